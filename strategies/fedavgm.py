"""FedAvgM: federated averaging with server momentum.

Reference: Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", 2019, section 4.3.

Server, round t:  d = w_t - sum_k p_k w_k;  v <- beta v + d;  w_{t+1} = w_t - eta_s v.
Client k:         as in FedAvg.

No dampening: a constant d moves the model by d / (1 - beta) a round in the end. beta = 0.9 is the paper's;
beta = 0 is FedAvg bit for bit. BatchNorm statistics are averaged and have no momentum.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowerbed.errors import require
from flowerbed.storage import Tensors
from flowerbed.strategies.base import STRATEGIES
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

MOMENTUM = "server momentum"


@dataclass(frozen=True)
class FedAvgMParams(FedAvgParams):
    """Hyper-parameters of FedAvgM."""

    beta: float = 0.9
    """Share of the last round's v that is kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.beta < 1, f"strategy.beta is {self.beta}; give a number in [0, 1).")


@STRATEGIES.register("fedavgm")
class FedAvgM(FedAvg):
    """Keeps v in ``state["server momentum"]``, one tensor a parameter in its own type."""

    Params = FedAvgMParams
    params: FedAvgMParams

    def step(self, server_round: int, current: Tensors, mean: Tensors) -> Tensors:
        # w - eta_s (beta v + d) is FedAvg's step less eta_s beta v, which is exact where there is no momentum.
        averaged = super().step(server_round, current, mean)
        moving = self.parameters(current)
        kept = {n: self.params.beta * v for n, v in self.state.get(MOMENTUM, {}).items()}
        self.state[MOMENTUM] = {
            n: current[n] - m + kept[n] if n in kept else current[n] - m
            for n, m in mean.items()
            if n in moving
        }
        lr = self.server_lr(server_round)
        return {n: w - lr * kept[n] if n in kept else w for n, w in averaged.items()}
