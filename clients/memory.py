"""What a client remembers of each of its samples, across rounds: keyed by sample id, kept in the client's state.

Past predictions, feature banks, histories of losses. A memory never leaves the client.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowerbed.clients.data import ClientData
from flowerbed.clients.local_round import LocalRound
from flowerbed.clients.store import ClientState
from flowerbed.errors import ClientError

IDS, VALUES, WRITTEN = "ids", "values", "written"
NEVER = -1


@dataclass(frozen=True)
class SampleMemory:
    """One row a sample. Reading and writing go by sample id (``batch["index"]``), whatever the order of the batch."""

    ids: Tensor
    """Sample ids in the split, increasing, int64 ``(N,)``."""
    values: Tensor
    """What is remembered, ``(N, ...)``."""
    written: Tensor
    """The step (clock) at which each row was last written, int64 ``(N,)``; -1 for rows never written."""

    @classmethod
    def open(cls, local: LocalRound, name: str, initial: Callable[[ClientData], Tensor]) -> SampleMemory:
        """Return the client's memory called ``name``, as its last round left it.

        The first time its rows are ``initial(data)``, ``(N, ...)`` in the order of the client's data. Raises
        ``ClientError`` if the memory is of other samples.
        """
        ids, order = torch.sort(local.train_data.index)
        found = local.state.get(group(name))
        if found is None:
            values = initial(local.train_data)[order].clone()
            return cls(ids, values, torch.full_like(ids, NEVER))
        memory = cls(*(found[key].to(local.device, copy=True) for key in (IDS, VALUES, WRITTEN)))
        if not torch.equal(memory.ids, ids):
            raise ClientError(f"the memory '{name}' is of other samples than this client has")
        return memory

    def rows(self, index: Tensor) -> Tensor:
        """Return the rows of the samples with these ids; raises ``ClientError`` for an id that is not there."""
        rows = torch.searchsorted(self.ids, index).clamp_(max=len(self.ids) - 1)
        if not torch.equal(self.ids[rows], index):
            raise ClientError("a batch holds samples that this memory does not know")
        return rows

    def read(self, index: Tensor) -> Tensor:
        """Return a copy of what is remembered of the samples, ``(B, ...)``."""
        return self.values[self.rows(index)]

    def write(self, index: Tensor, values: Tensor, step: int) -> None:
        """Remember ``values`` ``(B, ...)`` of the samples, as of the given step."""
        rows = self.rows(index)
        self.values[rows] = values.detach().to(self.values.dtype)
        self.written[rows] = step

    def keep(self, state: ClientState, name: str) -> None:
        """Put the memory into the client's state, for its next round."""
        state[group(name)] = {IDS: self.ids, VALUES: self.values, WRITTEN: self.written}


def group(name: str) -> str:
    """Return the group of the client's state that holds the memory called ``name``."""
    return f"memory {name}"
