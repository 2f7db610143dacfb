"""From a description to a run: builds every part, runs the federation, and keeps the run directory."""

from __future__ import annotations

import contextlib
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from flowerbed.clients.app import ClientSpec, choose_device
from flowerbed.clients.data import LABELLED
from flowerbed.clients.store import ClientStore, DiskStore, MemoryStore
from flowerbed.datasets.dataset import Dataset
from flowerbed.datasets.files import Progress
from flowerbed.datasets.partitions import Partition, partition
from flowerbed.datasets.sources import load_dataset
from flowerbed.datasets.subsets import labelled_split, long_tail, matched_test_partition
from flowerbed.errors import ConfigError
from flowerbed.experiments import figures, metrics, options, progress, tracking, transforms
from flowerbed.experiments.config import IDENTITY, Choice, Simulation, build
from flowerbed.models import evaluation
from flowerbed.models.base import ModelSpec
from flowerbed.models.info import ModelInfo
from flowerbed.models.tasks import task_for
from flowerbed.server.callbacks import CLIENTS, SERVER, Callback, MetricsLog
from flowerbed.server.checkpoint import Checkpoints
from flowerbed.server.grids.base import SimulationGrid
from flowerbed.server.loop import Federation, RunResult, ServerEvaluator
from flowerbed.server.sampling import UniformSampler
from flowerbed.storage import Tensors, atomic_write
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


def simulate(callbacks: Sequence[Callback] = (), **settings: Any) -> RunResult:
    """Run a simulation described by keyword arguments and return its result.

    Every argument is a section of the configuration: ``strategy="fedavg"`` or
    ``strategy={"name": "fedavg", "server_lr": 0.5}``, ``federation={"clients": 100, "cohort": 10}``,
    ``local={"lr": 0.05}``, ``grid="ray"``, ``run={"dir": "runs/first"}``, ``seed=1`` ...; what is left out has
    the defaults of ``flowerbed.experiments.config``. Without ``run.dir`` nothing is written.
    """
    return run_simulation(Simulation.of(settings), callbacks=callbacks)


def resume(directory: str | Path, callbacks: Sequence[Callback] = (), **settings: Any) -> RunResult:
    """Go on with the run in ``directory`` after its newest checkpoint.

    ``settings`` may change what does not decide the model (grid, tracking, run) and ``federation.rounds``.
    """
    simulation = load_simulation(directory, settings)
    return run_simulation(simulation, callbacks=callbacks, resume=True)


def load_simulation(directory: str | Path, settings: Mapping[str, Any] | None = None) -> Simulation:
    """Read the configuration of the run in ``directory``, with some settings replaced."""
    path = Path(directory) / "config.yaml"
    if not path.exists():
        raise ConfigError(f"{directory} holds no run: {path} is missing.")
    plain = yaml.safe_load(path.read_text())
    for section, value in (settings or {}).items():
        same = isinstance(value, Mapping) and isinstance(plain.get(section), dict)
        plain[section] = {**plain[section], **value} if same else value
    plain["run"] = {**plain["run"], "dir": str(directory)}
    return Simulation.of(plain)


def run_simulation(
    simulation: Simulation, *, callbacks: Sequence[Callback] = (), resume: bool = False
) -> RunResult:
    """Run (or go on with) a simulation; the run directory, if any, is complete also when the run fails."""
    tracking.check(simulation)
    with progress.display(simulation.run.progress) as shown:
        parts = build_parts(simulation, shown.download)
        callbacks = (shown, *callbacks)
        if simulation.run.dir is None:
            with open_grid(parts, MemoryStore()) as grid:
                return make_federation(parts, grid, callbacks).run()
        directory = Path(simulation.run.dir)
        if resume:
            _go_on(directory, parts.simulation)
        else:
            _claim(directory, parts.simulation)
        return _run_in(directory, parts, callbacks, resume)


