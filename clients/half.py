"""The client half of an algorithm: the small class that an algorithm file derives from.

Most algorithms need only the *gradient level*: override ``loss`` (and perhaps ``begin``, ``correct``,
``end``). ``loss`` and ``correct`` are pure functions of their arguments, which is what allows many clients
to be computed as one batch. What is not one sequence of gradient steps overrides ``run`` (the *round
level*) and may call ``flowerbed.clients.training.train`` as often as it likes, with other losses, steps or
frozen parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from flowerbed.clients.data import Batch
from flowerbed.clients.local_round import MODEL, Extras, LocalRound, Reply, Step, Trained, shared_model
from flowerbed.clients.training import (
    Batches,
    Evaluation,
    Hooks,
    StepGradients,
    backpropagate,
    of_one_call,
    own_batches,
    train,
)
from flowerbed.models.info import ModelInfo
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors

Predictor = Callable[[Tensor], Tensor]


class ClientHalf:
    """Base of all client halves; as it stands it is FedAvg's: train on the task's loss, send the model."""

    stateful: bool = False
    """Whether the half itself keeps anything in ``LocalRound.state``."""

    def __init__(self, params: Any = None) -> None:
        """``params`` is the algorithm's frozen parameter dataclass."""
        self.params = params

    # Roles of parameters.

    def private(self, info: ModelInfo) -> frozenset[str]:
        """Return the parameters and buffers that never leave the client; they live in its state."""
        return frozenset()

    def frozen(self, info: ModelInfo) -> frozenset[str]:
        """Return the parameters that local training does not move."""
        return frozenset()

    def decayed(self, info: ModelInfo) -> frozenset[str] | None:
        """Return the parameters that weight decay acts on; None means all that move."""
        return None

    # The gradient level.

    def begin(self, local: LocalRound) -> Extras:
        """Prepare the round; what is returned reaches every hook."""
        return {}

    def further(self, extras: Extras) -> Tensors:
        """Return tensors of ``extras`` that local training moves, in place, beside the model's parameters."""
        return {}

    def batches(self, local: LocalRound) -> Batches:
        """Return where the batches of a round come from, by clock: by default all of the client's samples."""
        return own_batches(local, local.local)

    @of_one_call
    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the scalar loss of a batch and further scalars to report. Pure."""
        return task.mean_loss(model(batch["x"]), batch["y"]), {}

    def estimate(self, compute: Evaluation, parameters: Mapping[str, Tensor]) -> StepGradients:
        """Return loss, metrics and gradients of a step; ``compute()`` evaluates the loss where it stands.

        The default differentiates once. An override may move the parameters in place and evaluate again
        (sharpness-aware steps), but puts them back; or evaluate the loss at other parameters, ``compute.at``.
        """
        return backpropagate(compute, parameters)

    def correct(self, gradients: Tensors, parameters: Mapping[str, Tensor], extras: Extras) -> Tensors:
        """Return the gradients that the optimizer sees, given those of the loss, by parameter name. Pure."""
        return gradients

    def after_step(self, step: Step) -> None:
        """Act after an optimizer step: proximal maps, projections, second models kept in ``step.extras``."""

    def end(self, local: LocalRound, trained: Trained, extras: Extras) -> Mapping[str, Mapping[str, Tensor]]:
        """Return the streams to send and update ``local.state``. By default the model, but what is private."""
        if local.lent is not None:
            return {MODEL: local.lent}
        return {MODEL: shared_model(local, self.private(local.info))}

    # The round level.

    def run(self, local: LocalRound) -> Reply:
        """Do one local round. Override for what is not one sequence of gradient steps."""
        extras = self.begin(local)
        trained = train(
            local,
            self.loss,
            extras=extras,
            hooks=self.hooks(),
            frozen=self.frozen(local.info),
            batches=self.batches(local),
            further=self.further(extras),
            decayed=self.decayed(local.info),
        )
        streams = self.end(local, trained, extras)
        counted = {"num-examples": trained.examples, "steps": trained.steps, **trained.counts}
        return Reply(streams, {**counted, **trained.metrics})

    def hooks(self) -> Hooks:
        """Return the hooks that this class overrides, so that the others cost nothing in a step."""
        kind = type(self)
        return Hooks(
            estimate=self.estimate if kind.estimate is not ClientHalf.estimate else None,
            correct=self.correct if kind.correct is not ClientHalf.correct else None,
            after_step=self.after_step if kind.after_step is not ClientHalf.after_step else None,
        )

    def query(self, local: LocalRound) -> Reply:
        """Answer a message of type ``query`` (a statistics phase). Halves without such a phase refuse."""
        raise TypeError(f"{type(self).__name__} answers no query; phase '{local.phase}' asked one.")

    def predictors(self, local: LocalRound) -> Mapping[str, Predictor]:
        """Return what is evaluated on the client's test data, by name: inputs to outputs.

        ``""`` is the model as received (with the private parameters, if any); others, such as
        ``"personal"``, are reported beside it under names with that prefix.
        """
        return {"": local.model}
