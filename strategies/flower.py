"""Stock Flower strategies, and anybody's plain ``flwr.serverapp.strategy.Strategy``, in our loop.

What Flower leaves open is settled here: sampling and noise draw from seeded streams although the classes
use the global generators, float32 models stay float32 although FedAdam answers in float64, integer buffers
come back as integers, and the attributes that hold state are saved with a checkpoint.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import flwr.serverapp.strategy as flower
import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.exception import AppExitException
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from flowerbed import messages, seeds
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound
from flowerbed.errors import ConfigError, RunError, unknown_name
from flowerbed.registry import import_attribute
from flowerbed.storage import TensorGroups, Tensors
from flowerbed.strategies import aggregation
from flowerbed.strategies.base import STRATEGIES, FederatedStrategy, Setting, decode

T = TypeVar("T")
LOG = logging.getLogger("flwr")
SCALARS = "scalars"
ARRAYS = "arrays"
# Arithmetic on numpy arrays without dimensions gives numpy scalars.
NUMERIC = (np.ndarray, np.generic)
UNFIT = {
    "Result",
    "Strategy",
    # XGBoost trees are bytes; our clients train tensors.
    "FedXgbBagging",
    "FedXgbCyclic",
    # These need a mod on every client; clipping before sending is a defence of our own.
    "DifferentialPrivacyClientSideAdaptiveClipping",
    "DifferentialPrivacyClientSideFixedClipping",
}
# These compare replies with each other.
ROBUST = (flower.FedMedian, flower.FedTrimmedAvg, flower.Krum, flower.MultiKrum, flower.Bulyan)


def flower_names() -> list[str]:
    """Return the names of Flower's strategies that work on tensors."""
    return sorted(n for n in flower.__all__ if n not in UNFIT)


@dataclass(frozen=True)
class FlowerParams:
    """Which Flower strategy, and its own keyword arguments."""

    flower: str = "FedAvg"
    """A class of ``flwr.serverapp.strategy``, or ``package.module:Class``."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the class. Numbers of clients and fractions are set from ``federation``."""
    inner: str = ""
    """The strategy that a differential-privacy wrapper wraps; FedAvg if empty."""


class FlowerHalf(ClientHalf):
    """Plain local training plus the one thing a Flower strategy may ask: FedProx's proximal term.

    Flower's FedProx sends ``proximal-mu``; the gradient of ``mu/2 ||w - w_t||^2`` is added here.
    """

    def begin(self, local: LocalRound) -> Extras:
        mu = float(local.config.get("proximal-mu", 0.0))
        return {"mu": mu, "reference": local.received_model()} if mu else {}

    def correct(self, gradients: Tensors, parameters: Mapping[str, torch.Tensor], extras: Extras) -> Tensors:
        if not extras:
            return gradients
        mu, reference = extras["mu"], extras["reference"]
        return {n: g + mu * (parameters[n] - reference[n]) for n, g in gradients.items()}


@STRATEGIES.register("flower")
class FlowerStrategy(FederatedStrategy):
    """Runs a Flower strategy: its own four methods decide, this class seeds, types and saves them."""

    Params = FlowerParams
    Half = FlowerHalf
    params: FlowerParams

    def __init__(self, params: FlowerParams | None = None) -> None:
        super().__init__(params)
        self._class = _strategy_class(self.params.flower)
        self.individual_replies = issubclass(self._class, ROBUST)
        self._inner: Strategy | None = None
        self._pending: TensorGroups = {}

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        nodes = list(range(setting.clients))
        counts = {
            "train": len(setting.sampler.train(1, nodes)),
            "evaluate": len(setting.sampler.evaluate(1, nodes)),
        }
        self._inner = _build(self._class, self.params, counts, setting.clients)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.current = messages.tensors(arrays)
        asked = list(
            self._seeded(
                "configure train",
                server_round,
                lambda s: s.configure_train(server_round, arrays, config, grid),
            )
        )
        for transform in self.transforms:
            transform.configure(server_round, asked, grid)
        return asked

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        received = list(replies)
        if self.transforms:
            received = self._after_transforms(server_round, [r for r in received if r.has_content()])
        arrays, metrics = self._seeded(
            "aggregate train", server_round, lambda s: s.aggregate_train(server_round, received)
        )
        if arrays is None:
            return None, metrics
        return self.finished(server_round, self._typed(arrays), metrics or MetricRecord(), len(received))

    def _after_transforms(self, server_round: int, replies: list[Message]) -> list[Message]:
        """Give the messages the contents that the transforms make of them."""
        transformed = self.transformed(server_round, [decode(message) for message in replies])
        for message, reply in zip(replies, transformed, strict=True):
            content = RecordDict({**message.content.metric_records, **message.content.config_records})
            for name, stream in reply.streams.items():
                content[name] = messages.array_record(stream)
            message.content = content
        return replies

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._seeded(
            "configure evaluate",
            server_round,
            lambda s: s.configure_evaluate(server_round, arrays, config, grid),
        )

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return self._seeded(
            "aggregate evaluate", server_round, lambda s: s.aggregate_evaluate(server_round, replies)
        )

    def state_dict(self) -> TensorGroups:
        groups = super().state_dict()
        for owner, strategy in _chain(self.inner):
            for name, value in vars(strategy).items():
                _collect(groups, f"{owner}{name}", value)
        return groups

    def load_state_dict(self, state: TensorGroups) -> None:
        super().load_state_dict(state)
        self.state = {}
        for owner, strategy in _chain(self.inner):
            for name, value in list(vars(strategy).items()):
                setattr(strategy, name, _restored(state, f"{owner}{name}", value))

    @property
    def inner(self) -> Strategy:
        """The Flower strategy itself; built when the run is set up."""
        if self._inner is None:
            raise ConfigError("A Flower strategy is built from the run's setting; call setup() first.")
        return self._inner

    def _seeded(self, purpose: str, server_round: int, call: Callable[[Strategy], T]) -> T:
        seed = self.setting.seed if self.setting else 0
        # Flower reports every call on its log; our progress display says the same once.
        level = LOG.level
        LOG.setLevel(logging.WARNING)
        try:
            with seeds.global_streams(seed, f"flower {purpose}", server_round):
                return call(self.inner)
        except AppExitException as error:
            raise RunError(f"Flower's {self._class.__name__} could not {purpose}: {error}") from error
        finally:
            LOG.setLevel(level)

    def _typed(self, arrays: ArrayRecord) -> Tensors:
        """Return the aggregated model with the types of the broadcast one."""
        result: Tensors = {}
        for name, value in messages.tensors(arrays).items():
            kind = self.current[name].dtype
            rounded = value.round() if value.is_floating_point() and not kind.is_floating_point else value
            result[name] = rounded.to(kind).reshape(self.current[name].shape)
        return result


