"""Keeps what the server sees of chosen clients, of any strategy, in simulation or on real devices."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from flowerbed.clients.local_round import MODEL
from flowerbed.models.base import ModelSpec
from flowerbed.pooling import WEIGHT
from flowerbed.storage import Tensors
from flowerbed.strategies.aggregation import scalar
from flowerbed.strategies.attacks.observation import COHORT, Observation
from flowerbed.strategies.base import ClientReply, ServerTransform

SERVER, SUM, RELEASED = "server", "sum", "released"
"""What is seen: every reply; the mean that secure aggregation leaves; the model that a round ends with."""


class Observer(ServerTransform):
    """Writes an observation for every chosen reply, or for the round, and changes nothing.

    Of single replies it stands before all other transforms, where they are what they were on the wire. Under secure
    aggregation that is noise; the server learns the mean, which is in every reply once the masks are off. What is
    released are a round's model, and who took part. The algorithm never gets to know of it.
    """

    def __init__(
        self,
        folder: Path,
        model: ModelSpec,
        *,
        clients: Collection[int] | None = None,
        rounds: Collection[int] | None = None,
        first_node: int = 0,
        view: str = SERVER,
    ) -> None:
        """``clients`` and ``rounds`` are those to keep, None for all; ``first_node`` is the node id of client 0."""
        self._folder, self._model = folder, model
        self._clients, self._rounds, self._first = clients, rounds, first_node
        self._view = view
        self._cohort: Sequence[ClientReply] = ()

    def replies(
        self, server_round: int, current: Tensors, replies: list[ClientReply], parameters: frozenset[str]
    ) -> list[ClientReply]:
        # An answer without a model, to a query, is no update.
        updates = [reply for reply in replies if MODEL in reply.streams]
        if not updates or not self._wanted(server_round):
            return replies
        if self._view == SERVER:
            for reply in updates:
                client = reply.node - self._first
                if self._clients is None or client in self._clients:
                    self._keep(server_round, client, current, reply.model, [reply])
        elif self._view == SUM:
            self._keep(server_round, COHORT, current, updates[0].model, updates)
        self._cohort = updates
        return replies

    def model(
        self, server_round: int, current: Tensors, model: Tensors, replies: int, parameters: frozenset[str]
    ) -> Tensors:
        if self._view == RELEASED and self._wanted(server_round):
            self._keep(server_round, COHORT, current, model, self._cohort)
        return model

    def _wanted(self, server_round: int) -> bool:
        return self._rounds is None or server_round in self._rounds

    def _keep(
        self, server_round: int, client: int, sent: Tensors, found: Tensors, told: Sequence[ClientReply]
    ) -> None:
        counts = [reply.metrics.get(WEIGHT) for reply in told]
        examples = (
            None if None in counts else sum(round(scalar(count)) for count in counts if count is not None)
        )
        returned = {name: value for name, value in found.items() if name in sent}
        members = tuple(reply.node - self._first for reply in told) if client == COHORT else ()
        Observation(client, server_round, self._model, dict(sent), returned, examples, members).save(
            self._folder / name_of(server_round, client)
        )


def name_of(server_round: int, client: int) -> str:
    """Return the stem of an observation's files."""
    return f"round-{server_round:05d}-" + ("cohort" if client == COHORT else f"client-{client:06d}")


def stems(folder: Path) -> list[Path]:
    """Return the stems of all observations in a folder, by round and client."""
    return sorted(path.with_suffix("") for path in folder.glob("round-*.json"))
