"""An image set with its splits exchanged: clients hold what a public model of the training images has never seen."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.datasets.files import Found, Search
from flowerbed.datasets.source import DataSource
from flowerbed.errors import ConfigError


@dataclass(frozen=True)
class Swapped:
    """Another set whose training split is its test split, and the other way round; statistics stay as they are."""

    of: str = "fashion_mnist"
    """The data set."""
    inverted: bool = False
    """Whether all images are negatives, which no model of the plain ones has seen."""

    def locate(self, search: Search) -> Found:
        """Return the files of the underlying set."""
        return self._source().locate(replace(search, name=self.of))

    def read(self, found: Found) -> Dataset:
        """Decode them and exchange the splits; raises ``ConfigError`` for negatives of what is no bytes."""
        plain = self._source().read(found)
        train, test = plain.test, plain.train
        if self.inverted:
            train, test = _negative(train, self.of), _negative(test, self.of)
        return replace(plain, name=f"swapped {plain.name}", train=train, test=test)

    def _source(self) -> DataSource:
        # Here, not above: the table of data sets may come to name this one.
        from flowerbed.datasets.sources import DATASETS

        source = DATASETS.get(self.of)()
        if isinstance(source, Dataset | Swapped):
            raise ConfigError(
                f"dataset.of={self.of} cannot be swapped; choose a data set that has both splits by its own name."
            )
        return source


def _negative(split: Split, name: str) -> Split:
    if split.inputs.dtype != torch.uint8:
        raise ConfigError(f"dataset.of={name} has no images of bytes, whose negatives could be taken.")
    return replace(split, inputs=255 - split.inputs)
