"""Rotations that bring one cloud of points onto another."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def rotation(a: Tensor, b: Tensor) -> Tensor:
    """Return the proper rotation R ``(D, D)`` for which ``a @ R.T`` is nearest to ``b``, both ``(N, D)`` and centred.

    Kabsch 1976: with the singular value decomposition a^T b = U S V^T, R = V U^T, where the last column of V changes
    its sign if R were a reflection. Computed in float64.
    """
    u, _, vt = torch.linalg.svd(a.double().T @ b.double())
    v = vt.T.clone()
    if torch.linalg.det(v @ u.T) < 0:
        v[:, -1] = -v[:, -1]
    found: Tensor = (v @ u.T).to(a.dtype)
    return found


def centred(points: Tensor) -> Tensor:
    """Return points ``(N, D)`` minus their mean."""
    return points - points.mean(0)


def residual(a: Tensor, b: Tensor) -> Tensor:
    """Return the Frobenius norm of ``a - b``, a scalar."""
    return (a - b).square().sum().sqrt()
