"""What there is below some folders: found by walking, described by a few small reads, kept up to date by stamps.

A folder is described anew only when the size or time of one of its files has changed. Of a run that goes on, only the
end of metrics.jsonl is read. So ten thousand runs cost a walk and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from flowerbed.errors import ConfigError
from flowerbed.experiments import saved
from flowerbed.experiments.watch.follow import plain

FILES = ("config.yaml", "metrics.jsonl", "summary.json", "jobs.jsonl", *saved.RESULT_FILES.values())
INSIDE_A_RUN = "attacks"
"""The one folder of a run that holds further results."""
SKIPPED = ("checkpoints", "figures", "observations", "wandb", "tensorboard", "__pycache__")
TAIL, LONGEST_TAIL = 1 << 16, 1 << 24
CONFIG_LIMIT = 1 << 20
ALIVE = 60.0
"""Seconds without a line after which a run that has not ended is silent; longer where its rounds take longer."""
DUTY = 0.1
"""Share of the time that looking for changes may take."""
SORTS = ("updated", "path", "kind", "status", "strategy", "dataset", "seed", "round", "accuracy", "loss")
NO_CONFIG = "config.yaml is missing"
RUNNING, SILENT = "running", "silent"

_SECTIONS = re.compile(rb"^(?:strategy|dataset|seed|federation):.*\n(?:[ -].*\n)*", re.MULTILINE)
_DIGITS = re.compile(r"([0-9]+)")

Stamps = dict[str, tuple[int, int]]
"""Modification time (ns) and size of the files that describe a folder."""


@dataclass(frozen=True)
class Entry:
    """One folder as the list shows it."""

    id: str
    kind: str
    path: str
    """As a person would type it."""
    directory: Path
    status: str = ""
    """Of a run completed, stopped, failed or interrupted; "" while it has not ended."""
    about: str = ""
    strategy: str = ""
    dataset: str = ""
    seed: int | None = None
    clients: int | None = None
    round: int | None = None
    rounds: int | None = None
    accuracy: float | str | None = None
    loss: float | str | None = None
    updated: float = 0.0
    """When its files were last written, in seconds since 1970."""
    pace: float = 0.0
    """Seconds of its last record."""
    notes: tuple[str, ...] = ()
    stamps: Stamps = field(default_factory=dict, compare=False)

    def state(self, now: float) -> str:
        """Return the status, or for a run that has not ended whether it still writes."""
        if self.status or self.kind != saved.RUN:
            return self.status
        return RUNNING if now - self.updated < max(ALIVE, 5 * self.pace) else SILENT

    def row(self, now: float) -> dict[str, Any]:
        """Return what the list shows, as JSON values."""
        row = asdict(self)
        for name in ("directory", "stamps", "pace"):
            row.pop(name)
        return {**row, "status": self.state(now), "notes": list(self.notes)}


class Index:
    """All entries below some folders."""

    def __init__(self, roots: Sequence[Path], clock: Callable[[], float] = time.time) -> None:
        self.roots = tuple(roots)
        self.clock = clock
        self.version = 0
        """Grows with every change."""
        self.complete = False
        """Whether everything has been seen once."""
        self._entries: dict[str, Entry] = {}
        self._lock = threading.Lock()

    def scan(self) -> None:
        """Look at everything once; entries appear as they are found."""
        seen = set()
        for directory, kind, stamps in self._walk():
            id_ = identifier(directory)
            seen.add(id_)
            before = self._entries.get(id_)
            if before is not None and before.stamps == stamps and before.kind == kind:
                continue
            entry = describe(id_, kind, directory, _shown(directory), stamps, before)
            with self._lock:
                self._entries[id_] = entry
                self.version += 1
        with self._lock:
            gone = self._entries.keys() - seen
            for id_ in gone:
                del self._entries[id_]
            if gone or not self.complete:
                self.version += 1
            self.complete = True

    def follow(self, stop: threading.Event, least: float = 1.0) -> None:
        """Scan until ``stop`` is set, with pauses that leave most of the time to others."""
        while not stop.is_set():
            started = time.monotonic()
            self.scan()
            stop.wait(max(least, (time.monotonic() - started) / DUTY))

    def get(self, id_: str) -> Entry | None:
        """Return an entry by its identifier."""
        with self._lock:
            return self._entries.get(id_)

    def inside(self, entry: Entry) -> list[Entry]:
        """Return the entries below another one: a sweep's runs, a run's attacks."""
        with self._lock:
            entries = list(self._entries.values())
        below = f"{entry.directory}{os.sep}"
        found = [other for other in entries if str(other.directory).startswith(below)]
        return sorted(found, key=lambda other: _natural(other.path))

    def page(
        self,
        search: str = "",
        status: str = "",
        kind: str = "",
        sort: str = "updated",
        descending: bool = True,
        offset: int = 0,
        limit: int = 50,
    ) -> dict[str, Any]:
        """Return one page of the rows that match, and how many there are.

        ``search`` is split at blanks; every word must occur in the path, strategy, dataset or status. What has no
        value comes last, whatever the order. Raises ``ConfigError`` for a sort that is none.
        """
        if sort not in SORTS:
            raise ConfigError(f"Cannot sort by '{sort}'; choose one of {', '.join(SORTS)}.")
        now = self.clock()
        with self._lock:
            entries, version, complete = list(self._entries.values()), self.version, self.complete
        states = {entry.id: entry.state(now) for entry in entries}
        words = search.lower().split()
        matching = [
            entry
            for entry in entries
            if (not status or states[entry.id] == status)
            and (not kind or entry.kind == kind)
            and all(word in _searched(entry, states[entry.id]) for word in words)
        ]

        def key(entry: Entry) -> Any:
            value = states[entry.id] if sort == "status" else getattr(entry, sort)
            return _natural(value) if isinstance(value, str) else value

        have = [entry for entry in matching if _has(entry, sort)]
        have.sort(key=lambda entry: _natural(entry.path))
        have.sort(key=key, reverse=descending)
        ordered = have + [entry for entry in matching if not _has(entry, sort)]
        return {
            "version": version,
            "complete": complete,
            "total": len(entries),
            "running": sum(state == RUNNING for state in states.values()),
            "matching": len(matching),
            "kinds": sorted({entry.kind for entry in entries}),
            "statuses": sorted({state for state in states.values() if state}),
            "rows": [entry.row(now) for entry in ordered[offset : offset + limit]],
        }

    def _walk(self) -> Iterator[tuple[Path, str, Stamps]]:
        waiting = [str(root) for root in reversed(self.roots)]
        while waiting:
            folder = waiting.pop()
            names: dict[str, os.DirEntry[str]] = {}
            folders: list[str] = []
            try:
                with os.scandir(folder) as found:
                    for item in found:
                        # Links are followed nowhere: what is shown lies below the folders that were named.
                        if item.is_dir(follow_symlinks=False):
                            if item.name not in SKIPPED and not item.name.startswith("."):
                                folders.append(item.name)
                        elif item.name in FILES and item.is_file(follow_symlinks=False):
                            names[item.name] = item
            except OSError:
                # Deleted since, or not ours to read.
                continue
            kind = saved.kind_of(names)
            if kind is not None:
                stamps: Stamps = {}
                for name, item in names.items():
                    try:
                        about = item.stat(follow_symlinks=False)
                    except OSError:
                        continue
                    stamps[name] = (about.st_mtime_ns, about.st_size)
                yield Path(folder), kind, stamps
            if kind == saved.RUN:
                folders = [name for name in folders if name == INSIDE_A_RUN]
            waiting += [f"{folder}/{name}" for name in sorted(folders, reverse=True)]


def describe(
    id_: str, kind: str, directory: Path, path: str, stamps: Stamps, before: Entry | None = None
) -> Entry:
    """Return the entry of a folder; what its unchanged files said is taken from ``before``."""
    updated = max((time_ for time_, _ in stamps.values()), default=0) / 1e9
    entry = Entry(id_, kind, path, directory, updated=updated, stamps=stamps)
    if kind == saved.RUN:
        return _run(entry, before)
    if kind == saved.SWEEP:
        return replace(entry, **_sweep(directory / "jobs.jsonl"))
    try:
        content = saved.read_object(directory / saved.RESULT_FILES[kind])
        return replace(entry, about=saved.headline(kind, content))
    except ConfigError as error:
        return replace(entry, about="cannot be read", notes=(str(error),))


def _run(entry: Entry, before: Entry | None) -> Entry:
    directory, stamps = entry.directory, entry.stamps
    same = before is not None and before.stamps.get("config.yaml") == stamps.get("config.yaml")
    if same and before is not None and before.kind == saved.RUN:
        entry = replace(
            entry, **{n: getattr(before, n) for n in ("strategy", "dataset", "seed", "clients", "rounds")}
        )
        notes = [note for note in before.notes if note.startswith("config.yaml")]
    else:
        found, notes = (
            read_config(directory / "config.yaml") if "config.yaml" in stamps else ({}, [NO_CONFIG])
        )
        entry = replace(entry, **found)
    summary: Mapping[str, Any] = {}
    if "summary.json" in stamps:
        try:
            summary = saved.read_object(directory / "summary.json")
        except ConfigError as error:
            notes.append(str(error))
    last = _last(directory / "metrics.jsonl", notes) if _goes_on(stamps, summary) else {}
    final = summary.get("final") or {}
    ended = bool(summary) and not (last and last["round"] != summary.get("rounds"))
    if not ended:
        final = last.get("metrics") or final
    return replace(
        entry,
        status=str(summary.get("status", "unknown")) if ended else "",
        about=str(summary.get("reason") or "").splitlines()[0][:200]
        if ended and summary.get("reason")
        else "",
        round=_whole(summary.get("rounds") if ended else last.get("round", 0)),
        accuracy=_figure(final.get("accuracy")),
        loss=_figure(final.get("loss")),
        pace=float(last.get("pace", 0.0)),
        notes=tuple(notes),
    )


def _goes_on(stamps: Stamps, summary: Mapping[str, Any]) -> bool:
    """Return whether the metrics may say more than the summary: there is none, or it is of before a resume."""
    if "metrics.jsonl" not in stamps:
        return False
    return not summary or stamps["metrics.jsonl"][0] > stamps["summary.json"][0]


def read_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return what the list shows of a configuration, and what is wrong with it."""
    try:
        if path.stat().st_size > CONFIG_LIMIT:
            return {}, [f"config.yaml has more than {CONFIG_LIMIT} bytes and is not read"]
        text = path.read_bytes()
        # Four of some twenty sections are shown; to parse them alone is what makes thousands of runs quick.
        sections = _SECTIONS.findall(text)
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        found = yaml.load(b"".join(sections) if len(sections) == 4 else text, loader)
    except FileNotFoundError:
        return {}, [NO_CONFIG]
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        return {}, [f"config.yaml cannot be read: {str(error).splitlines()[0]}"]
    if not isinstance(found, dict):
        return {}, ["config.yaml holds no settings"]
    federation = found.get("federation")
    federation = federation if isinstance(federation, dict) else {}
    return {
        "strategy": _name(found.get("strategy")),
        "dataset": _name(found.get("dataset")),
        "seed": _whole(found.get("seed")),
        "clients": _whole(federation.get("clients")),
        "rounds": _whole(federation.get("rounds")),
    }, []


