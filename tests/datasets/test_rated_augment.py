"""Augmentations whose strengths are numbers of each sample."""

from __future__ import annotations

import colorsys

import pytest
import torch
from torch import Tensor

from flowerbed.datasets.augment import PIXELS, Scale
from flowerbed.datasets.rated_augment import STRENGTHS, jitter, pierced, turned
from flowerbed.errors import ConfigError


def images(count: int = 6, side: int = 12) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25


def test_strength_zero_changes_nothing() -> None:
    x = images()
    none = {name: torch.zeros(6) for name in STRENGTHS}
    torch.testing.assert_close(jitter(x, none, PIXELS), x)
    scale = Scale((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    torch.testing.assert_close(jitter(scale.values(x), none, scale), scale.values(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [s for s in STRENGTHS if s not in ("holes", "length")])
def test_each_sample_has_its_own_strength(name: str) -> None:
    x, strength = images(), torch.tensor([0.0, 0.3] * 3)
    torch.manual_seed(0)
    found = jitter(x, {name: strength}, PIXELS)
    changed = (found - x).abs().flatten(1).amax(1) > 1e-4
    assert changed.tolist() == [False, True] * 3


def test_scaling_is_a_factor_within_its_bounds() -> None:
    x = torch.ones(4000, 3, 1, 1) * 0.5
    torch.manual_seed(0)
    factors = (jitter(x, {"scaling": torch.full((4000,), 0.3)}, PIXELS) / x)[:, 0, 0, 0]
    assert 0.7 <= float(factors.min()) < 0.71
    assert 1.29 < float(factors.max()) <= 1.3001
    assert float(factors.mean()) == pytest.approx(1.0, abs=0.01)


def test_a_turned_hue_keeps_grey_and_the_sum_and_a_third_of_a_turn_swaps_channels() -> None:
    x = images()
    found = turned(x, torch.full((6,), 1 / 3))
    torch.testing.assert_close(found, x[:, [2, 0, 1]])
    grey = torch.full((1, 3, 2, 2), 0.4)
    torch.testing.assert_close(turned(grey, torch.tensor([0.2])), grey)
    some = turned(x, torch.full((6,), 0.05))
    torch.testing.assert_close(some.sum(1), x.sum(1))
    before, after = colorsys.rgb_to_hsv(0.6, 0.4, 0.4)[0], 0.05
    pixel = torch.tensor([0.6, 0.4, 0.4]).view(1, 3, 1, 1)
    red, green, blue = turned(pixel, torch.tensor([after])).flatten().tolist()
    assert before == 0.0
    assert colorsys.rgb_to_hsv(red, green, blue)[0] == pytest.approx(after, abs=0.02)


def test_holes_have_their_number_and_size() -> None:
    torch.manual_seed(0)
    x = torch.ones(300, 1, 40, 40)
    holes = torch.tensor([0.0, 1.9, 3.0] * 100)
    grey = (pierced(x, holes, torch.full((300,), 4.7))[:, 0] == 0.5).sum((1, 2)).view(100, 3)
    assert (grey[:, 0] == 0).all()
    # One square of 4 by 4, less at the edges; three of them may overlap.
    assert int(grey[:, 1].max()) == 16
    assert float(grey[:, 1].float().mean()) > 14
    assert int(grey[:, 2].max()) == 48
    assert float(grey[:, 2].float().mean()) > 38


def test_holes_without_a_length_are_refused() -> None:
    with pytest.raises(ConfigError, match="length"):
        jitter(images(), {"holes": torch.ones(6)}, PIXELS)
