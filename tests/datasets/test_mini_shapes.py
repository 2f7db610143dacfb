"""Mini-shapes: every combination once, the same in every run, drawn as described."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch

from flowerbed.datasets.mini_shapes import FACTORS, RADII, covered
from flowerbed.datasets.sources import load_dataset
from flowerbed.errors import ConfigError

MINI = "flowerbed.datasets.mini_shapes:MiniShapes"


def test_every_combination_occurs_once() -> None:
    data = load_dataset(MINI, side=8)
    factors = torch.cat([data.train.extras["factors"], data.test.extras["factors"]])
    assert len(factors) == 8 * 8 * 6 * 4 * 3 * 5
    assert len(torch.unique(factors, dim=0)) == len(factors)
    assert [int(column.max()) + 1 for column in factors.T] == list(FACTORS.values())
    assert len(torch.unique(torch.cat([data.train.inputs, data.test.inputs]), dim=0)) == len(factors)
    assert data.task == "measured"
    x = data.prepare(data.test.inputs)
    assert 0 <= float(x.min()) < float(x.max()) <= 1


def test_pixels_are_what_the_factors_say() -> None:
    data = load_dataset(MINI, side=32, test=50)
    for image, values in zip(data.test.inputs.numpy(), data.test.extras["factors"].tolist(), strict=True):
        floor, thing, wall, size, shape, x = values
        colours = {
            (0, 0): colorsys.hsv_to_rgb(wall / 6, 0.3, 0.95),
            (31, 0): colorsys.hsv_to_rgb(floor / 8, 0.55, 0.75),
            (16, round((0.26 + 0.12 * x) * 32)): colorsys.hsv_to_rgb(thing / 8, 0.95, 0.95),
        }
        for (row, column), colour in colours.items():
            np.testing.assert_allclose(image[:, row, column] / 255, colour, atol=0.003)
        # The corner of its bounding box is part of a square alone.
        half = RADII[size] * np.sqrt(np.pi) / 2 * 32 - 1
        corner = image[:, int(0.52 * 32 - half), int((0.26 + 0.12 * x) * 32 - half)]
        ours = np.allclose(corner / 255, colorsys.hsv_to_rgb(thing / 8, 0.95, 0.95), atol=0.003)
        assert not ours or shape == 0


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_shapes_of_a_size_have_equal_areas(kind: int) -> None:
    for radius in RADII:
        assert covered(kind, radius, 0.5, 64).mean() == pytest.approx(np.pi * radius**2, rel=0.02)


def test_a_factor_may_be_the_label() -> None:
    data = load_dataset(MINI, side=8, label="x", predicted=True)
    assert data.task == "classification"
    assert data.num_classes == 5
    assert torch.equal(data.train.labels, data.train.extras["factors"][:, 5])


@pytest.mark.parametrize("options", [{"side": 4}, {"test": 0}, {"test": 23_040}, {"label": "colour"}])
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"dataset.{next(iter(options))} is"):
        load_dataset(MINI, **options)