def _last(path: Path, notes: list[str]) -> dict[str, Any]:
    """Return the last round, its seconds and the last figures of the server, from the end of the file."""
    tail = TAIL
    while True:
        try:
            with open(path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - tail))
                data = file.read(tail)
        except OSError:
            return {}
        lines = data[: data.rfind(b"\n") + 1].splitlines()
        # The first of them is cut, unless it is the file's.
        lines = lines if size <= tail else lines[1:]
        records = [record for line in reversed(lines) if (record := _record(line))]
        judged = next((r["metrics"] for r in records if r["phase"] == "evaluate-server"), None)
        if judged is None and size > tail and tail < LONGEST_TAIL:
            tail *= 8
            continue
        if lines and not records:
            notes.append("metrics.jsonl: its last lines cannot be read")
        if not records:
            return {}
        pace = max((float(r.get("seconds") or 0.0) for r in records[:4]), default=0.0)
        return {"round": records[0]["round"], "pace": pace, "metrics": judged or records[0]["metrics"]}


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        raw = json.loads(line)
        return raw if isinstance(raw["metrics"], dict) and isinstance(raw["round"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


def _sweep(path: Path) -> dict[str, Any]:
    jobs = unreadable = 0
    states: dict[str, int] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            status = str(json.loads(line)["status"])
        except (ValueError, KeyError, TypeError):
            unreadable += 1
            continue
        jobs += 1
        states[status] = states.get(status, 0) + 1
    about = (
        f"{jobs} jobs: {', '.join(f'{count} {status}' for status, count in states.items())}"
        if jobs
        else "0 jobs"
    )
    notes = (f"jobs.jsonl: {unreadable} lines cannot be read and left out",) if unreadable else ()
    return {"about": about, "notes": notes}


def identifier(directory: Path) -> str:
    """Return the name of a folder in addresses of the page: a hash, so that no address names a path."""
    return hashlib.sha256(str(directory).encode(errors="surrogateescape")).hexdigest()[:20]


def pictures(directory: Path) -> dict[str, Path]:
    """Return the PNG files of a folder and of its figures by name; plain files only, no links."""
    found = {}
    for folder in (directory, directory / "figures"):
        try:
            if stat.S_ISLNK(folder.lstat().st_mode):
                continue
            with os.scandir(folder) as items:
                for item in items:
                    if item.name.endswith(".png") and item.is_file(follow_symlinks=False):
                        found[item.name] = Path(item.path)
        except OSError:
            continue
    return dict(sorted(found.items()))


def _shown(directory: Path) -> str:
    here = Path.cwd()
    shown = directory.relative_to(here) if directory.is_relative_to(here) else directory
    # A name that is no UTF-8 can be shown, if not typed.
    return str(shown).encode(errors="replace").decode()


def _name(value: Any) -> str:
    """Return the name of a choice without the path of its module."""
    if isinstance(value, dict):
        value = value.get("flower") or value.get("name", "")
    return str(value or "").rpartition(":")[2]


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _figure(value: Any) -> float | str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    found: float | str = plain(float(value))
    return found


def _has(entry: Entry, sort: str) -> bool:
    value = getattr(entry, sort)
    if sort in ("accuracy", "loss"):
        # One that is not finite is text, which cannot be ordered among numbers.
        return isinstance(value, float) and math.isfinite(value)
    return value is not None and (value != "" or sort == "status")


def _searched(entry: Entry, state: str) -> str:
    return f"{entry.path} {entry.kind} {state} {entry.strategy} {entry.dataset} {entry.about}".lower()


def _natural(text: str) -> list[str | int]:
    """Return a key that puts run-2 before run-10: text and numbers in turn."""
    return [int(part) if i % 2 else part for i, part in enumerate(_DIGITS.split(text))]
