"""What listens to a run. Callbacks see records; they never change the model or the order of anything."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flowerbed.errors import CheckpointError
from flowerbed.server.params import StopParams
from flowerbed.server.replies import Failure
from flowerbed.storage import atomic_write

SERVER = "evaluate-server"
CLIENTS = "evaluate-clients"


@dataclass(frozen=True)
class Record:
    """One round's outcome in one phase: a line of metrics.jsonl."""

    round: int
    phase: str
    """The strategy's phase ("train"), evaluate-server or evaluate-clients."""
    metrics: dict[str, Any]
    asked: int = 0
    answered: int = 0
    failed: int = 0
    seconds: float = 0.0
    bytes_down: int = 0
    """Payload bytes sent to clients."""
    bytes_up: int = 0
    """Payload bytes received from clients."""
    failures: tuple[Failure, ...] = field(default=(), compare=False)

    def line(self) -> str:
        """Return the record as one line of JSON."""
        return json.dumps(asdict(self), allow_nan=True)

    @classmethod
    def parse(cls, line: str) -> Record:
        """Read what ``line`` wrote."""
        raw = json.loads(line)
        raw["failures"] = tuple(Failure(**f) for f in raw["failures"])
        return cls(**raw)


class Callback:
    """Base of callbacks; every method may be left as it is."""

    def started(self, rounds: int, first_round: int) -> None:
        """The run starts (or goes on) with ``first_round``."""

    def asked(self, server_round: int, phase: str, clients: int) -> None:
        """``clients`` clients were just sent a message."""

    def answered(self, server_round: int, ok: bool) -> None:
        """One client answered (``ok`` is False for an error)."""

    def recorded(self, record: Record) -> None:
        """A phase of a round is complete."""

    def finished(self, status: str) -> None:
        """The run is over: completed, stopped, failed or interrupted."""


class MetricsLog:
    """A JSON-lines file of records, complete after every append."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def append(self, record: Record) -> None:
        """Add one line."""
        with open(self.path, "a") as file:
            file.write(record.line() + "\n")

    def records(self) -> list[Record]:
        """Return all records so far."""
        return [Record.parse(line) for line in read_lines(self.path)]

    def rewind(self, keep: int) -> list[Record]:
        """Cut the file back to its first ``keep`` records (a resumed run; 0 starts anew) and return them.

        Raises ``CheckpointError`` if there are fewer.
        """
        lines = read_lines(self.path)[:keep]
        if len(lines) < keep:
            raise CheckpointError(f"{self.path} has {len(lines)} records, the checkpoint knows of {keep}.")
        text = "".join(f"{line}\n" for line in lines)
        atomic_write(self.path, text.encode())
        return [Record.parse(line) for line in lines]


class EarlyStop:
    """Decides from the history alone, so a resumed run decides as the uninterrupted one would."""

    def __init__(self, params: StopParams) -> None:
        self.params = params

    def reason(self, history: Sequence[Record]) -> str | None:
        """Return why the run should stop now, or None."""
        p = self.params
        if not p.patience and p.target is None:
            return None
        sign = 1.0 if p.mode == "max" else -1.0
        values = [
            sign * float(r.metrics[p.metric]) for r in history if r.phase == SERVER and p.metric in r.metrics
        ]
        if not values:
            return None
        if p.target is not None and values[-1] >= sign * p.target:
            return f"{p.metric} reached the target {p.target}"
        best, since = values[0], 0
        for value in values[1:]:
            if value > best + p.min_delta:
                best, since = value, 0
            else:
                since += 1
        if p.patience and since >= p.patience:
            return f"{p.metric} has not improved for {since} evaluations"
        return None


def read_lines(path: Path) -> list[str]:
    """Return the whole lines of a text file; a last line without its end (a killed writer) is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()
