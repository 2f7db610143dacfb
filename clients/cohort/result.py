"""What the clients of a block computed, stacked: the leading dimension of every tensor is the client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowerbed.clients.local_round import Metric, Reply
from flowerbed.storage import Tensors


@dataclass(frozen=True)
class Stacked:
    """Replies of K clients, to be added up as they are (``flowerbed.pooling.Adder.add_block``) or cut apart.

    The tensors belong to whoever receives them; nothing writes to them later.
    """

    positions: Sequence[int]
    """Where each client stood in the sequence that the engine was given."""
    streams: Mapping[str, Tensors]
    """Every tensor is ``(K, ...)``; shared buffers are expanded views."""
    metrics: Mapping[str, Sequence[Metric]]
    """K values under each name; ``num-examples`` and ``steps`` are always there."""

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def examples(self) -> Sequence[Metric]:
        """The number of training samples of each client (n_k)."""
        return self.metrics["num-examples"]

    @classmethod
    def of(cls, positions: Sequence[int], replies: Sequence[Reply]) -> Stacked:
        """Stack replies; raises ``ValueError`` if they differ in names or shapes."""
        first = replies[0]
        if any(signature(reply) != signature(first) for reply in replies):
            raise ValueError("the replies differ in the names or shapes of what they send")

        def stacked(stream: str, name: str) -> Tensor:
            values = [reply.streams[stream][name] for reply in replies]
            return torch.stack(values) if len(values) > 1 else values[0].unsqueeze(0)

        streams = {s: {n: stacked(s, n) for n in tensors} for s, tensors in first.streams.items()}
        return cls(positions, streams, {n: [r.metrics[n] for r in replies] for n in first.metrics})

    def replies(self) -> Iterator[tuple[int, Reply]]:
        """Return each client's position and its reply, as views."""
        for k, position in enumerate(self.positions):
            streams = {s: {n: value[k] for n, value in ts.items()} for s, ts in self.streams.items()}
            yield position, Reply(streams, {n: values[k] for n, values in self.metrics.items()})


def signature(reply: Reply) -> object:
    """Return what two replies must have in common to be stacked."""
    shapes = {s: {n: (v.shape, v.dtype) for n, v in tensors.items()} for s, tensors in reply.streams.items()}
    return shapes, set(reply.metrics)
