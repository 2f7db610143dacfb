"""Experiment tracking: what a run directory holds, sent where the user looks (Weights & Biases, TensorBoard).

A tracker is one small callback: it takes scalars round by round, and at the end tables, pictures and the summary. All
of them get the same, under the same names.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flowerbed.errors import ConfigError
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.metrics import scalars
from flowerbed.offline import offline_defaults
from flowerbed.server.callbacks import Callback, Record

GOOD = ("completed", "stopped")
MOST_FAILURES = 1000
"""Rows of the table of failures: the last ones."""
MOST_ROWS = 1000
"""Longer lists (one entry a client, say) are in no table."""


@dataclass(frozen=True)
class Table:
    """A table by name."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


class Tracker(Callback):
    """Tracks nothing; what ``tracking=none`` means, and the interface of the others."""

    def close(self, summary: Mapping[str, Any], figures: Sequence[Path], records: Sequence[Record]) -> None:
        """Hand over the run's summary, pictures and all its records; the last call."""


class WandbTracker(Tracker):
    """Logs every record under ``phase/metric`` with the round as its step.

    Unless it is asked to be online, wandb keeps its files below the run directory (``flowerbed sync`` sends them
    later) and makes no network call. A resumed run is the same run for wandb.
    """

    def __init__(self, simulation: Simulation, directory: Path) -> None:
        offline_defaults()
        # wandb reports its own crashes over the network as soon as it is imported.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._wandb: Any = wandb
        init: Any = wandb.init
        earlier = earlier_id(directory)
        self._run = init(
            project=simulation.tracking.project,
            name=directory.name,
            dir=str(directory),
            config=simulation.plain(),
            mode=simulation.tracking.mode or os.environ.get("WANDB_MODE") or "offline",
            settings=wandb.Settings(silent=True, console="off"),
            **({"id": earlier, "resume": "allow"} if earlier else {}),
        )

    def recorded(self, record: Record) -> None:
        self._run.log(values_of(record), step=record.round)

    def close(self, summary: Mapping[str, Any], figures: Sequence[Path], records: Sequence[Record]) -> None:
        for table in tables_of(records):
            made = self._wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
            self._run.log({table.name: made})
        for figure in figures:
            self._run.log({f"figures/{figure.stem}": self._wandb.Image(str(figure))})
        self._run.summary.update({key: value for key, value in summary.items() if key != "versions"})
        self._run.finish(exit_code=0 if summary["status"] in GOOD else 1)


class TensorBoardTracker(Tracker):
    """Writes event files into ``tensorboard/`` of the run directory, with the round as step.

    Scalars go under ``phase/metric``, tables, configuration and summary as text. Nothing uses the network. A resumed
    run hides the rounds that it makes again.
    """

    def __init__(self, simulation: Simulation, directory: Path) -> None:
        self._folder, self._simulation = directory / "tensorboard", simulation
        self._writer: Any = None
        self._last = 0

    def started(self, rounds: int, first_round: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = first_round if first_round > 1 else None
        self._writer = SummaryWriter(str(self._folder), purge_step=purge)
        self._text("config", yaml.safe_dump(self._simulation.plain(), sort_keys=False))

    def recorded(self, record: Record) -> None:
        self._last = record.round
        for name, value in values_of(record).items():
            self._writer.add_scalar(name, value, record.round)

    def close(self, summary: Mapping[str, Any], figures: Sequence[Path], records: Sequence[Record]) -> None:
        if self._writer is None:
            # It failed before it started; what is known is the summary.
            self.started(0, 1)
        for table in tables_of(records):
            self._writer.add_text(table.name, _markdown(table), self._last)
        for figure in figures:
            self._writer.add_image(f"figures/{figure.stem}", _pixels(figure), self._last, dataformats="HWC")
        self._text("summary", json.dumps(summary, indent=1))
        self._writer.close()

    def _text(self, name: str, text: str) -> None:
        # Indented, so that TensorBoard's Markdown leaves the lines as they are.
        self._writer.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), self._last)


TRACKERS: dict[str, Callable[[Simulation, Path], Tracker]] = {
    "none": lambda simulation, directory: Tracker(),
    "wandb": WandbTracker,
    "tensorboard": TensorBoardTracker,
}


def check(simulation: Simulation) -> None:
    """Raise ``ConfigError`` if the tracker that is asked for cannot be used, before anything is written."""
    name = simulation.tracking.name
    if name == "none":
        return
    if simulation.run.dir is None:
        raise ConfigError(f"tracking={name} needs a run directory; give run.dir.")
    if importlib.util.find_spec(name) is None:
        raise ConfigError(f"tracking={name} needs {name}: pip install 'flowerbed[tracking]'.")


def open_tracker(simulation: Simulation, directory: Path) -> Tracker:
    """Return the tracker that the configuration asks for."""
    return TRACKERS[simulation.tracking.name](simulation, directory)


def values_of(record: Record) -> dict[str, float]:
    """Return what a record says in numbers, by ``phase/name``: metrics, seconds, clients and bytes of a round."""
    values = {**scalars(record.metrics), "seconds": record.seconds}
    if record.asked:
        values |= {"asked": record.asked, "answered": record.answered, "failed": record.failed}
        values |= {"bytes_down": record.bytes_down, "bytes_up": record.bytes_up}
    return {f"{record.phase}/{name}": value for name, value in values.items()}


def tables_of(records: Sequence[Record]) -> list[Table]:
    """Return the tables of a run: the last counts by class, by bin and so on of every phase, and the failures.

    ``correct-per-class`` and ``total-per-class`` become two columns of ``PHASE/per-class``.
    """
    lists: dict[str, dict[str, list[Any]]] = {}
    for record in records:
        for name, value in record.metrics.items():
            head, found, by = name.rpartition("per-")
            if isinstance(value, list) and found and len(value) <= MOST_ROWS:
                table = lists.setdefault(f"{record.phase}/per-{by}", {})
                table[head.removesuffix("-") or by] = value
    tables = []
    for name, columns in lists.items():
        by = name.rpartition("per-")[2]
        length = max(len(column) for column in columns.values())
        rows = [(i, *(c[i] if i < len(c) else None for c in columns.values())) for i in range(length)]
        tables.append(Table(name, (by, *columns), tuple(rows)))
    failures = [f for record in records for f in record.failures][-MOST_FAILURES:]
    if failures:
        rows = [(f.round, f.client, f.kind, f.reason.split("\n")[0]) for f in failures]
        tables.append(Table("failures", ("round", "client", "kind", "reason"), tuple(rows)))
    return tables


def earlier_id(directory: Path) -> str | None:
    """Return wandb's identifier of the run in a directory, from the folder that it made there; None if there is none.

    Such a folder is called ``run-DATE_TIME-ID`` or ``offline-run-DATE_TIME-ID``.
    """
    made = sorted(
        path.name.removeprefix("offline-") for path in (directory / "wandb").glob("*run-*-*") if path.is_dir()
    )
    return made[-1].split("-", 2)[2] if made else None


def _markdown(table: Table) -> str:
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    cells = [[str(value).replace("|", "\\|") for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _pixels(path: Path) -> Any:
    """Return a picture as uint8 (height, width, 3)."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))
