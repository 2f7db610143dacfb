"""What a defence of a client is: the base class and the table of names.

A defence may act in four places, and most act in one: on the model before the run (``model_spec``), on every batch
(``Encoding``), on the gradients of every step (``begin``), on the update that is sent (``changed``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from flowerbed import seeds
from flowerbed.clients import updates
from flowerbed.clients.data import Batch, ClientData
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import MODEL, LocalRound, Reply
from flowerbed.clients.params import LocalParams
from flowerbed.clients.transforms import ClientTransform
from flowerbed.clients.updates import Update
from flowerbed.datasets.dataset import Dataset
from flowerbed.errors import ConfigError, require
from flowerbed.models.base import ModelSpec
from flowerbed.registry import Registry

DEFENCES: Registry[type[Defence]] = Registry("defence")


@dataclass(frozen=True)
class ExamplePrivacy:
    """What a mechanism on single examples spends of their privacy in a step."""

    noise: float
    """Standard deviation of the noise over the clip norm (z)."""
    delta: float
    sampling: str
    """none or poisson: what accounting assumes of the batches."""


class Defence(ClientTransform):
    """Base of defences: as it stands it changes nothing."""

    @property
    def privacy(self) -> ExamplePrivacy | None:
        """What it spends of the privacy of single examples; None where it promises nothing of the kind."""
        return None

    def known(self, local: LocalParams) -> Mapping[str, Any]:
        """Return the options of an attack as somebody sets them who knows the defence and its constants.

        They are those of ``flowerbed.strategies.attacks.inversion.Inversion`` and of its search space; {} where knowing
        of the defence helps nobody.
        """
        return {}

    def model_spec(self, spec: ModelSpec) -> ModelSpec:
        """Return the model that everybody trains, given the one that was asked for."""
        return spec

    def check(self, half: ClientHalf, module: nn.Module, local: LocalParams, dataset: Dataset) -> None:
        """Raise ``ConfigError`` for an algorithm, model, local training or data that it does not combine with."""

    def changed(self, update: Update, local: LocalRound) -> Update:
        """Return what is sent in place of ``update``, float64 tensors by stream and name."""
        return update

    def reply(self, local: LocalRound, reply: Reply) -> Reply:
        if type(self).changed is Defence.changed:
            return reply
        start = {n: v.to(local.device) for n, v in local.received[MODEL].items()}
        update = updates.update_of({MODEL: reply.streams[MODEL]}, start, local.info.parameters)
        changed = self.changed(update, local)
        return replace(reply, streams=updates.with_update(reply.streams, start, changed))


class Encoding(Defence):
    """Base of defences that train on something else than the samples themselves."""

    soft: bool = False
    """Whether its labels are probabilities ``(B, C)``."""
    sees_original: bool = False
    """Whether leakage is judged by the samples as they were before the encoding, and not as the model saw them."""

    def encoded(self, batch: Batch, data: ClientData, classes: int, rng: torch.Generator) -> Batch:
        """Return what a step trains on in place of ``batch``, samples of ``data``."""
        raise NotImplementedError

    def of_step(
        self, batch: Batch, data: ClientData, classes: int, seed: int, client: int, step: int
    ) -> Batch:
        """Return the encoding of the batch of clock ``step``, drawn from the step's own stream."""
        device = batch["x"].device.type
        return self.encoded(
            batch, data, classes, seeds.torch_rng(seed, "defence encoding", client, step, device=device)
        )

    def begin(self, local: LocalRound) -> None:
        def alter(batch: Batch, step: int) -> Batch:
            return self.of_step(batch, local.train_data, local.task.classes, local.seed, local.client, step)

        local.alter = alter

    def check(self, half: ClientHalf, module: nn.Module, local: LocalParams, dataset: Dataset) -> None:
        if self.soft:
            require_base_loss(self, half, "its labels are probabilities")
            require(
                dataset.task == "classification",
                f"defence={name_of(self)} mixes classes, and the data set '{dataset.name}' has none; choose another "
                "defence.",
            )


def require_base_loss(defence: Defence, half: ClientHalf, why: str) -> None:
    """Raise ``ConfigError`` where an algorithm's training is not one sequence of steps on the task's own loss."""
    for method, what in (
        ("loss", "has a loss of its own"),
        ("run", "does its local round by itself"),
        ("batches", "makes its own batches"),
        ("further", "trains tensors beside the model's parameters"),
        ("estimate", "makes its gradients by itself"),
    ):
        if getattr(type(half), method) is not getattr(ClientHalf, method):
            raise ConfigError(
                f"defence={name_of(defence)} needs the task's own loss on single batches ({why}), and "
                f"{type(half).__name__} {what}; choose another strategy, such as fedavg, fedprox or scaffold."
            )


def name_of(defence: Defence) -> str:
    """Return the name under which a defence is registered, else that of its class."""
    kind = type(defence)
    return next(
        (name for name in DEFENCES.names() if name in DEFENCES and DEFENCES.get(name) is kind), kind.__name__
    )


def share(name: str, value: float, *, least: float = 0.0, most: float = 1.0) -> None:
    """Raise ``ConfigError`` unless an option lies between two numbers."""
    require(
        least <= value <= most, f"defence.{name} is {value}; give a number between {least:g} and {most:g}."
    )
