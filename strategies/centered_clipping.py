"""Centred clipping.

Reference: Karimireddy, He, Jaggi, "Learning from History for Byzantine Robust Optimization", ICML 2021,
Algorithm 2 (the aggregator) and section 5.

Server, with u_k = w_k - w_t and the center v that the last round ended with (0 at first), L times:

    v <- v + 1/n sum_k (u_k - v) min(1, tau / ||u_k - v||),       then w_{t+1} = w_t + v.

Client:  plain local training.

Deviation: the paper's workers send momentum, m_k = (1 - beta) g_k + beta m_k, kept over all rounds. A
client that takes part now and then has no such thing; ``local.momentum`` with ``local.persist`` is the closest.
One client moves the center by tau / n an iteration at most. The paper proves robustness for a byzantine share
f / n of at most 0.1, which is the condition checked here. Norms are over all parameters together. Defaults:
the paper uses L = 1 and tau = 10 for gradients; an update is about a learning rate smaller, so tau = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flowerbed.clients.updates import wide
from flowerbed.errors import require
from flowerbed.storage import Tensors
from flowerbed.strategies.base import STRATEGIES
from flowerbed.strategies.robust import RobustParams, RobustStrategy

CENTER = "center"


@dataclass(frozen=True)
class CenteredClippingParams(RobustParams):
    """Hyper-parameters of centred clipping."""

    tau: float = 1.0
    """Radius around the center beyond which a client is clipped."""
    L: int = 1
    """Iterations a round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            math.isfinite(self.tau) and self.tau > 0,
            f"strategy.tau is {self.tau}; give a finite radius above 0.",
        )
        require(self.L >= 1, f"strategy.L is {self.L}; give at least 1 iteration.")


@STRATEGIES.register("centered_clipping")
class CenteredClipping(RobustStrategy):
    """Averages the clients' updates, clipped around the aggregate of the round before."""

    Params = CenteredClippingParams
    params: CenteredClippingParams
    condition = "max(10f, 1)"

    def least_replies(self) -> int:
        return max(10 * self.params.f, 1)

    def combine_models(
        self, current: Tensors, models: Sequence[Tensors], parameters: Sequence[str]
    ) -> Tensors:
        start = {n: wide(current[n]) for n in parameters}
        center = self.state.get(CENTER) or {n: torch.zeros_like(v) for n, v in start.items()}
        for _ in range(self.params.L):
            center = self._iterate(center, [{n: wide(m[n]) - start[n] for n in parameters} for m in models])
        self.state[CENTER] = center
        return {n: (start[n] + center[n]).to(models[0][n].dtype) for n in parameters}

    def _iterate(self, center: Tensors, updates: Sequence[Tensors]) -> Tensors:
        moved = {n: v.clone() for n, v in center.items()}
        for update in updates:
            offset = {n: update[n] - center[n] for n in center}
            length = math.sqrt(sum(float(v.abs().square().sum()) for v in offset.values()))
            share = min(1.0, self.params.tau / length) if length else 1.0
            for n, v in offset.items():
                moved[n] += v * (share / len(updates))
        return moved
