"""Image sets at a fraction of their size, for comparisons that must fit a small machine."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.datasets.files import Found, Search
from flowerbed.datasets.images import image_statistics
from flowerbed.datasets.source import DataSource
from flowerbed.errors import ConfigError, require


@dataclass(frozen=True)
class Shrunk:
    """An image set whose images are means over ``by`` x ``by`` pixels, rounded to whole grey levels."""

    of: str = "fashion_mnist"
    """The image set."""
    by: int = 2
    """Sides are divided by this; it must divide them."""

    def __post_init__(self) -> None:
        require(self.by >= 1, f"dataset.by is {self.by}; give 1 (as it is) or more.")

    def locate(self, search: Search) -> Found:
        """Return the files of the underlying set."""
        return self._source().locate(replace(search, name=self.of))

    def read(self, found: Found) -> Dataset:
        """Decode them and shrink the images; raises ``ConfigError`` for what is no such images."""
        plain = self._source().read(found)
        shape = plain.input_shape
        if (
            plain.train.inputs.dtype != torch.uint8
            or len(shape) != 3
            or shape[1] % self.by
            or shape[2] % self.by
        ):
            raise ConfigError(
                f"dataset.of={self.of} has samples of shape {shape}, which cannot be shrunk by {self.by}; choose an "
                "image set, and a number that divides the sides of its images."
            )
        train, test = (
            Split(shrunk(split.inputs, self.by), split.labels, split.extras)
            for split in (plain.train, plain.test)
        )
        mean, std = image_statistics(train.inputs)
        return replace(plain, name="shrunk", train=train, test=test, mean=mean, std=std)

    def _source(self) -> DataSource:
        # Here, not above: the table of data sets may come to name this one.
        from flowerbed.datasets.sources import DATASETS

        source = DATASETS.get(self.of)()
        if isinstance(source, Dataset | Shrunk):
            raise ConfigError(f"dataset.of={self.of} cannot be shrunk; choose an image set by its own name.")
        return source


def shrunk(images: Tensor, by: int) -> Tensor:
    """Return uint8 images ``(N, C, H / by, W / by)``: means over squares, half grey levels up."""
    n, channels, height, width = images.shape
    squares = images.reshape(n, channels, height // by, by, width // by, by).long().sum((3, 5))
    return ((2 * squares + by * by) // (2 * by * by)).to(torch.uint8)
