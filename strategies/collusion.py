"""Byzantine clients that know what the honest ones send: a simulation of the attack, not of a server.

Reference: Xie, Koyejo, Gupta, "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation",
UAI 2020, section 4. With H the honest clients of the round, every byzantine client sends the update

    u' = -s / |H| sum_{k in H} (w_k - w_t)

over the model's parameters. A round without an honest client is left as it is.
"""

from __future__ import annotations

from dataclasses import replace

from flowerbed.clients.local_round import MODEL
from flowerbed.clients.updates import scaled
from flowerbed.storage import Tensors
from flowerbed.strategies.aggregation import weighted_mean
from flowerbed.strategies.base import ClientReply, ServerTransform


class InnerProductManipulation(ServerTransform):
    """Replaces the replies of byzantine clients by the negative mean of the honest ones."""

    def __init__(self, nodes: frozenset[int], scale: float) -> None:
        """``nodes`` are the byzantine clients' node ids, ``scale`` is s (epsilon in the paper)."""
        self.nodes = nodes
        self.scale = scale

    def replies(
        self, server_round: int, current: Tensors, replies: list[ClientReply], parameters: frozenset[str]
    ) -> list[ClientReply]:
        honest = [reply.model for reply in replies if reply.node not in self.nodes]
        if not honest:
            return replies
        mean = weighted_mean(honest, [1.0] * len(honest))
        forged = {n: v for n, v in scaled(current, mean, parameters, -self.scale).items() if n in parameters}
        return [
            replace(reply, streams={**reply.streams, MODEL: {**reply.model, **forged}})
            if reply.node in self.nodes
            else reply
            for reply in replies
        ]
