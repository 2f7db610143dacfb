"""One client's view of a data set, and the order in which its samples are visited."""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
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
GATHER_BYTES = 2**21
"""Samples gathered at a time: many small batches, or one large one, within a core's cache."""
SLAB_BYTES = 2**21
"""Memory that kept views are laid into at a time."""
MOST_VIEWS = 2**12
"""Views that are kept at most: the objects of one take about 4 kB, however few its samples are."""

LABELLED = "labelled"
"""Extra of a semi-supervised split: bool, whether the client sees the sample's label."""
CLEAN = "clean"
"""Extra beside it, and of sets with noisy labels: the true label of every sample, for measuring and nothing else."""
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
            # Where labels are noisy, the set knows better.
            extras.setdefault(CLEAN, labels)
            labels = torch.where(extras[LABELLED], labels, UNLABELLED)
        inputs = dataset.prepare(split.inputs[index]).to(device)
        return cls(inputs, labels, index.to(device), extras, Scale(dataset.mean, dataset.std))

    def __len__(self) -> int:
        return self.y.shape[0]

    @property
    def nbytes(self) -> int:
        """The size of all tensors."""
        return sum(values.nbytes for values in (self.x, self.y, self.index, *self.extras.values()))

    @property
    def bytes_per_sample(self) -> int:
        """The size of a prepared input."""
        return self.x[:1].nbytes

    def batch(self, rows: Tensor | slice) -> Batch:
        """Return the batch of the given rows (int64, or a slice) of this view."""
        columns = {"x": self.x, "y": self.y, "index": self.index, **self.extras}
        if isinstance(rows, slice):
            return {name: values[rows] for name, values in columns.items()}
        # Copies whole rows, in half the time of indexing.
        return {name: values.index_select(0, rows) for name, values in columns.items()}

    def each(self, change: Callable[[Tensor], Tensor]) -> ClientData:
        """Return the view whose columns are what ``change`` makes of those of this one."""
        extras = {name: change(values) for name, values in self.extras.items()}
        return replace(self, x=change(self.x), y=change(self.y), index=change(self.index), extras=extras)

    def take(self, rows: Tensor) -> ClientData:
        """Return the view of the given rows (int64 or bool) of this one."""
        return self.each(lambda values: values[rows])


class Slabs:
    """Room for tensors that stay, apart from the heap in which those of training come and go.

    Small tensors that stay between large ones that go take the heap apart: it grows with every client. A slab goes back
    to the system with the last tensor in it.
    """

    def __init__(self) -> None:
        self._slab: mmap.mmap | None = None
        self._used = 0

    def keep(self, values: Tensor) -> Tensor:
        """Return a copy of ``values`` that lies in a slab.

        What is larger than one, on a GPU or no plain array is returned itself.
        """
        if values.device.type != "cpu" or not values.is_contiguous() or not 0 < values.nbytes <= SLAB_BYTES:
            return values
        start = -(-self._used // 64) * 64
        if self._slab is None or start + values.nbytes > SLAB_BYTES:
            self._slab, start = mmap.mmap(-1, SLAB_BYTES), 0
        self._used = start + values.nbytes
        # Keeps the slab for as long as it exists.
        kept = torch.frombuffer(self._slab, dtype=values.dtype, count=values.numel(), offset=start)
        return (kept if values.dim() == 1 else kept.view(values.shape)).copy_(values)


class ViewCache:
    """The most recently used views, as many as fit into ``limit`` bytes, and at any rate the last one.

    No more than ``MOST_VIEWS`` of them.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._slabs = Slabs()
        self._bytes = 0
        self._views: OrderedDict[Hashable, ClientData] = OrderedDict()

    def __contains__(self, key: object) -> bool:
        return key in self._views

    def get(self, key: Hashable, make: Callable[[], ClientData]) -> ClientData:
        """Return the view kept under ``key``, or ``make()``, which is then kept."""
        if key in self._views:
            self._views.move_to_end(key)
            return self._views[key]
        # Before another one is made, so that no two views of which one is too large exist together.
        self._shrink(self._limit)
        view = make().each(self._slabs.keep)
        self._shrink(self._limit - view.nbytes)
        self._views[key] = view
        self._bytes += view.nbytes
        return view

    def _shrink(self, limit: int) -> None:
        while self._views and (self._bytes > limit or len(self._views) >= MOST_VIEWS):
            _, view = self._views.popitem(last=False)
            self._bytes -= view.nbytes


class BatchOrder:
    """Which rows the step at a given clock holds: a fresh permutation for each epoch of the run.

    With ``local.replacement`` independent draws take the permutation's place.
    """

    def __init__(
        self, local: LocalParams, examples: int, seed: int, client: int, purpose: str = "data order"
    ) -> None:
        self._size = local.batch_size or examples
        self._per_epoch = local.batches_per_epoch(examples)
        self._examples = examples
        self._replacement = local.replacement
        self._key = (seed, purpose, client)
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def rows(self, step: int) -> Tensor:
        """Return the rows (int64, at most ``batch_size``) of clock ``step``."""
        epoch, position = divmod(step, self._per_epoch)
        if epoch != self._epoch:
            rng = seeds.numpy_rng(*self._key, epoch)
            if self._replacement:
                order = rng.integers(self._examples, size=self._per_epoch * self._size)
            else:
                order = rng.permutation(self._examples)
            self._permutation, self._epoch = torch.from_numpy(order), epoch
        return self._permutation[position * self._size : (position + 1) * self._size]

    def ahead(self, step: int, samples: int) -> range:
        """Return ``step`` and those after it in its epoch that hold at most ``samples`` together."""
        left = self._per_epoch - step % self._per_epoch
        return range(step, step + max(1, min(left, samples // self._size)))

    def span(self, steps: range) -> tuple[Tensor, list[int]]:
        """Return the rows of consecutive steps one after another (int64), and how many belong to each step."""
        pieces, sizes, step = [], [], steps.start
        while step < steps.stop:
            position = step % self._per_epoch
            count = min(self._per_epoch - position, steps.stop - step)
            first = self.rows(step)
            piece = self._permutation[position * self._size : (position + count) * self._size]
            sizes += [first.shape[0]] * (count - 1)
            sizes.append(piece.shape[0] - first.shape[0] * (count - 1))
            pieces.append(piece)
            step += count
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces), sizes


class BatchReader:
    """The batches of a client's data in an order, by clock; those of consecutive steps are gathered together.

    A batch is a view of what was gathered: nobody writes into it.
    """

    def __init__(self, data: ClientData, order: BatchOrder) -> None:
        self._data, self._order = data, order
        self._first = 0
        self._batches: list[Batch] = []

    def __call__(self, step: int) -> Batch:
        """Return the batch of clock ``step``, a mapping of the caller's own."""
        at = step - self._first
        if not 0 <= at < len(self._batches):
            self._gather(step)
            at = 0
        return dict(self._batches[at])

    def _gather(self, step: int) -> None:
        data = self._data
        steps = self._order.ahead(step, GATHER_BYTES // max(1, data.bytes_per_sample))
        rows, sizes = self._order.span(steps)
        gathered = data.batch(rows.to(data.y.device))
        pieces = {name: torch.split(values, sizes) for name, values in gathered.items()}
        self._batches = [
            dict(zip(pieces, found, strict=True)) for found in zip(*pieces.values(), strict=True)
        ]
        self._first = step
