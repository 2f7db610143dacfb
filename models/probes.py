"""How good embeddings are: what simple classifiers read from them, and how they fill their space."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def ridge_probe(z: Tensor, y: Tensor, tested: Tensor, labels: Tensor, penalty: float = 1e-3) -> float:
    """Return the accuracy on ``tested`` ``(M, d)`` of ridge regression from ``z`` ``(N, d)`` to one-hot labels ``y``.

    Columns are standardised with the statistics of ``z``; ``penalty`` is relative to the number of samples. Solved
    exactly, in float64.
    """
    z, tested = z.double(), tested.double()
    mean, spread = z.mean(0), z.std(0).clamp_min(1e-12)
    z, tested = (z - mean) / spread, (tested - mean) / spread
    targets = F.one_hot(y, int(y.max()) + 1).double()
    offset = targets.mean(0)
    gram = z.T @ z + penalty * len(z) * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    weights = torch.linalg.solve(gram, z.T @ (targets - offset))
    return float(((tested @ weights + offset).argmax(1) == labels).double().mean())


def nearest_neighbour_probe(
    z: Tensor, y: Tensor, tested: Tensor, labels: Tensor, k: int = 20, temperature: float = 0.1
) -> float:
    """Return the accuracy of the k most similar samples' vote, each weighing exp(cosine / ``temperature``)."""
    z, tested = F.normalize(z.double(), dim=1), F.normalize(tested.double(), dim=1)
    right = 0
    for rows, wanted in zip(torch.split(tested, 1024), torch.split(labels, 1024), strict=True):
        near = (rows @ z.T).topk(min(k, len(z)), 1)
        votes = torch.zeros(len(rows), int(y.max()) + 1, dtype=z.dtype, device=z.device)
        votes.scatter_add_(1, y[near.indices], (near.values / temperature).exp())
        right += int((votes.argmax(1) == wanted).sum())
    return right / len(labels)


def effective_rank(z: Tensor) -> float:
    """Return exp of the entropy of the singular values of the centred ``z`` ``(N, d)``, 1 to d; 0 if all vanish.

    Roy and Vetterli, EUSIPCO 2007.
    """
    sigma = torch.linalg.svdvals(z.double() - z.double().mean(0))
    total = sigma.sum()
    if not total > 1e-12:
        return 0.0
    shares = sigma / total
    return float(torch.special.entr(shares).sum().exp())


def spread(z: Tensor) -> float:
    """Return the mean standard deviation of a coordinate of unit vectors ``(N, d)``, times sqrt(d).

    About 1 for vectors that are uniform on the sphere, 0 if all are alike (collapse).
    """
    return float(z.double().std(0, unbiased=False).mean() * z.shape[1] ** 0.5)
