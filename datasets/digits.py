"""Handwritten digits, 8x8, bundled with scikit-learn: real data that needs no download."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.datasets.files import Found, Search
from flowerbed.datasets.images import image_statistics
from flowerbed.errors import DataError
from flowerbed.seeds import numpy_rng

_TRAIN = 1437


@dataclass(frozen=True)
class Digits:
    """1,797 grey images 1x8x8 in 10 classes (Alpaydin and Kaynak 1998, UCI; its test half).

    scikit-learn defines no split; ours is one fixed permutation (stream ``datasets.digits.split``, seed 0),
    whose first 1,437 samples are the train and whose last 360 are the test split. The 17 grey levels 0..16
    are stored as ``round(255 level / 16)``.
    """

    def locate(self, search: Search) -> Found:
        """Return no files: the data is part of scikit-learn."""
        return Found("scikit-learn")

    def read(self, found: Found) -> Dataset:
        """Return the data set; raises ``DataError`` if scikit-learn is not installed."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError(
                "The data set 'digits' is part of scikit-learn, which is not installed; "
                "install it with: pip install scikit-learn"
            ) from error
        levels, labels = load_digits(return_X_y=True)
        images = np.rint(levels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
        order = numpy_rng(0, "datasets.digits.split").permutation(len(images))
        parts = [
            Split(torch.from_numpy(images[rows]), torch.from_numpy(labels[rows].astype(np.int64)))
            for rows in (order[:_TRAIN], order[_TRAIN:])
        ]
        mean, std = image_statistics(parts[0].inputs)
        return Dataset(
            name="digits",
            train=parts[0],
            test=parts[1],
            classes=tuple("0123456789"),
            mean=mean,
            std=std,
        )
