"""FedProx: a proximal term that keeps clients near the global model.

Reference: Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, Algorithm 2.

Client k:  min_w  F_k(w) + mu/2 ||w - w_t||^2  (the squared norm), by the local steps of FedAvg.
Server:    as in FedAvg.

The term's gradient mu (w - w_t) is added in closed form, before clipping. It is zero at w_t, so the first local
step is FedAvg's; mu = 0 is FedAvg bit for bit. FedProx does not remove the bias of local training: its fixed
point is the optimum of smoothed client losses. Private parameters have a received value of their own and take
part. The paper's partial local work (gamma-inexact solutions) is ``local.steps`` of our clients.

Default: the paper tunes mu over 0.001, 0.01, 0.1 and 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound
from flowerbed.errors import require
from flowerbed.storage import Tensors
from flowerbed.strategies.base import STRATEGIES
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams


@dataclass(frozen=True)
class FedProxParams(FedAvgParams):
    """Hyper-parameters of FedProx."""

    mu: float = 0.01
    """Weight of the proximal term."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.mu >= 0, f"strategy.mu is {self.mu}; give 0 (FedAvg) or more.")


class FedProxHalf(ClientHalf):
    """Plain local training plus the proximal gradient."""

    def begin(self, local: LocalRound) -> Extras:
        return {"start": local.parameters()} if self.params.mu else {}

    def correct(self, gradients: Tensors, parameters: Mapping[str, Tensor], extras: Extras) -> Tensors:
        if not extras:
            return gradients
        mu, start = self.params.mu, extras["start"]
        return {n: g + mu * (parameters[n] - start[n]) for n, g in gradients.items()}


@STRATEGIES.register("fedprox")
class FedProx(FedAvg):
    """FedAvg's server."""

    Params = FedProxParams
    Half = FedProxHalf
    params: FedProxParams
