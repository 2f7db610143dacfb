"""Directories as they are found: whole, half written, of another version, damaged.

Nothing here raises for what a file lacks; it says so in ``missing``, and the report is made of what is left. Only a
directory that holds nothing of ours is refused.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from flowerbed import __version__
from flowerbed.errors import ConfigError
from flowerbed.experiments.metrics import evaluations
from flowerbed.experiments.report import JOBS
from flowerbed.experiments.reports.wording import finite
from flowerbed.experiments.run_directory import PARTITION
from flowerbed.server.callbacks import CLIENTS, SERVER, Record
from flowerbed.server.replies import Failure

RUN, SWEEP, COMPARISON, ATTACK, MATRIX, PAPERS = "run", "sweep", "comparison", "attack", "matrix", "papers"
DEPTH = 3
"""Levels below a folder at which runs are looked for."""
UNFINISHED = "unfinished"
LAST = 5
"""Evaluations that the selected figure is the mean of, where a run's configuration does not say."""


@dataclass(frozen=True)
class RunFiles:
    """What is left of a run."""

    directory: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    records: Sequence[Record] = ()
    counts: npt.NDArray[np.int64] | None = None
    """Training samples, ``(clients, classes)``."""
    classes: Sequence[str] = ()
    missing: Sequence[str] = ()

    @property
    def status(self) -> str:
        """Return how it ended; unfinished where it has not, or was killed."""
        return str(self.summary.get("status", UNFINISHED))

    @property
    def last(self) -> int:
        """Return how many evaluations the selected figure is the mean of."""
        section = self.config.get("evaluation")
        return int(section.get("last", LAST)) if isinstance(section, Mapping) else LAST

    @property
    def rounds(self) -> int:
        """Return the last round that left a record."""
        return max((r.round for r in self.records), default=0)

    def of(self, phase: str) -> list[Record]:
        """Return the records of a phase by round."""
        return sorted((r for r in self.records if r.phase == phase), key=lambda r: r.round)

    @property
    def training(self) -> list[Record]:
        """Return the records that are no evaluations."""
        return [r for r in self.records if r.phase not in (SERVER, CLIENTS)]

    def selected(self) -> dict[str, float]:
        """Return the figures that count: means over the last evaluations, never the best one.

        Those of the clients' own test data are named ``clients:...``. A mean over what is not finite is left out.
        """
        found: dict[str, float] = {}
        for phase, prefix in ((SERVER, ""), (CLIENTS, "clients:")):
            rows = [r.metrics for r in evaluations(self.records, phase)[-self.last :]]
            for name in rows[0] if rows else ():
                values = [finite(row.get(name)) for row in rows]
                known = [v for v in values if v is not None]
                if len(known) == len(values):
                    found[prefix + name] = sum(known) / len(known)
        return found


def kind_of(path: Path) -> str | None:
    """Return what a directory holds, or None for nothing of ours."""
    for name, kind in (
        ("comparison.json", COMPARISON),
        (JOBS, SWEEP),
        ("matrix.json", MATRIX),
        ("attack.json", ATTACK),
    ):
        if (path / name).exists():
            return kind
    if is_run(path):
        return RUN
    if records_below(path):
        return PAPERS
    return SWEEP if runs_below(path) else None


def require_kind(path: Path) -> str:
    """Return what a directory holds; raises ``ConfigError`` that says what was looked for."""
    if not path.is_dir():
        raise ConfigError(f"There is no directory {path}; give those of runs, sweeps, attacks or papers.")
    found = kind_of(path)
    if found is None:
        raise ConfigError(
            f"{path} holds nothing to report: no run (config.yaml, metrics.jsonl), sweep ({JOBS}), comparison "
            "(comparison.json), attack (attack.json, matrix.json) or record of a paper (record.json), and no folder "
            "of runs."
        )
    return found


def is_run(path: Path) -> bool:
    """Return whether a directory is that of a run, whole or not."""
    return (path / "config.yaml").exists() or (path / "metrics.jsonl").exists()


def runs_below(path: Path, depth: int = DEPTH) -> list[Path]:
    """Return the directories of runs below a folder, by name; runs inside of runs are not looked for."""
    found: list[Path] = []
    try:
        children = sorted(path.iterdir(), key=_natural) if depth else []
    except OSError:
        # A folder that may not be looked into holds no run of ours.
        return []
    for child in children:
        if child.is_dir() and not child.is_symlink():
            found += [child] if is_run(child) else runs_below(child, depth - 1)
    return found


def attacks_below(path: Path) -> list[Path]:
    """Return the folders of the attacks on a run, by name."""
    return sorted(p.parent for p in (path / "attacks").glob("*/attack.json"))


def records_below(path: Path) -> dict[str, list[Path]]:
    """Return the papers' folders at each scale by slug, below a folder as ``flowerbed reproduce`` writes it."""
    found: dict[str, list[Path]] = {}
    for pattern in ("record.json", "*/record.json", "*/*/record.json"):
        for file in sorted(path.glob(pattern)):
            record = read_json(file, [])
            slug = record.get("slug") if isinstance(record, Mapping) else None
            if isinstance(slug, str):
                found.setdefault(slug, []).append(file.parent)
    return found


def read_json(path: Path, missing: list[str]) -> Any:
    """Return what a JSON file holds; None, and a line in ``missing``, if it cannot be read."""
    try:
        return json.loads(path.read_text(errors="replace"))
    except (OSError, ValueError) as error:
        missing.append(f"{path.name} cannot be read ({_short(error)}).")
        return None


