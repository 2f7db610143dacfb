"""FedBABU: federated training of the body alone, personalised by fine-tuning.

Reference: Oh, Kim and Yun, "FedBABU: Toward Enhanced Representation for Federated Image Classification",
ICLR 2022, Algorithm 1.

Model:     body theta (shared) and head h, one random initialisation that all clients share and nobody trains.
Client k:  theta_k by local SGD on F_k(., h) from theta_t.
Server:    theta_{t+1} = sum_k p_k theta_k.
Evaluation: v_k = fine-tuning of the whole model (theta, h) on F_k for ``tune_epochs`` epochs (5 in the paper).

The paper uses SGD with lr 0.1, momentum 0.9, divided by ten at one half and three quarters of the run; its
code averages uniformly (``weighting=uniform``). The head is sent down with the model and not back up.

Evaluated are the received model with the initial head (``""``, the paper's "initial accuracy") and the model
that fine-tuning on the client's training data makes of it (``personal``); see
``flowerbed.strategies.finetune``."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from flowerbed.clients.local_round import MODEL, Extras, LocalRound, Trained, shared_model
from flowerbed.models.info import ModelInfo
from flowerbed.strategies.base import STRATEGIES, Setting
from flowerbed.strategies.finetune import FineTune, FineTuneHalf
from flowerbed.strategies.heads import require_head


class FedBABUHalf(FineTuneHalf):
    """Trains the body under the initial head."""

    def frozen(self, info: ModelInfo) -> frozenset[str]:
        return info.head

    def end(self, local: LocalRound, trained: Trained, extras: Extras) -> Mapping[str, Mapping[str, Tensor]]:
        return {MODEL: shared_model(local, local.info.head)}


@STRATEGIES.register("fedbabu")
class FedBABU(FineTune):
    """FedAvg on the body; the head keeps its initial value."""

    Half = FedBABUHalf

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        require_head(setting, "FedBABU")