def _run_in(directory: Path, parts: Parts, callbacks: Sequence[Callback], resume: bool) -> RunResult:
    started = time.time()
    result: RunResult | None = None
    error: BaseException | None = None
    log = MetricsLog(directory / "metrics.jsonl")
    flops = metrics.step_flops(parts.spec.model, parts.dataset, parts.simulation.local, parts.train.sizes)
    tracker = tracking.open_tracker(parts.simulation, directory)
    try:
        store = DiskStore(directory / "checkpoints" / "clients")
        callbacks = (tracker, *callbacks)
        with open_grid(parts, store) as grid:
            result = make_federation(parts, grid, callbacks, directory, log, store).run(resume=resume)
        save_file(_contiguous(result.model), directory / "model.safetensors")
        return result
    except BaseException as caught:
        error = caught
        raise
    finally:
        summary = write_summary(directory, parts.simulation, log, result, error, time.time() - started, flops)
        tracker.close(summary, draw_figures(directory, parts, log))


def draw_figures(directory: Path, parts: Parts, log: MetricsLog) -> list[Path]:
    """Draw the run's pictures from its partition and its metrics; returns the files."""
    simulation, dataset = parts.simulation, parts.dataset
    labels = dataset.train.labels
    counts = parts.train.class_counts(labels if labels.ndim == 1 else labels[:, 0], dataset.num_classes)
    title = f"{simulation.strategy.name} on {dataset.name}, {simulation.partition.name}"
    return figures.draw(directory / "figures", log.records(), counts, dataset.classes, title)


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


def build_partitions(simulation: Simulation, dataset: Dataset) -> tuple[Partition, Partition]:
    """Return the clients' shares of the training set and the matching shares of the test set."""
    labels, domains = dataset.train.labels, dataset.train.extras.get("domain")
    by_class = labels if labels.ndim == 1 else labels[:, 0]
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
    test_labels = dataset.test.labels
    test_by_class = test_labels if test_labels.ndim == 1 else test_labels[:, 0]
    return share, matched_test_partition(test_by_class, counts, simulation.seed)


def divide_with_server(simulation: Simulation, dataset: Dataset) -> tuple[Tensor, Tensor | None]:
    """Return the training samples of the server, and those that the clients share; None means all of them."""
    labels, data = dataset.train.labels, simulation.data
    by_class = labels if labels.ndim == 1 else labels[:, 0]
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


@contextlib.contextmanager
def open_grid(parts: Parts, store: ClientStore) -> Iterator[SimulationGrid]:
    """Open the grid that the configuration asks for; a single client never starts Ray."""
    from flowerbed.server.grids.inprocess import InProcessGrid

    params, clients = parts.simulation.grid, parts.simulation.federation.clients
    factory = replace(parts.spec, store=store)
    if params.name == "inprocess" or clients == 1:
        grid: SimulationGrid = InProcessGrid(factory, clients, threads=params.threads)
    else:
        from flowerbed.server.grids.ray_grid import RayGrid

        if isinstance(store, MemoryStore):
            raise ConfigError("grid=ray keeps the state of clients on disk; give run.dir.")
        grid = RayGrid(
            factory,
            clients,
            workers=params.workers,
            address=params.address,
            gpus_per_worker=params.gpus_per_worker,
            threads=params.threads,
            time_limit=parts.simulation.federation.time_limit or None,
        )
    with grid:
        yield grid


def make_federation(
    parts: Parts,
    grid: SimulationGrid,
    callbacks: Sequence[Callback] = (),
    directory: Path | None = None,
    log: MetricsLog | None = None,
    store: DiskStore | None = None,
) -> Federation:
    """Put the parts and an open grid together."""
    simulation = parts.simulation
    return Federation(
        strategy=parts.strategy,
        model=parts.model,
        grid=grid,
        params=simulation.federation,
        evaluator=transforms.with_backdoor_success(server_evaluator(parts.spec), simulation, parts.spec),
        evaluation=simulation.evaluation,
        stop=simulation.stop,
        callbacks=callbacks,
        log=log,
        checkpoints=Checkpoints(directory / "checkpoints", simulation.run.keep) if directory else None,
        checkpoint_every=simulation.run.checkpoint_every,
        store=store,
        identity=simulation.identity,
        derive=metrics.group_scores(parts.dataset.train.labels, parts.train, parts.dataset.num_classes),
    )


