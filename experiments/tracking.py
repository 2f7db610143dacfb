"""Experiment tracking with Weights & Biases: the run directory's content, sent where the user looks."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowerbed.errors import ConfigError
from flowerbed.experiments.config import Simulation
from flowerbed.offline import offline_defaults
from flowerbed.server.callbacks import Callback, Record


class Tracker(Callback):
    """Tracks nothing; what ``tracking=none`` means, and the interface of the others."""

    def close(self, summary: Mapping[str, Any], figures: Sequence[Path]) -> None:
        """Hand over the run's summary and pictures; the last call."""


class WandbTracker(Tracker):
    """Logs every record under ``phase/metric`` with the round as its step.

    Without a key wandb keeps its files below the run directory (``wandb sync`` uploads them later); no
    network call is made.
    """

    def __init__(self, simulation: Simulation, directory: Path) -> None:
        offline_defaults()
        # wandb reports its own crashes over the network as soon as it is imported.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._wandb: Any = wandb
        init: Any = wandb.init
        self._run = init(
            project=simulation.tracking.project,
            name=directory.name,
            dir=str(directory),
            config=simulation.plain(),
            mode=simulation.tracking.mode or os.environ.get("WANDB_MODE") or "online",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def recorded(self, record: Record) -> None:
        values = {**record.metrics, "seconds": record.seconds}
        if record.asked:
            values |= {"asked": record.asked, "answered": record.answered, "failed": record.failed}
        scalars = {name: value for name, value in values.items() if not isinstance(value, list)}
        self._run.log({f"{record.phase}/{name}": v for name, v in scalars.items()}, step=record.round)

    def close(self, summary: Mapping[str, Any], figures: Sequence[Path]) -> None:
        for figure in figures:
            self._run.log({f"figures/{figure.stem}": self._wandb.Image(str(figure))})
        self._run.summary.update({key: value for key, value in summary.items() if key != "versions"})
        self._run.finish(exit_code=0 if summary["status"] in ("completed", "stopped") else 1)


def check(simulation: Simulation) -> None:
    """Raise ``ConfigError`` if the tracker that is asked for cannot be used, before anything is written."""
    if simulation.tracking.name == "none":
        return
    if simulation.run.dir is None:
        raise ConfigError(f"tracking={simulation.tracking.name} needs a run directory; give run.dir.")
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("tracking=wandb needs wandb: pip install 'flowerbed[tracking]'.")


def open_tracker(simulation: Simulation, directory: Path) -> Tracker:
    """Return the tracker that the configuration asks for."""
    return Tracker() if simulation.tracking.name == "none" else WandbTracker(simulation, directory)
