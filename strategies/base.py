"""The server half of an algorithm: the class that an algorithm file derives from.

It is a Flower ``Strategy``: its four methods are the contract that our loop, and Flower's own ``start``,
call. An algorithm overrides ``aggregate`` (and perhaps ``broadcast``, ``phases``); everything else is here
once.
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
from flowerbed.registry import Registry
from flowerbed.storage import TensorGroups, Tensors
from flowerbed.strategies import aggregation
from flowerbed.strategies.server_side import ServerSide

CONFIG = "config"
EXAMPLES = "num-examples"
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
        return aggregation.scalar(self.metrics[EXAMPLES])


class ServerTransform:
    """Base of what may stand between the replies and any algorithm's ``aggregate``: clipping, noise.

    Every method may be left as it is. ``parameters`` names the trainable parameters: buffers are none of a
    transform's business unless it says so.
    """

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

    # What an algorithm overrides.

    def aggregate(self, server_round: int, current: Tensors, replies: list[ClientReply]) -> Tensors:
        """Return the next model from the broadcast one and the usable replies, in the order of asking."""
        raise NotImplementedError

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
        self.current = messages.tensors(arrays)
        nodes = self._sampler.train(server_round, list(grid.get_node_ids()))
        content = RecordDict({MODEL: self._shared(arrays)})
        for name, stream in self.broadcast(server_round).items():
            content[name] = messages.array_record(stream)
        content[CONFIG] = ConfigRecord({**config, "server-round": server_round, "phase": self.phase.name})
        kind = self.phase.message_type
        asked = [Message(content=content, dst_node_id=node, message_type=kind) for node in nodes]
        for transform in self.transforms:
            transform.configure(server_round, asked, grid)
        return asked

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
        nodes = self._sampler.evaluate(server_round, list(grid.get_node_ids()))
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


def decode(message: Message) -> ClientReply:
    """Read a reply's records as tensors and metrics."""
    content = message.content
    streams = {name: messages.tensors(record) for name, record in messages.array_records(content).items()}
    return ClientReply(message.metadata.src_node_id, streams, messages.metrics(content))


STRATEGIES: Registry[type[Strategy]] = Registry("strategy")
