"""The parts that a run is made of: built from its description, and checked before any work starts."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowerbed import seeds
from flowerbed.clients.app import ClientSpec, choose_device
from flowerbed.clients.data import LABELLED
from flowerbed.clients.engine_routes import Routes, find_routes
from flowerbed.clients.store import MemoryStore
from flowerbed.datasets.dataset import Dataset
from flowerbed.datasets.files import Busy, Progress
from flowerbed.datasets.partitions import DrawnPartition, Partition, partition
from flowerbed.datasets.sources import load_dataset
from flowerbed.datasets.subsets import (
    domain_skew,
    labelled_classes,
    labelled_split,
    long_tail,
    matched_test_partition,
)
from flowerbed.errors import ConfigError
from flowerbed.experiments import measures, options, transforms
from flowerbed.experiments.config import Choice, InitialParams, Simulation, build
from flowerbed.experiments.encoders import Material, embedded_dataset
from flowerbed.experiments.metrics import train_counts
from flowerbed.experiments.tampering import tampered
from flowerbed.models import evaluation
from flowerbed.models.base import ModelSpec
from flowerbed.models.info import ModelInfo
from flowerbed.models.tasks import task_for
from flowerbed.server.devices import Device, DeviceLink, simulated
from flowerbed.server.grids.base import torch_threads
from flowerbed.server.loop import ServerEvaluator
from flowerbed.server.sampling import Draws, make_sampler
from flowerbed.storage import Tensors
from flowerbed.strategies.base import STRATEGIES, FederatedStrategy, Setting
from flowerbed.strategies.flower import FlowerParams, FlowerStrategy
from flowerbed.strategies.loader import load_all
from flowerbed.strategies.server_side import ServerSide

# Group norm, because the batch statistics of clients with few classes do not average.
SMALL_RESNET = Choice("resnet8", {"norm": "gn"})
DEFAULT_MODELS = {
    "digits": Choice("mlp"),
    "cifar10": SMALL_RESNET,
    "cifar100": SMALL_RESNET,
    "pacs": SMALL_RESNET,
}


@dataclass(frozen=True)
class Parts:
    """Everything that a run is made of, built and checked before any work starts."""

    simulation: Simulation
    dataset: Dataset
    train: Partition
    test: Partition
    spec: ClientSpec
    strategy: FederatedStrategy
    model: Tensors
    link: DeviceLink | None = None
    """What is agreed with single devices; None where the configuration treats all alike."""


def build_parts(
    simulation: Simulation,
    download_progress: Progress | None = None,
    busy: Busy = contextlib.nullcontext,
    devices: Sequence[Device] | None = None,
    secret: int | None = None,
) -> Parts:
    """Load the data and build strategy, model and clients; raises ``ConfigError`` for what cannot work.

    ``download_progress`` and ``busy`` hear of what takes long: downloads, decoding, encoding.
    ``devices`` is what real clients have told about themselves, by client number; by default they are simulated.
    ``secret`` is the server's own seed of noise where clients know the run's.
    """
    load_all()
    simulation = completed(simulation)
    federation = simulation.federation
    strategy = build_strategy(simulation.strategy)
    dataset = load_dataset(
        simulation.dataset.name,
        data_dir=simulation.data.dir,
        cache_dir=simulation.data.cache,
        download=simulation.data.download,
        progress=download_progress,
        busy=busy,
        **simulation.dataset.options,
    )
    train, test = build_partitions(simulation, dataset)
    with busy(f"encoding with {simulation.encoder.name}"):
        dataset = encoded(simulation, dataset)
    dataset = hide_labels(simulation, dataset, train)
    if simulation.model.name == "auto":
        chosen = default_model(dataset) if simulation.encoder.name == "none" else Choice("linear")
        simulation = completed(replace(simulation, model=chosen))
    asked = ModelSpec(
        simulation.model.name, dataset.input_shape, dataset.num_classes, dict(simulation.model.options)
    )
    initial = simulation.initial
    defence = transforms.build_defence(simulation.defence)
    model = defence.model_spec(strategy.model_spec(asked))
    model = replace(model, weights=initial.weights, part=initial.part)
    module = model.build(simulation.seed)
    defence.check(strategy.half, module, simulation.local, dataset)
    info = ModelInfo.of(module)

    @cache
    def link() -> DeviceLink:
        # One object a client, so only where it is needed: there may be a million.
        fleet = (
            simulated(simulation.devices, train.sizes, simulation.seed) if devices is None else list(devices)
        )
        steps = [simulation.local.steps_per_round(max(1, device.examples)) for device in fleet]
        values = sum(value.numel() for value in module.state_dict().values())
        real = devices is not None
        return DeviceLink(simulation.devices, fleet, tickets=real, steps=steps, values=values)

    strategy.setup(
        Setting(
            seed=simulation.seed,
            clients=federation.clients,
            rounds=federation.rounds,
            info=info,
            sampler=make_sampler(
                federation.sampling,
                Draws(
                    simulation.seed,
                    federation.cohort,
                    federation.oversample,
                    simulation.evaluation.clients,
                    train.sizes,
                    lambda: link().able(),
                ),
            ),
            cohort=federation.cohort,
            local=simulation.local,
            server=ServerSide(
                simulation.seed,
                federation.clients,
                model,
                dataset,
                divide_with_server(simulation, dataset)[0].numpy(),
                simulation.grid.device,
            ),
            class_counts=tuple(train_counts(dataset.train.labels, train, dataset.num_classes)),
        )
    )
    strategy.transforms = transforms.server_transforms(simulation, strategy, info, secret)
    strategy.transforms = tampered(strategy.transforms, simulation, strategy, dataset)
    spec = ClientSpec(
        seed=simulation.seed,
        rounds=federation.rounds,
        half=strategy.half,
        model=model,
        dataset=dataset,
        train=train,
        test=test,
        local=simulation.local,
        store=MemoryStore(),
        device=simulation.grid.device,
        transforms=(
            *transforms.client_transforms(simulation, dataset),
            *transforms.evaluation_transforms(simulation, model, dataset),
        ),
        routes=fast_routes(simulation, module),
        mask=simulation.evaluation.mask,
        engine=simulation.grid.engine,
        cohort=simulation.cohort,
        validation=validation_partition(simulation, dataset, train),
    )
    first = {name: value.detach().clone() for name, value in module.state_dict().items()}
    agreed = link() if simulation.devices.acts or devices is not None else None
    return Parts(simulation, dataset, train, test, spec, strategy, first, agreed)


def fast_routes(simulation: Simulation, module: torch.nn.Module) -> Routes | None:
    """Return how the fast engine computes dense layers, for all workers alike; None where it is not asked for."""
    if simulation.local.engine != "fast" or choose_device(simulation.grid.device).type != "cpu":
        return None
    with torch_threads(simulation.grid.threads):
        return find_routes(module, simulation.local)


def completed(simulation: Simulation) -> Simulation:
    """Return the simulation with every option of every choice written out; ``model=auto`` waits for the data."""

    def whole(kind: str, choice: Choice) -> Choice:
        return Choice(*options.complete(kind, choice.name, choice.options))

    return replace(
        simulation,
        initial=digested(simulation.initial),
        strategy=whole("strategy", simulation.strategy),
        dataset=whole("dataset", simulation.dataset),
        partition=whole("partition", simulation.partition),
        encoder=whole("encoder", simulation.encoder),
        model=whole("model", simulation.model),
        defence=whole("defence", simulation.defence),
        tampering=whole("tampering", simulation.tampering),
    )


def digested(initial: InitialParams) -> InitialParams:
    """Return where the model starts with the digest of its file; raises ``ConfigError`` if that is another one."""
    if initial.weights is None:
        return initial
    try:
        found = hashlib.sha256(Path(initial.weights).read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"initial.weights={initial.weights} cannot be read: {error.strerror}.") from error
    if initial.sha256 not in ("", found):
        raise ConfigError(
            f"initial.weights={initial.weights} is not the file that this run began with; bring that one back, or "
            "start a new run."
        )
    return replace(initial, weights=str(Path(initial.weights).resolve()), sha256=found)


def build_strategy(choice: Choice) -> FederatedStrategy:
    """Return the strategy by name or import path.

    ``flower:FedAdam`` is short for the stock Flower strategy of that name; a class that is a plain Flower
    ``Strategy`` is wrapped likewise, its options being its keyword arguments.
    """
    load_all()
    if choice.name.startswith("flower:"):
        return FlowerStrategy(
            FlowerParams(flower=choice.name.removeprefix("flower:"), options=dict(choice.options))
        )
    found = STRATEGIES.get(choice.name)
    if isinstance(found, type) and issubclass(found, FederatedStrategy):
        return found(build(found.Params, choice.options, "strategy"))
    return FlowerStrategy(FlowerParams(flower=choice.name, options=dict(choice.options)))


def first_label(labels: Tensor) -> Tensor:
    """Return the class by which a sample is dealt out and drawn: its label, or that of its first position."""
    return labels if labels.ndim == 1 else labels[:, 0]


def build_partitions(simulation: Simulation, dataset: Dataset) -> tuple[Partition, Partition]:
    """Return the clients' shares of the training set and the matching shares of the test set."""
    labels, domains = dataset.train.labels, dataset.train.extras.get("domain")
    by_class = first_label(labels)
    _, kept = divide_with_server(simulation, dataset)
    share = partition(
        simulation.partition.name,
        by_class if kept is None else by_class[kept],
        simulation.federation.clients,
        simulation.seed,
        domains=domains if kept is None or domains is None else domains[kept],
        **simulation.partition.options,
    )
    if kept is not None:
        share = share.within(kept.numpy())
    if isinstance(share, DrawnPartition):
        return share, share.of_test(len(dataset.test))
    counts = share.class_counts(by_class, dataset.num_classes)
    return share, matched_test_partition(first_label(dataset.test.labels), counts, simulation.seed)


def validation_partition(simulation: Simulation, dataset: Dataset, train: Partition) -> Partition | None:
    """Return the clients' shares of the validation split, made as those of the test set; None where there is none."""
    if dataset.validation is None:
        return None
    if isinstance(train, DrawnPartition):
        return train.of_test(len(dataset.validation))
    counts = train.class_counts(first_label(dataset.train.labels), dataset.num_classes)
    return matched_test_partition(first_label(dataset.validation.labels), counts, simulation.seed)


def divide_with_server(simulation: Simulation, dataset: Dataset) -> tuple[Tensor, Tensor | None]:
    """Return the training samples of the server, and those that the clients share; None means all of them."""
    labels, data = dataset.train.labels, simulation.data
    by_class = first_label(labels)
    kept: Tensor | None = None
    if data.imbalance > 1:
        kept = torch.from_numpy(long_tail(by_class, dataset.num_classes, data.imbalance, simulation.seed))
    if not data.server_per_class:
        return torch.empty(0, dtype=torch.int64), limited(simulation, dataset, kept)
    pool = torch.arange(len(labels)) if kept is None else kept
    server, clients = labelled_split(labels, pool, simulation.seed, per_class=data.server_per_class)
    if not len(clients):
        raise ConfigError(
            f"data.server_per_class={data.server_per_class} leaves the clients without samples; give fewer."
        )
    return torch.from_numpy(server), limited(simulation, dataset, torch.from_numpy(clients))


