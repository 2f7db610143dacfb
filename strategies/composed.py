"""A strategy around another one: rounds of its own first, then the other's, unchanged.

What a method does to the data before training, or to a model after it, combines with every algorithm this way. The
inner algorithm (``base``) keeps its own messages, aggregation, state and client half, and counts its own rounds only:
cohorts, learning-rate schedules and data orders are those of a run without the rounds before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from flowerbed.errors import ConfigError, unknown_name
from flowerbed.models.base import ModelSpec
from flowerbed.storage import TensorGroups, Tensors
from flowerbed.strategies.base import STRATEGIES, FederatedStrategy, Phase, Setting

OWN = "composed "
"""Prefix of the outer strategy's groups among the saved ones."""


def inner_strategy(name: str, options: Mapping[str, Any]) -> FederatedStrategy:
    """Return the strategy called ``name`` with its options; raises ``ConfigError`` naming ``strategy.base``."""
    found = STRATEGIES.get(name)
    if not (isinstance(found, type) and issubclass(found, FederatedStrategy)) or issubclass(found, Composed):
        raise ConfigError(
            f"strategy.base='{name}' cannot be wrapped; name one of flowerbed's own algorithms, for example fedavg."
        )
    known = [f.name for f in dataclasses.fields(found.Params)]
    for option in options:
        if option not in known:
            raise ConfigError(unknown_name(f"option of strategy.base='{name}'", option, known))
    return found(found.Params(**options))


class Composed(FederatedStrategy):
    """Hands everything to ``base``; a subclass acts in the rounds of ``own_phases`` and adds to the messages."""

    def __init__(self, params: Any, base: FederatedStrategy) -> None:
        super().__init__(params)
        self.base = base
        self.half = base.half
        self.individual_replies = base.individual_replies

    def own_phases(self) -> list[Phase]:
        """Return the phases before the base's, all of them preparatory."""
        return []

    @property
    def own(self) -> bool:
        """Whether this round is one of the outer strategy's own."""
        return self.phase in self.own_phases()

    @property
    def inner(self) -> FederatedStrategy:
        """The base, told of this round's phase and of the transforms."""
        self.base.phase, self.base.transforms = self.phase, self.transforms
        return self.base

    def phases(self, rounds: int) -> list[Phase]:
        return [*self.own_phases(), *self.base.phases(rounds)]

    def start_phase(self, phase: Phase, model: Tensors) -> Tensors:
        return model if self.own else self.inner.start_phase(phase, model)

    def model_spec(self, spec: ModelSpec) -> ModelSpec:
        return self.base.model_spec(spec)

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        self.base.setup(setting)

    def parameters(self, model: Tensors) -> frozenset[str]:
        return self.base.parameters(model)

    def deliver(self, model: Tensors) -> Tensors:
        return self.base.deliver(model)

    def alternatives(self, model: Tensors) -> Mapping[str, Tensors]:
        return self.base.alternatives(model)

    @property
    def whole(self) -> bool:
        return self.base.whole

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        if self.own:
            return super().configure_train(server_round, arrays, config, grid)
        return self.inner.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self.base.rejected = self.rejected
        return self.inner.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        if self.own:
            # An algorithm need not know how to be evaluated before its first round.
            return []
        return self.inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return self.inner.aggregate_evaluate(server_round, replies)

    def state_dict(self) -> TensorGroups:
        own = {OWN + group: tensors for group, tensors in self.state.items()}
        return {**own, **self.inner.state_dict()}

    def load_state_dict(self, state: TensorGroups) -> None:
        self.state = {g.removeprefix(OWN): tensors for g, tensors in state.items() if g.startswith(OWN)}
        self.inner.load_state_dict({g: tensors for g, tensors in state.items() if not g.startswith(OWN)})
