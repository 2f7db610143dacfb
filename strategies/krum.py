"""Krum and multi-Krum.

Reference: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS
2017, section 4 (Krum) and section 6 (multi-Krum).

Server:  s(i) = sum over the n - f - 2 clients j nearest to i of ||w_i - w_j||^2;
         w_{t+1} = mean of the m models with the smallest scores (m = 1 is Krum). Equal scores are decided by
         the next nearest clients; the paper takes any.
Client:  plain local training; the paper sends gradients, which is one local step.

Withstands f byzantine clients among n >= 2f + 3 replies. m = n - f by default for multi-Krum, the clients
that are left when all byzantine ones are; with f = 0 this is the mean with equal weights. A larger m surely
includes byzantine clients and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from flowerbed.errors import require
from flowerbed.storage import Tensors
from flowerbed.strategies import robust
from flowerbed.strategies.base import STRATEGIES


@STRATEGIES.register("krum")
class Krum(robust.RobustStrategy):
    """Takes the one model whose neighbours are nearest."""

    condition = "2f + 3"

    def least_replies(self) -> int:
        return 2 * self.params.f + 3

    def selected(self, replies: int) -> int:
        """Return m, how many of ``replies`` models are averaged."""
        return 1

    def combine_models(
        self, current: Tensors, models: Sequence[Tensors], parameters: Sequence[str]
    ) -> Tensors:
        order = robust.krum_order(robust.squared_distances(models, parameters), self.params.f)
        best = order[: self.selected(len(models))]
        # A trimmed mean that trims nothing is the mean in an order of its own.
        return robust.by_coordinate([models[i] for i in best], parameters, partial(robust.trimmed_mean, f=0))


@dataclass(frozen=True)
class MultiKrumParams(robust.RobustParams):
    """Hyper-parameters of multi-Krum."""

    m: int = 0
    """Models averaged; 0 means n - f, with n the replies of the round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.m >= 0, f"strategy.m is {self.m}; give 0 (n - f) or more.")


@STRATEGIES.register("multi_krum")
class MultiKrum(Krum):
    """Averages the m models whose neighbours are nearest."""

    Params = MultiKrumParams
    params: MultiKrumParams
    condition = "max(2f + 3, m + f)"

    def selected(self, replies: int) -> int:
        return self.params.m or replies - self.params.f

    def least_replies(self) -> int:
        return max(super().least_replies(), self.params.m + self.params.f)
