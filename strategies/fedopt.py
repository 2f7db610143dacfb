"""FedAdagrad, FedAdam and FedYogi: adaptive optimizers on the server.

Reference: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, Algorithm 2.

Server, round t, with D = sum_k p_k w_k - w_t and everything element by element:

    m <- beta_1 m + (1 - beta_1) D
    v <- v + D^2                                   FedAdagrad
         beta_2 v + (1 - beta_2) D^2               FedAdam
         v - (1 - beta_2) D^2 sign(v - D^2)        FedYogi
    w_{t+1} = w_t + eta_s m / (sqrt(v) + tau)

Client k: as in FedAvg.

m starts at 0, v at tau^2, the least that the paper allows, and there is no bias correction. ``form = "flower"``
is Flower's variant: v starts at 0, and FedAdam multiplies eta_s by sqrt(1 - beta_2^(t+1)) / (1 - beta_1^(t+1)),
t = 1, 2, ... Unlike Flower's, these touch parameters only (BatchNorm statistics are averaged), and a float32
model stays float32.

Defaults: beta_1 = 0.9 (0 for FedAdagrad), beta_2 = 0.99 and tau = 1e-3 are the paper's; it tunes eta_s, so
ours are starting points: in the first rounds every weight moves by about eta_s, whatever the clients' steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowerbed.errors import require
from flowerbed.storage import Tensors
from flowerbed.strategies.base import STRATEGIES
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

FIRST, SECOND = "first moment", "second moment"


@dataclass(frozen=True)
class FedOptParams(FedAvgParams):
    """Hyper-parameters of the adaptive server optimizers."""

    server_lr: float = 0.01
    """eta_s in the first round."""
    beta_1: float = 0.9
    """Decay of the mean m of updates."""
    beta_2: float = 0.99
    """Decay of the mean v of squared updates; FedAdagrad has none."""
    tau: float = 1e-3
    """Degree of adaptivity, added to sqrt(v); the larger, the closer to plain momentum."""
    form: str = "paper"
    """paper, or flower (v from 0, Adam with Flower's bias correction)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.beta_1 < 1, f"strategy.beta_1 is {self.beta_1}; give a number in [0, 1).")
        require(0 <= self.beta_2 < 1, f"strategy.beta_2 is {self.beta_2}; give a number in [0, 1).")
        require(self.tau > 0, f"strategy.tau is {self.tau}; give a number above 0.")
        require(self.form in ("paper", "flower"), f"strategy.form is '{self.form}'; choose paper or flower.")


@dataclass(frozen=True)
class FedAdagradParams(FedOptParams):
    """Hyper-parameters of FedAdagrad."""

    server_lr: float = 0.1
    """eta_s in the first round."""
    beta_1: float = 0.0
    """Decay of the mean m of updates; 0 in the paper's FedAdagrad."""


class FedOpt(FedAvg):
    """The common core; the three differ in ``second_moment``. State: m and v, in the parameters' types."""

    Params = FedOptParams
    params: FedOptParams

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """Return the next v, given the last one and D^2."""
        raise NotImplementedError

    def correction(self, server_round: int) -> float:
        """Return the factor on eta_s that makes up for moments that start at 0."""
        return 1.0

    def step(self, server_round: int, current: Tensors, mean: Tensors) -> Tensors:
        params, moving = self.params, self.parameters(current)
        lr = self.server_lr(server_round) * self.correction(server_round)
        start = params.tau**2 if params.form == "paper" else 0.0
        old_m, old_v = self.state.get(FIRST, {}), self.state.get(SECOND, {})
        first: Tensors = {}
        second: Tensors = {}
        following = dict(mean)
        for name in (n for n in mean if n in moving):
            w = current[name]
            update = mean[name] - w
            m = old_m[name] if name in old_m else torch.zeros_like(w)
            v = old_v[name] if name in old_v else torch.full_like(w, start)
            first[name] = params.beta_1 * m + (1 - params.beta_1) * update
            second[name] = self.second_moment(v, update.square())
            following[name] = w + lr * first[name] / (second[name].sqrt() + params.tau)
        self.state[FIRST], self.state[SECOND] = first, second
        return following


@STRATEGIES.register("fedadagrad")
class FedAdagrad(FedOpt):
    """v is the sum of all squared updates."""

    Params = FedAdagradParams

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        return v + square


@STRATEGIES.register("fedadam")
class FedAdam(FedOpt):
    """v is an exponential mean of squared updates."""

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        return self.params.beta_2 * v + (1 - self.params.beta_2) * square

    def correction(self, server_round: int) -> float:
        if self.params.form == "paper":
            return 1.0
        power = server_round + 1
        return math.sqrt(1 - self.params.beta_2**power) / (1 - self.params.beta_1**power)


@STRATEGIES.register("fedyogi")
class FedYogi(FedOpt):
    """v moves towards the squared update by a step that does not depend on v: slower down than Adam's."""

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        return v - (1 - self.params.beta_2) * square * torch.sign(v - square)
