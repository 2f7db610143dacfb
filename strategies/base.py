"""The server half of an algorithm: the class that an algorithm file derives from.

It is a Flower ``Strategy``: its four methods are the contract that our loop, and Flower's own ``start``,
call. An algorithm that takes nothing but means from the replies names them in ``pooled`` and overrides
``combine``, any other overrides ``aggregate`` (and perhaps ``broadcast``, ``phases``); everything else is here once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from flowerbed import messages
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import MODEL, Metric
from flowerbed.clients.params import LocalParams
from flowerbed.errors import ConfigError
from flowerbed.models.base import ModelSpec
from flowerbed.models.info import ModelInfo
from flowerbed.pooling import WEIGHT, Pooled, Pooling, means
from flowerbed.registry import Registry
from flowerbed.storage import TensorGroups, Tensors
from flowerbed.strategies import aggregation
from flowerbed.strategies.server_side import ServerSide

CONFIG = "config"
TRANSFORM = "transform "


class Sampler(Protocol):
    """Who is asked: decides over node ids, seeded, the same however many workers there are."""

    def train(self, server_round: int, nodes: Sequence[int]) -> list[int]:
        """Return the nodes that train in this round."""

    def evaluate(self, server_round: int, nodes: Sequence[int]) -> list[int]:
        """Return the nodes that evaluate in this round."""


class Everyone:
    """The sampler used until another is given: all nodes, in order."""

    def train(self, server_round: int, nodes: Sequence[int]) -> list[int]:
        return list(nodes)

    def evaluate(self, server_round: int, nodes: Sequence[int]) -> list[int]:
        return list(nodes)


@dataclass(frozen=True)
class Phase:
    """A stretch of rounds with one purpose; a run is a list of them."""

    name: str
    rounds: int
    message_type: str = "train"
    """``train``, or ``query`` for rounds that ask for statistics and leave the model as it is."""
    everyone: bool = False
    """Whether all clients are asked, whatever the cohort."""
    preparatory: bool = False
    """Whether its rounds are not counted: the strategy, the clients and the samplers see those of the phases after
    it as in a run without it, from 1, and its own up to 0. Only phases at the start can be."""


@dataclass(frozen=True)
class Setting:
    """What a strategy is told about the run before it starts."""

    seed: int
    clients: int
    """Registered clients (N)."""
    rounds: int
    info: ModelInfo
    """Roles, shapes and kinds of the model's parameters and buffers."""
    sampler: Sampler
    cohort: int = 0
    """Clients asked in a round (m); 0 means all."""
    local: LocalParams = field(default_factory=LocalParams)
    """The local training of every client."""
    server: ServerSide | None = None
    """What a server half needs to train by itself; None where there is nothing of the kind."""
    class_counts: tuple[int, ...] = ()
    """Samples of each class in all clients' training data together, for refusing data that a method cannot use;
    nothing may be trained with them. () means unknown."""


@dataclass(frozen=True)
class ClientReply:
    """One usable reply, decoded."""

    node: int
    streams: Mapping[str, Tensors]
    """Read-only tensors by stream and name."""
    metrics: Mapping[str, Metric]

    @property
    def model(self) -> Tensors:
        """The model stream."""
        return self.streams[MODEL]

    @property
    def examples(self) -> float:
        """The number of training samples of the client (n_k)."""
        return aggregation.scalar(self.metrics[WEIGHT])


class ServerTransform:
    """Base of what may stand between the replies and any algorithm's ``aggregate``: clipping, noise.

    Every method may be left as it is. ``parameters`` names the trainable parameters: buffers are none of a
    transform's business unless it says so.
    """

    merges: bool = False
    """Whether it puts the mean of all replies in the place of every one."""

    def configure(self, server_round: int, asked: Sequence[Message], grid: Grid) -> None:
        """Prepare a training round: exchange messages of one's own, add to the contents of those to be sent.

        The messages of one round may share one content.
        """

    def replies(
        self, server_round: int, current: Tensors, replies: list[ClientReply], parameters: frozenset[str]
    ) -> list[ClientReply]:
        """Return the replies that the algorithm aggregates."""
        return replies

    def model(
        self, server_round: int, current: Tensors, model: Tensors, replies: int, parameters: frozenset[str]
    ) -> Tensors:
        """Return the model that follows, given the aggregated one and the number of replies in it."""
        return model

    def metrics(self) -> Mapping[str, float]:
        """Return what is to be reported with the round that was just aggregated."""
        return {}

    def state_dict(self) -> Tensors:
        """Return everything that a resumed run needs."""
        return {}

    def load_state_dict(self, state: Tensors) -> None:
        """Put back what ``state_dict`` returned."""


