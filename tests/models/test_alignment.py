"""Rotations between clouds of points, against known ones and against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes

from flowerbed.models.alignment import centred, residual, rotation


def clouds(dim: int, count: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(dim)
    a = centred(torch.randn(count, dim, generator=rng))
    q, _ = torch.linalg.qr(torch.randn(dim, dim, generator=rng))
    if torch.linalg.det(q) < 0:
        q[:, 0] = -q[:, 0]
    return a, q


@pytest.mark.parametrize("dim", [2, 3, 8, 33])
def test_a_known_rotation_is_recovered(dim: int) -> None:
    a, known = clouds(dim)
    found = rotation(a, a @ known.T)
    torch.testing.assert_close(found, known, rtol=0, atol=1e-4)
    torch.testing.assert_close(a @ found.T, a @ known.T, rtol=0, atol=1e-4)


def test_it_is_proper_where_a_reflection_would_be_nearer() -> None:
    a, known = clouds(3)
    mirrored = a * torch.tensor([1.0, 1.0, -1.0])
    found = rotation(a, mirrored)
    assert float(torch.linalg.det(found)) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(found @ found.T, torch.eye(3), rtol=0, atol=1e-5)
    # No other proper rotation is nearer: small turns about every axis, and a known one, are worse.
    best = float(residual(a @ found.T, mirrored))
    for axis in range(3):
        for angle in (-0.1, 0.1):
            turn = torch.zeros(3, 3)
            i, j = [k for k in range(3) if k != axis]
            turn[i, j], turn[j, i] = -angle, angle
            other = torch.linalg.matrix_exp(turn) @ found
            assert float(residual(a @ other.T, mirrored)) > best
    assert float(residual(a @ known.T, mirrored)) > best


def test_it_agrees_with_procrustes_where_that_needs_no_reflection() -> None:
    a, known = clouds(6)
    b = centred(a @ known.T + 0.3 * torch.randn(50, 6, generator=torch.Generator().manual_seed(1)))
    other, _ = orthogonal_procrustes(a.numpy(), b.numpy())
    assert np.linalg.det(other) > 0
    torch.testing.assert_close(rotation(a, b).T, torch.from_numpy(other), rtol=0, atol=1e-4)


def test_fewer_points_than_dimensions_still_give_a_proper_rotation() -> None:
    a, known = clouds(20, 8)
    found = rotation(a, a @ known.T)
    assert float(torch.linalg.det(found)) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(a @ found.T, a @ known.T, rtol=0, atol=1e-4)
