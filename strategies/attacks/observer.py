"""Keeps what the server sees of chosen clients, of any strategy, in simulation or on real devices."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from flowerbed.clients.local_round import MODEL
from flowerbed.models.base import ModelSpec
from flowerbed.pooling import WEIGHT
from flowerbed.storage import Tensors
from flowerbed.strategies.aggregation import scalar
from flowerbed.strategies.attacks.observation import Observation
from flowerbed.strategies.base import ClientReply, ServerTransform


class Observer(ServerTransform):
    """Writes an observation for every chosen reply, and changes nothing.

    It stands before all other transforms, where replies are what they were on the wire: masked, if aggregation is
    secure. The algorithm never gets to know of it.
    """

    def __init__(
        self,
        folder: Path,
        model: ModelSpec,
        *,
        clients: Collection[int] | None = None,
        rounds: Collection[int] | None = None,
        first_node: int = 0,
    ) -> None:
        """``clients`` and ``rounds`` are those to keep, None for all; ``first_node`` is the node id of client 0."""
        self._folder, self._model = folder, model
        self._clients, self._rounds, self._first = clients, rounds, first_node

    def replies(
        self, server_round: int, current: Tensors, replies: list[ClientReply], parameters: frozenset[str]
    ) -> list[ClientReply]:
        if self._rounds is None or server_round in self._rounds:
            for reply in replies:
                client = reply.node - self._first
                # An answer without a model, to a query, is no update.
                if (self._clients is None or client in self._clients) and MODEL in reply.streams:
                    self._keep(server_round, client, current, reply)
        return replies

    def _keep(self, server_round: int, client: int, sent: Tensors, reply: ClientReply) -> None:
        told = reply.metrics.get(WEIGHT)
        examples = None if told is None else round(scalar(told))
        returned = {name: value for name, value in reply.model.items() if name in sent}
        Observation(client, server_round, self._model, dict(sent), returned, examples).save(
            self._folder / name_of(server_round, client)
        )


def name_of(server_round: int, client: int) -> str:
    """Return the stem of an observation's files."""
    return f"round-{server_round:05d}-client-{client:06d}"


def stems(folder: Path) -> list[Path]:
    """Return the stems of all observations in a folder, by round and client."""
    return sorted(path.with_suffix("") for path in folder.glob("round-*.json"))