def _claim(directory: Path, simulation: Simulation) -> None:
    """Make ``directory`` this run's; raises ``ConfigError`` if another run is there."""
    if (directory / "config.yaml").exists():
        if not simulation.run.overwrite:
            raise ConfigError(
                f"{directory} already holds a run; go on with it (flowerbed resume {directory}), choose another "
                "run.dir, or replace it with run.overwrite=true."
            )
        for name in ("checkpoints", "figures"):
            shutil.rmtree(directory / name, ignore_errors=True)
        for name in ("metrics.jsonl", "summary.json", "model.safetensors"):
            (directory / name).unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    _write_config(directory, simulation)


def _go_on(directory: Path, simulation: Simulation) -> None:
    """Keep what a resumed run does otherwise (more rounds, another grid) for the next resume.

    Raises ``ConfigError``, and leaves the run as it is, for settings that decide the model.
    """
    stored = load_simulation(directory)
    if stored.identity != simulation.identity:
        before, now = stored.plain(), simulation.plain()
        changed = [key for key in IDENTITY if before[key] != now[key]]
        raise ConfigError(
            f"The run in {directory} was made with other settings of {' and '.join(changed)}; resume may change "
            "federation.rounds (not under a cosine schedule), grid, run and tracking. Start a new run instead."
        )
    _write_config(directory, simulation)


def _write_config(directory: Path, simulation: Simulation) -> None:
    text = yaml.safe_dump(simulation.plain(), sort_keys=False)
    atomic_write(directory / "config.yaml", text.encode())


def write_summary(
    directory: Path,
    simulation: Simulation,
    log: MetricsLog,
    result: RunResult | None,
    error: BaseException | None,
    seconds: float,
    flops_per_step: float | None = None,
) -> dict[str, Any]:
    """Write summary.json from the metrics log and the outcome; returns what was written."""
    records = log.records()
    failures = [failure for record in records for failure in record.failures]
    if result is not None:
        status = result.status
    else:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    last = simulation.evaluation.last
    summary = {
        "status": status,
        "reason": result.reason if result is not None else f"{type(error).__name__}: {error}",
        "rounds": max((r.round for r in records), default=0),
        "resumed_from": result.resumed_from if result is not None else None,
        "final": metrics.final(records, SERVER),
        f"mean_of_last_{last}": metrics.mean_of_last(records, SERVER, last),
        "clients": metrics.final(records, CLIENTS),
        f"clients_mean_of_last_{last}": metrics.mean_of_last(records, CLIENTS, last),
        "failures": {
            "total": len(failures),
            "by_kind": dict(Counter(f.kind for f in failures)),
            "by_client": {str(k): v for k, v in sorted(Counter(f.client for f in failures).items())},
        },
        "bytes": {"down": sum(r.bytes_down for r in records), "up": sum(r.bytes_up for r in records)},
        "cost": metrics.cost(records, flops_per_step),
        "seed": simulation.seed,
        "config_hash": simulation.identity,
        "git_commit": _git_commit(),
        "versions": _versions(),
        "wall_seconds": round(seconds, 3),
        # ru_maxrss is in KiB on Linux; Ray's actors are not children of this process.
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }
    (directory / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _contiguous(model: Tensors) -> Tensors:
    return {name: value.detach().clone().contiguous() for name, value in model.items()}


def _git_commit() -> str | None:
    """Return the commit of the current directory's repository, else of this package's, or None."""
    for folder in (Path.cwd(), Path(__file__).resolve().parent):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
            found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
            if found.returncode == 0:
                return found.stdout.strip()
    return None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": sys.platform}
    for package in ("flowerbed", "flwr", "torch", "numpy", "ray"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions
