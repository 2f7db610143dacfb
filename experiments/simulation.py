"""From a description to a run: builds the parts, opens the grid, runs the federation, keeps the directory."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid
from safetensors.torch import save_file

from flowerbed.clients.store import ClientStore, DiskStore, MemoryStore
from flowerbed.datasets.files import Busy
from flowerbed.errors import ConfigError
from flowerbed.experiments import metrics, progress, run_directory, tracking, transforms
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.parts import Parts, build_parts, server_evaluator
from flowerbed.experiments.sharded import Sharded
from flowerbed.server.callbacks import Callback, MetricsLog
from flowerbed.server.checkpoint import Checkpoints
from flowerbed.server.devices import Device
from flowerbed.server.grids.base import SimulationGrid
from flowerbed.server.loop import Federation, RunResult
from flowerbed.storage import Tensors

OpenGrid = Callable[[Parts, ClientStore], AbstractContextManager[Grid]]
"""Opens what carries messages between a run's server and its clients."""


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
    simulation = run_directory.load_simulation(directory, settings)
    return run_simulation(simulation, callbacks=callbacks, resume=True)


def run_simulation(
    simulation: Simulation,
    *,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    opened: OpenGrid | None = None,
    devices: Sequence[Device] | None = None,
    secret: int | None = None,
) -> RunResult:
    """Run (or go on with) a simulation; the run directory, if any, is complete also when the run fails.

    ``opened`` opens another grid than the one that the configuration names: that of real devices.
    ``devices`` is then what they have told about themselves, by client number, and ``secret`` the seed of the server's
    noise, since devices know the run's.
    """
    tracking.check(simulation)
    with progress.display(simulation.run.progress) as shown:
        opened = opened or functools.partial(open_grid, busy=shown.busy)
        with shown.busy("preparing data and model"):
            parts = build_parts(simulation, shown.download, shown.busy, devices, secret)
        callbacks = (shown, *callbacks)
        if simulation.run.dir is None:
            with opened(parts, MemoryStore()) as grid:
                return make_federation(parts, grid, callbacks).run()
        directory = Path(simulation.run.dir)
        if resume:
            run_directory.go_on(directory, parts.simulation)
        else:
            run_directory.claim(directory, parts.simulation)
        return _run_in(directory, parts, callbacks, resume, opened)


def _run_in(
    directory: Path, parts: Parts, callbacks: Sequence[Callback], resume: bool, opened: OpenGrid
) -> RunResult:
    started = time.time()
    result: RunResult | None = None
    error: BaseException | None = None
    log = MetricsLog(directory / "metrics.jsonl")
    run_directory.write_partition(directory, parts)
    flops = metrics.step_flops(parts.spec.model, parts.dataset, parts.simulation.local, parts.train.sizes)
    tracker = tracking.open_tracker(parts.simulation, directory)
    try:
        store = DiskStore(directory / "checkpoints" / "clients")
        callbacks = (tracker, *callbacks)
        with opened(parts, store) as grid:
            result = make_federation(parts, grid, callbacks, directory, log, store).run(resume=resume)
        save_file(_contiguous(result.model), directory / "model.safetensors")
        return result
    except BaseException as caught:
        error = caught
        raise
    finally:
        summary = run_directory.write_summary(
            directory, parts.simulation, log, result, error, time.time() - started, flops
        )
        tracker.close(summary, run_directory.draw_figures(directory, parts, log), log.records())


@contextlib.contextmanager
def open_grid(
    parts: Parts, store: ClientStore, busy: Busy = contextlib.nullcontext
) -> Iterator[SimulationGrid]:
    """Open the grid that the configuration asks for; a single client never starts Ray. ``busy`` hears of the start."""
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
    with contextlib.ExitStack() as stack:
        with busy(f"starting {params.name}"):
            stack.enter_context(grid)
        yield grid


def make_federation(
    parts: Parts,
    grid: Grid,
    callbacks: Sequence[Callback] = (),
    directory: Path | None = None,
    log: MetricsLog | None = None,
    store: DiskStore | None = None,
) -> Federation:
    """Put the parts and an open grid together."""
    simulation = parts.simulation
    federation = Federation(
        strategy=parts.strategy,
        model=parts.model,
        grid=grid,
        params=simulation.federation,
        exchange=simulation.grid.exchange,
        evaluator=transforms.with_backdoor_success(
            server_evaluator(parts.spec, simulation.evaluation.measures, sharded_counts(parts, grid)),
            simulation,
            parts.spec,
        ),
        evaluation=simulation.evaluation,
        stop=simulation.stop,
        callbacks=callbacks,
        log=log,
        checkpoints=Checkpoints(directory / "checkpoints", simulation.run.keep) if directory else None,
        checkpoint_every=simulation.run.checkpoint_every,
        store=store,
        identity=simulation.identity,
        derive=metrics.group_scores(parts.dataset.train.labels, parts.train, parts.dataset.num_classes),
        link=parts.link,
    )
    refusal = federation.pooling_refusal() or parts.spec.engine_refusal()
    if simulation.grid.engine == "cohort" and refusal is not None:
        raise ConfigError(f"grid.engine=cohort cannot be used: {refusal}; set grid.engine=auto or generic.")
    return federation


def sharded_counts(parts: Parts, grid: Grid) -> Sharded | None:
    """Return what counts over the test set on the grid's workers; None where the driver does that itself."""
    simulation = parts.simulation
    if not simulation.evaluation.sharded or not isinstance(grid, SimulationGrid) or not grid.parallel:
        return None
    return Sharded(grid, len(parts.dataset.test), simulation.grid.workers)


def _contiguous(model: Tensors) -> Tensors:
    return {name: value.detach().clone().contiguous() for name, value in model.items()}
