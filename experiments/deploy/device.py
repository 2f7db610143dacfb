"""A device as a client: its configuration, its data and its store behind the same ClientApp as a simulated client.

The server says with every message what it runs (``Expectations``, in Flower's run configuration), so that a device
holds nothing but its own data and state; a process that answers a single message and ends loses nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import flowerbed
from flowerbed import messages
from flowerbed.clients.app import ClientSpec, Worker, choose_device
from flowerbed.clients.device_config import (
    MEGABYTE,
    Capabilities,
    DeviceConfig,
    DeviceDataParams,
    Quotas,
)
from flowerbed.clients.device_data import DEVICE_DATA, DeviceData, DeviceSplits, load_data
from flowerbed.clients.device_store import DeviceStore, Usage, run_secret, writable
from flowerbed.clients.local_round import Metric
from flowerbed.datasets.dataset import Dataset
from flowerbed.datasets.form import DataForm
from flowerbed.datasets.partitions import Partition
from flowerbed.errors import ClientError, ConfigError, FlowerbedError
from flowerbed.models.base import ModelSpec
from flowerbed.models.info import ModelInfo
from flowerbed.models.tasks import task_for
from flowerbed.pooling import METRICS, WEIGHT

if TYPE_CHECKING:
    from flowerbed.experiments.config import Simulation
    from flowerbed.strategies.base import FederatedStrategy

__all__ = [
    "DEVICE_DATA",
    "HELLO",
    "RUN_KEY",
    "Capabilities",
    "DeviceConfig",
    "DeviceData",
    "DeviceDataParams",
    "DeviceSplits",
    "Expectations",
    "Quotas",
    "Report",
    "check",
    "device_app",
]

RUN_KEY = "flowerbed"
"""The key of Flower's run configuration under which the expectations are, as JSON."""
HELLO = "device"
"""The phase of a query that asks a device what it is; it is answered before any work and needs no model."""
RECEIPT = "receipt"
"""The record of a reply that names the message it answers, by its ``TICKET``."""
TICKET = "ticket"
NO_SAMPLES = "this device has no training samples; add some, or lower data.test_fraction"


@dataclass(frozen=True)
class Expectations:
    """What a run needs of every client, as plain values: sent with the run, and given to operators for a dry run."""

    run: str
    """A name of this run and no other, under which clients keep their state; letters, digits, '.', '_' and '-'."""
    simulation: Mapping[str, Any]
    """What decides the model, as ``flowerbed.experiments.config.Simulation.of`` reads it."""
    form: DataForm
    tensors: Mapping[str, tuple[int, ...]]
    """Shape of every tensor of the model."""
    version: str = flowerbed.__version__

    @classmethod
    def of(
        cls, simulation: Simulation, dataset: Dataset, model: Mapping[str, torch.Tensor], run: str
    ) -> Self:
        """Describe a run by its simulation, the server's data set and the initial model."""
        from flowerbed.experiments.config import IDENTITY

        plain = simulation.plain()
        decides = {section: plain[section] for section in IDENTITY}
        # Paths of the server are none of a device's.
        decides["data"] = {**decides["data"], "dir": None, "cache": None}
        shapes = {name: tuple(value.shape) for name, value in model.items()}
        return cls(run, decides, DataForm.of(dataset), shapes)

    @classmethod
    def loads(cls, text: str) -> Self:
        """Read what ``dumps`` returned; raises ``ConfigError`` if it is anything else."""
        try:
            plain = json.loads(text)
            form = DataForm.from_plain(plain.pop("form"))
            shapes = {name: tuple(shape) for name, shape in plain.pop("tensors").items()}
            return cls(form=form, tensors=shapes, **plain)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"What the server expects of clients cannot be read ({type(error).__name__}: {error}); server and "
                "device need the same version of flowerbed."
            ) from error

    def dumps(self) -> str:
        """Return the expectations as JSON."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return json.dumps({**plain, "form": self.form.plain()}, default=list)


@dataclass
class Report:
    """What a dry run found."""

    problems: list[str] = field(default_factory=list)
    """Why the device cannot take part, one sentence each with its remedy; [] if it can."""
    notes: list[str] = field(default_factory=list)
    """What its owner should know, but does not keep it from taking part."""
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the device can take part."""
        return not self.problems

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        width = max((len(name) for name in self.facts), default=0)
        return [
            *(f"{name:{width}}  {value}" for name, value in self.facts.items()),
            *(f"note: {note}" for note in self.notes),
            *(f"error: {problem}" for problem in self.problems),
        ]


def device_app(config_path: str | os.PathLike[str]) -> ClientApp:
    """Return the ClientApp of the device that the file describes; nothing is read before the first message."""
    return DeviceApp(Path(config_path))


class DeviceApp(ClientApp):
    """Answers a server's messages with this device's data, within the limits that its owner has set."""

    def __init__(self, config_path: Path) -> None:
        super().__init__()
        self._path = config_path
        self._clients: dict[tuple[str, int], Worker] = {}
        self.train()(lambda message, context: self._answer(message, context, "train"))
        self.evaluate()(lambda message, context: self._answer(message, context, "evaluate"))
        self.query()(lambda message, context: self._answer(message, context, "query"))

    def _answer(self, message: Message, context: Context, kind: str) -> Message:
        config = DeviceConfig.read(self._path)
        usage = Usage(config.store_folder, config.quotas)
        usage.accept(messages.nbytes(message.content), kind == "train")
        settings = messages.settings(message.content)
        torch.set_num_threads(config.threads)
        limit_memory(config.memory_limit_mb)
        try:
            reply = self._reply(message, context, kind, config, settings)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            raise ClientError(
                f"the device ran out of memory (memory_limit_mb={config.memory_limit_mb}); raise the limit, or lower "
                "local.batch_size or the size of the model on the server"
            ) from error
        usage.release(messages.nbytes(reply.content))
        if TICKET in settings:
            reply.content[RECEIPT] = ConfigRecord({TICKET: settings[TICKET]})
        return reply

    def _reply(
        self,
        message: Message,
        context: Context,
        kind: str,
        config: DeviceConfig,
        settings: Mapping[str, Any],
    ) -> Message:
        client = client_number(config, context.node_config)
        if kind == "query" and settings.get("phase") == HELLO:
            expected = context.run_config.get(RUN_KEY)
            known = Expectations.loads(str(expected)) if expected else None
            return Message(hello(config, client, known), reply_to=message)
        worker = self._worker(config, client, str(context.run_config.get(RUN_KEY, "")))
        own = Context(
            context.run_id,
            context.node_id,
            {**context.node_config, "partition-id": client},
            context.state,
            context.run_config,
        )
        answer: Callable[[Message, Context], Message] = getattr(worker, kind)
        return answer(message, own)

    def _worker(self, config: DeviceConfig, client: int, text: str) -> Worker:
        key = (text, client)
        if key not in self._clients:
            if not text:
                raise ClientError(
                    f"the run says nothing in its configuration's '{RUN_KEY}'; submit it with flowerbed deploy run"
                )
            expected = Expectations.loads(text)
            # Of another run nobody will ask again, and memory is scarce.
            self._clients = {key: Worker(client_spec(config, expected, client))}
        return self._clients[key]


def client_number(config: DeviceConfig, node_config: Mapping[str, Any]) -> int:
    """Return the device's number; raises ``ClientError`` where neither configuration tells it, or both differ."""
    told = node_config.get("partition-id")
    if config.client < 0 and told is None:
        raise ClientError(
            "this device has no number; set 'client' in its configuration, or start the node with "
            "--node-config 'partition-id=NUMBER'"
        )
    if config.client >= 0 and told is not None and int(told) != config.client:
        raise ClientError(
            f"the device's configuration says client={config.client} and the node's partition-id is {told}; make them "
            "equal"
        )
    return config.client if told is None else int(told)


