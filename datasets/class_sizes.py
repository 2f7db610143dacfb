"""Data sets with a given number of training samples in every class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.datasets.files import Found, Search
from flowerbed.datasets.source import DataSource
from flowerbed.errors import ConfigError, require
from flowerbed.seeds import numpy_rng


def numbered(sizes: Sequence[int] = (100, 100, 100, 100)) -> Dataset:
    """Return samples that are nothing but their number, ``sizes[k]`` of class k: for features that are parameters.

    Inputs are int64 ``(N, 1)``; the test split is the training split.
    """
    require(
        len(sizes) >= 2 and min(sizes) >= 1, f"dataset.sizes is {list(sizes)}; give one number per class."
    )
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(list(sizes)))
    split = Split(torch.arange(len(labels))[:, None], labels)
    return Dataset("numbered", split, split, tuple(map(str, range(len(sizes)))), (0.0,), (1.0,))


@dataclass(frozen=True)
class ClassSizes:
    """Another set with ``sizes[k]`` random training samples of class k; its test split is left as it is."""

    sizes: tuple[int, ...]
    of: str = "fashion_mnist"
    """The other set."""
    seed: int = 0
    """Decides which samples are kept."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))

    def locate(self, search: Search) -> Found:
        """Return the files of the other set."""
        return self._source().locate(replace(search, name=self.of))

    def read(self, found: Found) -> Dataset:
        """Decode them and choose; raises ``ConfigError`` if a class has too few samples."""
        whole = self._source().read(found)
        have = torch.bincount(whole.train.labels, minlength=whole.num_classes).tolist()
        require(
            len(self.sizes) == len(have) and all(0 < n <= h for n, h in zip(self.sizes, have, strict=True)),
            f"dataset.sizes is {list(self.sizes)}; give {len(have)} numbers, above 0 and at most {have}.",
        )
        rng = numpy_rng(self.seed, "datasets.class_sizes")
        labels = whole.train.labels.numpy()
        rows = np.sort(
            np.concatenate(
                [rng.permutation(np.flatnonzero(labels == k))[:n] for k, n in enumerate(self.sizes)]
            )
        )
        train = Split(
            whole.train.inputs[rows],
            whole.train.labels[rows],
            {name: values[rows] for name, values in whole.train.extras.items()},
        )
        return replace(whole, name="class_sizes", train=train)

    def _source(self) -> DataSource:
        # Here, not above: the table of data sets may name this one.
        from flowerbed.datasets.sources import DATASETS

        source = DATASETS.get(self.of)()
        if isinstance(source, Dataset | ClassSizes):
            raise ConfigError(f"dataset.of={self.of} is no stored set; choose one by its own name.")
        return source
