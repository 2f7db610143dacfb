"""FedBN: batch normalisation stays at the client.

Reference: Li et al., "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", ICLR
2021, Algorithm 1.

Model:     everything but batch normalisation (shared); its weights, biases and statistics (private to client k).
Client k:  local SGD on F_k over both.
Server:    averages what is shared, with p_k; the paper averages uniformly (``weighting=uniform``).

Evaluated is, under both names, the received model with the client's own normalisation, before further local
training; a client that never trained has the initial one. The server has no complete model to evaluate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flowerbed.clients.half import ClientHalf, Predictor
from flowerbed.clients.local_round import LocalRound
from flowerbed.errors import require
from flowerbed.models.info import ModelInfo
from flowerbed.strategies.base import STRATEGIES, Setting
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams
from flowerbed.strategies.personal import two_predictors

STATISTICS = "running_mean"


@dataclass(frozen=True)
class FedBNParams(FedAvgParams):
    """FedAvg's parameters, and which normalisation is private."""

    layers: str = "batch"
    """batch: layers with running statistics, as in the paper; all: also group and layer normalisation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.layers in ("batch", "all"), f"strategy.layers is '{self.layers}'; choose batch or all.")


class FedBNHalf(ClientHalf):
    """FedAvg's client with normalisation layers of its own."""

    params: FedBNParams

    def private(self, info: ModelInfo) -> frozenset[str]:
        if self.params.layers == "all":
            return info.normalisation
        batch = {name.removesuffix(STATISTICS) for name in info.normalisation if name.endswith(STATISTICS)}
        return frozenset(n for n in info.normalisation if n.removesuffix(n.rpartition(".")[2]) in batch)

    def predictors(self, local: LocalRound) -> Mapping[str, Predictor]:
        return two_predictors(local, local.model)


@STRATEGIES.register("fedbn")
class FedBN(FedAvg):
    """FedAvg on everything but normalisation."""

    Params = FedBNParams
    Half = FedBNHalf
    params: FedBNParams

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        require(
            bool(self.half.private(setting.info)),
            "FedBN keeps batch normalisation at the clients and this model has none, which would be FedAvg; set "
            "model.norm=bn, or strategy.layers=all for a model with other normalisation.",
        )
