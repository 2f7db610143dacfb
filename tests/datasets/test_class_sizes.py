"""Sets with given class sizes."""

from __future__ import annotations

import pytest
import torch

from flowerbed.datasets.class_sizes import ClassSizes, numbered
from flowerbed.datasets.sources import load_dataset
from flowerbed.errors import ConfigError

NAME = "flowerbed.datasets.class_sizes:ClassSizes"
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)


def test_every_class_has_its_size_and_the_test_split_stays() -> None:
    found, whole = load_dataset(NAME, sizes=SIZES, of="digits"), load_dataset("digits")
    assert torch.bincount(found.train.labels).tolist() == list(SIZES)
    assert torch.equal(found.test.inputs, whole.test.inputs)
    rows = {
        tuple(x.flatten().tolist()): int(y)
        for x, y in zip(whole.train.inputs, whole.train.labels, strict=True)
    }
    for x, y in zip(found.train.inputs, found.train.labels, strict=True):
        assert rows[tuple(x.flatten().tolist())] == int(y)


def test_the_seed_decides_which() -> None:
    one, same, other = (load_dataset(NAME, sizes=SIZES, of="digits", seed=s).train.inputs for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("sizes", [(1, 2), (0, *SIZES[1:]), (999, *SIZES[1:])])
def test_sizes_that_do_not_fit_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="dataset.sizes is"):
        load_dataset(NAME, sizes=sizes, of="digits")


def test_a_set_that_is_not_stored_is_refused() -> None:
    with pytest.raises(ConfigError, match="by its own name"):
        ClassSizes(SIZES, of=NAME.replace("ClassSizes", "numbered"))._source()


def test_numbered_samples_are_their_numbers() -> None:
    found = numbered((2, 3))
    assert found.train.inputs.tolist() == [[0], [1], [2], [3], [4]]
    assert found.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert torch.equal(found.prepare(found.train.inputs), found.train.inputs)
    with pytest.raises(ConfigError, match="dataset.sizes is"):
        numbered((2, 0))
