"""FedAvg with local fine-tuning afterwards: the plainest personalised method, and a strong one.

Reference: Yu, Bagdasaryan and Shmatikov, "Salvaging Federated Learning by Local Adaptation", 2020
("fine-tuning"); Cheng, Chadha and Duchi, "Fine-tuning is Fine in Federated Learning", 2021.

Training is FedAvg's, bit for bit. Client k, when it evaluates: v_k = w after ``tune_epochs`` epochs of
SGD on F_k with the local parameters at a constant learning rate ``tune_lr``.

Evaluated are the received model (``""``) and the model that this fine-tuning on the client's training data
makes of it (``personal``). It is made anew for each evaluation and not kept: set ``evaluation.clients_every``
to the number of rounds to pay for it only once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from flowerbed.clients.half import ClientHalf, Predictor
from flowerbed.clients.local_round import LocalRound
from flowerbed.errors import require
from flowerbed.strategies.base import STRATEGIES, Setting
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams
from flowerbed.strategies.heads import require_head
from flowerbed.strategies.personal import Tuning, parts_of, tuned, two_predictors


@dataclass(frozen=True)
class FineTuneParams(FedAvgParams):
    """FedAvg's parameters and those of the fine-tuning."""

    tune_epochs: int = 5
    """Epochs of fine-tuning, as in FedBABU."""
    tune_lr: float = 0.0
    """Learning rate of the fine-tuning; 0 means ``local.lr``."""
    tune_part: str = "all"
    """What is fine-tuned: all, body or head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tune_epochs >= 1, f"strategy.tune_epochs is {self.tune_epochs}; give at least 1.")
        require(self.tune_lr >= 0, f"strategy.tune_lr is {self.tune_lr}; give 0 (local.lr) or more.")
        require(
            self.tune_part in ("all", "body", "head"),
            f"strategy.tune_part is '{self.tune_part}'; choose all, body or head.",
        )


class FineTuneHalf(ClientHalf):
    """FedAvg's client that fine-tunes before it evaluates."""

    params: FineTuneParams

    def predictors(self, local: LocalRound) -> Mapping[str, Predictor]:
        p, info = self.params, local.info
        frozen = {"all": frozenset[str](), "body": info.head, "head": info.backbone}[p.tune_part]
        tuning = replace(local.local, epochs=p.tune_epochs, steps=0, lr=p.tune_lr or local.local.lr)
        return two_predictors(local, parts_of(local, tuned(local, self.loss, Tuning(tuning, frozen))))


@STRATEGIES.register("finetune")
class FineTune(FedAvg):
    """FedAvg; only what the clients evaluate differs."""

    Params = FineTuneParams
    Half = FineTuneHalf
    params: FineTuneParams

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        if self.params.tune_part != "all":
            require_head(setting, "Fine-tuning a part of the model")
