"""FedAvg: federated averaging.

Reference: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, Algorithm 1.

Server, round t:  w_{t+1} = w_t + eta_s (sum_k p_k w_k - w_t),  p_k = n_k / sum_j n_j over the replies.
Client k:         local steps on the mean cross-entropy of its own data, starting from w_t.

The paper is ``server_lr = 1`` (eta_s) and ``weighting = "examples"``. BatchNorm statistics are averaged like
parameters, but are never scaled by the server's learning rate; integer counters take the largest value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flowerbed.clients.local_round import MODEL
from flowerbed.errors import require
from flowerbed.pooling import Mean, Pooling
from flowerbed.storage import Tensors
from flowerbed.strategies.base import STRATEGIES, ClientReply, FederatedStrategy
from flowerbed.strategies.server_lr import ServerRate


@dataclass(frozen=True)
class FedAvgParams(ServerRate):
    """Hyper-parameters of FedAvg's server; with eta_s = 1 the mean replaces the model."""

    weighting: str = "examples"
    """examples: p_k proportional to n_k, as in the paper; uniform: every reply weighs the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.weighting in ("examples", "uniform"),
            f"strategy.weighting is '{self.weighting}'; choose examples or uniform.",
        )


@STRATEGIES.register("fedavg")
class FedAvg(FederatedStrategy):
    """Averages the clients' models. The client half is the base class's: plain local training."""

    Params = FedAvgParams
    params: FedAvgParams

    @property
    def pooled(self) -> Pooling | None:
        return {MODEL: Mean(MODEL, self.params.weighting)}

    def combine(
        self, server_round: int, current: Tensors, means: Mapping[str, Tensors], count: int
    ) -> Tensors:
        return self.step(server_round, current, means[MODEL])

    def weights(self, replies: list[ClientReply]) -> list[float]:
        """Return what each reply weighs under ``weighting`` (not normalised), for those who take them one by one."""
        return [r.examples if self.params.weighting == "examples" else 1.0 for r in replies]

    def step(self, server_round: int, current: Tensors, mean: Tensors) -> Tensors:
        """Return the next model, given the broadcast one and the mean of the clients'."""
        lr = self.server_lr(server_round)
        if lr == 1.0:
            return mean
        moving = self.parameters(current)
        return {n: current[n] + lr * (m - current[n]) if n in moving else m for n, m in mean.items()}

    def server_lr(self, server_round: int) -> float:
        """Return eta_s of this round."""
        return self.params.server_lr_at(server_round, self.setting.rounds if self.setting else 0)
