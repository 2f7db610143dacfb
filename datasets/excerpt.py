"""A part of another data set: some of its classes, so many samples of each, and samples to choose settings by."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.datasets.files import Found, Search
from flowerbed.datasets.source import DataSource
from flowerbed.errors import ConfigError, DataError, require
from flowerbed.seeds import numpy_rng


@dataclass(frozen=True)
class Excerpt:
    """Some classes of a set, numbered anew from 0, and random samples of them drawn by ``draw``.

    The validation samples come out of the training set and are in neither of the two splits.
    """

    of: str = "fashion_mnist"
    """The data set."""
    classes: tuple[int, ...] = ()
    """Classes that stay, by their number there; none given means all."""
    per_class: int = 0
    """Training samples of each class; 0 means all that are left."""
    validation_per_class: int = 0
    """Validation samples of each class; 0 means that there is no such split."""
    test_per_class: int = 0
    """Test samples of each class; 0 means all."""
    draw: int = 0
    """Which random samples: the seed of the choice."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        require(
            len(set(self.classes)) == len(self.classes),
            f"dataset.classes {list(self.classes)} repeats one; name each once.",
        )
        for name in ("per_class", "validation_per_class", "test_per_class", "draw"):
            require(getattr(self, name) >= 0, f"dataset.{name} is {getattr(self, name)}; give 0 or more.")

    def locate(self, search: Search) -> Found:
        """Return the files of the underlying set."""
        return self._source().locate(replace(search, name=self.of))

    def read(self, found: Found) -> Dataset:
        """Decode them and choose; raises ``ConfigError`` for a class that is not there, or too small."""
        whole = self._source().read(found)
        if whole.train.labels.ndim != 1:
            raise ConfigError(f"dataset.of={self.of} has no classes to choose from; choose an image set.")
        classes = self.classes or tuple(range(whole.num_classes))
        require(
            max(classes) < whole.num_classes and min(classes) >= 0,
            f"dataset.classes {list(classes)}: '{self.of}' has the classes 0 to {whole.num_classes - 1}.",
        )
        held = self._rows(whole.train, "validation", classes, self.validation_per_class)
        rest = torch.ones(len(whole.train), dtype=torch.bool)
        if self.validation_per_class:
            rest[held] = False
        train = self._rows(whole.train, "train", classes, self.per_class, rest)
        test = self._rows(whole.test, "test", classes, self.test_per_class)
        return replace(
            whole,
            name=f"{whole.name} excerpt",
            train=_taken(whole.train, train, classes),
            test=_taken(whole.test, test, classes),
            validation=_taken(whole.train, held, classes) if self.validation_per_class else None,
            classes=tuple(whole.classes[c] for c in classes),
        )

    def _rows(
        self, split: Split, name: str, classes: tuple[int, ...], count: int, allowed: Tensor | None = None
    ) -> Tensor:
        """Return rows of the split, increasing: ``count`` random allowed ones of each class, or all."""
        rng = numpy_rng(self.draw, f"datasets.excerpt.{name}")
        chosen = []
        for c in classes:
            own = split.labels == c
            rows = torch.nonzero(own if allowed is None else own & allowed).flatten()
            require(
                len(rows) >= count,
                f"The {name} samples of class {c} of '{self.of}' are {len(rows)}, not {count}; ask for fewer.",
            )
            order = torch.from_numpy(rng.permutation(len(rows)))
            chosen.append(rows[order[: count or len(rows)]])
        return torch.cat(chosen).sort().values

    def _source(self) -> DataSource:
        # Here, not above: the table of data sets names this one.
        from flowerbed.datasets.sources import DATASETS

        source = DATASETS.get(self.of)()
        if isinstance(source, Dataset | Excerpt):
            raise ConfigError(
                f"dataset.of={self.of} is nothing to take an excerpt of; choose a data set by its own name."
            )
        return source


def _taken(split: Split, rows: Tensor, classes: tuple[int, ...]) -> Split:
    numbers = torch.full((max(classes) + 1,), -1)
    numbers[list(classes)] = torch.arange(len(classes))
    extras = {name: values[rows] for name, values in split.extras.items()}
    return Split(split.inputs[rows], numbers[split.labels[rows]], extras)


KINDS = ("symmetric", "pair", "asymmetric")
TRUE = "clean"
"""Extra of the training split: the true label, for measuring and nothing else."""
CIFAR10_CONFUSIONS = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}
"""Truck to automobile, bird to airplane, cat to dog and back, deer to horse (Patrini et al., CVPR 2017)."""


@dataclass(frozen=True)
class NoisyLabels(Excerpt):
    """An excerpt whose training labels are wrong for an exact share of every class; all others are right.

    The true ones are in the extra ``clean``. Which samples are hit is drawn by ``draw``, as the excerpt is.
    """

    noise: str = "symmetric"
    """symmetric: any other class, uniformly; pair: the next class; asymmetric: that of a similar one (cifar10)."""
    rate: float = 0.5
    """Share of each class whose label is wrong, rounded to whole samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.noise in KINDS, f"dataset.noise is '{self.noise}'; choose from {', '.join(KINDS)}.")
        require(0 <= self.rate <= 1, f"dataset.rate is {self.rate}; give a share in [0, 1].")
        require(
            self.noise != "asymmetric" or (self.of == "cifar10" and not self.classes),
            "dataset.noise=asymmetric knows which classes of cifar10 are alike; use dataset.of=cifar10 with all of "
            "its classes, or another noise.",
        )

    def read(self, found: Found) -> Dataset:
        """Decode the underlying set, choose, and make labels wrong."""
        chosen = super().read(found)
        true = chosen.train.labels
        try:
            labels = noisy(true, chosen.num_classes, self.noise, self.rate, self.draw)
        except DataError as error:
            raise ConfigError(str(error)) from error
        train = Split(chosen.train.inputs, labels, {**chosen.train.extras, TRUE: true})
        return replace(chosen, name=f"{chosen.name} with noisy labels", train=train)


def noisy(labels: Tensor, num_classes: int, kind: str, rate: float, seed: int) -> Tensor:
    """Return labels ``(N,)`` of which ``round(rate n_c)`` random ones of every class c are wrong.

    ``kind`` is one of ``KINDS``; classes that asymmetric noise does not confuse keep all their labels. Raises
    ``DataError`` for a single class, which cannot be mistaken.
    """
    if num_classes < 2:
        raise DataError("A single class cannot be mistaken for another; labels cannot be noisy.")
    rng = numpy_rng(seed, f"datasets.noisy.{kind}")
    wrong = labels.clone()
    for c in range(num_classes):
        rows = torch.nonzero(labels == c).flatten()
        hit = rows[torch.from_numpy(rng.permutation(len(rows)))[: round(rate * len(rows))]]
        if kind == "symmetric":
            step = torch.from_numpy(rng.integers(1, num_classes, len(hit)))
            wrong[hit] = (c + step) % num_classes
        elif kind == "pair":
            wrong[hit] = (c + 1) % num_classes
        else:
            wrong[hit] = CIFAR10_CONFUSIONS.get(c, c)
    return wrong