def _strategy_class(name: str) -> type[Strategy]:
    if ":" in name:
        return import_attribute(name, "strategy")
    if name not in flower_names():
        raise ConfigError(unknown_name("Flower strategy", name, flower_names()))
    found: type[Strategy] = getattr(flower, name)
    return found


def _build(class_: type[Strategy], params: FlowerParams, counts: Mapping[str, int], clients: int) -> Strategy:
    accepted = set(inspect.signature(class_.__init__).parameters) | (
        set(inspect.signature(flower.FedAvg.__init__).parameters)
        if issubclass(class_, flower.FedAvg)
        else set()
    )
    given = dict(params.options)
    ours: dict[str, Any] = {
        # The fraction alone could round down; Flower takes the larger of both, so the minimum decides.
        "fraction_train": counts["train"] / clients,
        "fraction_evaluate": counts["evaluate"] / clients,
        "min_train_nodes": counts["train"],
        "min_evaluate_nodes": counts["evaluate"],
        "min_available_nodes": clients,
        # The name under which our clients report the mean training loss.
        "train_loss_key": "loss",
        # Flower's own would average counts and steps, which must add up.
        "train_metrics_aggr_fn": _train_metrics,
        "evaluate_metrics_aggr_fn": _evaluation_metrics,
    }
    if "strategy" in inspect.signature(class_.__init__).parameters:
        inner = FlowerParams(flower=params.inner or "FedAvg")
        given["strategy"] = _build(_strategy_class(inner.flower), inner, counts, clients)
        ours = {"num_sampled_clients": counts["train"]}
    keywords = {**{k: v for k, v in ours.items() if k in accepted}, **given}
    unknown = sorted(set(given) - accepted)
    if unknown and "kwargs" not in accepted:
        raise ConfigError(
            unknown_name(f"option of Flower's {class_.__name__}", unknown[0], accepted - {"self"})
        )
    try:
        return class_(**keywords)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"Flower's {class_.__name__} refused its options ({error}); set them with strategy.options."
        ) from error


def _train_metrics(contents: list[RecordDict], weight_key: str) -> MetricRecord:
    return aggregation.mean_metrics([messages.metrics(content) for content in contents])


def _evaluation_metrics(contents: list[RecordDict], weight_key: str) -> MetricRecord:
    return aggregation.summed_evaluation([messages.metrics(content) for content in contents])


def _chain(strategy: Strategy) -> list[tuple[str, Strategy]]:
    """Return the strategy and, for wrappers, the wrapped one, each with a prefix for its attributes."""
    inner = vars(strategy).get("strategy")
    return [("", strategy), *([("strategy.", inner)] if isinstance(inner, Strategy) else [])]


def _collect(groups: TensorGroups, name: str, value: Any) -> None:
    """Store an attribute that is a number or holds arrays; configuration of other types is rebuilt."""
    if isinstance(value, bool | int | float):
        groups.setdefault(SCALARS, {})[name] = torch.tensor(value, dtype=torch.float64)
    elif isinstance(value, np.ndarray):
        groups.setdefault(ARRAYS, {})[name] = torch.from_numpy(value.copy())
    elif isinstance(value, ArrayRecord):
        groups[f"record {name}"] = messages.tensors(value)
    elif isinstance(value, dict) and value and all(isinstance(v, NUMERIC) for v in value.values()):
        groups[f"dict {name}"] = {str(k): torch.from_numpy(np.array(v)) for k, v in value.items()}
    elif isinstance(value, list) and value and all(isinstance(v, NUMERIC) for v in value):
        groups[f"list {name}"] = {str(i): torch.from_numpy(np.array(v)) for i, v in enumerate(value)}


def _restored(state: TensorGroups, name: str, value: Any) -> Any:
    """Return the stored value of an attribute, or ``value`` where nothing was stored."""
    if name in state.get(SCALARS, {}):
        stored = state[SCALARS][name].item()
        return type(value)(stored) if isinstance(value, bool | int | float) else stored
    if name in state.get(ARRAYS, {}):
        return state[ARRAYS][name].numpy()
    if f"record {name}" in state:
        return messages.array_record(state[f"record {name}"])
    if f"dict {name}" in state:
        return {k: v.numpy() for k, v in state[f"dict {name}"].items()}
    if f"list {name}" in state:
        return [v.numpy() for v in state[f"list {name}"].values()]
    return value
