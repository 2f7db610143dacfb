"""What one client holds during one local round, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowerbed import seeds
from flowerbed.clients.data import Batch, ClientData
from flowerbed.clients.engine_fast import FastLayers
from flowerbed.clients.params import LocalParams
from flowerbed.clients.store import ClientState
from flowerbed.errors import ClientError
from flowerbed.models.info import ModelInfo
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors

if TYPE_CHECKING:
    from flowerbed.clients.training import Estimate

Extras = Mapping[str, Any]
"""What ``begin`` hands to the hooks: named tensors, or mappings of names to tensors."""
Metric = int | float | list[int] | list[float]

WORK = "work"
"""Setting of a message: the share of a round's steps that the client makes; everything where it is missing."""
MODEL = "arrays"
"""The stream that carries the model; Flower's own strategies use the same name."""


@dataclass(frozen=True)
class Clock:
    """Where this round lies in the run."""

    round: int
    rounds: int
    steps: int
    """Optimizer steps of one round, by which the clock counts."""
    work: float = 1.0
    """Share of them that the client makes, at least one: a weak device does the first part of its round."""

    @property
    def first_step(self) -> int:
        """The clock of this round's first step, counted from the start of the run."""
        return (self.round - 1) * self.steps

    @property
    def made(self) -> int:
        """The optimizer steps that the client makes in this round."""
        return self.steps if self.work == 1.0 else min(self.steps, max(1, round(self.work * self.steps)))

    @property
    def all_steps(self) -> range:
        """The clock of every step that is made in this round."""
        return range(self.first_step, self.first_step + self.made)


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
    info: ModelInfo
    task: Task
    local: LocalParams
    open_train: Callable[[], ClientData]
    open_test: Callable[[], ClientData]
    state: ClientState
    device: torch.device
    deadline: float | None = None
    """``time.monotonic()`` after which training stops with an error."""
    optimizer_steps: int = 0
    """Made so far in this round, in however many trainings; ``train`` counts them."""
    version: int = 0
    """The round of the run, also where the clock counts training rounds only: what ``state`` is kept under."""
    lent: Mapping[str, Tensor] | None = None
    """The resident model's own shared tensors, to be sent in place of copies; given where whoever takes the reply
    reads it before the model moves on."""
    fast: FastLayers | None = None
    """The fast forms of the model's layers, which ``train`` then uses where it may; None is the strict engine."""
    open_initial: Callable[[], Tensors] = dict
    """Returns the run's initial model, the same for every client; by default nothing is known of it."""
    open_validation: Callable[[], ClientData] | None = None
    secret: int | None = None
    """Entropy for noise and keys that nobody but this client knows; None in a simulation, where the seed serves."""
    alter: Callable[[Batch, int], Batch] | None = None
    """Changes the batch of a clock before any loss sees it; a client transform's, like the next two."""
    estimate: Estimate | None = None
    """Makes the gradients of every step in place of one backward pass."""
    term: Callable[[ModelParts], Tensor] | None = None
    """Added to every loss, evaluated after it; a scalar."""

    @cached_property
    def train_data(self) -> ClientData:
        """The client's training samples; loaded when first asked for."""
        return self.open_train()

    @cached_property
    def test_data(self) -> ClientData:
        """The client's own test samples; loaded when first asked for."""
        return self.open_test()

    @cached_property
    def validation_data(self) -> ClientData:
        """The client's own samples for choosing settings; raises ``ClientError`` where the data set has none."""
        if self.open_validation is None:
            raise ClientError(
                "the algorithm chooses by validation samples and the data set has none; use one that has, such as "
                "dataset=excerpt with dataset.validation_per_class"
            )
        return self.open_validation()

    def generator(self, purpose: str) -> torch.Generator:
        """Return this client's own random stream for ``purpose`` in this round."""
        return seeds.torch_rng(self.seed, purpose, self.client, self.clock.round, device=self.device.type)

    @property
    def hidden_seed(self) -> int:
        """The seed of what must stay hidden from the server."""
        return self.seed if self.secret is None else self.secret

    def hidden_generator(self, purpose: str) -> torch.Generator:
        """Return this client's stream for ``purpose`` in this round, which on a device the server cannot repeat."""
        return seeds.torch_rng(
            self.hidden_seed, purpose, self.client, self.clock.round, device=self.device.type
        )

    def received_model(self) -> Tensors:
        """Return a copy of the model as it was received, on this round's device."""
        return {n: v.to(self.device, copy=True) for n, v in self.received[MODEL].items()}

    def parameters(self) -> Tensors:
        """Return a copy of the model's current trainable parameters."""
        return {name: value.detach().clone() for name, value in self.parts.parameters.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put values into the resident model, by name; names that are left out stay as they are."""
        state = self.model.state_dict(keep_vars=True)
        for name, value in tensors.items():
            state[name].copy_(value)


@dataclass(frozen=True)
class Step:
    """One optimizer step that has just been made; what ``after_step`` hooks see."""

    index: int
    """Clock of the step, counted from the start of the run."""
    lr: float
    batch: Batch
    parts: ModelParts
    """The model after the step; change its parameters only in place and under ``torch.no_grad``."""
    extras: Extras
    task: Task
    products: Mapping[str, Tensor] = field(default_factory=dict)
    """By-products of the loss: the floating tensors with dimensions that it returned beside its scalars, detached."""


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
    counts: Mapping[str, int | list[int]] = field(default_factory=dict)
    """Sums over the steps of what the loss reported as integers."""


@dataclass(frozen=True)
class Reply:
    """What leaves the client: named streams of tensors, and metrics (``num-examples`` is required)."""

    streams: Mapping[str, Mapping[str, Tensor]]
    metrics: Mapping[str, Metric]


def shared_model(local: LocalRound, private: frozenset[str]) -> Tensors:
    """Return a copy of the model's current parameters and buffers without the private ones."""
    # Asking the module anew would walk its whole tree for every client.
    state = local.parts.state if local.parts.module is local.model else local.model.state_dict(keep_vars=True)
    with torch.no_grad():
        return {name: value.clone() for name, value in state.items() if name not in private}
