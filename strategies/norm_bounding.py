"""Norm bounding: FedAvg with every client's update clipped.

Reference: Sun et al., "Can You Really Backdoor Federated Learning?", 2019, section 5 (norm thresholding).

Server:  w_{t+1} = w_t + sum_k p_k (w_k - w_t) / max(1, ||w_k - w_t|| / M).
Client:  plain local training.

The norm is over all parameters together; BatchNorm statistics are averaged as they are. One client moves the
model by p_k M at most, so f byzantine ones by f M / n with equal weights, which are the default here because a
number of examples is whatever a client says. The paper's weak differential privacy is ``privacy.mode=central``.
M has no default that fits every model: the paper's order of magnitude is the usual norm of an honest update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from flowerbed.clients.local_round import MODEL
from flowerbed.clients.updates import clip_factor, scaled, update_norm
from flowerbed.errors import require
from flowerbed.storage import Tensors
from flowerbed.strategies.base import STRATEGIES, ClientReply
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams


@dataclass(frozen=True)
class NormBoundingParams(FedAvgParams):
    """Hyper-parameters of norm bounding."""

    weighting: str = "uniform"
    """uniform: every reply weighs the same; examples: p_k proportional to n_k."""
    M: float = 1.0
    """Largest norm of an update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            math.isfinite(self.M) and self.M > 0,
            f"strategy.M is {self.M}; give a finite norm above 0.",
        )


@STRATEGIES.register("norm_bounding")
class NormBounding(FedAvg):
    """Averages the clients' models after clipping their updates."""

    individual_replies = True
    Params = NormBoundingParams
    params: NormBoundingParams

    def aggregate(self, server_round: int, current: Tensors, replies: list[ClientReply]) -> Tensors:
        return super().aggregate(server_round, current, [self._bounded(current, r) for r in replies])

    def _bounded(self, current: Tensors, reply: ClientReply) -> ClientReply:
        moving = self.parameters(current)
        factor = clip_factor(update_norm(current, reply.model, moving), self.params.M)
        return replace(reply, streams={**reply.streams, MODEL: scaled(current, reply.model, moving, factor)})
