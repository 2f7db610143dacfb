"""FedDC: local drift decoupled from the model, and corrected.

Reference: Gao et al., "FedDC: Federated Learning with Non-IID Data via Local Drift Decoupling and Correction",
CVPR 2022, Algorithm 1.

Client i:  y_i ~ argmin_y  F_i(y) + alpha/2 ||y + h_i - w_t||^2 + <c - c_i, y>, by local steps from w_t;
           h_i <- h_i + (y_i - w_t);   c_i <- c_i - c + (w_t - y_i) / (K eta).
Server:    h <- h + (1 / N) sum_S (y_i - w_t);   w_{t+1} = mean_S y_i + h;   c as in SCAFFOLD.
           Means are uniform, N is all clients.

c - c_i is the paper's gradient correction (g_i - g) / (K eta), with the last updates g_i = y_i - w_t; like the
released code, we keep it by SCAFFOLD's option II, of which everything said in ``scaffold`` holds. h is the mean
of all N drifts, again as in the released code; with full participation, w_{t+1} is the paper's mean of
y_i + h_i. At the fixed point all y_i are w, h is zero, and alpha h_i - c_i is minus the gradient of F_i: the
optimum of the mean loss. alpha = 0 without h would be SCAFFOLD; alpha must be above 0, since nothing else bounds
the drifts.

Deviations: every client counts the same; the released code weighs alpha and c by the clients' sizes.

Of FedDC and Mime the library has FedDC: it is two more terms of the gradient, as every drift correction here,
whereas Mime runs the server's optimizer inside every client step and needs two gradients for it.

Default: alpha = 0.01, as in the released CIFAR examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flowerbed.clients.local_round import MODEL, Extras, LocalRound, Trained
from flowerbed.errors import require
from flowerbed.pooling import UNIFORM, Mean, Pooling
from flowerbed.storage import Tensors
from flowerbed.strategies.base import STRATEGIES
from flowerbed.strategies.scaffold import Scaffold, ScaffoldHalf, ScaffoldParams

DRIFT = "drift"
"""Group of h (server) and h_i (client)."""


@dataclass(frozen=True)
class FedDCParams(ScaffoldParams):
    """Hyper-parameters of FedDC; those of SCAFFOLD keep their meaning."""

    alpha: float = 0.01
    """Weight of the penalty on y + h_i - w_t."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha > 0, f"strategy.alpha is {self.alpha}; give a number above 0, or use scaffold.")


class FedDCHalf(ScaffoldHalf):
    """SCAFFOLD's client with a penalty that is centred on w_t - h_i."""

    def begin(self, local: LocalRound) -> Extras:
        extras = super().begin(local)
        start = extras["start"]
        drift = {n: h.to(local.device) for n, h in local.state.get(DRIFT, {}).items()}
        return {**extras, "drift": drift or {n: torch.zeros_like(w) for n, w in start.items()}}

    def correct(self, gradients: Tensors, parameters: Mapping[str, Tensor], extras: Extras) -> Tensors:
        alpha, start, drift = self.params.alpha, extras["start"], extras["drift"]
        controlled = super().correct(gradients, parameters, extras)
        return {n: g + alpha * (parameters[n] + drift[n] - start[n]) for n, g in controlled.items()}

    def end(self, local: LocalRound, trained: Trained, extras: Extras) -> Mapping[str, Mapping[str, Tensor]]:
        start, drift = extras["start"], extras["drift"]
        local.state[DRIFT] = {
            n: drift[n] + (y.detach() - start[n]) for n, y in local.parts.parameters.items()
        }
        return super().end(local, trained, extras)


@STRATEGIES.register("feddc")
class FedDC(Scaffold):
    """Keeps h in ``state["drift"]``, beside SCAFFOLD's c."""

    Params = FedDCParams
    Half = FedDCHalf
    params: FedDCParams

    @property
    def pooled(self) -> Pooling | None:
        return {**(super().pooled or {}), DRIFT: Mean(MODEL, UNIFORM)}

    def combine(
        self, server_round: int, current: Tensors, means: Mapping[str, Tensors], count: int
    ) -> Tensors:
        averaged = super().combine(server_round, current, means, count)
        share, moving = count / self.clients, self.parameters(current)
        change = {n: share * (m - current[n]) for n, m in means[DRIFT].items() if n in moving}
        old = self.state.get(DRIFT, {})
        drift = {n: old[n] + d if n in old else d for n, d in change.items()}
        self.state[DRIFT] = drift
        return {n: w + drift[n] if n in drift else w for n, w in averaged.items()}
