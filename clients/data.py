"""One client's view of a data set, and the order in which its samples are visited."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flowerbed import seeds
from flowerbed.clients.params import LocalParams
from flowerbed.datasets.augment import PIXELS, Scale
from flowerbed.datasets.dataset import Dataset, Split

Batch = dict[str, Tensor]
"""A batch by name: x (inputs, prepared), y (labels), index (sample ids in the split), and the extras."""


LABELLED = "labelled"
"""Extra of a semi-supervised split: bool, whether the client sees the sample's label."""
CLEAN = "clean"
"""Extra beside it: the true label of every sample, for measuring pseudo-labels and for nothing else."""
UNLABELLED = -1
"""The label that a client sees where it sees none."""


@dataclass(frozen=True)
class ClientData:
    """The samples of one client: an index view of a split, prepared (normalised) once when built.

    Where the split has the extra ``labelled``, the labels of the other samples read ``UNLABELLED``.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    extras: Mapping[str, Tensor]
    scale: Scale = PIXELS
    """How the prepared values of images relate to pixels; augmentations need it."""

    @classmethod
    def view(
        cls, dataset: Dataset, split: Split, indices: npt.NDArray[np.int64], device: torch.device
    ) -> ClientData:
        """Take the samples ``indices`` of ``split``, in that order, to ``device``."""
        index = torch.from_numpy(np.array(indices, dtype=np.int64))
        labels = split.labels[index].to(device)
        extras = {name: values[index].to(device) for name, values in split.extras.items()}
        if LABELLED in extras:
            extras[CLEAN] = labels
            labels = torch.where(extras[LABELLED], labels, UNLABELLED)
        inputs = dataset.prepare(split.inputs[index]).to(device)
        return cls(inputs, labels, index.to(device), extras, Scale(dataset.mean, dataset.std))

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, rows: Tensor | slice) -> Batch:
        """Return the batch of the given rows of this view."""
        extras = {name: values[rows] for name, values in self.extras.items()}
        return {"x": self.x[rows], "y": self.y[rows], "index": self.index[rows], **extras}

    def take(self, rows: Tensor) -> ClientData:
        """Return the view of the given rows (int64 or bool) of this one."""
        extras = {name: values[rows] for name, values in self.extras.items()}
        return replace(self, x=self.x[rows], y=self.y[rows], index=self.index[rows], extras=extras)


class BatchOrder:
    """Which rows the step at a given clock holds: a fresh permutation for each epoch of the run."""

    def __init__(
        self, local: LocalParams, examples: int, seed: int, client: int, purpose: str = "data order"
    ) -> None:
        self._size = local.batch_size or examples
        self._per_epoch = local.batches_per_epoch(examples)
        self._examples = examples
        self._key = (seed, purpose, client)
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def rows(self, step: int) -> Tensor:
        """Return the rows (int64, at most ``batch_size``) of clock ``step``."""
        epoch, position = divmod(step, self._per_epoch)
        if epoch != self._epoch:
            order = seeds.numpy_rng(*self._key, epoch).permutation(self._examples)
            self._permutation, self._epoch = torch.from_numpy(order), epoch
        return self._permutation[position * self._size : (position + 1) * self._size]
