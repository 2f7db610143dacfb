"""The client half of an algorithm: the small class that an algorithm file derives from.

Most algorithms need only the *gradient level*: override ``loss`` (and perhaps ``begin``, ``correct``,
``end``). These are pure functions of their arguments, which is what allows many clients to be computed as
one batch. What is not a sequence of gradient steps overrides ``run`` (the *round level*) and may call
``train`` of ``flowerbed.clients.training`` as often as it likes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flowerbed.clients.data import Batch
from flowerbed.clients.local_round import MODEL, Extras, LocalRound, Reply, Trained, shared_model
from flowerbed.clients.training import train
from flowerbed.models.base import Role
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors


class ClientHalf:
    """Base of all client halves; as it stands it is FedAvg's: train on the task's loss, send the model."""

    stateful: bool = False
    """Whether the half itself keeps anything in ``LocalRound.state``."""

    def __init__(self, params: Any = None) -> None:
        """``params`` is the algorithm's frozen parameter dataclass."""
        self.params = params

    def private(self, roles: Mapping[str, Role]) -> frozenset[str]:
        """Return the parameters and buffers that never leave the client; they live in its state."""
        return frozenset()

    def frozen(self, roles: Mapping[str, Role]) -> frozenset[str]:
        """Return the parameters that local training does not move."""
        return frozenset()

    def begin(self, local: LocalRound) -> Extras:
        """Prepare the round; what is returned reaches every ``loss`` and ``correct`` call."""
        return {}

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the scalar loss of a batch and further scalars to report. Pure."""
        return task.loss(model(batch["x"]), batch["y"]).mean(), {}

    def correct(self, gradients: Tensors, parameters: Mapping[str, Tensor], extras: Extras) -> Tensors:
        """Return the gradients that the optimizer sees, given those of the loss, by parameter name. Pure."""
        return gradients

    def end(self, local: LocalRound, trained: Trained) -> Mapping[str, Mapping[str, Tensor]]:
        """Return the streams to send and update ``local.state``. The model's stream is complete by itself."""
        return {MODEL: shared_model(local, self.private(local.roles))}

    def run(self, local: LocalRound) -> Reply:
        """Do one local round. Override for what is not one sequence of gradient steps."""
        trained = train(
            local,
            self.loss,
            extras=self.begin(local),
            correct=self.correct if type(self).correct is not ClientHalf.correct else None,
            frozen=self.frozen(local.roles),
        )
        streams = self.end(local, trained)
        return Reply(streams, {"num-examples": trained.examples, "steps": trained.steps, **trained.metrics})

    def query(self, local: LocalRound) -> Reply:
        """Answer a message of type ``query`` (a statistics phase). Halves without such a phase refuse."""
        raise TypeError(f"{type(self).__name__} answers no query; phase '{local.phase}' asked one.")
