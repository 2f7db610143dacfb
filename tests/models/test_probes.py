"""Probes against scikit-learn, and ranks of clouds whose spectrum is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier

from flowerbed.models.probes import effective_rank, nearest_neighbour_probe, ridge_probe, spread


def clusters(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=rng)
    centres = torch.tensor([[2.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 2.0, 0]])
    return centres[y] + torch.randn(n, 4, generator=rng) * torch.tensor([1, 1, 1, 9.0]) + 5, y


def test_ridge_is_scikit_learns() -> None:
    (z, y), (tested, labels) = clusters(300, 0), clusters(200, 1)
    mean, sd = z.mean(0), z.std(0)
    model = Ridge(alpha=0.05 * 300).fit(((z - mean) / sd).numpy(), np.eye(3)[y.numpy()])
    expected = (model.predict(((tested - mean) / sd).numpy()).argmax(1) == labels.numpy()).mean()
    assert ridge_probe(z, y, tested, labels, 0.05) == pytest.approx(float(expected))
    assert 0.6 < expected < 1


def test_neighbours_are_scikit_learns() -> None:
    (z, y), (tested, labels) = clusters(300, 0), clusters(200, 1)

    def unit(x: torch.Tensor) -> np.ndarray:
        return (x / x.norm(dim=1, keepdim=True)).double().numpy()

    model = KNeighborsClassifier(7, weights=lambda d: np.exp((1 - d**2 / 2) / 0.1)).fit(unit(z), y.numpy())
    expected = (model.predict(unit(tested)) == labels.numpy()).mean()
    assert nearest_neighbour_probe(z, y, tested, labels, 7) == pytest.approx(float(expected), abs=0.006)


def test_the_effective_rank_of_known_spectra() -> None:
    rng = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(50, 4, generator=rng, dtype=torch.float64) - 0.0).Q
    left = torch.linalg.qr(left - left.mean(0)).Q
    right = torch.linalg.qr(torch.randn(4, 4, generator=rng, dtype=torch.float64)).Q
    for sigma, expected in (([1.0] * 4, 4), ([1.0, 1, 0, 0], 2), ([3.0, 1, 0, 0], math.exp(0.562335))):
        z = left @ torch.diag(torch.tensor(sigma, dtype=torch.float64)) @ right + 7
        assert effective_rank(z) == pytest.approx(expected, rel=1e-5)
    assert effective_rank(torch.ones(5, 3)) == 0.0


def test_spread_is_one_on_the_sphere_and_zero_in_a_point() -> None:
    z = torch.nn.functional.normalize(
        torch.randn(20_000, 16, generator=torch.Generator().manual_seed(0)), dim=1
    )
    assert spread(z) == pytest.approx(1, abs=0.01)
    assert spread(z[:1].repeat(10, 1)) == pytest.approx(0, abs=1e-6)