def read_run(directory: Path) -> RunFiles:
    """Read all that a run left."""
    missing: list[str] = []
    config = _read_config(directory, missing)
    records = read_records(directory / "metrics.jsonl", missing)
    summary = _read_summary(directory, missing)
    counts, classes = _read_partition(directory, config, missing)
    missing += _gaps(records)
    return RunFiles(directory, config, summary, records, counts, classes, missing)


def read_records(path: Path, missing: list[str]) -> list[Record]:
    """Return the records that can be read, sorted by nothing: in the order of the file.

    A round that was recorded twice (a file that was put together by hand) counts as it was recorded last.
    """
    if not path.exists():
        missing.append(f"{path.name} is missing, so there are no curves.")
        return []
    found: dict[tuple[int, str], Record] = {}
    damaged: list[int] = []
    for place, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = _record(json.loads(line))
            found[record.round, record.phase] = record
        except (ValueError, TypeError, KeyError, AttributeError):
            damaged.append(place)
    if damaged:
        lines = "line" if len(damaged) == 1 else f"{len(damaged)} lines, the first of them line"
        missing.append(
            f"{path.name} has {lines} {damaged[0]} that cannot be read (half written, or of another version); "
            "left out."
        )
    if not found and not damaged:
        missing.append(f"{path.name} is empty: no round was completed.")
    return list(found.values())


def _record(raw: Mapping[str, Any]) -> Record:
    """Return a record, whatever it has beside or lacks of what today's have."""
    failures = tuple(
        Failure(int(f.get("round", raw["round"])), int(f["client"]), str(f.get("kind", "unknown")),
                str(f.get("reason", "")))
        for f in raw.get("failures", ())
    )  # fmt: skip
    return Record(
        int(raw["round"]),
        str(raw["phase"]),
        dict(raw["metrics"]),
        asked=int(raw.get("asked", 0)),
        answered=int(raw.get("answered", 0)),
        failed=int(raw.get("failed", len(failures))),
        seconds=finite(raw.get("seconds")) or 0.0,
        bytes_down=int(raw.get("bytes_down", 0)),
        bytes_up=int(raw.get("bytes_up", 0)),
        failures=failures,
    )


def _read_config(directory: Path, missing: list[str]) -> Mapping[str, Any]:
    path = directory / "config.yaml"
    if not path.exists():
        missing.append("config.yaml is missing, so the settings are not known.")
        return {}
    try:
        found = yaml.safe_load(path.read_text(errors="replace"))
    except yaml.YAMLError as error:
        missing.append(f"config.yaml cannot be read ({_short(error)}).")
        return {}
    if not isinstance(found, Mapping):
        missing.append("config.yaml holds no settings.")
        return {}
    return found


def _read_summary(directory: Path, missing: list[str]) -> Mapping[str, Any]:
    path = directory / "summary.json"
    if not path.exists():
        missing.append(
            "summary.json is missing: the run is still going on, or was killed. What follows is what its metrics say "
            f"so far; go on with: flowerbed resume {directory}"
        )
        return {}
    found = read_json(path, missing)
    if not isinstance(found, Mapping):
        missing += [] if found is None else ["summary.json holds no summary."]
        return {}
    versions = found.get("versions")
    made_with = versions.get("flowerbed") if isinstance(versions, Mapping) else None
    if made_with != __version__:
        missing.append(
            f"The run was made with flowerbed {made_with or 'of an unknown version'}, this report with {__version__}; "
            "what has another name there is not shown."
        )
    return found


def _read_partition(
    directory: Path, config: Mapping[str, Any], missing: list[str]
) -> tuple[npt.NDArray[np.int64] | None, Sequence[str]]:
    path = directory / PARTITION
    if not path.exists():
        clients = (config.get("federation") or {}).get("clients", "?")
        missing.append(
            f"{PARTITION} is missing, so who holds what is not shown (it is of an older version, or its {clients} "
            "clients are too many for a picture)."
        )
        return None, ()
    try:
        with np.load(path, allow_pickle=False) as file:
            counts, classes = np.asarray(file["counts"], dtype=np.int64), [str(c) for c in file["classes"]]
        if counts.ndim != 2 or counts.shape[1] != len(classes):
            raise ValueError(f"counts of shape {counts.shape} with {len(classes)} classes")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        missing.append(f"{PARTITION} cannot be read ({_short(error)}).")
        return None, ()
    return counts, classes


def _gaps(records: Sequence[Record]) -> Iterable[str]:
    """Yield what is not there between the first and the last round, and what is no number."""
    rounds = {r.round for r in records if r.phase not in (SERVER, CLIENTS)}
    absent = [r for r in range(1, max(rounds, default=0) + 1) if r not in rounds]
    if absent:
        yield f"No training record of {_ranges(absent)}; curves are broken there."
    bad: dict[str, list[int]] = {}
    for r in records:
        for name, value in r.metrics.items():
            if isinstance(value, float) and finite(value) is None:
                bad.setdefault(f"{name} ({r.phase})", []).append(r.round)
    for name, where in sorted(bad.items()):
        yield f"{name} is not finite in {_ranges(sorted(where))}; curves are broken there."


def _ranges(rounds: Sequence[int], most: int = 6) -> str:
    """Return rounds in words: round 3, or rounds 4-6, 9."""
    runs: list[list[int]] = []
    for r in rounds:
        if runs and r == runs[-1][1] + 1:
            runs[-1][1] = r
        else:
            runs.append([r, r])
    shown = [f"{a}" if a == b else f"{a}–{b}" for a, b in runs[:most]]
    more = f" and {len(runs) - most} further stretches" if len(runs) > most else ""
    return f"{'round' if len(rounds) == 1 else 'rounds'} {', '.join(shown)}{more}"


def _natural(path: Path) -> tuple[int, int, str]:
    return (0, int(path.name), "") if path.name.isdigit() else (1, 0, path.name)


def _short(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
