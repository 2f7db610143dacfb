"""The metrics of one run, followed while they grow: every byte of metrics.jsonl is read once.

A run that goes on after a crash cuts its file back to the last checkpoint and replaces it. That is noticed (another
inode, a smaller file, or other bytes before the place where reading stopped) and reading starts anew.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

CHUNK = 1 << 20
REMEMBERED = 512
"""Bytes before the place where reading stopped, by which a replaced file is recognised."""
SHOWN_FAILURES = 50
LONGEST_LIST = 1000
"""Entries of a list (counts by class) that is kept."""
POINTS = 2000
"""Rounds of a curve that are sent, about; of longer runs every n-th."""
ABOUT = ("seconds", "asked", "answered", "failed", "bytes_down", "bytes_up")
"""What a record says beside its metrics."""


class Lines:
    """Reads the whole lines that were added to a file since the last look."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self._inode = -1
        self._before = b""

    def more(self) -> tuple[bool, Iterator[bytes]]:
        """Return whether the file starts anew, and the new whole lines; a last line without its end waits."""
        try:
            file = open(self.path, "rb")  # noqa: SIM115 - closed by the generator
        except OSError:
            started = self.offset > 0
            self._forget(-1)
            return started, iter(())
        stat = os.fstat(file.fileno())
        anew = False
        if stat.st_ino != self._inode or stat.st_size < self.offset or not self._same(file):
            anew = self.offset > 0
            self._forget(stat.st_ino)
        return anew, self._read(file)

    def _forget(self, inode: int) -> None:
        self.offset, self._inode, self._before = 0, inode, b""

    def _same(self, file: Any) -> bool:
        file.seek(self.offset - len(self._before))
        return bool(file.read(len(self._before)) == self._before)

    def _read(self, file: Any) -> Iterator[bytes]:
        with file:
            file.seek(self.offset)
            rest = b""
            while chunk := file.read(CHUNK):
                rest += chunk
                *lines, rest = rest.split(b"\n")
                for line in lines:
                    self.offset += len(line) + 1
                    self._before = (self._before + line + b"\n")[-REMEMBERED:]
                    yield line


