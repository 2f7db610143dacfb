"""The ClientApp: a thin adapter between Flower messages and the client half of an algorithm."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from flowerbed import messages, pooling
from flowerbed.clients.cohort import CohortEngine, CohortOptions, Plan
from flowerbed.clients.cohort.refusal import TIME_LIMIT, refusal
from flowerbed.clients.data import ClientData, ViewCache
from flowerbed.clients.engine_fast import FastLayers
from flowerbed.clients.engine_routes import Routes, find_routes
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import MODEL, WORK, Clock, LocalRound, Metric, Reply
from flowerbed.clients.params import LocalParams
from flowerbed.clients.prefetch import Prefetch
from flowerbed.clients.store import ClientState, ClientStore
from flowerbed.clients.transforms import ClientTransform, Request
from flowerbed.datasets.dataset import Dataset
from flowerbed.datasets.partitions import Partition
from flowerbed.errors import ClientError
from flowerbed.models import evaluation
from flowerbed.models.base import ModelSpec
from flowerbed.models.info import ModelInfo
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import task_for
from flowerbed.pooling import METRICS, Adder, Pool
from flowerbed.storage import Tensors

LOG = logging.getLogger(__name__)
Block = Sequence[tuple[int, int]]
"""Clients of a round: the place of each in the order of asking, and its number."""
Raised = Mapping[int, BaseException]
"""What clients raised, by place."""
RunBlock = Callable[[Block, Adder, Pool], Raised]
VIEW_BYTES = 2**28
"""Prepared samples that a worker keeps for the next rounds of the same clients."""
TOGETHER = 128
"""Most clients that are opened at once to be computed together."""
OPTIMIZER_STEPS = "optimizer-steps"
"""All steps of a round, as a cost; ``steps`` is what an algorithm counts for its own arithmetic."""
CONFIG = "config"
TRAIN, TEST, VALIDATION = "train", "test", "validation"


@dataclass(frozen=True)
class ClientSpec:
    """All that a process needs to be any client of a run; picklable, sent to an actor once."""

    seed: int
    rounds: int
    half: ClientHalf
    model: ModelSpec
    dataset: Dataset
    train: Partition
    test: Partition | None
    local: LocalParams
    store: ClientStore
    device: str = "auto"
    transforms: tuple[ClientTransform, ...] = ()
    """Applied in order to every client's training data and to every training reply."""
    engine: str = "generic"
    """generic: clients of a block one after another; cohort, auto: together, where the half allows it."""
    cohort: CohortOptions = field(default_factory=CohortOptions)
    """How clients are computed together."""
    routes: Routes | None = None
    """How the fast engine (``local.engine``) computes dense layers; None means that each worker finds out."""
    mask: str = "none"
    """Classes left out of every prediction that a client evaluates: none, or those without any of its train or
    test samples."""
    validation: Partition | None = None
    """Shares of the data set's validation split, where it has one."""
    secret: int | None = None
    """On a device, entropy for noise and keys that nobody else knows; see ``LocalRound.secret``."""

    def __call__(self) -> SimulatedApp:
        """Build the ClientApp: grids take the spec itself as their factory."""
        return SimulatedApp(Worker(self))

    def block_size(self, cohort: int, parallel: bool) -> int:
        """Return how many clients of a cohort are computed together, or at least added up one after another.

        Clients that are computed together need blocks large enough for that; with ``parallel`` workers, however many,
        some blocks are left for each. Clients computed one after another are added up alike everywhere.
        """
        if self.engine_refusal() is not None:
            return pooling.block_size(cohort)
        blocks = max(-(-cohort // TOGETHER), min(4, -(-cohort // 25)) if parallel else 1)
        return max(-(-cohort // blocks), -(-cohort // pooling.MOST))

    @property
    def agrees(self) -> bool:
        """Whether workers must agree: on how clients are computed together, which one of them measures."""
        return self.engine_refusal() is None

    def engine_refusal(self) -> str | None:
        """Return a sentence that says why clients are computed one after another; None if they are not."""
        if self.engine == "generic":
            return "grid.engine=generic asks for one client at a time"
        for transform in self.transforms:
            if type(transform).reply is not ClientTransform.reply:
                return f"{type(transform).__name__} changes replies one by one"
            if type(transform).begin is not ClientTransform.begin:
                return f"{type(transform).__name__} changes the steps of one client at a time"
        return refusal(self.half, self.local)

    def loads(self, clients: Sequence[int]) -> Sequence[float]:
        """Return about how long each client takes in a round: its steps' samples, and as much again as the mean.

        The base weight stands for what a client costs whatever its data; without it many small clients would
        look free.
        """
        sizes = np.array([self.train.size(client) for client in clients], dtype=np.float64)
        if self.local.steps:
            sizes = self.local.steps * np.minimum(self.local.batch_size or sizes, sizes)
        found: list[float] = (sizes + np.mean(sizes)).tolist()
        return found


class SimulatedApp(ClientApp):
    """The ClientApp of a simulation: beside messages it takes whole blocks of clients, for grids that pool."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self.open_round = worker.open_round
        self.agreement = worker.plan
        self.train()(worker.train)
        self.evaluate()(worker.evaluate)
        self.query()(worker.query)


@dataclass(frozen=True)
class Sent:
    """What one message says, decoded: the same for all clients of a round."""

    received: Mapping[str, Tensors]
    config: Mapping[str, Any]
    round: int
    version: int
    phase: str
    time_limit: float
    work: float = 1.0

    @classmethod
    def of(cls, content: RecordDict) -> Sent:
        """Decode the content of a message."""
        config = messages.settings(content)
        round_ = int(_number(config, "server-round", 1))
        return cls(
            {n: messages.tensors(r) for n, r in messages.array_records(content).items()},
            config,
            round_,
            round_ + int(_number(config, messages.EARLIER, 0)),
            str(config.get("phase", "train")),
            _number(config, "time-limit", 0.0),
            _number(config, WORK, 1.0),
        )


class Worker:
    """One process's clients: a resident model that every client is loaded into in turn."""

    def __init__(self, spec: ClientSpec) -> None:
        self.spec = spec
        self.device = choose_device(spec.device)
        self.task = task_for(spec.dataset.task, spec.dataset.num_classes)
        self._loads: tuple[Sent, list[Tensor], list[Tensor]] | None = None
        self._engine: CohortEngine | None = None
        self._views = Prefetch(ViewCache(VIEW_BYTES), self._make_data)
        self._warned: set[str] = set()

    @cached_property
    def model(self) -> torch.nn.Module:
        return self.spec.model.build(self.spec.seed).to(self.device)

    @cached_property
    def parts(self) -> ModelParts:
        return ModelParts.resident(self.model)

    @cached_property
    def info(self) -> ModelInfo:
        return ModelInfo.of(self.model)

    @cached_property
    def fast(self) -> FastLayers | None:
        """The fast forms of the resident model's layers, where the clients' engine is fast."""
        if self.spec.local.engine != "fast" or self.device.type != "cpu":
            return None
        routes = self.spec.routes
        return FastLayers(self.model, find_routes(self.model, self.spec.local) if routes is None else routes)

    @cached_property
    def private(self) -> frozenset[str]:
        return self.spec.half.private(self.info)

    @cached_property
    def resident(self) -> dict[str, Tensor]:
        """The resident model's own parameters and buffers, by name."""
        return dict(self.model.state_dict(keep_vars=True))

    @cached_property
    def initial(self) -> dict[str, Tensor]:
        """The run's initial model, where private parameters and personal models of clients start."""
        initial = self.spec.model.build(self.spec.seed).state_dict()
        return {name: value.to(self.device) for name, value in initial.items()}

    @cached_property
    def stateful(self) -> bool:
        """Whether clients keep anything from one round to the next."""
        spec = self.spec
        kept = spec.half.stateful or spec.local.persist or any(t.stateful for t in spec.transforms)
        return kept or bool(self.private)

    @cached_property
    def lent(self) -> Mapping[str, Tensor] | None:
        """What a client sends without a copy of it; None where something else than the base class sends it."""
        kind = type(self.spec.half)
        replying = [t for t in self.spec.transforms if type(t).reply is not ClientTransform.reply]
        plain = kind.run is ClientHalf.run and kind.end is ClientHalf.end and not replying
        return {n: v for n, v in self.resident.items() if n not in self.private} if plain else None

    def train(self, message: Message, context: Context) -> Message:
        local = self._open(Sent.of(message.content), _client(context), train=True)
        return _encoded(message, *self._trained(local))

    def open_round(self, content: RecordDict, agreed: Plan | None = None) -> RunBlock:
        """Return what runs blocks of clients that are all sent ``content`` and adds their replies to a pool.

        ``agreed`` is what ``plan`` returned, here or in another process.
        """
        sent = Sent.of(content)
        run = self._run_in_turn
        if self.spec.engine_refusal() is None:
            if sent.time_limit:
                # The clock of a client starts when it is opened, and clients that are together are opened at once.
                self._warn(TIME_LIMIT)
            elif sent.work != 1.0:
                self._warn("clients make a part of their steps")
            else:
                run = self._run_together
                if agreed is not None and self._engine is None:
                    self._engine = self._make_engine(agreed)

        def run_block(block: Block, adder: Adder, pool: Pool) -> Raised:
            with self._views.ahead((client, TRAIN) for _, client in block):
                return run(sent, block, adder, pool)

        return run_block

    def plan(self, content: RecordDict, clients: Sequence[int]) -> Plan | None:
        """Return how such clients are computed together, measured here, so that other processes do the same."""
        if self.spec.engine_refusal() is not None:
            return None
        sent = Sent.of(content)
        return self.engine.plan([self._open(sent, client, train=True, load=False) for client in clients])

    @property
    def engine(self) -> CohortEngine:
        """What computes clients together."""
        self._engine = self._engine or self._make_engine(None)
        return self._engine

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            LOG.warning("Clients are computed one after another: %s.", reason)

    def _make_engine(self, plan: Plan | None) -> CohortEngine:
        spec = self.spec
        return CohortEngine(
            spec.half,
            self.model,
            self.info,
            self.task,
            spec.local,
            self.device,
            options=spec.cohort,
            plan=plan,
        )

    def _run_in_turn(self, sent: Sent, block: Block, adder: Adder, pool: Pool) -> Raised:
        """Train the clients one after another in the resident model and add each at once."""
        raised: dict[int, BaseException] = {}
        for place, client in block:
            try:
                local = self._open(sent, client, train=True)
                local.lent = self.lent
                reply, further = self._trained(local)
                metrics = {**reply.metrics, **further}
            except (Exception, SystemExit) as error:  # noqa: BLE001 - a client's failure is its own.
                raised[place] = error
            else:
                adder.add(pool, place, reply.streams, metrics)
        return raised

    def _run_together(self, sent: Sent, block: Block, adder: Adder, pool: Pool) -> Raised:
        """Let the engine train the clients and add what it yields."""
        raised: dict[int, BaseException] = {}
        failed: dict[int, BaseException] = {}
        places: list[int] = []
        opened: list[LocalRound] = []
        for place, client in block:
            try:
                opened.append(self._open(sent, client, train=True, load=False))
                places.append(place)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - a client's failure is its own.
                raised[place] = error
        for stacked in self.engine.run(opened, failed):
            metrics = []
            for k, position in enumerate(stacked.positions):
                local = opened[position]
                if local.state:
                    self.spec.store.write(local.client, local.version, local.state)
                own = {name: values[k] for name, values in stacked.metrics.items()}
                metrics.append({**own, OPTIMIZER_STEPS: local.optimizer_steps})
            adder.add_block(pool, [places[i] for i in stacked.positions], stacked.streams, metrics)
        return raised | {places[i]: error for i, error in failed.items()}

    def _trained(self, local: LocalRound) -> tuple[Reply, Mapping[str, Metric]]:
        """Let a client train; return what it sends, and the metrics that are ours."""
        for transform in self.spec.transforms:
            transform.begin(local)
        reply = self.spec.half.run(local)
        for transform in self.spec.transforms:
            reply = transform.reply(local, reply)
        return self._closed(local, reply)

    def query(self, message: Message, context: Context) -> Message:
        request = self._request(message, context)
        for transform in self.spec.transforms:
            answer = transform.answer(request)
            if answer is not None:
                return _encoded(message, answer, {})
        local = self._open(Sent.of(message.content), _client(context), train=True)
        reply = self.spec.half.query(local)
        for transform in self.spec.transforms:
            reply = transform.statistics(local, reply)
        return _encoded(message, *self._closed(local, reply))

    def evaluate(self, message: Message, context: Context) -> Message:
        local = self._open(Sent.of(message.content), _client(context), train=False)
        data, absent = local.test_data, self._absent(local)
        metrics: dict[str, Metric] = {}
        for prefix, predictor in self.spec.half.predictors(local).items():
            # Preparing a predictor may have trained the model, and so left it in training mode.
            self.model.eval()
            if absent is not None:
                predictor = evaluation.masked(predictor, absent)
            sums = evaluation.counts(predictor, self.task, data.x, data.y)
            found = evaluation.metrics(sums, len(data), self.spec.dataset.num_classes)
            metrics.update({f"{prefix}-{name}" if prefix else name: value for name, value in found.items()})
        return Message(RecordDict({METRICS: MetricRecord(metrics)}), reply_to=message)

    def _open(self, sent: Sent, client: int, *, train: bool, load: bool = True) -> LocalRound:
        """Open the client's view and state and, with ``load``, put its model into the resident one."""
        # A training round reads what earlier rounds wrote; an evaluation also sees this round's training.
        before = sent.version if train else sent.version + 1
        state = self.spec.store.read(client, before) if self.stateful else {}
        if load:
            self._load(sent, state)
        steps = self.spec.local.steps_per_round(self.spec.train.size(client))
        return LocalRound(
            client=client,
            seed=self.spec.seed,
            clock=Clock(sent.round, self.spec.rounds, steps, sent.work),
            phase=sent.phase,
            config=sent.config,
            received=sent.received,
            model=self.model,
            parts=self.parts,
            info=self.info,
            task=self.task,
            local=self.spec.local,
            open_train=lambda: self._data(client),
            open_test=lambda: self._data(client, TEST),
            state=state,
            device=self.device,
            deadline=time.monotonic() + sent.time_limit if sent.time_limit else None,
            version=sent.version,
            fast=self.fast,
            open_initial=lambda: self.initial,
            open_validation=(lambda: self._data(client, VALIDATION)) if self.spec.validation else None,
            secret=self.spec.secret,
        )

    def _absent(self, local: LocalRound) -> Tensor | None:
        """Return the classes that the client cannot predict, bool ``(C,)``; None where it may predict all."""
        if self.spec.mask == "none":
            return None
        labels = (local.train_data if self.spec.mask == "train" else local.test_data).y
        absent = torch.bincount(labels[labels >= 0], minlength=self.task.classes) == 0
        # Who sees no label at all knows of no class that is absent.
        return None if bool(absent.all()) else absent

    def _request(self, message: Message, context: Context) -> Request:
        sent = Sent.of(message.content)
        return Request(
            client=_client(context),
            seed=self.spec.seed,
            round=sent.round,
            phase=sent.phase,
            received=sent.received,
            hidden_seed=self.spec.seed if self.spec.secret is None else self.spec.secret,
        )

    @torch.no_grad()
    def _load(self, sent: Sent, state: ClientState) -> None:
        """Put the client's model into the resident one."""
        if self._loads is None or self._loads[0] is not sent:
            shared = [name for name in self.resident if name not in self.private]
            self._loads = sent, *self._matched(shared, sent.received.get(MODEL, {}))
        _, targets, sources = self._loads
        if targets:  # No client shares anything in purely local training.
            torch._foreach_copy_(targets, sources)
        if self.private:
            own = {name: self.initial[name] for name in self.private} | state.get("private", {})
            torch._foreach_copy_(*self._matched(sorted(self.private), own))

    def _matched(
        self, names: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the resident tensors of these names and the ones to load into them, on the worker's device."""
        targets, sources = [], []
        for name in names:
            target, source = self.resident[name], tensors.get(name)
            if source is None:
                raise ClientError(f"the received model lacks '{name}'; server and client models differ")
            if source.shape != target.shape:
                raise ClientError(
                    f"'{name}' arrived with shape {tuple(source.shape)}, this client's model has "
                    f"{tuple(target.shape)}; server and client models differ"
                )
            targets.append(target)
            sources.append(source.to(self.device))
        return targets, sources

    def _closed(self, local: LocalRound, reply: Reply) -> tuple[Reply, Mapping[str, Metric]]:
        """Keep the client's state; return the reply and the metrics that are ours."""
        if self.private:
            local.state["private"] = {n: self.resident[n].detach() for n in sorted(self.private)}
        if local.state:
            self.spec.store.write(local.client, local.version, local.state)
        return reply, {OPTIMIZER_STEPS: local.optimizer_steps}

    def _data(self, client: int, name: str = TRAIN) -> ClientData:
        return self._views.get((client, name))

    def _make_data(self, key: tuple[int, str]) -> ClientData:
        client, name = key
        spec, dataset = self.spec, self.spec.dataset
        split, partition = {
            TRAIN: (dataset.train, spec.train),
            TEST: (dataset.test, spec.test),
            VALIDATION: (dataset.validation, spec.validation),
        }[name]
        indices = partition.indices(client) if partition is not None else np.empty(0, dtype=np.int64)
        assert split is not None
        data = ClientData.view(dataset, split, indices, self.device)
        if name == TRAIN:
            for transform in self.spec.transforms:
                data = transform.data(client, data)
        return data


def _encoded(message: Message, reply: Reply, metrics: Mapping[str, Metric]) -> Message:
    content = RecordDict()
    for name, stream in reply.streams.items():
        record: ArrayRecord = messages.array_record(stream)
        content[name] = record
    content[METRICS] = MetricRecord({**reply.metrics, **metrics})
    return Message(content, reply_to=message)


def choose_device(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` is the first GPU that this process sees, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def _client(context: Context) -> int:
    return int(_number(context.node_config, "partition-id"))


def _number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key, default)
    if isinstance(value, int | float):
        return value
    raise ClientError(f"the message's or node's setting '{key}' is {value!r}; a number is needed")