def client_spec(config: DeviceConfig, expected: Expectations, client: int) -> ClientSpec:
    """Return all that makes this process the client of a run; raises an error of ours for what does not fit."""
    simulation, strategy = _experiment(expected)
    if client >= simulation.federation.clients:
        raise ConfigError(
            f"This device is client {client}, the run has {simulation.federation.clients}; give it a number below that."
        )
    from flowerbed.experiments.transforms import client_transforms

    dataset = own_dataset(config, expected)
    if not len(dataset.train):
        raise ClientError(NO_SAMPLES)
    everything = (len(dataset.train), len(dataset.test), len(dataset.validation or ()))
    train, test, validation = (
        Partition.from_owners([client] * count, simulation.federation.clients) for count in everything
    )
    return ClientSpec(
        seed=simulation.seed,
        rounds=simulation.federation.rounds,
        half=strategy.half,
        model=model_spec(config, expected, simulation, strategy),
        dataset=dataset,
        train=train,
        test=test,
        local=simulation.local,
        store=DeviceStore(config.store_folder, expected.run, config.keep_rounds),
        device=config.device,
        transforms=client_transforms(simulation, dataset),
        mask=simulation.evaluation.mask,
        validation=validation if dataset.validation is not None else None,
        secret=run_secret(config.store_folder, expected.run),
    )


def own_dataset(config: DeviceConfig, expected: Expectations) -> Dataset:
    """Return the device's samples in the form of the run; raises ``DataError`` where they do not fit."""
    kept = config.store_folder / "decoded"
    return load_data(config.data.kind, config.data.options, config.folder, expected.form, kept)


def model_spec(
    config: DeviceConfig, expected: Expectations, simulation: Simulation, strategy: FederatedStrategy
) -> ModelSpec:
    """Return the model of the run as this device builds it; raises ``ConfigError`` if it is not the server's."""
    form, initial = expected.form, simulation.initial
    asked = ModelSpec(
        simulation.model.name, form.input_shape, len(form.classes), dict(simulation.model.options)
    )
    spec = dataclasses.replace(strategy.model_spec(asked), part=initial.part)
    if initial.weights is not None:
        from flowerbed.experiments.parts import digested

        here = config.folder / Path(initial.weights).name
        if not here.exists():
            raise ConfigError(
                f"The run starts from the weights {Path(initial.weights).name}; copy that file to {config.folder}."
            )
        digested(dataclasses.replace(initial, weights=str(here)))
        spec = dataclasses.replace(spec, weights=str(here))
    shapes = dict(ModelInfo.of(spec.build(simulation.seed)).shapes)
    for name in sorted(shapes.keys() | expected.tensors.keys()):
        mine, theirs = shapes.get(name), expected.tensors.get(name)
        if mine != theirs:
            raise ConfigError(
                f"The model '{simulation.model.name}' differs between device and server: '{name}' is "
                f"{mine or 'missing'} here and {theirs or 'missing'} there; install the server's version of flowerbed "
                f"({expected.version}, here {flowerbed.__version__}) and of the model's package."
            )
    return spec


def hello(config: DeviceConfig, client: int, expected: Expectations | None) -> RecordDict:
    """Return what the server may know of the device: its number, what it can, and how many samples it has."""
    able = config.capabilities
    known: dict[str, Metric] = {
        WEIGHT: 0,
        "client": client,
        "ram-mb": able.ram,
        "gpu": int(able.gpu or choose_device(config.device).type == "cuda"),
        "speed": able.speed,
        "bandwidth-mbit": able.bandwidth_mbit,
        "threads": config.threads,
        "message-mb": config.quotas.message_mb,
    }
    if expected is not None:
        dataset = own_dataset(config, expected)
        known |= {WEIGHT: len(dataset.train), "test-examples": len(dataset.test)}
    versions = ConfigRecord({"flowerbed": flowerbed.__version__, "torch": torch.__version__})
    return RecordDict({METRICS: MetricRecord(known), "versions": versions})


