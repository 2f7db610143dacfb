"""Images prepared to lie in [-1, 1]."""

from __future__ import annotations

import pytest
import torch

from flowerbed.datasets.sources import load_dataset
from flowerbed.errors import ConfigError

SYMMETRIC = "flowerbed.datasets.symmetric:Symmetric"


def test_it_is_the_other_set_in_another_range() -> None:
    plain, found = load_dataset("digits"), load_dataset(SYMMETRIC, of="digits")
    assert torch.equal(found.train.inputs, plain.train.inputs)
    assert torch.equal(found.test.labels, plain.test.labels)
    x = found.prepare(found.train.inputs)
    assert (float(x.min()), float(x.max())) == (-1, 1)
    assert (found.task, load_dataset(SYMMETRIC, task="classification").task) == ("measured", "classification")


def test_what_has_no_images_is_refused() -> None:
    with pytest.raises(ConfigError, match="dataset.task is 'guess'"):
        load_dataset(SYMMETRIC, task="guess")
