"""Local training only: every client trains a model of its own and nothing is shared.

The control that every personalised method must beat. Client k: v_k <- v_k - eta grad F_k(v_k), for as many
steps a round as in any other method, starting from the run's initial model; a round in which it is not asked
trains nothing, so ask all clients (``federation.cohort=0``) for the usual figure.

Nothing but metrics travels. Evaluated is each client's own model after its last training, under both names;
the server has no model to evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flowerbed.clients.half import ClientHalf, Predictor
from flowerbed.clients.local_round import LocalRound
from flowerbed.models.info import ModelInfo
from flowerbed.pooling import Pooling
from flowerbed.storage import Tensors
from flowerbed.strategies.base import STRATEGIES, FederatedStrategy
from flowerbed.strategies.personal import two_predictors


@dataclass(frozen=True)
class LocalOnlyParams:
    """Local training has no parameters beside those of ``local``."""


class LocalOnlyHalf(ClientHalf):
    """Keeps every parameter and buffer at the client."""

    def private(self, info: ModelInfo) -> frozenset[str]:
        return frozenset(info.roles)

    def predictors(self, local: LocalRound) -> Mapping[str, Predictor]:
        return two_predictors(local, local.model)


@STRATEGIES.register("local")
class LocalOnly(FederatedStrategy):
    """Counts the clients' steps; its model stays the initial one."""

    Params = LocalOnlyParams
    Half = LocalOnlyHalf

    @property
    def pooled(self) -> Pooling | None:
        return {}

    def combine(
        self, server_round: int, current: Tensors, means: Mapping[str, Tensors], count: int
    ) -> Tensors:
        return {}
