"""How generated images are judged: denoising error, and the Frechet distance of features."""

from __future__ import annotations

import torch
from torch import Tensor

from flowerbed import seeds
from flowerbed.errors import ConfigError
from flowerbed.experiments.measures import Measured
from flowerbed.models.diffusion import DiffusionPrior, denoising_loss


@torch.no_grad()
def denoising(measured: Measured) -> dict[str, float]:
    """Return the error of the predicted noise on the test set, by label and without: 1 is knowing nothing.

    Times and noise are the same for all models, four draws for each image.
    """
    prior, split = measured.model, measured.dataset.test
    if not isinstance(prior, DiffusionPrior):
        raise ConfigError(
            f"{type(prior).__name__} predicts no noise; choose one of flowerbed.models.diffusion."
        )
    x = torch.cat(list(measured.batches(split)))
    labels = split.labels.to(x.device)
    found = {}
    for name, told in (("denoising", labels), ("denoising-unlabelled", prior.unlabelled(x))):
        total = 0.0
        for draw in range(4):
            generator = seeds.torch_rng(0, "denoising measure", draw, device=x.device.type)
            total += float(denoising_loss(prior, prior.schedule, x, told, generator))
        found[name] = total / 4
    return found


def frechet(one: Tensor, other: Tensor) -> float:
    """Return |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)) of features ``(N, D)`` and ``(M, D)``, in float64.

    Heusel et al., NeurIPS 2017, eq. 6, with whatever features are given. Biased upwards by few samples.
    """
    (mean_1, cov_1), (mean_2, cov_2) = _moments(one), _moments(other)
    values, vectors = torch.linalg.eigh(cov_1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # C_1 C_2 has the eigenvalues of the symmetric C_1^(1/2) C_2 C_1^(1/2).
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    distance = ((mean_1 - mean_2) ** 2).sum() + cov_1.trace() + cov_2.trace() - 2 * cross
    return max(0.0, float(distance))


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and covariance (over N - 1)."""
    features = features.double()
    return features.mean(0), features.T.cov()
