"""Views for self-supervised learning, against a slow twin, and what they must leave alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowerbed.datasets.augment import AUGMENTATIONS, Scale
from flowerbed.datasets.sources import load_dataset
from flowerbed.datasets.views import relit, resized_crops, ssl_view
from flowerbed.errors import ConfigError


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ramps(count: int, side: int = 12) -> Tensor:
    """Return images whose two channels are the column's and the row's place, -1 to 1: a view shows where it looks."""
    at = (torch.arange(side) + 0.5) / side * 2 - 1
    return torch.stack([at.expand(side, side), at[:, None].expand(side, side)]).repeat(count, 1, 1, 1)


def test_a_crop_is_where_its_draws_say() -> None:
    count, side = 40, 12
    seen = resized_crops(ramps(count, side), rng(3), 0.3)
    u = torch.rand(5, count, generator=rng(3))
    for k in range(count):
        share, aspect = 0.3 + 0.7 * u[0, k], math.exp((2 * u[1, k] - 1) * math.log(4 / 3))
        tall, wide = min(1.0, math.sqrt(share / aspect)), min(1.0, math.sqrt(share * aspect))
        middle = (2 * u[3, k] - 1) * (1 - wide), (2 * u[2, k] - 1) * (1 - tall)
        at = ramps(1, side)[0, 0, 0]
        columns = middle[0] + (-wide if u[4, k] < 0.5 else wide) * at
        rows = middle[1] + tall * at
        # Half a pixel from the edge bilinear values have nothing to lean on.
        inner = 1 - 1 / side
        expected = (
            columns.clamp(-inner, inner).expand(side, side),
            rows.clamp(-inner, inner)[:, None].expand(side, side),
        )
        torch.testing.assert_close(seen[k, 0], expected[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(seen[k, 1], expected[1], atol=1e-5, rtol=0)


def test_the_whole_image_unmirrored_is_the_image() -> None:
    images = torch.rand(5, 3, 9, 9, generator=rng())
    seen = resized_crops(images, rng(), 1.0, flip=False)
    # Of full area, yet of another aspect: the longer side is the image's, the shorter one is cut.
    assert seen.shape == images.shape
    unlit = relit(images, rng(), 0.0)
    torch.testing.assert_close(unlit, images)


def test_light_scales_mean_and_contrast() -> None:
    images = 0.4 + 0.1 * torch.rand(50, 1, 8, 8, generator=rng())
    lit = relit(images, rng(1), 0.3)
    bright, contrast = 1 + 0.3 * (2 * torch.rand(2, 50, generator=rng(1)) - 1)
    torch.testing.assert_close(lit.mean((1, 2, 3)), images.mean((1, 2, 3)) * bright)
    torch.testing.assert_close(lit.std((1, 2, 3)), images.std((1, 2, 3)) * bright * contrast)


def test_views_repeat_stay_in_range_and_know_the_scale() -> None:
    scale = Scale((0.3,), (0.2,))
    pixels = torch.rand(6, 1, 16, 16, generator=rng())
    view = AUGMENTATIONS.get("ssl")
    assert view is ssl_view
    one, other = (view(scale.values(pixels), rng(5), scale=scale) for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one, view(scale.values(pixels), rng(6), scale=scale))
    seen = scale.pixels(one)
    assert 0 <= float(seen.min()) < float(seen.max()) <= 1
    torch.testing.assert_close(seen, view(pixels, rng(5)), atol=1e-5, rtol=0)


def test_no_images_are_refused() -> None:
    for x in (torch.rand(3, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ConfigError, match="float images"):
            ssl_view(x, rng())


def test_a_set_without_its_task() -> None:
    name = "flowerbed.datasets.unlabelled:Unlabelled"
    plain, bare = load_dataset("digits"), load_dataset(name, of="digits")
    assert bare.task == "measured"
    assert torch.equal(bare.train.inputs, plain.train.inputs)
    assert torch.equal(bare.test.labels, plain.test.labels)
    with pytest.raises(ConfigError, match="dataset.of"):
        load_dataset(name, of=name)
