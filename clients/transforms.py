"""What may stand between a client and its algorithm: changes of its data and of what it sends.

Defences of clients (clipping, noise, compression) and the behaviour of dishonest clients are both this; they
combine with every algorithm because no algorithm knows of them.
"""

from __future__ import annotations

from flowerbed.clients.data import ClientData
from flowerbed.clients.local_round import LocalRound, Reply


class ClientTransform:
    """Base of client transforms; every method may be left as it is. Picklable, without state of its own."""

    def data(self, client: int, data: ClientData) -> ClientData:
        """Return the training data that the client uses."""
        return data

    def reply(self, local: LocalRound, reply: Reply) -> Reply:
        """Return what the client sends; memory across rounds belongs in ``local.state``."""
        return reply
