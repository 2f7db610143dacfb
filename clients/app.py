"""The ClientApp: a thin adapter between Flower messages and the client half of an algorithm."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from flowerbed import messages
from flowerbed.clients.data import ClientData
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import MODEL, Clock, LocalRound, Metric, Reply
from flowerbed.clients.params import LocalParams
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

METRICS = "metrics"
OPTIMIZER_STEPS = "optimizer-steps"
"""All steps of a round, as a cost; ``steps`` is what an algorithm counts for its own arithmetic."""
CONFIG = "config"


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

    def __call__(self) -> ClientApp:
        """Build the ClientApp: grids take the spec itself as their factory."""
        worker = Worker(self)
        app = ClientApp()
        app.train()(worker.train)
        app.evaluate()(worker.evaluate)
        app.query()(worker.query)
        return app


class Worker:
    """One process's clients: a resident model that every client is loaded into in turn."""

    def __init__(self, spec: ClientSpec) -> None:
        self.spec = spec
        self.device = choose_device(spec.device)
        self.task = task_for(spec.dataset.task, spec.dataset.num_classes)

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

    def train(self, message: Message, context: Context) -> Message:
        local = self._open(message, context, train=True)
        reply = self.spec.half.run(local)
        for transform in self.spec.transforms:
            reply = transform.reply(local, reply)
        return self._close(message, local, reply)

    def query(self, message: Message, context: Context) -> Message:
        request = self._request(message, context)
        for transform in self.spec.transforms:
            answer = transform.answer(request)
            if answer is not None:
                return _encoded(message, answer, {})
        local = self._open(message, context, train=True)
        return self._close(message, local, self.spec.half.query(local))

    def evaluate(self, message: Message, context: Context) -> Message:
        local = self._open(message, context, train=False)
        data = local.test_data
        metrics: dict[str, Metric] = {}
        for prefix, predictor in self.spec.half.predictors(local).items():
            # Preparing a predictor may have trained the model, and so left it in training mode.
            self.model.eval()
            sums = evaluation.counts(predictor, self.task, data.x, data.y)
            found = evaluation.metrics(sums, len(data), self.spec.dataset.num_classes)
            metrics.update({f"{prefix}-{name}" if prefix else name: value for name, value in found.items()})
        return Message(RecordDict({METRICS: MetricRecord(metrics)}), reply_to=message)

    def _open(self, message: Message, context: Context, *, train: bool) -> LocalRound:
        """Decode the message, load the client's view, state and model."""
        client = int(_number(context.node_config, "partition-id"))
        config = messages.settings(message.content)
        round_ = int(_number(config, "server-round", 1))
        received = {n: messages.tensors(r) for n, r in messages.array_records(message.content).items()}
        stateful = self.spec.half.stateful or bool(self.private) or self.spec.local.persist
        # A training round reads what earlier rounds wrote; an evaluation also sees this round's training.
        before = round_ if train else round_ + 1
        state = self.spec.store.read(client, before) if stateful else {}
        self._load(received.get(MODEL, {}), state)
        steps = self.spec.local.steps_per_round(int(self.spec.train.sizes[client]))
        limit = _number(config, "time-limit", 0.0)
        return LocalRound(
            client=client,
            seed=self.spec.seed,
            clock=Clock(round_, self.spec.rounds, steps),
            phase=str(config.get("phase", "train")),
            config=config,
            received=received,
            model=self.model,
            parts=self.parts,
            info=self.info,
            task=self.task,
            local=self.spec.local,
            open_train=lambda: self._data(client),
            open_test=lambda: self._data(client, test=True),
            state=state,
            device=self.device,
            deadline=time.monotonic() + limit if limit else None,
            open_initial=lambda: self.initial,
        )

    def _request(self, message: Message, context: Context) -> Request:
        config = messages.settings(message.content)
        return Request(
            client=int(_number(context.node_config, "partition-id")),
            seed=self.spec.seed,
            round=int(_number(config, "server-round", 1)),
            phase=str(config.get("phase", "train")),
            received={n: messages.tensors(r) for n, r in messages.array_records(message.content).items()},
        )

    @torch.no_grad()
    def _load(self, received: dict[str, Tensor], state: ClientState) -> None:
        private = {name: self.initial[name] for name in self.private} | state.get("private", {})
        for name, target in self.resident.items():
            source = private[name] if name in private else received.get(name)
            if source is None:
                raise ClientError(f"the received model lacks '{name}'; server and client models differ")
            if source.shape != target.shape:
                raise ClientError(
                    f"'{name}' arrived with shape {tuple(source.shape)}, this client's model has "
                    f"{tuple(target.shape)}; server and client models differ"
                )
            target.copy_(source)

    def _close(self, message: Message, local: LocalRound, reply: Reply) -> Message:
        """Keep the client's state and encode the reply."""
        if self.private:
            local.state["private"] = {n: self.resident[n].detach() for n in sorted(self.private)}
        if local.state:
            self.spec.store.write(local.client, local.clock.round, local.state)
        return _encoded(message, reply, {OPTIMIZER_STEPS: local.optimizer_steps})

    def _data(self, client: int, *, test: bool = False) -> ClientData:
        dataset = self.spec.dataset
        partition = self.spec.test if test else self.spec.train
        split = dataset.test if test else dataset.train
        indices = partition.indices(client) if partition is not None else np.empty(0, dtype=np.int64)
        data = ClientData.view(dataset, split, indices, self.device)
        if not test:
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


def _number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key, default)
    if isinstance(value, int | float):
        return value
    raise ClientError(f"the message's or node's setting '{key}' is {value!r}; a number is needed")
