"""One arm with one seed: run, resumed or reused, with what came of it beside the run.

The directory's name holds the hash of all that decides the run, so a changed paper never finds an old run, and a
command that is repeated repeats no work.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from flowerbed.errors import CheckpointError, ConfigError, DataError, DivergedError
from flowerbed.experiments import metrics
from flowerbed.experiments.config import Settings, Simulation
from flowerbed.experiments.failure import first_line
from flowerbed.experiments.reproduction.claims import DIVERGED, Observed
from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.experiments.reproduction.paper import load_paper
from flowerbed.experiments.simulation import run_simulation
from flowerbed.server.callbacks import CLIENTS, SERVER, Callback, MetricsLog, Record
from flowerbed.server.grids.base import torch_threads
from flowerbed.storage import atomic_write

OUTCOME = "outcome.json"
MODEL = "model.safetensors"
Key = tuple[str, str, int]
"""Slug, arm, seed."""
Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Job:
    """A run that is to be made. Picklable."""

    paper: str
    """As ``load_paper`` takes it."""
    arm: str
    seed: int
    settings: Settings
    directory: Path
    needs: tuple[Key, ...] = ()
    """Runs whose models it starts from."""

    @property
    def key(self) -> Key:
        """What names it."""
        return self.paper, self.arm, self.seed


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    status: str
    """completed, stopped (early), diverged (left the finite numbers) or failed."""
    reason: str
    values: Mapping[str, float]
    """Its figures by metric. A diverged run has none but ``diverged`` and its costs."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """(round, figure) by metric of the server's evaluation and of training."""
    seconds: float = 0.0
    made_with: str = ""
    """Commit and torch version."""

    @property
    def observed(self) -> Observed:
        """What a claim may see of it."""
        return Observed(self.status, self.values, self.reason)

    @classmethod
    def read(cls, directory: Path) -> Outcome | None:
        """Return what an earlier command left in ``directory``, if that run is over and worked."""
        path = directory / OUTCOME
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        curves = {name: [(int(r), float(v)) for r, v in curve] for name, curve in found.pop("curves").items()}
        return cls(**found, curves=curves)


def execute(job: Job, callbacks: Sequence[Callback] = ()) -> Outcome:
    """Make, finish or reuse the run; its failure is an outcome, but wrong settings and missing data are raised."""
    earlier = Outcome.read(job.directory)
    if earlier is not None:
        return earlier
    simulation = simulation_of(job)
    job.directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        with torch_threads(simulation.grid.threads):
            status = _run_or_resume(simulation, job.directory, callbacks)
            outcome = _measured(job, simulation, status)
    except DivergedError as error:
        outcome = _broken(job, "diverged", first_line(error))
    except (ConfigError, DataError) as error:
        raise type(error)(f"{job.arm}, seed {job.seed}: {error}") from error
    except Exception as error:  # noqa: BLE001 - the other arms may work; this one is shown as failed
        return _broken(job, "failed", f"{type(error).__name__}: {first_line(error)}")
    atomic_write(job.directory / OUTCOME, (json.dumps(asdict(outcome)) + "\n").encode())
    return outcome


def simulation_of(job: Job) -> Simulation:
    """Return the job as a run in its directory."""
    simulation = Simulation.of(job.settings)
    return replace(
        simulation, run=replace(simulation.run, dir=str(job.directory), overwrite=True, progress=False)
    )


def _run_or_resume(simulation: Simulation, directory: Path, callbacks: Sequence[Callback]) -> str:
    if (directory / "config.yaml").exists():
        try:
            return run_simulation(simulation, callbacks=callbacks, resume=True).status
        except (CheckpointError, ConfigError):
            # Interrupted before its first checkpoint, or described otherwise since the platform changed.
            pass
    return run_simulation(simulation, callbacks=callbacks).status


def _measured(job: Job, simulation: Simulation, status: str) -> Outcome:
    """Return the outcome of a finished run, with the paper's own measures."""
    records = _records(job)
    values = {**figures(records, simulation.evaluation.last), **_costs(job.directory)}
    started = time.perf_counter()
    paper = load_paper(job.paper)
    if paper.measure is not None:
        values = united(
            values, paper.measure(Finished(job.arm, job.seed, job.directory, values)), "paper's measure"
        )
    bad = sorted(name for name, value in values.items() if not math.isfinite(value))
    if bad:
        return _broken(job, "diverged", f"{bad[0]} is {values[bad[0]]}")
    seconds = math.fsum(r.seconds for r in records) + time.perf_counter() - started
    curves = _curves(records)
    return Outcome(
        status, "", {**values, DIVERGED: 0.0}, curves, round(seconds, 3), _made_with(job.directory)
    )


def _broken(job: Job, status: str, reason: str) -> Outcome:
    records = _records(job)
    seconds = round(math.fsum(r.seconds for r in records), 3)
    values = {**_costs(job.directory), DIVERGED: 1.0} if status == "diverged" else {}
    return Outcome(status, reason, values, _curves(records), seconds, _made_with(job.directory))


def figures(records: Sequence[Record], last: int) -> dict[str, float]:
    """Return the figures of a run: the mean of its last ``last`` evaluations, never the best one.

    Those of the clients' evaluations are called ``clients:NAME``, those of training ``train:NAME``.
    """
    values = dict(metrics.mean_of_last(records, SERVER, last))
    values |= {f"clients:{n}": v for n, v in metrics.mean_of_last(records, CLIENTS, last).items()}
    found: dict[str, list[float]] = {}
    for record in records:
        if record.phase not in (SERVER, CLIENTS):
            for name, value in metrics.scalars(record.metrics).items():
                found.setdefault(f"train:{name}", []).append(float(value))
    return values | {name: math.fsum(v[-last:]) / len(v[-last:]) for name, v in found.items()}


def united(values: Mapping[str, float], further: Mapping[str, float], what: str) -> dict[str, float]:
    """Return both; raises ``ConfigError`` if they share a name."""
    shared = sorted(values.keys() & further.keys())
    if shared:
        raise ConfigError(f"The {what} repeats the metric '{shared[0]}'; give it another name.")
    return {**values, **{name: float(value) for name, value in further.items()}}


def _costs(directory: Path) -> dict[str, float]:
    cost = _summary(directory).get("cost", {}).get("train", {})
    return {f"cost:{name}": float(value) for name, value in cost.items() if value is not None}


def _curves(records: Sequence[Record]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for record in records:
        if record.phase != CLIENTS:
            prefix = "" if record.phase == SERVER else "train:"
            for name, value in metrics.scalars(record.metrics).items():
                curves.setdefault(prefix + name, []).append((record.round, float(value)))
    return curves


def _records(job: Job) -> list[Record]:
    return MetricsLog(job.directory / "metrics.jsonl").records()


def _made_with(directory: Path) -> str:
    summary = _summary(directory)
    torch = summary.get("versions", {}).get("torch", "unknown")
    return f"commit {(summary.get('git_commit') or 'unknown')[:10]}, torch {torch}"


def _summary(directory: Path) -> dict[str, Any]:
    path = directory / "summary.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found