def limited(simulation: Simulation, dataset: Dataset, kept: Tensor | None) -> Tensor | None:
    """Return the samples that the clients share: of those that they may have, what ``data`` says; None means all."""
    wanted, skew = simulation.data.client_samples, simulation.data.domain_skew
    pool = torch.arange(len(dataset.train)) if kept is None else kept
    if skew:
        if "domain" not in dataset.train.extras:
            raise ConfigError("data.domain_skew needs a data set with domains, such as pacs or restyled.")
        labels, domains = first_label(dataset.train.labels), dataset.train.extras["domain"]
        kept = pool = torch.from_numpy(domain_skew(labels, domains, pool, skew, simulation.seed))
    if not wanted:
        return kept
    if wanted > len(pool):
        raise ConfigError(
            f"data.client_samples={wanted} is more than the {len(pool)} samples that there are."
        )
    order = seeds.numpy_rng(simulation.seed, "client samples").permutation(len(pool))
    return pool[torch.from_numpy(np.sort(order[:wanted]))]


def encoded(simulation: Simulation, dataset: Dataset) -> Dataset:
    """Return the data set as embeddings, if the run has an encoder."""
    if simulation.encoder.name == "none":
        return dataset
    device, samples = simulation.grid.device, divide_with_server(simulation, dataset)[0].numpy()
    nothing = ModelSpec("linear", dataset.input_shape, dataset.num_classes)
    server = ServerSide(simulation.seed, simulation.federation.clients, nothing, dataset, samples, device)
    material = Material(dataset, server, simulation.seed, choose_device(device))
    return embedded_dataset(
        simulation.encoder.name, simulation.encoder.options, material, simulation.data.cache
    )


