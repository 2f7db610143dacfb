"""The parts that a run is made of: built from its description, and checked before any work starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowerbed.clients.app import ClientSpec, choose_device
from flowerbed.clients.data import LABELLED
from flowerbed.clients.store import MemoryStore
from flowerbed.datasets.dataset import Dataset
from flowerbed.datasets.files import Progress
from flowerbed.datasets.partitions import Partition, partition
from flowerbed.datasets.sources import load_dataset
from flowerbed.datasets.subsets import labelled_split, long_tail, matched_test_partition
from flowerbed.errors import ConfigError
from flowerbed.experiments import options, transforms
from flowerbed.experiments.config import Choice, Simulation, build
from flowerbed.models import evaluation
from flowerbed.models.base import ModelSpec
from flowerbed.models.info import ModelInfo
from flowerbed.models.tasks import task_for
from flowerbed.server.loop import ServerEvaluator
from flowerbed.server.sampling import UniformSampler
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


def build_parts(simulation: Simulation, download_progress: Progress | None = None) -> Parts:
    """Load the data and build strategy, model and clients; raises ``ConfigError`` for what cannot work."""
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
        **simulation.dataset.options,
    )
    train, test = build_partitions(simulation, dataset)
    dataset = hide_labels(simulation, dataset, train)
    if simulation.model.name == "auto":
        simulation = completed(replace(simulation, model=default_model(dataset)))
    asked = ModelSpec(
        simulation.model.name, dataset.input_shape, dataset.num_classes, dict(simulation.model.options)
    )
    model = strategy.model_spec(asked)
    module = model.build(simulation.seed)
    info = ModelInfo.of(module)
    strategy.setup(
        Setting(
            seed=simulation.seed,
            clients=federation.clients,
            rounds=federation.rounds,
            info=info,
            sampler=UniformSampler(
                simulation.seed, federation.cohort, federation.oversample, simulation.evaluation.clients
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
        )
    )
    strategy.transforms = transforms.server_transforms(simulation, strategy, info)
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
        transforms=transforms.client_transforms(simulation, dataset),
    )
    initial = {name: value.detach().clone() for name, value in module.state_dict().items()}
    return Parts(simulation, dataset, train, test, spec, strategy, initial)


def completed(simulation: Simulation) -> Simulation:
    """Return the simulation with every option of every choice written out; ``model=auto`` waits for the data."""

    def whole(kind: str, choice: Choice) -> Choice:
        return Choice(*options.complete(kind, choice.name, choice.options))

    return replace(
        simulation,
        strategy=whole("strategy", simulation.strategy),
        dataset=whole("dataset", simulation.dataset),
        partition=whole("partition", simulation.partition),
        model=whole("model", simulation.model),
    )


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
        share = replace(share, samples=kept.numpy()[share.samples])
    counts = share.class_counts(by_class, dataset.num_classes)
    return share, matched_test_partition(first_label(dataset.test.labels), counts, simulation.seed)


def divide_with_server(simulation: Simulation, dataset: Dataset) -> tuple[Tensor, Tensor | None]:
    """Return the training samples of the server, and those that the clients share; None means all of them."""
    labels, data = dataset.train.labels, simulation.data
    by_class = first_label(labels)
    kept: Tensor | None = None
    if data.imbalance > 1:
        kept = torch.from_numpy(long_tail(by_class, dataset.num_classes, data.imbalance, simulation.seed))
    if not data.server_per_class:
        return torch.empty(0, dtype=torch.int64), kept
    pool = torch.arange(len(labels)) if kept is None else kept
    server, clients = labelled_split(labels, pool, simulation.seed, per_class=data.server_per_class)
    if not len(clients):
        raise ConfigError(
            f"data.server_per_class={data.server_per_class} leaves the clients without samples; give fewer."
        )
    return torch.from_numpy(server), torch.from_numpy(clients)


def hide_labels(simulation: Simulation, dataset: Dataset, train: Partition) -> Dataset:
    """Mark which training samples keep their label, in the extra ``labelled``; see ``ClientData``.

    The server's own samples keep theirs.
    """
    data = simulation.data
    if data.labelled == 1 and not data.labels_per_class:
        return dataset
    how: dict[str, Any] = (
        {"per_class": data.labels_per_class} if data.labels_per_class else {"fraction": data.labelled}
    )
    mask = torch.zeros(len(dataset.train), dtype=torch.bool)
    mask[divide_with_server(simulation, dataset)[0]] = True
    for client in range(train.num_clients):
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


def server_evaluator(spec: ClientSpec) -> ServerEvaluator:
    """Return the evaluation of a global model on the whole test set."""
    device = choose_device(spec.device)
    module = spec.model.build(spec.seed).to(device)
    task = task_for(spec.dataset.task, spec.dataset.num_classes)
    test = spec.dataset.test

    def prepare(inputs: Tensor) -> Tensor:
        return spec.dataset.prepare(inputs.to(device))

    def evaluate(model: Tensors) -> Mapping[str, Any]:
        module.load_state_dict(model)
        module.eval()
        sums = evaluation.counts(module, task, test.inputs, test.labels, prepare)
        found = evaluation.metrics(sums, len(test), spec.dataset.num_classes)
        return {**found, **evaluation.scores(found)}

    return evaluate
