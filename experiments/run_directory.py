"""The directory of a run: claimed when it starts, described when it ends, read when it goes on.

``config.yaml``, ``partition.npz``, ``metrics.jsonl``, ``summary.json``, ``model.safetensors``, ``checkpoints/`` and
``figures/``: other tools rely on these names.
"""

from __future__ import annotations

import contextlib
import io
import json
import platform
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from flowerbed.errors import ConfigError
from flowerbed.experiments import figures, metrics
from flowerbed.experiments.config import IDENTITY, Simulation
from flowerbed.experiments.parts import Parts, first_label
from flowerbed.server.callbacks import CLIENTS, SERVER, MetricsLog
from flowerbed.server.loop import RunResult
from flowerbed.storage import atomic_write

PARTITION = "partition.npz"
MOST_DRAWN = 20_000
"""More clients than this are in no picture of the partition, and their samples in no file."""


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


def claim(directory: Path, simulation: Simulation) -> None:
    """Make ``directory`` this run's; raises ``ConfigError`` if another run is there."""
    if (directory / "config.yaml").exists():
        if not simulation.run.overwrite:
            raise ConfigError(
                f"{directory} already holds a run; go on with it (flowerbed resume {directory}), choose another "
                "run.dir, or replace it with run.overwrite=true."
            )
        for name in ("checkpoints", "figures", "observations", "tensorboard", "wandb"):
            shutil.rmtree(directory / name, ignore_errors=True)
        for name in ("metrics.jsonl", "summary.json", "model.safetensors", PARTITION):
            (directory / name).unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    _write_config(directory, simulation)


def go_on(directory: Path, simulation: Simulation) -> None:
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
        "git_commit": git_commit(),
        "versions": versions(),
        "wall_seconds": round(seconds, 3),
        # ru_maxrss is in KiB on Linux; Ray's actors are not children of this process.
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }
    # Whole or not at all: others read it while it is written.
    atomic_write(directory / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def class_counts(parts: Parts) -> npt.NDArray[np.int64] | None:
    """Return how many training samples of each class each client holds, ``(clients, classes)``.

    None where there are too many clients: a row for every one says nothing then.
    """
    if parts.train.num_clients > MOST_DRAWN:
        return None
    return parts.train.class_counts(first_label(parts.dataset.train.labels), parts.dataset.num_classes)


def write_partition(directory: Path, parts: Parts) -> None:
    """Keep who holds what: ``counts``, int64 ``(clients, classes)``, and the names of the ``classes``."""
    counts = class_counts(parts)
    if counts is not None:
        data = io.BytesIO()
        np.savez_compressed(data, counts=counts, classes=np.array(parts.dataset.classes, dtype=np.str_))
        atomic_write(directory / PARTITION, data.getvalue())


def draw_figures(directory: Path, parts: Parts, log: MetricsLog) -> list[Path]:
    """Draw the run's pictures from its partition and its metrics, unless it wants none; returns the files."""
    if not parts.simulation.run.figures:
        return []
    simulation, dataset = parts.simulation, parts.dataset
    counts = class_counts(parts)
    title = f"{simulation.strategy.name} on {dataset.name}, {simulation.partition.name}"
    return figures.draw(directory / "figures", log.records(), counts, dataset.classes, title)


def git_commit() -> str | None:
    """Return the commit of the current directory's repository, else of this package's, or None."""
    for folder in (Path.cwd(), Path(__file__).resolve().parent):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
            found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
            if found.returncode == 0:
                return found.stdout.strip()
    return None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version(), "platform": sys.platform}
    for package in ("flowerbed", "flwr", "torch", "numpy", "ray"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
