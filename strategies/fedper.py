"""FedPer: federated learning with personalisation layers.

Reference: Arivazhagan et al., "Federated Learning with Personalization Layers", 2019, Algorithms 1 and 2.

Model:     body theta (shared) and head h_k (private to client k); the paper's K_P = 1 personalisation layer.
Client k:  (theta_k, h_k) by local SGD on F_k, both at once, from (theta_t, h_k).
Server:    theta_{t+1} = sum_k p_k theta_k, p_k = n_k / sum_j n_j.

Heads start from the run's initial model, the same on all clients. Evaluated is, under both names, the
received body with the client's own head: after aggregation and before further local training, as in the
paper. A client that never trained has its initial head. The server has no complete model to evaluate."""

from __future__ import annotations

from collections.abc import Mapping

from flowerbed.clients.half import ClientHalf, Predictor
from flowerbed.clients.local_round import LocalRound
from flowerbed.models.info import ModelInfo
from flowerbed.strategies.base import STRATEGIES, Setting
from flowerbed.strategies.fedavg import FedAvg
from flowerbed.strategies.heads import require_head
from flowerbed.strategies.personal import two_predictors


class FedPerHalf(ClientHalf):
    """FedAvg's client with a head that never leaves it."""

    def private(self, info: ModelInfo) -> frozenset[str]:
        return info.head

    def predictors(self, local: LocalRound) -> Mapping[str, Predictor]:
        return two_predictors(local, local.model)


@STRATEGIES.register("fedper")
class FedPer(FedAvg):
    """FedAvg on the body."""

    Half = FedPerHalf

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        require_head(setting, "FedPer")
