"""FedAvg: federated averaging.

Reference: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, Algorithm 1.

Server, round t:  w_{t+1} = w_t + eta_s (sum_k p_k w_k - w_t),  p_k = n_k / sum_j n_j over the replies.
Client k:         local steps on the mean cross-entropy of its own data, starting from w_t.

The paper is ``server_lr = 1`` (eta_s) and ``weighting = "examples"``. BatchNorm statistics are averaged like
parameters, but are never scaled by the server's learning rate; integer counters take the largest value.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowerbed.errors import require
from flowerbed.storage import Tensors
from flowerbed.strategies.aggregation import weighted_mean
from flowerbed.strategies.base import STRATEGIES, ClientReply, FederatedStrategy


@dataclass(frozen=True)
class FedAvgParams:
    """Hyper-parameters of FedAvg's server."""

    weighting: str = "examples"
    """examples: p_k proportional to n_k, as in the paper; uniform: every reply weighs the same."""
    server_lr: float = 1.0
    """eta_s; 1 replaces the model by the mean."""

    def __post_init__(self) -> None:
        require(
            self.weighting in ("examples", "uniform"),
            f"strategy.weighting is '{self.weighting}'; choose examples or uniform.",
        )
        require(self.server_lr > 0, f"strategy.server_lr is {self.server_lr}; give a number above 0.")


@STRATEGIES.register("fedavg")
class FedAvg(FederatedStrategy):
    """Averages the clients' models. The client half is the base class's: plain local training."""

    Params = FedAvgParams
    params: FedAvgParams

    def aggregate(self, server_round: int, current: Tensors, replies: list[ClientReply]) -> Tensors:
        weights = [r.examples if self.params.weighting == "examples" else 1.0 for r in replies]
        mean = weighted_mean([r.model for r in replies], weights)
        if self.params.server_lr == 1.0:
            return mean
        lr, moving = self.params.server_lr, self.parameters(current)
        return {n: current[n] + lr * (m - current[n]) if n in moving else m for n, m in mean.items()}
