"""Regression that is drawn, with a known truth: sparse linear targets, targets of a two-layer ReLU network.

Data sets of the task ``measured``: what is to be predicted is the extra ``target``, float64 ``(N,)``, without noise;
there are no labels. Both are factories for ``load_dataset``, by import path.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.errors import require
from flowerbed.seeds import numpy_rng

TARGET = "target"
Floats = npt.NDArray[np.float64]


def sparse_linear(*, d: int = 1000, n: int = 300, test: int = 1000, k: int = 3, seed: int = 0) -> Dataset:
    """Return y = <beta, x> for inputs ``(d,)`` uniform on [-1, 1]; beta is 1 in its first ``k`` entries, else 0."""
    require(0 <= k <= d, f"dataset.k is {k}; give between 0 and the {d} inputs.")
    rng = numpy_rng(seed, "sparse linear regression")
    x = _float32(rng.uniform(-1, 1, (n + test, d)))
    return _dataset("sparse_linear", x, x[:, :k].sum(1), n)


def relu_teacher(*, d: int = 100, n: int = 300, test: int = 1000, units: int = 10, seed: int = 0) -> Dataset:
    """Return y = sum_i relu(<v_i, x>) for inputs uniform on the sphere of radius sqrt(d).

    The ``units`` vectors v_i are uniform on the unit sphere.
    """
    require(units >= 1, f"dataset.units is {units}; give at least 1.")
    rng = numpy_rng(seed, "targets of a relu network")
    v = _unit(rng.standard_normal((units, d)))
    x = _float32(_unit(rng.standard_normal((n + test, d))) * np.sqrt(d))
    return _dataset("relu_teacher", x, np.maximum(x @ v.T, 0).sum(1), n)


def _unit(rows: Floats) -> Floats:
    found: Floats = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return found


def _float32(values: Floats) -> Floats:
    """Round the values to what inputs are kept in, so that targets belong to exactly those."""
    return values.astype(np.float32).astype(np.float64)


def _dataset(name: str, x: Floats, y: Floats, n: int) -> Dataset:
    require(
        0 < n < len(x), f"The data set '{name}' has n={n} and test={len(x) - n}; give at least 1 of each."
    )
    inputs, target = torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y)
    none = torch.zeros(len(x), dtype=torch.int64)
    train, test = (Split(inputs[at], none[at], {TARGET: target[at]}) for at in (slice(n), slice(n, None)))
    return Dataset(name, train, test, ("none",), (0.0,), (1.0,), task="measured")
