"""Runs as a person reads them: one line at the end, one screen later, one table for a sweep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flowerbed.errors import ConfigError
from flowerbed.experiments import saved
from flowerbed.experiments.failure import first_line
from flowerbed.experiments.text import duration, number, size, table
from flowerbed.experiments.watch.follow import ABOUT, Follower, Phase

JOBS = "jobs.jsonl"
GOOD = ("completed", "stopped")
"""The states of a run that is whole."""


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    number: int
    overrides: list[str]
    directory: str
    status: str
    reason: str = ""
    accuracy: float | None = None
    loss: float | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, number: int, overrides: Sequence[str], directory: Path, error: str | None) -> Job:
        """Describe a run that has just ended, from its summary or the error that kept it from starting."""
        try:
            summary = read_summary(directory)
        except ConfigError:
            return cls(number, list(overrides), str(directory), "failed", error or "it left no summary")
        final = summary["final"]
        return cls(
            number,
            list(overrides),
            str(directory),
            summary["status"] if error is None else "failed",
            error or summary["reason"],
            final.get("accuracy"),
            final.get("loss"),
            summary["wall_seconds"],
        )


def write_job(folder: Path, job: Job) -> None:
    """Add a job to its sweep's table; jobs may run in several processes."""
    with open(folder / JOBS, "a") as file:
        file.write(json.dumps(asdict(job)) + "\n")


def read_jobs(folder: Path) -> list[Job]:
    """Return the jobs of a sweep in the order of their numbers; [] if there are none."""
    path = folder / JOBS
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted((Job(**json.loads(line)) for line in lines), key=lambda job: job.number)


def read_summary(directory: Path) -> dict[str, Any]:
    """Return a run's summary; for a run that has not ended, or whose summary is damaged, what its metrics say so far.

    ``notes`` then says what is missing. Raises ``ConfigError`` if there is no run.
    """
    path, notes = directory / "summary.json", []
    if path.exists():
        try:
            return saved.read_object(path)
        except ConfigError as error:
            notes.append(str(error))
    if not any((directory / name).exists() for name in ("config.yaml", "metrics.jsonl", "summary.json")):
        raise ConfigError(f"{directory} holds no run: neither summary.json nor config.yaml is there.")
    follower = Follower(directory / "metrics.jsonl")
    follower.refresh()
    judged = follower.phases.get("evaluate-server", Phase())
    final = (
        {name: column[-1] for name, column in judged.columns.items() if name not in ABOUT}
        if judged.rounds
        else {}
    )
    return {
        "status": "unfinished",
        "reason": f"it is running, or was killed; go on with: flowerbed resume {directory}",
        "rounds": max((max(phase.rounds) for phase in follower.phases.values()), default=0),
        "final": {name: value for name, value in final.items() if value is not None},
        "failures": {"total": sum(follower.failed.values()), "by_kind": dict(follower.failed)},
        "wall_seconds": sum(
            filter(None, (t for p in follower.phases.values() for t in p.columns.get("seconds", ())))
        ),
        "notes": [*notes, *follower.whole()["notes"]],
    }


def ending(directory: Path, summary: Mapping[str, Any]) -> str:
    """Return the few lines that end a run on the screen."""
    lines = [f"{summary['status']}: {_result(summary)}"]
    if summary["status"] == "stopped":
        lines[0] += f" ({summary['reason']})"
    failures = summary["failures"]
    if failures["total"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in failures["by_kind"].items())
        lines.append(f"client failures: {failures['total']} ({kinds})")
    pictures = sorted(path.name for path in (directory / "figures").glob("*.png"))
    files = ["summary.json", "metrics.jsonl", *(["model.safetensors"] if _has_model(directory) else [])]
    if pictures:
        files.append(f"figures/{{{','.join(pictures)}}}" if len(pictures) > 1 else f"figures/{pictures[0]}")
    lines.append(f"files:   {directory}/ ({', '.join(files)})")
    lines.append(f"look:    flowerbed show {directory}")
    if summary["status"] not in GOOD and any((directory / "checkpoints").glob("round-*")):
        lines.append(f"go on:   flowerbed resume {directory}")
    return "\n".join(lines)


def screen(directory: Path, summary: Mapping[str, Any]) -> str:
    """Return a run's summary as one table; what a run of another version does not say is left out."""
    final, failures = summary.get("final") or {}, summary.get("failures") or {}
    rows: list[tuple[str, str]] = [
        ("directory", str(directory)),
        ("status", str(summary.get("status", "not recorded"))),
    ]
    if summary.get("reason"):
        rows.append(("reason", first_line(summary["reason"])))
    rows += [("missing", note) for note in summary.get("notes", ())]
    rows.append(("rounds", str(summary.get("rounds", "not recorded"))))
    rows += [(f"final {name}", number(value)) for name, value in final.items()]
    for key, means in summary.items():
        if key.startswith("mean_of_last_"):
            rows += [
                (f"{name}, {key.replace('_', ' ')}", number(value))
                for name, value in means.items()
                if name in ("accuracy", "loss")
            ]
    rows += [(f"clients' {name}", number(value)) for name, value in (summary.get("clients") or {}).items()]
    kinds = ", ".join(f"{count} {kind}" for kind, count in failures.get("by_kind", {}).items())
    rows.append(
        ("client failures", f"{failures.get('total', 'not recorded')}{f' ({kinds})' if kinds else ''}")
    )
    if "bytes" in summary:
        down, up = summary["bytes"]["down"], summary["bytes"]["up"]
        rows.append(("payload", f"{size(down)} to clients, {size(up)} from clients"))
    if "wall_seconds" in summary:
        rows.append(("wall time", duration(summary["wall_seconds"])))
    for key, label in (
        ("peak_memory_mib", "peak memory (MiB)"),
        ("seed", "seed"),
        ("config_hash", "config hash"),
    ):
        if key in summary:
            rows.append((label, str(summary[key])))
    if summary.get("git_commit"):
        rows.append(("git commit", summary["git_commit"]))
    if "versions" in summary:
        rows.append(("versions", ", ".join(f"{k} {v}" for k, v in summary["versions"].items())))
    return table(rows)


def jobs_table(jobs: Sequence[Job]) -> str:
    """Return a sweep as one table; of the overrides, those in which the jobs differ."""
    common = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    rows = [("job", "overrides", "status", "accuracy", "loss", "seconds", "directory")]
    for job in jobs:
        status = (
            job.status if job.status in GOOD or not job.reason else f"{job.status}: {first_line(job.reason)}"
        )
        numbers = (number(job.accuracy), number(job.loss), number(job.seconds))
        overrides = " ".join(text for text in job.overrides if text not in common) or "(none)"
        rows.append((str(job.number), overrides, status, *numbers, job.directory))
    return table(rows, header=True)


def _result(summary: Mapping[str, Any]) -> str:
    final = [
        f"{name} {number(summary['final'][name])}"
        for name in ("accuracy", "loss")
        if name in summary["final"]
    ]
    took = f"{summary['rounds']} rounds in {duration(summary['wall_seconds'])}"
    return f"{', '.join(final)} after {took}" if final else took


def _has_model(directory: Path) -> bool:
    return (directory / "model.safetensors").exists()
