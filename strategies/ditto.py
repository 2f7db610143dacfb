"""Ditto: a personal model beside the shared one, held close to it.

Reference: Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021,
Algorithm 1 and equation (2); the solver of the shared objective is FedAvg.

Client k:  1. w_k: FedAvg's local training from w_t, sent back;
           2. v_k <- v_k - eta (grad F_k(v_k) + lambda (v_k - w_t)), with w_t as it was received.
Server:    FedAvg on w_k, bit for bit: the personal branch touches neither its weights nor its random streams.

v_k starts from the run's initial model and keeps its momentum under ``local.persist``. The paper chooses
lambda from {0.05, 0.1, 1, 2}, or for each client by validation loss; here it is one number. lambda = 0 is
local training.

Evaluated are the received model (``""``) and v_k after the client's last training (``personal``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from flowerbed.clients.half import ClientHalf, Predictor
from flowerbed.clients.local_round import Extras, LocalRound, Reply
from flowerbed.clients.training import Hooks, train
from flowerbed.errors import require
from flowerbed.storage import Tensors
from flowerbed.strategies.base import STRATEGIES
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams
from flowerbed.strategies.personal import (
    PERSONAL,
    hosting,
    parts_of,
    personal_model,
    two_predictors,
    whole_model,
)


@dataclass(frozen=True)
class DittoParams(FedAvgParams):
    """FedAvg's parameters, for the shared model, and those of the personal one."""

    lambda_: float = 0.1
    """lambda: pull of the personal model towards the shared one."""
    personal_epochs: int = 0
    """Epochs a round of the personal model; 0 means as the shared one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lambda_ >= 0, f"strategy.lambda_ is {self.lambda_}; give 0 (local training) or more.")
        require(
            self.personal_epochs >= 0,
            f"strategy.personal_epochs is {self.personal_epochs}; give 0 (as the shared model) or more.",
        )


class DittoHalf(ClientHalf):
    """Trains the shared model as FedAvg does, then the personal one."""

    stateful = True
    params: DittoParams

    def run(self, local: LocalRound) -> Reply:
        centre, epochs = local.received_model(), self.params.personal_epochs
        shared = super().run(local)
        with hosting(local, personal_model(local)):
            trained = train(
                local,
                self.loss,
                extras={"centre": centre},
                hooks=Hooks(correct=self._pulled),
                params=replace(local.local, epochs=epochs, steps=0) if epochs else None,
                scope=" personal",
            )
            local.state[PERSONAL] = whole_model(local)
        metrics = {f"personal-{name}": value for name, value in trained.metrics.items()}
        return Reply(shared.streams, {**shared.metrics, **metrics})

    def _pulled(self, gradients: Tensors, parameters: Mapping[str, Tensor], extras: Extras) -> Tensors:
        centre = extras["centre"]
        return {n: g + self.params.lambda_ * (parameters[n] - centre[n]) for n, g in gradients.items()}

    def predictors(self, local: LocalRound) -> Mapping[str, Predictor]:
        return two_predictors(local, parts_of(local, personal_model(local)))


@STRATEGIES.register("ditto")
class Ditto(FedAvg):
    """FedAvg on the shared model."""

    Params = DittoParams
    Half = DittoHalf
    params: DittoParams
