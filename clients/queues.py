"""What a client remembers of its last samples: several columns that are filled together, first in, first out.

Feature banks and dictionaries of negatives. A queue never leaves the client.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flowerbed.clients.store import ClientState
from flowerbed.errors import ClientError

PLACE = "place"


@dataclass
class Queue:
    """At most ``size`` rows; entry j of every column is of the same sample."""

    size: int
    columns: dict[str, Tensor]
    """Storage by name, ``(size, ...)``; as long as nothing was pushed, empty."""
    filled: int = 0
    following: int = 0
    """Where the next row goes."""

    @classmethod
    def empty(cls, size: int) -> Queue:
        """Return a queue without rows; raises ``ClientError`` for one that could hold none."""
        if size < 1:
            raise ClientError(f"a queue of {size} rows remembers nothing; give it at least 1")
        return cls(size, {})

    def __len__(self) -> int:
        return self.filled

    def push(self, rows: Mapping[str, Tensor]) -> None:
        """Append rows ``(B, ...)`` of every column, in the place of the oldest.

        Raises ``ClientError`` for columns that differ in length, or from those that there are.
        """
        counts = {name: len(values) for name, values in rows.items()}
        if len(set(counts.values())) != 1 or (self.columns and self.columns.keys() != rows.keys()):
            raise ClientError(f"the columns of a queue are filled together, got {counts}")
        count = min(self.size, next(iter(counts.values())))
        for name, values in rows.items():
            if name not in self.columns:
                self.columns[name] = values.new_zeros((self.size, *values.shape[1:]))
        device = next(iter(rows.values())).device
        # Of more rows than there is room for, the last ones stay.
        places = (self.following + torch.arange(count, device=device)) % self.size
        for name, values in rows.items():
            self.columns[name][places] = values[len(values) - count :].detach()
        self.following = (self.following + count) % self.size
        self.filled = min(self.size, self.filled + count)

    def rows(self) -> dict[str, Tensor]:
        """Return copies of all columns, ``(filled, ...)``, the oldest row first."""
        first = self.following - self.filled
        places = (first + torch.arange(self.filled)) % self.size
        return {name: values[places.to(values.device)] for name, values in self.columns.items()}

    def keep(self, state: ClientState, name: str) -> None:
        """Put the queue into the client's state, for its next round."""
        place = torch.tensor([self.size, self.filled, self.following])
        state[group(name)] = {**{f"column {n}": v for n, v in self.columns.items()}, PLACE: place}

    @classmethod
    def kept(cls, state: ClientState, name: str, device: torch.device) -> Queue | None:
        """Return the queue called ``name`` as the last round left it; None if there is none."""
        found = state.get(group(name))
        if found is None:
            return None
        size, filled, following = (int(n) for n in found[PLACE])
        columns = {n.removeprefix("column "): v.to(device, copy=True) for n, v in found.items() if n != PLACE}
        return cls(size, columns, filled, following)


def group(name: str) -> str:
    """Return the group of the client's state that holds the queue called ``name``."""
    return f"queue {name}"