class FederatedStrategy(Strategy):
    """Base of our strategies: sampling, messages, phases and explicit state, around ``aggregate``.

    State that must survive a restart lives in ``self.state``: groups of named tensors, nothing else.
    """

    Params: ClassVar[type]
    """The algorithm's frozen parameter dataclass."""
    Half: ClassVar[type[ClientHalf]] = ClientHalf
    """The client half."""
    individual_replies: bool = False
    """Whether the algorithm needs every reply as its client sent it (robust rules, stale starts), so that a
    transform may not put their mean in their place."""
    sums_in_queries: bool = False
    """Whether the answers to the algorithm's queries matter by their sum alone, so that they can be masked."""

    def __init__(self, params: Any = None) -> None:
        """``params`` is an instance of ``Params``; by default its defaults."""
        self.params = self.Params() if params is None else params
        self.half = self.Half(self.params)
        self.state: TensorGroups = {}
        self.transforms: Sequence[ServerTransform] = ()
        self.setting: Setting | None = None
        self.phase = Phase("train", 0)
        self.current: Tensors = {}
        """The model as it was broadcast in this round."""
        self.asked: Sequence[int] = ()
        """The nodes that were asked in this round, in order."""
        self.rejected: dict[int, str] = {}
        """Replies of this round that ``aggregate_train`` found unusable: node id to reason. The loop counts them."""

    # What an algorithm overrides: ``pooled`` and ``combine`` where means are all it needs, else ``aggregate``.

    @property
    def pooled(self) -> Pooling | None:
        """The means of streams that are all the algorithm takes from the replies; None if it needs more.

        Where they are, a grid may add up the replies of a round as they come and bring back the sums alone.
        """
        return None

    def combine(
        self, server_round: int, current: Tensors, means: Mapping[str, Tensors], count: int
    ) -> Tensors:
        """Return the next model from the broadcast one and the means named in ``pooled``, over ``count`` replies."""
        raise NotImplementedError

    def aggregate(self, server_round: int, current: Tensors, replies: list[ClientReply]) -> Tensors:
        """Return the next model from the broadcast one and the usable replies, in the order of asking."""
        pooling = self.pooled
        if pooling is None:
            raise NotImplementedError(
                f"{type(self).__name__} defines neither aggregate nor pooled and combine."
            )
        places = {node: place for place, node in enumerate(self.asked)}
        if not all(reply.node in places for reply in replies):
            places = {reply.node: place for place, reply in enumerate(replies)}
        rows = ((places[r.node], r.streams, r.metrics) for r in replies)
        found = means(rows, pooling, len(places))
        return self.combine(server_round, current, found, len(replies))

    def broadcast(self, server_round: int) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Return further streams to send beside the model, for example control variates."""
        return {}

    def broadcast_evaluate(self, server_round: int) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Return further streams to send to the clients that evaluate."""
        return {}

    def deliver(self, model: Tensors) -> Tensors:
        """Return the model that is evaluated and that the run delivers, given the one that training goes on with.

        The place of post-processing (renormalised or re-trained heads). It uses no further data, leaves its
        argument as it is, and may be called at any time.
        """
        return model

    def alternatives(self, model: Tensors) -> Mapping[str, Tensors]:
        """Return further models for the server to evaluate beside the delivered one, by the prefix of their metrics.

        For post-processing, whose effect a single run then shows. ``model`` is the one that training goes on with.
        """
        return {}

    def phases(self, rounds: int) -> list[Phase]:
        """Return the phases of a run of ``rounds`` training rounds."""
        return [Phase("train", rounds)]

    def start_phase(self, phase: Phase, model: Tensors) -> Tensors:
        """Do server-side work before a phase (construction, data-free post-processing); return the model."""
        return model

    def model_spec(self, spec: ModelSpec) -> ModelSpec:
        """Return the model to train, given the one that was asked for; override to give it another head."""
        return spec

    def setup(self, setting: Setting) -> None:
        """Learn about the run; override to refuse settings that the algorithm cannot work with."""
        self.setting = setting

    def parameters(self, model: Tensors) -> frozenset[str]:
        """Return the names in ``model`` that are trainable parameters, on which server optimizers act.

        Before ``setup`` (a bare strategy under Flower's own loop) every floating tensor counts as one.
        """
        if self.setting is not None:
            return self.setting.info.parameters & model.keys()
        return frozenset(name for name, value in model.items() if value.is_floating_point())

    @property
    def whole(self) -> bool:
        """Whether the server's model is complete; with parts that stay at the clients it cannot be evaluated."""
        return self.setting is None or not self.half.private(self.setting.info)

    @property
    def clients(self) -> int:
        """The registered clients (N); raises ``ConfigError`` before ``setup``."""
        if self.setting is None:
            raise ConfigError(
                f"{type(self).__name__} needs to know how many clients there are; call setup() before the run."
            )
        return self.setting.clients

    # Flower's contract.

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the sampled nodes, all with one and the same content."""
        content, nodes = self.question(server_round, arrays, config, grid)
        kind = self.phase.message_type
        asked = [Message(content=content, dst_node_id=node, message_type=kind) for node in nodes]
        for transform in self.transforms:
            transform.configure(server_round, asked, grid)
        return asked

    def question(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> tuple[RecordDict, Sequence[int]]:
        """Return what is sent to every client of the round, and the sampled nodes."""
        self.current = messages.tensors(arrays)
        sampler = Everyone() if self.phase.everyone else self._sampler
        self.asked = sampler.train(server_round, nodes_of(grid))
        content = RecordDict({MODEL: self._shared(arrays)})
        for name, stream in self.broadcast(server_round).items():
            content[name] = messages.array_record(stream)
        content[CONFIG] = ConfigRecord({**config, "server-round": server_round, "phase": self.phase.name})
        return content, self.asked

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Decode the replies that carry content and hand them to ``aggregate``."""
        usable = [decode(reply) for reply in replies if reply.has_content()]
        if not usable:
            return None, None
        metrics = aggregation.mean_metrics([reply.metrics for reply in usable])
        usable = self.transformed(server_round, usable)
        # What stayed at home (private parameters) keeps its value on the server.
        model = {**self.current, **self.aggregate(server_round, self.current, usable)}
        return self.finished(server_round, model, metrics, len(usable))

    def aggregate_pooled(self, server_round: int, pooled: Pooled) -> tuple[ArrayRecord, MetricRecord]:
        """Do what ``aggregate_train`` does, given the means of the usable replies instead of these."""
        metrics = aggregation.tallied(pooled.tally, pooled.metrics)
        model = {**self.current, **self.combine(server_round, self.current, pooled.means, pooled.count)}
        return self.finished(server_round, model, metrics, pooled.count)

    def pooling_refusal(self) -> str | None:
        """Return a sentence that says why the replies of this phase are needed one by one; None if they are not."""
        name = type(self).__name__
        for method in ("configure_train", "question", "aggregate_train", "transformed"):
            if getattr(type(self), method) is not getattr(FederatedStrategy, method):
                return f"{name} handles the replies itself (it overrides '{method}')"
        if self.individual_replies or self.pooled is None:
            return f"{name} needs every reply as its client sent it"
        for kind in type(self).__mro__:
            if "pooled" in vars(kind):
                break
            if "aggregate" in vars(kind):
                return (
                    f"{kind.__name__} aggregates replies one by one (it overrides 'aggregate', not 'pooled')"
                )
        if self.transforms:
            return f"{type(self.transforms[0]).__name__} needs every reply"
        if self.phase.message_type != "train":
            return f"phase '{self.phase.name}' asks for statistics"
        return None

    def transformed(self, server_round: int, replies: list[ClientReply]) -> list[ClientReply]:
        """Return the replies as the transforms leave them."""
        moving = self.parameters(self.current)
        for transform in self.transforms:
            replies = transform.replies(server_round, self.current, replies, moving)
        return replies

    def finished(
        self, server_round: int, model: Tensors, metrics: MetricRecord, replies: int
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Return an aggregated model and its metrics as the transforms leave them."""
        moving = self.parameters(self.current)
        for transform in self.transforms:
            model = transform.model(server_round, self.current, model, replies, moving)
            metrics.update(transform.metrics())
        return messages.array_record(model), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the sampled nodes to evaluate the model on their own test data."""
        nodes = self._sampler.evaluate(server_round, nodes_of(grid))
        record = ConfigRecord({**config, "server-round": server_round, "phase": self.phase.name})
        content = RecordDict({MODEL: self._shared(arrays)})
        for name, stream in self.broadcast_evaluate(server_round).items():
            content[name] = messages.array_record(stream)
        content[CONFIG] = record
        return [Message(content=content, dst_node_id=node, message_type="evaluate") for node in nodes]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Add up the clients' counts."""
        usable = [decode(reply) for reply in replies if reply.has_content()]
        return aggregation.summed_evaluation([r.metrics for r in usable]) if usable else None

    def summary(self) -> None:
        """Flower calls this before a run; our progress display says it all."""

    # State.

    def state_dict(self) -> TensorGroups:
        """Return everything that a resumed run needs."""
        return {**self.state, **{f"{TRANSFORM}{i}": t.state_dict() for i, t in enumerate(self.transforms)}}

    def load_state_dict(self, state: TensorGroups) -> None:
        """Put back what ``state_dict`` returned."""
        for i, transform in enumerate(self.transforms):
            transform.load_state_dict(state.get(f"{TRANSFORM}{i}", {}))
        self.state = {group: tensors for group, tensors in state.items() if not group.startswith(TRANSFORM)}

    @property
    def _sampler(self) -> Sampler:
        return self.setting.sampler if self.setting else Everyone()

    def _shared(self, arrays: ArrayRecord) -> ArrayRecord:
        private = self.half.private(self.setting.info) if self.setting else frozenset()
        if not private:
            return arrays
        record = ArrayRecord()
        for name, array in arrays.items():
            if name not in private:
                record[name] = array
        return record


def nodes_of(grid: Grid) -> Sequence[int]:
    """Return the node ids of a grid; ours have a range of them and make no list of a million."""
    nodes: Sequence[int] | None = getattr(grid, "nodes", None)
    return list(grid.get_node_ids()) if nodes is None else nodes


def decode(message: Message) -> ClientReply:
    """Read a reply's records as tensors and metrics."""
    content = message.content
    streams = {name: messages.tensors(record) for name, record in messages.array_records(content).items()}
    return ClientReply(message.metadata.src_node_id, streams, messages.metrics(content))


STRATEGIES: Registry[type[Strategy]] = Registry("strategy")