def check(config_path: str | os.PathLike[str], expectations: Expectations | str) -> Report:
    """Find out whether a device can take part in a run, without joining it; never raises for what is wrong.

    ``expectations`` are the server's, or their JSON. Read is everything that the first round would read, and one batch
    is trained on a model that is thrown away.
    """
    report = Report()

    def attempt(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except FlowerbedError as error:
            report.problems.append(_sentence(str(error)))
        return None

    config = attempt(lambda: DeviceConfig.read(config_path))
    expected = attempt(
        lambda: Expectations.loads(expectations) if isinstance(expectations, str) else expectations
    )
    if config is not None and (problem := writable(config.store_folder)):
        report.problems.append(problem)
    if config is None or expected is None:
        return report
    if expected.version != flowerbed.__version__:
        report.notes.append(
            f"the server runs flowerbed {expected.version}, this device {flowerbed.__version__}"
        )
    found = attempt(lambda: _experiment(expected))
    dataset = attempt(lambda: own_dataset(config, expected))
    if dataset is not None:
        _describe(report, dataset, found[0].local.batch_size if found else 0)
        if not len(dataset.train):
            report.problems.append(_sentence(NO_SAMPLES))
    spec = attempt(lambda: model_spec(config, expected, *found)) if found else None
    if dataset is None or spec is None or report.problems:
        return report
    _require_room(report, config, dataset, spec, found[0])
    attempt(lambda: _trial(config, dataset, spec, found[0]))
    return report


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _experiment(expected: Expectations) -> tuple[Simulation, FederatedStrategy]:
    from flowerbed.experiments.config import Simulation
    from flowerbed.experiments.parts import build_strategy

    simulation = Simulation.of(expected.simulation)
    return simulation, build_strategy(simulation.strategy)


def _describe(report: Report, dataset: Dataset, batch: int) -> None:
    report.facts |= {
        "training samples": str(len(dataset.train)),
        "test samples": str(len(dataset.test)),
    }
    if dataset.task == "classification" and len(dataset.train):
        counts = torch.bincount(dataset.train.labels, minlength=dataset.num_classes).tolist()
        report.facts["samples of each class"] = " ".join(map(str, counts))
        absent = [dataset.classes[c] for c, count in enumerate(counts) if not count]
        if absent:
            report.notes.append(f"no training sample of: {', '.join(absent[:12])}")
    if 0 < len(dataset.train) < batch:
        report.notes.append(
            f"fewer training samples than a batch ({batch}): every step uses all {len(dataset.train)}"
        )
    if not len(dataset.test):
        report.notes.append("no test samples: this device takes no part in evaluations")


def _require_room(
    report: Report, config: DeviceConfig, dataset: Dataset, spec: ModelSpec, simulation: Simulation
) -> None:
    """Report what the model and the samples need of memory and of the quota for messages, at the least."""
    model = sum(t.nbytes for t in spec.build(simulation.seed).state_dict().values())
    data = dataset.train.inputs.numel() * (8 if dataset.train.inputs.dtype == torch.int64 else 4)
    # Received, resident and sent, a gradient, and the initial values; optimizers with a memory need more.
    needed = (5 * model + data) / MEGABYTE
    report.facts |= {
        "model": f"{model / MEGABYTE:.1f} MB",
        "memory": f"at least {needed:.0f} MB beside torch",
    }
    if 0 < config.memory_limit_mb < needed:
        report.problems.append(
            f"Model and samples need at least {needed:.0f} MB and memory_limit_mb is {config.memory_limit_mb}; raise "
            "it, or give the device fewer samples."
        )
    if 0 < config.quotas.message_mb * MEGABYTE < model:
        report.problems.append(
            f"The model has {model / MEGABYTE:.1f} MB and quotas.message_mb is {config.quotas.message_mb:g}; raise it."
        )


def _trial(config: DeviceConfig, dataset: Dataset, spec: ModelSpec, simulation: Simulation) -> None:
    """Train one batch on a model of its own; raises ``ClientError`` for whatever goes wrong in it."""
    device = choose_device(config.device)
    model = spec.build(simulation.seed).to(device).train()
    rows = slice(0, simulation.local.batch_size or len(dataset.train))
    x = dataset.prepare(dataset.train.inputs[rows]).to(device)
    y = dataset.train.labels[rows].to(device)
    try:
        outputs = model(x)
        if dataset.task != "measured":
            loss = task_for(dataset.task, dataset.num_classes).mean_loss(outputs, y)
            torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    except Exception as error:
        raise ClientError(
            f"the model '{spec.name}' cannot be trained on this device's first batch of {len(y)} samples "
            f"({type(error).__name__}: {error}); a batch of one sample needs a model without batch normalisation"
        ) from error


def limit_memory(megabytes: int) -> None:
    """Let this process use no more than that for its data; 0 leaves it as it is. More than before is not possible."""
    if not megabytes:
        return
    # Address space would count torch's libraries, which are mapped and hardly used; RLIMIT_DATA counts what is written.
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = megabytes * MEGABYTE
    allowed = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([wanted, *allowed]), hard))


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text
