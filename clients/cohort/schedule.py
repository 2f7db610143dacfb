"""Who is at which step with which samples: the ticks of a block of clients.

The clients of a block are ordered by their number of steps, most first, so that those which still train at a
tick are a prefix of the block: a client that is done is left out of the computation, hence frozen exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flowerbed.clients.data import Batch, BatchOrder, ClientData
from flowerbed.clients.local_round import LocalRound
from flowerbed.clients.training import own_batches, view_of

GATHER_BYTES = 2**24
"""Largest buffer of gathered samples; longer rounds are gathered a few ticks at a time."""
SMALL_ROW = 64
"""Bytes of a sample up to which one gather from all clients' samples together is the faster way."""


@dataclass(frozen=True)
class Tick:
    """One step of every client that is not done yet."""

    batch: Batch
    """``(A, B, ...)``: A active clients, rows beyond a client's own batch size hold samples of no weight."""
    sizes: Sequence[int]
    """The batch size of each active client."""
    lr: Sequence[float]
    """The learning rate of each active client."""
    active: int
    """A."""
    width: int
    """B, the largest of ``sizes``."""
    uniform: bool
    """Whether all ``sizes`` are B."""


class Schedule:
    """The ticks of one block; its clients are ordered by steps, most first, and each has at least one."""

    def __init__(self, locals_: Sequence[LocalRound], *, columns: bool) -> None:
        """``columns`` says whether the loss may look at more of a batch than inputs and labels."""
        self._locals = locals_
        self._data = [local.train_data for local in locals_]
        self._augments = locals_[0].local.augment != "none"
        self._names = ["x", "y"]
        if columns:
            self._names += ["index", *self._data[0].extras]
        for local, data in zip(locals_, self._data, strict=True):
            if data.extras:
                own_batches(local, local.local)  # Refuses samples without a label.
        spans = [_span(local, data) for local, data in zip(locals_, self._data, strict=True)]
        self._sizes = [sizes for _, sizes in spans]
        self._steps = [len(sizes) for sizes in self._sizes]
        self._rows = _padded([rows for rows, _ in spans], self._sizes)

    def __iter__(self) -> Iterator[Tick]:
        clients, longest, width = self._rows.shape
        sample = self._data[0].x[0]
        per_tick = clients * width * max(1, sample.numel() * sample.element_size())
        chunk = max(1, GATHER_BYTES // per_tick)
        same = self._steps[0] == self._steps[-1] and all(s == self._sizes[0] for s in self._sizes)
        for start in range(0, longest, chunk):
            stop = min(start + chunk, longest)
            columns = {name: self._gather(name, start, stop) for name in self._names}
            for j in range(start, stop):
                active = clients if same else sum(steps > j for steps in self._steps)
                sizes = [self._sizes[0][j]] * clients if same else [own[j] for own in self._sizes[:active]]
                widest = max(sizes)
                at = j - start
                batch = {name: values[:active, at, :widest] for name, values in columns.items()}
                if self._augments:
                    self._augment(batch["x"], sizes, j)
                uniform = same or min(sizes) == widest
                yield Tick(batch, sizes, self._rates(j, active), active, widest, uniform)

    def _rates(self, j: int, active: int) -> Sequence[float]:
        first = self._locals[0]
        if first.local.schedule == "constant":
            return [first.local.lr] * active
        clocks = (local.clock for local in self._locals[:active])
        return [first.local.lr_at(c.first_step + j, c.steps, c.rounds) for c in clocks]

    def _augment(self, x: Tensor, sizes: Sequence[int], j: int) -> None:
        """Augment each client's samples in place, drawn from its own stream of this step."""
        for k, size in enumerate(sizes):
            local, own = self._locals[k], x[k, :size]
            index = local.clock.first_step + j
            own.copy_(view_of(local, own, self._data[k].scale, local.local.augment, "augment", index))

    def _gather(self, name: str, start: int, stop: int) -> Tensor:
        """Return ``(K, stop - start, B, ...)`` of one column; slots of clients that are done hold anything."""
        values = [_column(data, name) for data in self._data]
        first, rows = values[0], self._rows[:, start:stop]
        if first[0].numel() * first.element_size() <= SMALL_ROW:
            offsets = np.cumsum([0, *(value.shape[0] for value in values[:-1])])
            joint = torch.from_numpy(rows + offsets[:, None, None])
            return torch.cat(values)[joint.to(first.device)]
        wanted = torch.from_numpy(rows).to(first.device).flatten(1).unbind()
        buffer = first.new_empty(*rows.shape, *first.shape[1:])
        slots = buffer.flatten(1, 2).unbind()
        for value, own, slot, steps in zip(values, wanted, slots, self._steps, strict=True):
            if steps >= stop:
                torch.index_select(value, 0, own, out=slot)
            elif steps > start:
                used = (steps - start) * rows.shape[2]
                torch.index_select(value, 0, own[:used], out=slot[:used])
        return buffer


def _column(data: ClientData, name: str) -> Tensor:
    if name in ("x", "y", "index"):
        found: Tensor = getattr(data, name)
        return found
    return data.extras[name]


def _span(local: LocalRound, data: ClientData) -> tuple[npt.NDArray[np.int64], list[int]]:
    order = BatchOrder(local.local, data.y.shape[0], local.seed, local.client)
    rows, sizes = order.span(local.clock.all_steps)
    return rows.numpy(), sizes


def _padded(rows: Sequence[npt.NDArray[np.int64]], sizes: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    """Return the rows by client and step, ``(K, S, B)``; row 0 stands where there is none."""
    width = max(max(own) for own in sizes)
    padded = np.zeros((len(rows), max(len(own) for own in sizes), width), dtype=np.int64)
    for k, (flat, own) in enumerate(zip(rows, sizes, strict=True)):
        if len(flat) == len(own) * width:
            padded[k, : len(own)] = flat.reshape(len(own), width)
            continue
        at = 0
        for j, size in enumerate(own):
            padded[k, j, :size] = flat[at : at + size]
            at += size
    return padded
