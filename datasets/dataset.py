"""What a data set is to the rest of the platform: its splits of tensors and the facts about them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flowerbed.errors import DataError

Task = Literal["classification", "next-token", "measured"]
"""``measured``: no label is predicted; a model is judged by other figures than counts of right answers."""


@dataclass(frozen=True, eq=False)
class Split:
    """The samples of one split, as they are stored (not normalised).

    ``inputs`` is uint8 images ``(N, C, H, W)``, float32 features ``(N, F)`` or images ``(N, C, H, W)``, or
    int64 token ids ``(N, L)``. ``labels`` is int64: ``(N,)`` classes, or ``(N, L)`` next tokens. ``extras``
    holds further tensors with one row per sample, for example ``"domain"`` (int64 indices into
    ``Dataset.domains``).

    Treat the tensors as read-only: they may share memory with a cache file or with other processes.
    Raises ``DataError`` if the types or the numbers of samples do not fit together.
    """

    inputs: Tensor
    labels: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.inputs.dtype not in (torch.uint8, torch.float32, torch.int64):
            raise DataError(f"Inputs must be uint8, float32 or int64 (token ids), not {self.inputs.dtype}.")
        if self.labels.dtype != torch.int64:
            raise DataError(f"Labels must be int64, not {self.labels.dtype}; convert them with .long().")
        for name, rows in {"labels": self.labels, **self.extras}.items():
            if len(rows) != len(self.inputs):
                raise DataError(f"There are {len(self.inputs)} inputs but {len(rows)} {name}.")

    def __len__(self) -> int:
        return len(self.inputs)

    def __reduce__(self) -> tuple[Any, ...]:
        # Plain numpy arrays leave a protocol-5 pickle as out-of-band buffers, which Ray keeps in shared
        # memory; torch's own pickling would copy every tensor into each process.
        return _from_arrays, (_array(self.inputs), _array(self.labels), _arrays(self.extras))


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.detach().cpu().contiguous().numpy()
    return array


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: _array(tensor) for name, tensor in tensors.items()}


def _from_arrays(
    inputs: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], extras: Mapping[str, np.ndarray[Any, Any]]
) -> Split:
    return Split(
        as_tensor(inputs), as_tensor(labels), {name: as_tensor(rows) for name, rows in extras.items()}
    )


def as_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """Return a tensor that shares memory with ``array``, without torch's warning if that is read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ", category=UserWarning)
        return torch.from_numpy(array)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set with its fixed train and test split, and perhaps a third one to choose settings by.

    ``classes`` names the values of the labels (for next-token tasks: the vocabulary). ``mean`` and ``std``
    have one entry, or one per channel (images) or feature; images are scaled to [0, 1] before they apply.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    domains: tuple[str, ...] = ()
    task: Task = "classification"
    validation: Split | None = None
    """Samples that are neither trained nor tested on; clients hold them as they hold test samples."""

    def __post_init__(self) -> None:
        others = {"test": self.test} | ({} if self.validation is None else {"validation": self.validation})
        for label, split in others.items():
            if self.train.inputs.shape[1:] != split.inputs.shape[1:]:
                shapes = f"{tuple(self.train.inputs.shape[1:])} and {tuple(split.inputs.shape[1:])}"
                raise DataError(f"The train and {label} inputs of '{self.name}' differ in shape: {shapes}.")
        for label, split in {"train": self.train, **others}.items():
            _check_range(f"{label} labels of '{self.name}'", split.labels, len(self.classes))
            if "domain" in split.extras:
                _check_range(f"{label} domains of '{self.name}'", split.extras["domain"], len(self.domains))
        widths = {1} if self.task == "next-token" else {1, self.train.inputs.shape[1]}
        if len(self.mean) not in widths or len(self.std) != len(self.mean) or min(self.std) <= 0:
            raise DataError(
                f"mean and std of '{self.name}' need one entry, or one per channel, and std above 0; "
                f"got mean={self.mean}, std={self.std}."
            )

    @property
    def _normalised(self) -> bool:
        return not any(self.mean) and all(value == 1 for value in self.std)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input: ``(C, H, W)``, ``(F,)`` or ``(L,)``."""
        return tuple(self.train.inputs.shape[1:])

    @property
    def num_classes(self) -> int:
        """The number of classes; for next-token tasks the size of the vocabulary."""
        return len(self.classes)

    def prepare(self, inputs: Tensor) -> Tensor:
        """Return what a model receives for raw ``inputs`` with any leading dimensions (B or K, B).

        Images and features become normalised float32, ``(x - mean) / std`` per channel, uint8 after
        division by 255. Token ids (int64), and float32 of mean 0 and std 1, are returned as they are. ``inputs``
        is not changed.
        """
        if inputs.dtype == torch.int64 or (inputs.dtype == torch.float32 and self._normalised):
            return inputs
        trailing = len(self.input_shape) - 1
        mean = _constant(self.mean, trailing, inputs.device)
        std = _constant(self.std, trailing, inputs.device)
        if inputs.dtype == torch.uint8:
            return inputs.to(torch.float32).div_(255).sub_(mean).div_(std)
        return (inputs.to(torch.float32) - mean).div_(std)


@lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], trailing: int, device: torch.device) -> Tensor:
    """Return ``values`` as float32 of shape ``(C, 1, ...)``, kept on the device to save a copy per batch."""
    return torch.tensor(values, dtype=torch.float32, device=device).reshape(-1, *[1] * trailing)


def _check_range(what: str, values: Tensor, count: int) -> None:
    if len(values) and (int(values.min()) < 0 or int(values.max()) >= count):
        raise DataError(f"The {what} must lie in 0..{count - 1}; found {values.min()}..{values.max()}.")
