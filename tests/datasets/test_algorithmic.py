"""Algorithmic sets: the rule, the split, the seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowerbed.datasets.algorithmic import modular, parity
from flowerbed.datasets.dataset import Dataset
from flowerbed.errors import ConfigError


def rows(found: Dataset) -> list[tuple[tuple[int, ...], int]]:
    return [
        (tuple(x.int().tolist()), int(y))
        for split in (found.train, found.test)
        for x, y in zip(split.inputs, split.labels, strict=True)
    ]


@pytest.mark.parametrize("operation", ["add", "subtract", "product"])
def test_every_pair_is_there_once_with_its_result(operation: str) -> None:
    rule = {"add": lambda a, b: a + b, "subtract": lambda a, b: a - b, "product": lambda a, b: a * b}[
        operation
    ]
    found = modular(7, operation, 0.4)
    assert len(found.train) == round(0.4 * 49)
    seen = set()
    for bits, label in rows(found):
        assert sum(bits) == 2
        a, b = bits[:7].index(1), bits[7:].index(1)
        assert label == rule(a, b) % 7
        seen.add((a, b))
    assert len(seen) == 49
    assert torch.equal(found.prepare(found.train.inputs), found.train.inputs)


def test_parity_is_that_of_the_first_bits_over_distinct_vectors() -> None:
    found = parity(3, 9, 200, 0.5)
    assert (len(found.train), len(found.test)) == (100, 100)
    assert len({bits for bits, _ in rows(found)}) == 200
    assert all(label == sum(bits[:3]) % 2 for bits, label in rows(found))
    wide = parity().train
    assert wide.inputs.shape == (1000, 43)
    assert (wide.inputs.mean(0) - 0.5).abs().max() < 0.08
    assert abs(float(wide.labels.float().mean()) - 0.5) < 0.06


def test_the_seed_decides_the_split_and_nothing_else() -> None:
    one, same, other = (modular(7, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.train.inputs, same.train.inputs)
    assert not torch.equal(one.train.inputs, other.train.inputs)
    assert sorted(rows(one)) == sorted(rows(other))


@pytest.mark.parametrize(
    ("make", "options", "sentence"),
    [
        (modular, {"p": 1}, "dataset.p is 1"),
        (modular, {"operation": "divide"}, "dataset.operation is 'divide'"),
        (modular, {"p": 3, "train_share": 1.0}, "dataset.train_share is 1.0"),
        (parity, {"noise": 60}, "63; give at most 62 bits"),
        (parity, {"relevant": 2, "noise": 2, "samples": 9}, "dataset.samples is 9"),
        (parity, {"relevant": 0}, "dataset.relevant must be at least 1"),
    ],
)
def test_what_cannot_be_made_is_refused(make: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make(**options)