def hide_labels(simulation: Simulation, dataset: Dataset, train: Partition) -> Dataset:
    """Mark which training samples keep their label, in the extra ``labelled``; see ``ClientData``.

    The server's own samples keep theirs.
    """
    data = simulation.data
    if data.labelled == 1 and not data.labels_per_class:
        return dataset
    if isinstance(train, DrawnPartition):
        raise ConfigError(
            "data.labelled and data.labels_per_class need samples of one client each, partition=draws "
            "shares them; choose another partition."
        )
    how: dict[str, Any] = (
        {"per_class": data.labels_per_class} if data.labels_per_class else {"fraction": data.labelled}
    )
    mask = torch.zeros(len(dataset.train), dtype=torch.bool)
    mask[divide_with_server(simulation, dataset)[0]] = True
    counts = train.class_counts(first_label(dataset.train.labels), dataset.num_classes)
    chosen = labelled_classes(counts, data.labelled_classes, simulation.seed)
    for client in range(train.num_clients):
        # Every class a client holds is no restriction: the labels are then those that there always were.
        how["classes"] = np.flatnonzero(chosen[client])
        labelled, _ = labelled_split(dataset.train.labels, train.indices(client), simulation.seed, **how)
        mask[torch.from_numpy(labelled)] = True
    split = replace(dataset.train, extras={**dataset.train.extras, LABELLED: mask})
    return replace(dataset, train=split)


def default_model(dataset: Dataset) -> Choice:
    """Return the model that ``model=auto`` stands for."""
    if dataset.task == "next-token":
        return Choice("char_lstm")
    if dataset.name in DEFAULT_MODELS:
        return DEFAULT_MODELS[dataset.name]
    return Choice("mlp" if len(dataset.input_shape) == 1 else "leaf_cnn")


def server_evaluator(
    spec: ClientSpec,
    further: Sequence[str] = (),
    count: Callable[[Tensors], Mapping[str, Tensor]] | None = None,
) -> ServerEvaluator:
    """Return the evaluation of a global model on the whole test set, with ``further`` measures by import path.

    ``count`` computes the task's counts elsewhere than here.
    """
    device = choose_device(spec.device)
    module = spec.model.build(spec.seed).to(device)
    task = task_for(spec.dataset.task, spec.dataset.num_classes)
    test = spec.dataset.test
    loaded = measures.load(further)

    def prepare(inputs: Tensor) -> Tensor:
        return spec.dataset.prepare(inputs.to(device))

    def evaluate(model: Tensors) -> Mapping[str, Any]:
        module.load_state_dict(model)
        module.eval()
        found = counted(model)
        return measures.add(found, loaded, measures.Measured(module, spec.dataset, spec.seed, device))

    def counted(model: Tensors) -> dict[str, Any]:
        if spec.dataset.task == "measured":
            return {}
        if count is not None:
            sums = dict(count(model))
        else:
            sums = evaluation.counts(module, task, test.inputs, test.labels, prepare)
        found = evaluation.metrics(sums, len(test), spec.dataset.num_classes)
        return {**found, **evaluation.scores(found), **by_domain()}

    def by_domain() -> dict[str, float]:
        """Return the accuracy in every domain of the test set, their mean and their standard deviation."""
        if "domain" not in test.extras:
            return {}
        accuracy = {}
        for number, name in enumerate(spec.dataset.domains):
            rows = torch.nonzero(test.extras["domain"] == number).flatten()
            if len(rows):
                sums = evaluation.counts(module, task, test.inputs[rows], test.labels[rows], prepare)
                accuracy[f"accuracy-domain-{name}"] = float(sums["correct"].sum() / sums["total"].sum())
        values = np.array(list(accuracy.values()))
        spread = {"accuracy-domains-mean": float(values.mean()), "accuracy-domains-std": float(values.std())}
        return {**accuracy, **spread}

    return evaluate
