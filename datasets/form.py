"""What the data of a run look like: all that somebody with other samples must know to take part in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from flowerbed.datasets.dataset import Dataset, Split, Task
from flowerbed.errors import DataError

TYPES = {"uint8": torch.uint8, "float32": torch.float32, "int64": torch.int64}


@dataclass(frozen=True)
class DataForm:
    """The facts about a data set that every client shares; plain values, so that they travel as JSON."""

    name: str
    input_shape: tuple[int, ...]
    """``(C, H, W)``, ``(F,)`` or ``(L,)``."""
    dtype: str
    """uint8 (images), float32 (features, or images in [0, 1]) or int64 (token ids)."""
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    """Of the normalisation that every client applies, per channel or feature, or one for all."""
    std: tuple[float, ...]
    domains: tuple[str, ...] = ()
    task: Task = "classification"

    @classmethod
    def of(cls, dataset: Dataset) -> DataForm:
        """Describe ``dataset``."""
        kinds = {kind: name for name, kind in TYPES.items()}
        return cls(
            dataset.name,
            dataset.input_shape,
            kinds[dataset.train.inputs.dtype],
            dataset.classes,
            dataset.mean,
            dataset.std,
            dataset.domains,
            dataset.task,
        )

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> DataForm:
        """Read what ``plain`` returned, also after a journey as JSON."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()}
        return cls(**values)

    def plain(self) -> dict[str, Any]:
        """Return plain values that ``from_plain`` reads."""
        return asdict(self)

    @property
    def images(self) -> bool:
        """Whether a sample is an image."""
        return len(self.input_shape) == 3

    @property
    def values(self) -> int:
        """The numbers in one input."""
        return math.prod(self.input_shape)

    def dataset(self, train: Split, test: Split, validation: Split | None = None) -> Dataset:
        """Return other samples of this form as a data set; raises ``DataError`` where they have another one."""
        named = {"training": train, "test": test} | ({} if validation is None else {"validation": validation})
        for part, split in named.items():
            self.check(part, split)
        return Dataset(
            self.name, train, test, self.classes, self.mean, self.std, self.domains, self.task, validation
        )

    def check(self, part: str, split: Split) -> None:
        """Raise ``DataError`` naming the first thing in which the samples of ``part`` have another form."""
        shape = tuple(split.inputs.shape[1:])
        if shape != self.input_shape:
            raise DataError(
                f"The {part} inputs have shape {shape}, the run's data '{self.name}' have {self.input_shape}; "
                "convert them, or join a run that was made for such data."
            )
        found, wanted = split.inputs.dtype, TYPES[self.dtype]
        # Images may come as they are stored or already in [0, 1]; the normalisation is the same.
        floats = self.dtype == "uint8" and found == torch.float32
        if found != wanted and not floats:
            raise DataError(
                f"The {part} inputs are {_name(found)}, the run's data '{self.name}' are {self.dtype}; convert them."
            )
        if found.is_floating_point and len(split):
            self._check_values(part, split.inputs, floats)
        if self.task == "classification" and split.labels.dim() != 1:
            raise DataError(
                f"The {part} labels have shape {tuple(split.labels.shape)}; one class per sample is needed."
            )
        self._check_labels(part, split.labels)

    def _check_values(self, part: str, inputs: Tensor, images: bool) -> None:
        if not bool(torch.isfinite(inputs).all()):
            raise DataError(f"The {part} inputs hold NaN or infinity; remove or fill in those values.")
        low, high = float(inputs.min()), float(inputs.max())
        if images and not (low >= 0 and high <= 1):
            raise DataError(
                f"The {part} images are floats between {low:g} and {high:g}; the run needs uint8, or floats in [0, 1]."
            )

    def _check_labels(self, part: str, labels: Tensor) -> None:
        if self.task == "measured" or not len(labels):
            return
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(self.classes):
            wrong = low if low < 0 else high
            raise DataError(
                f"The {part} labels hold {wrong}, the run knows the classes 0..{len(self.classes) - 1} "
                f"({_some(self.classes)}); renumber them."
            )

    def class_number(self, label: str) -> int:
        """Return the class called ``label``, which may be a name or a number; raises ``DataError`` for neither."""
        if label in self.classes:
            return self.classes.index(label)
        try:
            return int(label)
        except ValueError:
            raise DataError(
                f"'{label}' is no class of the run's data '{self.name}'; its classes are {_some(self.classes)}."
            ) from None


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def _some(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" ... ({len(names)} in all)" if len(names) > most else "")
