"""What may stand between a client and its algorithm: changes of its data and of what it sends.

Defences of clients (clipping, noise, compression) and the behaviour of dishonest clients are both this; they
combine with every algorithm because no algorithm knows of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from flowerbed.clients.data import ClientData
from flowerbed.clients.local_round import LocalRound, Reply


@dataclass(frozen=True)
class Request:
    """A message of type ``query`` that a transform may answer in the algorithm's place; it carries no model."""

    client: int
    seed: int
    round: int
    phase: str
    received: Mapping[str, Mapping[str, Tensor]]
    """Streams that the server sent, read-only."""
    hidden_seed: int = 0
    """The seed of what must stay hidden from the server; in a simulation the run's."""


class ClientTransform:
    """Base of client transforms; every method may be left as it is. Picklable, without state of its own."""

    @property
    def stateful(self) -> bool:
        """Whether it keeps anything in ``LocalRound.state`` from one round to the next."""
        return False

    def data(self, client: int, data: ClientData) -> ClientData:
        """Return the training data that the client uses."""
        return data

    def begin(self, local: LocalRound) -> None:
        """Prepare a training round before the algorithm's: set the optional functions of ``local``."""

    def reply(self, local: LocalRound, reply: Reply) -> Reply:
        """Return what the client sends; memory across rounds belongs in ``local.state``."""
        return reply

    def statistics(self, local: LocalRound, reply: Reply) -> Reply:
        """Return what the client answers to a query of the algorithm's own."""
        return reply

    def answer(self, request: Request) -> Reply | None:
        """Answer a query that is the transform's own business; None leaves it to the algorithm."""
        return None
