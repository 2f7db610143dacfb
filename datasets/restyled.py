"""Four domains made of one image set, for methods that need domains where no such set is at hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.datasets.files import Found, Search
from flowerbed.datasets.images import image_statistics
from flowerbed.datasets.source import DataSource
from flowerbed.errors import ConfigError
from flowerbed.seeds import numpy_rng

DOMAINS = ("plain", "inverted", "rotated", "blurred")
NOISE = 0.1
"""Standard deviation of the blurred domain's noise, for pixels in [0, 1]."""


@dataclass(frozen=True)
class Restyled:
    """An image set in four styles: plain, inverted, rotated by 90 degrees, and blurred (3x3 mean) with noise.

    Every image belongs to one domain, drawn at random with equal sizes, so that no image is seen in two styles. The
    result is the same in every run.
    """

    of: str = "fashion_mnist"
    """The image set."""

    def locate(self, search: Search) -> Found:
        """Return the files of the underlying set."""
        return self._source().locate(replace(search, name=self.of))

    def read(self, found: Found) -> Dataset:
        """Decode them and restyle the images; raises ``ConfigError`` for what is not square images."""
        plain = self._source().read(found)
        shape = plain.input_shape
        if plain.train.inputs.dtype != torch.uint8 or len(shape) != 3 or shape[1] != shape[2]:
            raise ConfigError(
                f"dataset.of={self.of} has no square images to restyle; choose another image set."
            )
        train, test = _restyled(plain.train, "train"), _restyled(plain.test, "test")
        mean, std = image_statistics(train.inputs)
        return Dataset("restyled", train, test, plain.classes, mean, std, DOMAINS)

    def _source(self) -> DataSource:
        # Here, not above: the table of data sets names this one.
        from flowerbed.datasets.sources import DATASETS

        source = DATASETS.get(self.of)()
        if isinstance(source, Dataset | Restyled):
            raise ConfigError(
                f"dataset.of={self.of} cannot be restyled; choose an image set by its own name."
            )
        return source


def _restyled(split: Split, name: str) -> Split:
    domain = torch.from_numpy(
        numpy_rng(0, f"datasets.restyled.{name}").permutation(len(split)) % len(DOMAINS)
    )
    images = split.inputs.clone()
    images[domain == 1] = 255 - images[domain == 1]
    images[domain == 2] = torch.rot90(images[domain == 2], 1, (2, 3))
    images[domain == 3] = _blurred(images[domain == 3], name)
    return Split(images, split.labels, {**split.extras, "domain": domain})


def _blurred(images: Tensor, name: str) -> Tensor:
    """Return the 3x3 mean of uint8 images, the border repeated, plus noise, rounded and clipped."""
    mean = F.avg_pool2d(F.pad(images.double(), (1, 1, 1, 1), mode="replicate"), 3, 1)
    noise = numpy_rng(0, f"datasets.restyled.noise.{name}").standard_normal(tuple(images.shape))
    noisy: Tensor = (mean + torch.from_numpy(np.asarray(noise)) * (NOISE * 255)).round().clamp(0, 255)
    return noisy.to(torch.uint8)
