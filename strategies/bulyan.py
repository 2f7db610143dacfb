"""Bulyan over Krum.

Reference: El Mhamdi, Guerraoui, Rouault, "The Hidden Vulnerability of Distributed Learning in Byzantium", ICML
2018, section 4.

Server:  1. pick theta = n - 2f clients, one after the other: each time Krum's choice among those that are left;
         2. w_{t+1}[j] = mean of the beta = theta - 2f values nearest to the median of the picked w_k[j].
Client:  plain local training; the paper sends gradients, which is one local step.

Withstands f byzantine clients among n >= 4f + 3 replies. While picking, Krum's n - f - 2 neighbours shrink with
the clients that are left, down to one at the least: the paper leaves this open. With f = 0 everybody is picked
and kept, which is the mean with equal weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from flowerbed.storage import Tensors
from flowerbed.strategies import robust
from flowerbed.strategies.base import STRATEGIES


@STRATEGIES.register("bulyan")
class Bulyan(robust.RobustStrategy):
    """Selects with Krum, then averages around the median of every coordinate."""

    condition = "4f + 3"

    def least_replies(self) -> int:
        return 4 * self.params.f + 3

    def combine_models(
        self, current: Tensors, models: Sequence[Tensors], parameters: Sequence[str]
    ) -> Tensors:
        f = self.params.f
        picked = robust.bulyan_selection(robust.squared_distances(models, parameters), f)
        count = len(picked) - 2 * f
        return robust.by_coordinate(
            [models[i] for i in picked], parameters, partial(robust.mean_around_median, count=count)
        )
