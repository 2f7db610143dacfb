"""Per-FedAvg: a shared model from which one local step leads to a good personal one.

Reference: Fallah, Mokhtari and Ozdaglar, "Personalized Federated Learning with Theoretical Guarantees: A
Model-Agnostic Meta-Learning Approach", NeurIPS 2020, equations (3) and (4), Algorithm 1.

Client k, each step, on two batches D, D' of its own:
           w <- w - eta (I - alpha H_k(w; D)) grad F_k(w - alpha grad F_k(w; D); D')
with H_k the Hessian: the gradient by w of the meta-loss F_k(w - alpha grad F_k(w; D); D'), taken by differentiating
twice. ``first_order`` leaves H_k out (the paper's "FO"). The outer rate eta (the paper's beta) is ``local.lr``.
Server:    FedAvg; the paper averages uniformly (``weighting=uniform``).

The paper draws a third batch for H_k, which makes its estimate unbiased; here, as in most implementations,
H_k and the inner gradient share D. Its "HF" variant approximates H_k by differences and is not needed with
automatic differentiation. Step i of the run uses the batches 2i and 2i + 1 of the client's order; a round
therefore makes as many steps as FedAvg's on twice as many samples.

alpha = 0 is FedAvg on the batches D'. Evaluated are the received model (``""``) and the model after
``adapt_steps`` plain SGD steps of size alpha on the client's training data (``personal``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf, Predictor
from flowerbed.clients.local_round import Extras, LocalRound, Reply
from flowerbed.clients.training import own_batches, train
from flowerbed.errors import require
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.strategies.base import STRATEGIES
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams
from flowerbed.strategies.personal import Tuning, parts_of, tuned, two_predictors

INNER = "inner "
"""Prefix of what belongs to the batch D in a step's batch."""


@dataclass(frozen=True)
class PerFedAvgParams(FedAvgParams):
    """FedAvg's parameters and those of the adaptation."""

    alpha: float = 0.01
    """Size of the adaptation step, in training and in evaluation."""
    first_order: bool = False
    """Leave out second derivatives."""
    adapt_steps: int = 1
    """Adaptation steps before a client evaluates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha >= 0, f"strategy.alpha is {self.alpha}; give 0 (FedAvg) or more.")
        require(self.adapt_steps >= 1, f"strategy.adapt_steps is {self.adapt_steps}; give at least 1.")


class PerFedAvgHalf(ClientHalf):
    """Trains on the meta-loss; adapts before it evaluates."""

    params: PerFedAvgParams

    def run(self, local: LocalRound) -> Reply:
        own = own_batches(local, local.local)

        def both(step: int) -> Batch:
            inner = {INNER + name: value for name, value in own(2 * step).items()}
            return own(2 * step + 1) | inner

        extras = self.begin(local)
        trained = train(local, self.loss, extras=extras, hooks=self.hooks(), batches=both)
        metrics = {"num-examples": trained.examples, "steps": trained.steps, **trained.metrics}
        return Reply(self.end(local, trained, extras), metrics)

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        inner = {n.removeprefix(INNER): v for n, v in batch.items() if n.startswith(INNER)}
        before, _ = super().loss(model, inner, extras, task)
        gradients = torch.autograd.grad(
            before,
            list(model.parameters.values()),
            create_graph=not self.params.first_order,
            materialize_grads=True,
        )
        adapted = {
            name: parameter - self.params.alpha * gradient
            for (name, parameter), gradient in zip(model.parameters.items(), gradients, strict=True)
        }
        parts = ModelParts.functional(model.module, adapted, model.buffers)
        value, _ = super().loss(parts, batch, extras, task)
        return value, {"unadapted-loss": before}

    def predictors(self, local: LocalRound) -> Mapping[str, Predictor]:
        step = replace(
            local.local,
            steps=self.params.adapt_steps,
            optimizer="sgd",
            lr=self.params.alpha,
            momentum=0.0,
            nesterov=False,
            weight_decay=0.0,
        )
        return two_predictors(local, parts_of(local, tuned(local, super().loss, Tuning(step))))


@STRATEGIES.register("per_fedavg")
class PerFedAvg(FedAvg):
    """FedAvg of the clients' meta-learned models."""

    Params = PerFedAvgParams
    Half = PerFedAvgHalf
    params: PerFedAvgParams
