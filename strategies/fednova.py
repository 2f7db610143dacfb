"""FedNova: normalised averaging for clients that do different amounts of work.

Reference: Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization",
NeurIPS 2020, equations 6 to 10.

Client k:  local SGD moves w by -eta sum_j a_kj g_kj over its gradients; it sends w_k and A_k = eta ||a_k||_1.
Server:    d_k = (w_t - w_k) / A_k;   w_{t+1} = w_t - eta_s (sum_k p_k A_k) (sum_k p_k d_k).

A_k (``flowerbed.clients.gradient_weight``) covers momentum, Nesterov momentum, schedules and the proximal term
of weight mu, which is FedProx's; the optimizer must be SGD, with momentum that starts anew each round. With
equal A_k this is FedAvg bit for bit. Written as w_{t+1} = w_t + eta_s sum_k p_k r_k (w_k - w_t) with
r_k = sum_j p_j A_j / A_k, it is FedAvg over updates that are scaled first. BatchNorm statistics are averaged
unscaled.

Deviations: A_k contains the step sizes, so that clients may have schedules; the paper's eta is one number. Its
server momentum on top is not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowerbed.clients.gradient_weight import gradient_weight, require_gradient_weight
from flowerbed.clients.local_round import MODEL, LocalRound, Reply
from flowerbed.storage import Tensors
from flowerbed.strategies.aggregation import scalar
from flowerbed.strategies.base import STRATEGIES, ClientReply, Setting
from flowerbed.strategies.fedavg import FedAvg
from flowerbed.strategies.fedprox import FedProxHalf, FedProxParams

WEIGHT = "gradient-weight"


@dataclass(frozen=True)
class FedNovaParams(FedProxParams):
    """Hyper-parameters of FedNova."""

    mu: float = 0.0
    """Weight of the proximal term; 0 leaves it out."""


class FedNovaHalf(FedProxHalf):
    """FedProx's client, which also reports A_k."""

    def run(self, local: LocalRound) -> Reply:
        reply = super().run(local)
        weight = gradient_weight(local.local, local.clock, self.params.mu)
        return replace(reply, metrics={**reply.metrics, WEIGHT: weight})


@STRATEGIES.register("fednova")
class FedNova(FedAvg):
    """Scales every client's update to the common amount of work, then averages."""

    Params = FedNovaParams
    Half = FedNovaHalf
    params: FedNovaParams
    individual_replies = True

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        require_gradient_weight("FedNova", setting.local)

    def aggregate(self, server_round: int, current: Tensors, replies: list[ClientReply]) -> Tensors:
        moving = self.parameters(current)
        ratios = work_ratios([scalar(r.metrics[WEIGHT]) for r in replies], self.weights(replies))
        scaled = [
            replace(r, streams={**r.streams, MODEL: _scaled(current, r.model, ratio, moving)})
            for r, ratio in zip(replies, ratios, strict=True)
        ]
        return super().aggregate(server_round, current, scaled)


def work_ratios(work: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Return r_k = sum_j p_j A_j / A_k for p_j proportional to ``weights``; exactly 1 where all A are equal."""
    total = sum(weights)
    return [sum(p * (a / mine) for a, p in zip(work, weights, strict=True)) / total for mine in work]


def _scaled(current: Tensors, model: Tensors, ratio: float, moving: frozenset[str]) -> Tensors:
    """Return w_t + ratio (w_k - w_t) for parameters; the model itself where the ratio is 1."""

    def lerp(start: Tensor, end: Tensor) -> Tensor:
        return torch.lerp(start.double(), end.double(), ratio).to(end.dtype)

    return {n: lerp(current[n], w) if n in moving else w for n, w in model.items()}
