"""Coordinate-wise median.

Reference: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
Definition 1 and Algorithm 1 (option I).

Server:  w_{t+1}[j] = median_k w_k[j] for every coordinate j (an even number of replies: mean of the middle two).
Client:  plain local training; the paper sends gradients, which is one local step.

Withstands f byzantine clients among n >= 2f + 1 replies: each coordinate then lies between two honest values.
There is no default for f in the paper; it decides nothing here but that check.
"""

from __future__ import annotations

from collections.abc import Sequence

from flowerbed.storage import Tensors
from flowerbed.strategies.base import STRATEGIES
from flowerbed.strategies.robust import RobustStrategy, by_coordinate, median


@STRATEGIES.register("median")
class Median(RobustStrategy):
    """Takes the median of the clients' models in every coordinate."""

    def combine_models(
        self, current: Tensors, models: Sequence[Tensors], parameters: Sequence[str]
    ) -> Tensors:
        return by_coordinate(models, parameters, median)
