"""Splits exchanged: nothing is lost, nothing is in both, negatives are negatives."""

from __future__ import annotations

import pytest
import torch

from flowerbed.datasets.digits import Digits
from flowerbed.datasets.files import Found
from flowerbed.datasets.swapped import Swapped
from flowerbed.errors import ConfigError

FOUND = Found("scikit-learn")


def test_the_splits_change_places() -> None:
    plain, swapped = Digits().read(FOUND), Swapped("digits").read(FOUND)
    assert torch.equal(swapped.train.inputs, plain.test.inputs)
    assert torch.equal(swapped.train.labels, plain.test.labels)
    assert torch.equal(swapped.test.inputs, plain.train.inputs)
    assert (swapped.mean, swapped.std) == (plain.mean, plain.std)


def test_negatives_add_up_to_white() -> None:
    plain, negative = Swapped("digits").read(FOUND), Swapped("digits", inverted=True).read(FOUND)
    for a, b in ((plain.train, negative.train), (plain.test, negative.test)):
        assert bool((a.inputs.int() + b.inputs.int() == 255).all())
        assert torch.equal(a.labels, b.labels)


def test_what_cannot_be_swapped_is_refused() -> None:
    with pytest.raises(ConfigError, match="by its own name"):
        Swapped("flowerbed.datasets.swapped:Swapped").read(FOUND)