@dataclass
class Phase:
    """One phase's records as columns: ``rounds`` and, of the same length, every scalar; None where there is none."""

    rounds: list[int] = field(default_factory=list)
    columns: dict[str, list[float | None]] = field(default_factory=dict)
    lists: dict[str, list[Any]] = field(default_factory=dict)
    """The newest value of every metric that is a list, such as counts by class."""

    def add(self, round_: int, values: Mapping[str, float | None], lists: Mapping[str, list[Any]]) -> None:
        """Add one record."""
        for name in values:
            if name not in self.columns:
                self.columns[name] = [None] * len(self.rounds)
        self.rounds.append(round_)
        for name, column in self.columns.items():
            column.append(values.get(name))
        self.lists.update(lists)

    def part(self, start: int, most: int | None = None) -> dict[str, Any]:
        """Return the records from ``start`` on, or about ``most`` of them, evenly spread and with the last."""
        chosen = range(start, len(self.rounds))
        if most is not None and len(chosen) > most:
            step = -(-len(chosen) // most)
            chosen = range(start + (len(chosen) - 1) % step, len(self.rounds), step)
        columns = {name: [column[i] for i in chosen] for name, column in self.columns.items()}
        return {
            "rounds": [self.rounds[i] for i in chosen],
            "columns": columns,
            "step": chosen.step,
            "lists": dict(self.lists),
        }


class Follower:
    """All records of a run so far, by phase; safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self._lines = Lines(path)
        self._lock = threading.Lock()
        self.generation = 0
        """Grows whenever the file starts anew."""
        self._clear()

    def _clear(self) -> None:
        self.phases: dict[str, Phase] = {}
        self.failures: list[dict[str, Any]] = []
        self.failed: Counter[str] = Counter()
        self.unreadable = 0
        self.not_finite: Counter[str] = Counter()

    def refresh(self) -> None:
        """Read what was added."""
        with self._lock:
            anew, lines = self._lines.more()
            if anew:
                self.generation += 1
                self._clear()
            for line in lines:
                self._take(line)

    def cursor(self) -> tuple[int, dict[str, int]]:
        """Return the generation, and how many records there are of each phase."""
        with self._lock:
            return self.generation, self._counts()

    def whole(self) -> dict[str, Any]:
        """Return all curves, thinned out if they are very long, with failures and what is wrong."""
        with self._lock:
            return {
                "phases": {name: phase.part(0, POINTS) for name, phase in self.phases.items()},
                **self._about(),
            }

    def since(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """Return the records after the first ``counts`` ones of each phase, and the rest of ``whole`` anew."""
        with self._lock:
            phases = {
                name: phase.part(counts.get(name, 0))
                for name, phase in self.phases.items()
                if counts.get(name, 0) < len(phase.rounds)
            }
            return {"phases": phases, **self._about()}

    def _counts(self) -> dict[str, int]:
        return {name: len(phase.rounds) for name, phase in self.phases.items()}

    def _about(self) -> dict[str, Any]:
        return {
            "generation": self.generation,
            "counts": self._counts(),
            "failures": list(self.failures),
            "failed": dict(self.failed.most_common()),
            "notes": list(self._notes()),
        }

    def _notes(self) -> Iterator[str]:
        if self.unreadable:
            yield f"metrics.jsonl: {_count(self.unreadable, 'line')} cannot be read and left out"
        for name, times in self.not_finite.items():
            yield f"{name} is not finite (NaN or infinite) {times} times: gaps in its curve"
        for name, phase in self.phases.items():
            gaps = missing_rounds(phase.rounds)
            if gaps:
                yield f"{name}: no record of rounds {gaps}"
            for metric, column in phase.columns.items():
                absent = column.count(None) - self.not_finite[f"{name}/{metric}"]
                if 0 < absent < len(column):
                    yield f"{name}/{metric} is missing in {absent} of {len(column)} records"

    def _take(self, line: bytes) -> None:
        try:
            raw = json.loads(line)
            round_, phase, metrics = int(raw["round"]), str(raw["phase"]), dict(raw["metrics"])
        except (ValueError, KeyError, TypeError):
            self.unreadable += 1
            return
        # Beside the platform's own figures a metric of the same name comes first.
        found = {name: raw[name] for name in ABOUT if raw.get(name)} | metrics
        values: dict[str, float | None] = {}
        for name, value in found.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not math.isfinite(value):
                self.not_finite[f"{phase}/{name}"] += 1
                values[name] = None
            else:
                values[name] = value
        lists = {n: plain(v) for n, v in metrics.items() if isinstance(v, list) and len(v) <= LONGEST_LIST}
        self.phases.setdefault(phase, Phase()).add(round_, values, lists)
        for failure in raw.get("failures") or ():
            if isinstance(failure, Mapping):
                self.failed[str(failure.get("kind"))] += 1
                self.failures.append({"round": round_, **plain(failure)})
        del self.failures[:-SHOWN_FAILURES]


def missing_rounds(rounds: list[int]) -> str:
    """Return the rounds that are missing among evenly spaced ones, as text; "" if none is.

    The usual distance of two records is that of most of them; where there is none, nothing can be said. Only more
    than it is a gap: the last round is evaluated wherever it falls.
    """
    ahead = [(a, b) for a, b in pairwise(rounds) if a > 0 and b > a]
    if not ahead:
        return ""
    usual, times = Counter(b - a for a, b in ahead).most_common(1)[0]
    if 2 * times <= len(ahead):
        return ""
    gaps = [(a + usual, b - usual) for a, b in ahead if b - a > usual]
    shown = [str(a) if a >= b else f"{a} to {b}" for a, b in gaps]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more gaps" if len(shown) > 5 else "")


def plain(value: Any) -> Any:
    """Return a value that every JSON parser reads: what is not finite becomes text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
