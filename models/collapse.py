"""Neural collapse, measured: how far features and classifier are from one point a class in a given frame.

The measures of Papyan, Han and Donoho (PNAS 2020) in the form of Dang et al. (ICML 2023). All are in float64 and take
features as rows, ``(N, D)``, with their labels ``(N,)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-9
"""Directions of the between-class covariance below this share of the largest one do not count."""


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the mean feature of every class, ``(K, D)``; zero for a class without samples."""
    sums = torch.zeros(classes, features.shape[1], dtype=torch.float64)
    sums.index_add_(0, labels, features.double())
    return sums / labels.bincount(minlength=classes).clamp(min=1).double()[:, None]


def variability(features: Tensor, labels: Tensor, classes: int) -> float:
    """Return NC1 = tr(S_W pinv(S_B)) / K; S_W averages over samples, S_B over classes, around the mean of the means."""
    means = class_means(features, labels, classes)
    within = features.double() - means[labels]
    between = means - means.mean(0)
    _, sizes, directions = torch.linalg.svd(between, full_matrices=False)
    kept = sizes**2 > RANK_TOLERANCE * sizes.max() ** 2
    along = within @ directions[kept].T
    spread = (along**2).mean(0)
    return float((spread * classes / sizes[kept] ** 2).sum()) / classes


def distance(found: Tensor, target: Tensor) -> float:
    """Return || A / ||A||_F - B / ||B||_F ||_F, between 0 and 2; zero matrices stay zero."""
    found, target = found.double(), target.double()
    tiny = torch.finfo(torch.float64).tiny
    return float((found / found.norm().clamp(min=tiny) - target / target.norm().clamp(min=tiny)).norm())


def equiangular(classes: int) -> Tensor:
    """Return the Gram matrix of a simplex equiangular tight frame up to scale, I - 11^T / K."""
    return torch.eye(classes, dtype=torch.float64) - 1 / classes
