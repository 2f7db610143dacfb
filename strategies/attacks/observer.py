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
        for reply in replies:
            # An answer without a model, to a query, is no update.
            if self.wants(server_round, self.client_of(reply.node)) and MODEL in reply.streams:
                self.keep(server_round, current, reply)
        return replies

    def client_of(self, node: int) -> int:
        """Return a node's number as a client."""
        return node - self._first

    def wants(self, server_round: int, client: int) -> bool:
        """Return whether a client's exchange of this round is to be kept."""
        return (self._rounds is None or server_round in self._rounds) and (
            self._clients is None or client in self._clients
        )

    def before(self, server_round: int, client: int) -> list[Observation]:
        """Return what was kept of a client in earlier rounds; also after a run was resumed."""
        kept = (self._folder / name_of(earlier, client) for earlier in sorted(self._rounds or ()))
        found = (Observation.load(stem) for stem in kept if stem.with_suffix(".json").exists())
        return [observation for observation in found if observation.round < server_round]

    def keep(self, server_round: int, sent: Tensors, reply: ClientReply) -> None:
        """Write the observation of a reply to ``sent``."""
        told = reply.metrics.get(WEIGHT)
        examples = None if told is None else round(scalar(told))
        returned = {name: value for name, value in reply.model.items() if name in sent}
        client = self.client_of(reply.node)
        seen = Observation(client, server_round, self._model, dict(sent), returned, examples)
        seen.save(self._folder / name_of(server_round, client))


def name_of(server_round: int, client: int) -> str:
    """Return the stem of an observation's files."""
    return f"round-{server_round:05d}-client-{client:06d}"


def stems(folder: Path) -> list[Path]:
    """Return the stems of all observations in a folder, by round and client."""
    return sorted(path.with_suffix("") for path in folder.glob("round-*.json"))
