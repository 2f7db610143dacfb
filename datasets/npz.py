"""A user's own arrays as a data set: ``npz:PATH``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from flowerbed.datasets.dataset import Dataset, Split, as_tensor
from flowerbed.datasets.files import Found, Search
from flowerbed.datasets.images import image_statistics
from flowerbed.errors import ConfigError, DataError

Layout = Literal["nchw", "nhwc"]


@dataclass(frozen=True)
class NpzFile:
    """The data set in a ``.npz`` file of plain arrays (nothing is unpickled).

    ``x_train``, ``y_train``, ``x_test``, ``y_test`` are needed. Inputs are uint8 images ``(N, H, W)`` or
    4-dimensional in ``layout``, float features ``(N, F)`` or images, or integer token ids ``(N, L)``;
    labels are integers, ``(N,)`` or, for next tokens, ``(N, L)``. Optional: ``classes`` and ``domains``
    (names), ``domain_train`` and ``domain_test`` (indices into ``domains``). Inputs are normalised with the
    statistics of ``x_train`` per channel or feature.
    """

    path: str
    layout: Layout = "nchw"

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise ConfigError(f"The layout of '{self.path}' is 'nchw' or 'nhwc', not '{self.layout}'.")

    def locate(self, search: Search) -> Found:
        """Return the file; raises ``DataError`` if it does not exist."""
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise DataError(f"The data file {path.absolute()} does not exist; correct the path after 'npz:'.")
        return Found("npz", (path.resolve(),))

    def read(self, found: Found) -> Dataset:
        """Decode the file; raises ``DataError`` naming the first array that is missing or unfit."""
        with np.load(found.files[0], allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        train, test = (self._split(arrays, part) for part in ("train", "test"))
        task: Literal["classification", "next-token"]
        task = "classification" if train.labels.dim() == 1 else "next-token"
        names = arrays.get("classes")
        count = 1 + max(int(split.labels.max()) for split in (train, test) if len(split))
        mean, std = statistics(train.inputs)
        return Dataset(
            name=found.files[0].stem,
            train=train,
            test=test,
            classes=tuple(map(str, range(count) if names is None else names.tolist())),
            domains=tuple(map(str, arrays["domains"].tolist())) if "domains" in arrays else (),
            mean=mean,
            std=std,
            task=task,
        )

    def _split(self, arrays: dict[str, np.ndarray[Any, Any]], part: str) -> Split:
        for name in (f"x_{part}", f"y_{part}"):
            if name not in arrays:
                raise DataError(f"{self.path} has no array '{name}'; it has {', '.join(sorted(arrays))}.")
        inputs, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if not np.issubdtype(labels.dtype, np.integer):
            raise DataError(f"y_{part} in {self.path} must hold integers, not {labels.dtype}.")
        if inputs.dtype != np.uint8:
            is_float = np.issubdtype(inputs.dtype, np.floating)
            inputs = inputs.astype(np.float32 if is_float else np.int64, copy=False)
        elif inputs.ndim == 3:
            inputs = inputs[:, None]
        if inputs.ndim == 4 and self.layout == "nhwc":
            inputs = inputs.transpose(0, 3, 1, 2)
        extras = {}
        if f"domain_{part}" in arrays:
            extras["domain"] = as_tensor(arrays[f"domain_{part}"].astype(np.int64))
        return Split(as_tensor(np.ascontiguousarray(inputs)), as_tensor(labels.astype(np.int64)), extras)


def statistics(inputs: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel or feature of inputs; token ids are not scaled."""
    if inputs.dtype == torch.int64:
        return (0.0,), (1.0,)
    if inputs.dtype == torch.uint8:
        return image_statistics(inputs)
    # numpy sums in an order that does not depend on threads.
    values = inputs.numpy()
    over = tuple(axis for axis in range(values.ndim) if axis != 1)
    mean = values.mean(axis=over, dtype=np.float64)
    std = values.std(axis=over, dtype=np.float64)
    # A feature that never varies is not scaled.
    return tuple(mean.tolist()), tuple(np.where(std > 0, std, 1.0).tolist())
