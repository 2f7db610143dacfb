"""Shrunk image sets: means of pixels by hand, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowerbed.datasets.shrunk import shrunk
from flowerbed.datasets.sources import load_dataset
from flowerbed.errors import ConfigError

SHRUNK = "flowerbed.datasets.shrunk:Shrunk"


def test_pixels_are_means_of_squares_by_hand() -> None:
    image = torch.tensor(
        [[[[0, 1, 255, 255], [1, 0, 255, 254], [10, 20, 0, 0], [30, 40, 0, 1]]]], dtype=torch.uint8
    )
    # Means 0.5, 254.75, 25 and 0.25; half a grey level goes up.
    assert shrunk(image, 2).tolist() == [[[[1, 255], [25, 0]]]]
    assert torch.equal(shrunk(image, 1), image)
    assert shrunk(image, 4).shape == (1, 1, 1, 1)


def test_a_set_keeps_everything_but_its_size() -> None:
    plain, small = load_dataset("digits"), load_dataset(SHRUNK, of="digits")
    assert small.input_shape == (1, 4, 4)
    assert torch.equal(small.train.labels, plain.train.labels)
    assert small.classes == plain.classes
    means = plain.test.inputs.numpy().reshape(-1, 1, 4, 2, 4, 2).mean((3, 5))
    assert np.array_equal(small.test.inputs.numpy(), np.floor(means + 0.5))
    prepared = small.prepare(small.train.inputs)
    assert abs(float(prepared.mean())) < 1e-4
    assert abs(float(prepared.std()) - 1) < 1e-4


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"of": "digits", "by": 3}, "cannot be shrunk by 3"),
        ({"of": "digits", "by": 0}, "dataset.by is 0"),
        ({"of": SHRUNK}, "cannot be shrunk"),
    ],
)
def test_what_cannot_be_shrunk_is_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_dataset(SHRUNK, **options)
