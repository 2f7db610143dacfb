"""Fitness of a prior: the range test against least squares, null scores and variety by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowerbed.datasets.augment import PIXELS
from flowerbed.experiments.leakage import fitness
from flowerbed.experiments.leakage.scoring import Pool, psnr
from flowerbed.strategies.attacks.generative import Prior

SHAPE = (1, 4, 4)


class LinearGenerator:
    """h_1 = z A, image = 1/2 + h_1: what z reaches is a plane, what h_1 reaches is everything."""

    layers = 2
    latent = (3,)

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(1)
        self.a = torch.linalg.qr(torch.randn(16, 3, generator=rng))[0].T

    def condition(self, labels: Tensor) -> Tensor:
        return labels.float()[:, None]

    def part(self, h: Tensor, condition: Tensor, first: int, last: int) -> Tensor:
        if first == 0 and last > 0:
            h = h @ self.a
        return 0.5 + h.view(-1, 1, 4, 4) if last == 2 else h


@pytest.fixture(scope="module")
def prior() -> Prior:
    return Prior(LinearGenerator(), SHAPE, PIXELS)


def images() -> Tensor:
    return 0.5 + 0.1 * torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(2)).clamp(-3, 3)


def test_the_code_reaches_the_least_squares_fit_and_the_feature_map_everything(prior: Prior) -> None:
    x, a = images(), prior.generator.a  # type: ignore[attr-defined]
    flat = x.flatten(1) - 0.5
    nearest = (0.5 + flat @ a.T @ a).view_as(x)
    found = fitness.reach(prior, x, torch.zeros(6, dtype=torch.int64), steps=300)
    assert found.shape == (2, 6)
    torch.testing.assert_close(found[0], psnr(nearest, x), atol=0.05, rtol=0)
    assert float(found[1].min()) > float(found[0].max()) + 10


def test_a_small_ball_keeps_the_feature_map_near(prior: Prior) -> None:
    x, y = images(), torch.zeros(6, dtype=torch.int64)
    free, bound, none = (fitness.reach(prior, x, y, steps=100, radii=r) for r in ((), (0.4,), (1e-9,)))
    assert torch.equal(free[0], bound[0])
    assert bool((bound[1] < free[1]).all())
    assert bool((bound[1] > none[1]).all())
    torch.testing.assert_close(none[1], none[0], atol=1e-3, rtol=0)


def test_null_scores_by_hand() -> None:
    """The class mean of 0 and 1 is 0.5, 0.3 from 0.2; the nearest of them is 0, 0.2 from it."""
    pool = Pool(
        torch.tensor([0.0, 1.0, 0.2]).view(3, 1, 1, 1).expand(3, *SHAPE),
        torch.tensor([0, 0, 1]),
        torch.arange(3),
    )
    x = torch.full((1, *SHAPE), 0.2)
    found = fitness.null_scores(x, torch.tensor([0]), pool)
    assert float(found["class mean"]) == pytest.approx(-20 * torch.tensor(0.3).log10().item(), abs=1e-4)
    assert float(found["nearest image"]) == pytest.approx(-20 * torch.tensor(0.2).log10().item(), abs=1e-4)


def test_variety_by_hand() -> None:
    """0 and 1 at every pixel deviate by 1/2; copies do not deviate at all."""
    two = torch.stack([torch.zeros(SHAPE), torch.ones(SHAPE)])
    assert fitness.variety(two) == 0.5
    assert fitness.variety(two[:1].expand(5, *SHAPE)) == 0


def test_the_best_sample_is_the_nearest_of_those_drawn(prior: Prior) -> None:
    x, y = images(), torch.tensor([0, 1, 2, 0, 1, 2])
    best = fitness.best_sample(prior, x, y, 20, seed=4)
    for place in range(6):
        drawn = fitness.samples(prior, int(y[place]), 20, seed=4)
        apart = [float(psnr(one[None], x[place : place + 1])) for one in drawn]
        assert float(best[place]) == pytest.approx(max(apart))
    assert bool((fitness.best_sample(prior, x, y, 200, seed=4) >= best).all())
