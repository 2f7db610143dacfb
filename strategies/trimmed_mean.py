"""Coordinate-wise trimmed mean.

Reference: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
Definition 2 and Algorithm 1 (option II).

Server:  w_{t+1}[j] = mean of the w_k[j] without the f largest and the f smallest, for every coordinate j.
Client:  plain local training.

The paper trims a share beta of the n replies at each end; here the number f = beta n is given. Withstands f
byzantine clients among n >= 2f + 1 replies. With f = 0 this is the mean with equal weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from flowerbed.storage import Tensors
from flowerbed.strategies import robust
from flowerbed.strategies.base import STRATEGIES


@STRATEGIES.register("trimmed_mean")
class TrimmedMean(robust.RobustStrategy):
    """Averages the clients' models without the extremes of every coordinate."""

    def combine_models(
        self, current: Tensors, models: Sequence[Tensors], parameters: Sequence[str]
    ) -> Tensors:
        return robust.by_coordinate(models, parameters, partial(robust.trimmed_mean, f=self.params.f))
