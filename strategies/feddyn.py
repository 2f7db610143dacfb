"""FedDyn: dynamic regularisation.

Reference: Acar et al., "Federated Learning Based on Dynamic Regularization", ICLR 2021, Algorithm 1.

Client k:  w_k ~ argmin_w  F_k(w) - <g_k, w> + alpha/2 ||w - w_t||^2, by the local steps of FedAvg;
           g_k <- g_k - alpha (w_k - w_t).
Server:    h <- h - (alpha / N) sum_S (w_k - w_t);   w_{t+1} = mean_S w_k - h / alpha.
           The mean is uniform, N is all clients.

g_k and h start at zero; h stays the mean of all N g_k. At the fixed point the clients agree, g_k is the gradient
of F_k there, and h is zero: the optimum of the mean loss, without drift. After an exact local solution g_k is
the gradient of F_k at w_k.

Deviations: every client counts the same, as in the paper; the released code weighs alpha by the clients' sizes.
The quadratic's gradient is added in closed form, where that code uses weight decay. The model that is evaluated
is w_{t+1}; the authors report the mean of the w_k too. BatchNorm statistics are averaged. A reply that is lost
after training leaves h and that client's g_k apart.

Default: alpha = 0.01 as in the released CIFAR examples; the paper tunes over 0.1, 0.01 and 0.001. The released
code clips gradient norms at 10 (``local.clip_norm``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import MODEL, Extras, LocalRound, Trained
from flowerbed.errors import require
from flowerbed.pooling import UNIFORM, Mean, Pooling
from flowerbed.storage import Tensors
from flowerbed.strategies.base import STRATEGIES, FederatedStrategy

DUAL = "dual"
"""Group of h (server) and g_k (client)."""


@dataclass(frozen=True)
class FedDynParams:
    """Hyper-parameters of FedDyn."""

    alpha: float = 0.01
    """Weight of the quadratic term; it also scales the linear one."""

    def __post_init__(self) -> None:
        require(
            self.alpha > 0, f"strategy.alpha is {self.alpha}; give a number above 0 (FedDyn divides by it)."
        )


class FedDynHalf(ClientHalf):
    """Local steps along the gradient of the regularised loss."""

    stateful = True

    def begin(self, local: LocalRound) -> Extras:
        start = local.parameters()
        dual = {n: g.to(local.device) for n, g in local.state.get(DUAL, {}).items()}
        return {"start": start, "dual": dual or {n: torch.zeros_like(w) for n, w in start.items()}}

    def correct(self, gradients: Tensors, parameters: Mapping[str, Tensor], extras: Extras) -> Tensors:
        alpha, start, dual = self.params.alpha, extras["start"], extras["dual"]
        return {n: g - dual[n] + alpha * (parameters[n] - start[n]) for n, g in gradients.items()}

    def end(self, local: LocalRound, trained: Trained, extras: Extras) -> Mapping[str, Mapping[str, Tensor]]:
        start, dual = extras["start"], extras["dual"]
        local.state[DUAL] = {
            n: dual[n] - self.params.alpha * (w.detach() - start[n])
            for n, w in local.parts.parameters.items()
        }
        return super().end(local, trained, extras)


@STRATEGIES.register("feddyn")
class FedDyn(FederatedStrategy):
    """Keeps h in ``state["dual"]``."""

    Params = FedDynParams
    Half = FedDynHalf
    params: FedDynParams

    @property
    def pooled(self) -> Pooling | None:
        return {MODEL: Mean(MODEL, UNIFORM)}

    def combine(
        self, server_round: int, current: Tensors, means: Mapping[str, Tensors], count: int
    ) -> Tensors:
        mean, alpha, moving = means[MODEL], self.params.alpha, self.parameters(current)
        share = alpha * count / self.clients
        old = self.state.get(DUAL, {})
        dual: Tensors = {}
        for name in (n for n in mean if n in moving):
            h = old[name] if name in old else torch.zeros_like(current[name])
            dual[name] = h - share * (mean[name] - current[name])
        self.state[DUAL] = dual
        return {n: m - dual[n] / alpha if n in dual else m for n, m in mean.items()}
