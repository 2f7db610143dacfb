"""What one client holds during one local round, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowerbed import seeds
from flowerbed.clients.data import ClientData
from flowerbed.clients.params import LocalParams
from flowerbed.clients.store import ClientState
from flowerbed.models.base import Role
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors

Extras = Mapping[str, Any]
"""What ``begin`` hands to ``loss`` and ``correct``: named tensors, or mappings of names to tensors."""
Metric = int | float | list[int] | list[float]

MODEL = "arrays"
"""The stream that carries the model; Flower's own strategies use the same name."""


@dataclass(frozen=True)
class Clock:
    """Where this round lies in the run."""

    round: int
    rounds: int
    steps: int
    """Optimizer steps of this round."""

    @property
    def first_step(self) -> int:
        """The clock of this round's first step, counted from the start of the run."""
        return (self.round - 1) * self.steps


@dataclass
class LocalRound:
    """Everything one client has in one round. ``state`` is the only part that outlives it."""

    client: int
    seed: int
    clock: Clock
    phase: str
    config: Mapping[str, Any]
    """Scalars that the strategy sent."""
    received: Mapping[str, Mapping[str, Tensor]]
    """Streams that the strategy sent, read-only."""
    model: nn.Module
    """The resident model, already holding the received and the private parameters."""
    parts: ModelParts
    roles: Mapping[str, Role]
    """Role of every parameter and buffer."""
    task: Task
    local: LocalParams
    train_data: ClientData
    state: ClientState
    device: torch.device
    deadline: float | None = None
    """``time.monotonic()`` after which training stops with an error."""

    def generator(self, purpose: str) -> torch.Generator:
        """Return this client's own random stream for ``purpose`` in this round."""
        return seeds.torch_rng(self.seed, purpose, self.client, self.clock.round, device=self.device.type)

    def received_model(self) -> Tensors:
        """Return the model as it was received, on this round's device."""
        return {name: value.to(self.device) for name, value in self.received[MODEL].items()}


@dataclass(frozen=True)
class Trained:
    """What a sequence of local steps did."""

    steps: int
    examples: int
    """Samples of the client (not sample visits)."""
    lr: float
    """Learning rate of the last step."""
    metrics: Mapping[str, float]
    """Means over the steps' batches, weighted by batch size; always has ``loss``."""


@dataclass(frozen=True)
class Reply:
    """What leaves the client: named streams of tensors, and metrics (``num-examples`` is required)."""

    streams: Mapping[str, Mapping[str, Tensor]]
    metrics: Mapping[str, Metric]


def shared_model(local: LocalRound, private: frozenset[str]) -> Tensors:
    """Return a copy of the model's current parameters and buffers without the private ones."""
    return {
        name: value.detach().clone()
        for name, value in local.model.state_dict(keep_vars=True).items()
        if name not in private
    }
