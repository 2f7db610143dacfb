"""FedETF: all clients learn features for one fixed simplex classifier.

Reference: Li et al., "No Fear of Classifier Biases: Neural Collapse Inspired Federated Learning with
Synthetic and Fixed Classifier", ICCV 2023, equations (5) to (8).

Model:     logits s normalise(P f(x)) M with body f, projection P (d, D), learned scale s (1 at the start) and a
           fixed random simplex M (d, C), M^T M = C/(C-1) (I - 11^T/C). It takes the head's place in the given model.
Client k:  SGD on CE(logits + log n_k, y) over f, P and s: balanced softmax with the client's class counts, those of
           absent classes taken as one.
Server:    FedAvg on f, P and s; M is sent down with the model and never back.
Evaluation: personal models by fine-tuning f, P and s with plain CE for ``tune_epochs``, then ``alternations`` times
           M for ``alternate_epochs`` at ``prototype_lr`` and P for as many at ``projection_lr``.

Defaults are the released code's (20 times 3 epochs at 0.1 and 0.05; it trains with lr 0.04, momentum 0.9,
weight decay 5e-4, 3 epochs, batch 128). That is 121 epochs for each evaluated client: evaluate the clients
only at the end.

Evaluated are the received model (``""``) and the model that this fine-tuning on the client's training data
makes of it (``personal``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf, Predictor
from flowerbed.clients.local_round import MODEL, Extras, LocalRound, Trained, shared_model
from flowerbed.errors import require
from flowerbed.models.base import ModelSpec
from flowerbed.models.etf import PROTOTYPES
from flowerbed.models.info import ModelInfo
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.strategies.base import STRATEGIES
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams
from flowerbed.strategies.logit_adjustment import class_counts, log_prior
from flowerbed.strategies.personal import Tuning, parts_of, tuned, two_predictors

FIXED = frozenset({PROTOTYPES})


@dataclass(frozen=True)
class FedETFParams(FedAvgParams):
    """FedAvg's parameters, the classifier's size, and the personal fine-tuning."""

    d: int = 0
    """Dimensions of projection and simplex, at least as many as classes; 0 means as many."""
    tune_epochs: int = 1
    """Epochs of fine-tuning f, P and s."""
    alternations: int = 20
    """How often prototypes and projection are then tuned in turn."""
    alternate_epochs: int = 3
    """Epochs of each of these."""
    prototype_lr: float = 0.1
    projection_lr: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.d >= 0, f"strategy.d is {self.d}; give 0 (as many as classes) or more.")
        for name in ("tune_epochs", "alternate_epochs"):
            require(getattr(self, name) >= 1, f"strategy.{name} is {getattr(self, name)}; give at least 1.")
        require(self.alternations >= 0, f"strategy.alternations is {self.alternations}; give 0 or more.")
        for name in ("prototype_lr", "projection_lr"):
            require(
                getattr(self, name) > 0, f"strategy.{name} is {getattr(self, name)}; give a number above 0."
            )


class FedETFHalf(ClientHalf):
    """Trains under fixed prototypes with balanced softmax; tunes before it evaluates."""

    params: FedETFParams

    def frozen(self, info: ModelInfo) -> frozenset[str]:
        return FIXED

    def begin(self, local: LocalRound) -> Extras:
        return {"log prior": log_prior(class_counts(local.train_data.y, local.task.classes))}

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return task.loss(model(batch["x"]) + extras["log prior"], batch["y"]).mean(), {}

    def end(self, local: LocalRound, trained: Trained, extras: Extras) -> Mapping[str, Mapping[str, Tensor]]:
        return {MODEL: shared_model(local, FIXED)}

    def predictors(self, local: LocalRound) -> Mapping[str, Predictor]:
        p, names = self.params, local.info.parameters
        projection = frozenset(n for n in names if n.startswith("head.projection."))
        whole = replace(local.local, epochs=p.tune_epochs, steps=0)
        turn = replace(local.local, epochs=p.alternate_epochs, steps=0)
        turns = (
            Tuning(replace(turn, lr=p.prototype_lr), frozen=names - FIXED),
            Tuning(replace(turn, lr=p.projection_lr), frozen=names - projection),
        )
        stages = (Tuning(whole, FIXED), *(turns * p.alternations))
        return two_predictors(local, parts_of(local, tuned(local, super().loss, *stages)))


@STRATEGIES.register("fedetf")
class FedETF(FedAvg):
    """FedAvg on all but the prototypes."""

    Params = FedETFParams
    Half = FedETFHalf
    params: FedETFParams

    def model_spec(self, spec: ModelSpec) -> ModelSpec:
        options = {"inner": spec.name, "dim": self.params.d, "options": dict(spec.options)}
        return replace(spec, name="flowerbed.models.etf:etf_net", options=options)
