"""FedRoD: a generic and a personal prediction from one body.

Reference: Chen and Chao, "On Bridging Generic and Personalized Federated Learning for Image Classification",
ICLR 2022, Algorithm 1, equations (4) to (6); the linear personal head.

Model:     body f and generic head G (shared), personal head h_k of G's shape (private to client k).
Client k:  f, G by SGD on CE(G(f(x)) + log n_k, y), balanced softmax with the client's class counts n_k;
           h_k by SGD on CE(sg[G(f(x))] + h_k(sg[f(x)]), y), sg = no gradient, in the same steps.
Server:    FedAvg on f and G.

The paper's balanced risk minimisation may be any class-balanced loss; its experiments use balanced softmax.
Counts of absent classes are taken as one. h_k starts at zero, so that a client that never trained predicts
generically (the paper does not say); its optimizer is that of ``local``, clipped apart from the model.

Evaluated are the received model's G(f(x)) (``""``) and G(f(x)) + h_k(f(x)) with the received f, G
(``personal``): after aggregation, before further local training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf, Predictor
from flowerbed.clients.local_round import Extras, LocalRound, Trained
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors
from flowerbed.strategies.base import STRATEGIES, Setting
from flowerbed.strategies.fedavg import FedAvg
from flowerbed.strategies.heads import linear_head
from flowerbed.strategies.logit_adjustment import class_counts, log_prior
from flowerbed.strategies.personal import PERSONAL, parts_of, two_predictors

PREFIX = "personal "


class FedRoDHalf(ClientHalf):
    """Trains both predictions in the same steps; keeps the personal head."""

    stateful = True

    def begin(self, local: LocalRound) -> Extras:
        counts = class_counts(local.train_data.y, local.task.classes)
        return {"log prior": log_prior(counts), PERSONAL: _personal_head(local)}

    def further(self, extras: Extras) -> Tensors:
        return {PREFIX + name: value for name, value in extras[PERSONAL].items()}

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        features = model.features(batch["x"])
        generic = model.head(features)
        balanced = task.loss(generic + extras["log prior"], batch["y"]).mean()
        own = ModelParts.functional(model.module, extras[PERSONAL], {}).head(features.detach())
        personal = task.loss(generic.detach() + own, batch["y"]).mean()
        return balanced + personal, {"balanced-loss": balanced, "personal-loss": personal}

    def end(self, local: LocalRound, trained: Trained, extras: Extras) -> Mapping[str, Mapping[str, Tensor]]:
        local.state[PERSONAL] = {name: value.detach().clone() for name, value in extras[PERSONAL].items()}
        return super().end(local, trained, extras)

    def predictors(self, local: LocalRound) -> Mapping[str, Predictor]:
        head = parts_of(local, _personal_head(local))

        def personal(x: Tensor) -> Tensor:
            features = local.parts.features(x)
            return local.parts.head(features) + head.head(features)

        return two_predictors(local, personal)


def _personal_head(local: LocalRound) -> Tensors:
    stored = local.state.get(PERSONAL, {})
    return {
        name: stored[name].to(local.device, copy=True) if name in stored else torch.zeros_like(value).detach()
        for name, value in local.parts.parameters.items()
        if name in local.info.head
    }


@STRATEGIES.register("fedrod")
class FedRoD(FedAvg):
    """FedAvg on body and generic head."""

    Half = FedRoDHalf

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        linear_head(setting, "FedRoD, whose personal head starts at zero,")
