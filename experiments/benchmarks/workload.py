"""The work that everybody does: 1,000 users with 50 CIFAR-10 images each, 50 users a round, 5 steps of SGD.

This is the workload of pfl-research's own benchmark (Granqvist et al. 2024, arXiv 2404.06430): IID users, one
local epoch, batch 10, learning rate 0.1, the mean of the models as the next one, no augmentation, no
evaluation. What a model sees:

- ``grey``: the rounded mean of the three colours, the middle 28x28 of 32x32 pixels; 784 numbers for the
  linear model and the MLP, 1x28x28 for the CNN of McMahan and LEAF, as these were made for.
- ``colour``: 3x32x32.

Both as float32, normalised per channel by the mean and standard deviation of all training pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flowerbed.errors import require

CLASSES = 10
CROP = slice(2, 30)
SHAPES = {"grey": (1, 28, 28), "colour": (3, 32, 32)}
Images = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class RaceModel:
    """A model of the race: what flowerbed calls it, what it sees, and the parameters that all must count."""

    name: str
    title: str
    view: str
    parameters: int
    options: Mapping[str, Any] = field(default_factory=dict)


MODELS = {
    model.name: model
    for model in (
        RaceModel("linear", "logistic regression, 784-10", "grey", 7_850),
        RaceModel("mlp", "MLP, 784-200-10", "grey", 159_010),
        RaceModel("leaf_cnn", "CNN of McMahan 2017 and LEAF", "grey", 1_663_370),
        RaceModel("pfl_cnn", "CNN of Reddi 2021 and pfl", "colour", 1_626_442),
        RaceModel("resnet8", "ResNet-8 with group norm", "colour", 75_290, {"norm": "gn"}),
    )
}


@dataclass(frozen=True)
class Work:
    """The sizes of the workload; a smoke run makes them smaller."""

    users: int = 1000
    samples: int = 50
    """Images of each user."""
    cohort: int = 50
    batch: int = 10
    lr: float = 0.1

    def __post_init__(self) -> None:
        require(
            1 <= self.cohort <= self.users,
            f"A cohort of {self.cohort} out of {self.users} users is impossible; give 1 to {self.users}.",
        )
        require(
            self.samples % self.batch == 0,
            f"{self.samples} samples are no whole number of batches of {self.batch}; change one of the two.",
        )

    @property
    def steps(self) -> int:
        """Client steps of one round."""
        return self.cohort * self.samples // self.batch


def grey(images: Images) -> Images:
    """Return ``(N, 3, 32, 32)`` as ``(N, 1, 28, 28)``; see above."""
    cropped = images[:, :, CROP, CROP]
    mean: Images = np.rint(cropped.mean(axis=1, keepdims=True, dtype=np.float32)).astype(np.uint8)
    return mean


def synthetic(samples: int, seed: int = 0) -> tuple[Images, npt.NDArray[np.int64]]:
    """Return noise of the shape of CIFAR-10; the arithmetic of a round does not depend on what is in it."""
    rng = np.random.Generator(np.random.PCG64(seed))
    images = rng.integers(0, 256, (samples, *SHAPES["colour"]), dtype=np.uint8)
    return images, rng.integers(0, CLASSES, samples)


def prepare(folder: Path, work: Work, source: str, data_dir: str | None = None) -> None:
    """Write the workload into ``folder``: for each view an ``.npz`` for flowerbed and arrays by user for the rest.

    ``VIEW-inputs.npy`` is float32 ``(users, samples, C, H, W)``, to be mapped so that the contestants share it;
    ``labels.npy`` is int64 ``(users, samples)``. ``source`` is ``cifar10`` or ``synthetic``. Raises
    ``ConfigError`` if there are not enough images, ``DataError`` if there are none.
    """
    needed = work.users * work.samples
    if source == "synthetic":
        images, labels = synthetic(needed)
        test, test_labels = synthetic(CLASSES * 10, seed=1)
    else:
        from flowerbed.datasets.sources import load_dataset

        data = load_dataset(source, data_dir=data_dir)
        images, labels = data.train.inputs.numpy(), data.train.labels.numpy()
        test, test_labels = data.test.inputs.numpy(), data.test.labels.numpy()
    require(
        len(labels) >= needed,
        f"{work.users} users with {work.samples} images need {needed}; {source} has {len(labels)}.",
    )
    images, labels = images[:needed], labels[:needed]
    owners = np.random.Generator(np.random.PCG64(0)).permutation(needed).reshape(work.users, work.samples)
    np.save(folder / "labels.npy", labels[owners])
    for view, shape in SHAPES.items():
        seen, seen_test = (grey(images), grey(test)) if view == "grey" else (images, test)
        np.savez(folder / f"{view}.npz", x_train=seen, y_train=labels, x_test=seen_test, y_test=test_labels)
        scaled = seen.astype(np.float32) / 255
        mean = scaled.mean(axis=(0, 2, 3), keepdims=True)
        std = scaled.std(axis=(0, 2, 3), keepdims=True)
        by_user = ((scaled - mean) / std).astype(np.float32)[owners]
        assert by_user.shape == (work.users, work.samples, *shape)
        np.save(folder / f"{view}-inputs.npy", by_user)
    (folder / "work.json").write_text(json.dumps(asdict(work)))


def read_work(folder: Path) -> Work:
    """Return the sizes with which ``folder`` was prepared."""
    return Work(**json.loads((folder / "work.json").read_text()))


def users(folder: Path, view: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return inputs and labels by user, the inputs mapped from disk."""
    return np.load(folder / f"{view}-inputs.npy", mmap_mode="c"), np.load(folder / "labels.npy")
