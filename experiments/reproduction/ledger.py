"""The record that a reproduction leaves, one JSON file a paper, and whether it still holds.

``experiments/ledger/<slug>.json`` holds one record a scale. A record names the hashes of the configuration, of the
paper's code and of its claims, and is sealed by one of its own content: where these differ from what is there now it is
shown as stale, and one that was edited by hand as that.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from flowerbed.errors import ConfigError, FlowerbedError
from flowerbed.experiments import paired
from flowerbed.experiments.reproduction import digests
from flowerbed.experiments.reproduction.claims import NOT_EVALUATED, REPRODUCED, Judged, Verdict
from flowerbed.experiments.reproduction.engine import SMOKE, Reproduction
from flowerbed.experiments.reproduction.paper import Paper, load_paper, load_scale
from flowerbed.experiments.run_directory import git_commit, versions
from flowerbed.machine import processor
from flowerbed.storage import atomic_write

LEDGER = Path(__file__).parent.parent / "ledger"
SCALES = ("full", "quick")
"""From the one that says most."""
NOT_RUN, RECORDED, STALE, EDITED, ABSENT = "not run", "recorded", "stale", "edited by hand", "no module"
Record = dict[str, Any]


@dataclass(frozen=True)
class Standing:
    """What the ledger says about a paper."""

    slug: str
    status: str
    """recorded, stale, edited by hand, not run, or no module."""
    reason: str = ""
    """What made it stale."""
    record: Record | None = None

    @property
    def verdicts(self) -> list[str]:
        """The verdict of every claim."""
        return [claim["verdict"] for claim in self.record["claims"]] if self.record else []

    @property
    def passed(self) -> int:
        """Claims that were reproduced."""
        return self.verdicts.count(REPRODUCED)

    @property
    def failed(self) -> int:
        """Claims that were evaluated and not reproduced as claimed."""
        return sum(verdict not in (REPRODUCED, NOT_EVALUATED) for verdict in self.verdicts)

    @property
    def age_days(self) -> float | None:
        """Days since it was made."""
        if self.record is None:
            return None
        return (datetime.now(UTC) - datetime.fromisoformat(self.record["made"])).total_seconds() / 86400


def record_of(made: Reproduction) -> Record:
    """Return the record of a reproduction: what was claimed and measured, and all that it was made with."""
    paper = made.scale.paper
    return sealed(
        {
            "slug": paper.slug,
            "title": paper.title,
            "scale": made.scale.name,
            "whole": made.whole,
            "seeds": list(made.seeds),
            "claims": [asdict(verdict) | {"clear": verdict.clear} for verdict in made.verdicts],
            "arms": {arm: _arm(made, arm) for arm in made.arms},
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(made.seconds, 1),
            "hardware": hardware(),
            "versions": versions(),
            "git_commit": git_commit(),
            "hashes": hashes(paper, made.scale.name),
        }
    )


def verdict_of(claim: Record) -> Verdict:
    """Return a verdict as it was before it stood in a record."""
    parts = {name: tuple(Judged(**one) for one in claim[name]) for name in ("conditions", "mechanism")}
    return Verdict(claim["claim"], claim["text"], claim["verdict"], claim["reason"], **parts)


def _arm(made: Reproduction, arm: str) -> Record:
    """Return an arm's figures by seed, with mean and interval unless a run is broken."""
    outcomes = made.of(arm)
    names = sorted({name for o in outcomes for name in o.values})
    figures = {}
    for name in names:
        values = [o.values.get(name) for o in outcomes]
        interval = paired.t_interval(values)
        figures[name] = {"values": values, **(asdict(interval) if interval else {"mean": None})}
    return {
        "about": made.scale.arms[arm].about,
        "settings": digests.deciding(made.scale.arms[arm].settings),
        "runs": [
            {
                "seed": seed,
                "status": o.status,
                "reason": o.reason,
                "seconds": o.seconds,
                "made_with": o.made_with,
            }
            for seed, o in zip(made.seeds, outcomes, strict=True)
        ],
        "figures": figures,
    }


def hashes(paper: Paper, scale: str) -> dict[str, str]:
    """Return the hashes that a record at this scale has as long as it holds."""
    config = digests.config(load_scale(paper, scale))
    return {"config": config, "module": digests.module(paper), "claims": digests.claims(paper)}


def sealed(record: Record) -> Record:
    """Return the record with the hash of its content."""
    content = {key: value for key, value in record.items() if key != "seal"}
    # Through JSON, so that the seal of what is read back is the same.
    return {**content, "seal": digests.digest(json.loads(json.dumps(content)))}


def write(record: Record, folder: Path = LEDGER) -> Path:
    """Put the record into the ledger, in the place of the last one at its scale; raises ``ConfigError`` for another."""
    if not record["whole"] or record["scale"] == SMOKE:
        raise ConfigError("Only a whole reproduction at quick or full scale goes into the ledger.")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['slug']}.json"
    records = {**read(path), record["scale"]: record}
    ordered = {scale: records[scale] for scale in SCALES if scale in records}
    atomic_write(path, (json.dumps(ordered, indent=1, ensure_ascii=False) + "\n").encode())
    return path


def read(path: Path) -> dict[str, Record]:
    """Return the records of a paper by scale; {} if there are none."""
    if not path.exists():
        return {}
    try:
        found: dict[str, Record] = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"The record {path} cannot be read ({error}); run the paper again.") from error
    return found


def standing(slug: str, built: bool, folder: Path = LEDGER) -> Standing:
    """Return what the ledger says about a paper: the record at the largest scale that holds, else the largest."""
    if not built:
        return Standing(slug, ABSENT)
    records = read(folder / f"{slug}.json")
    found = [_standing(slug, records[scale]) for scale in SCALES if scale in records]
    return next((s for s in found if s.status == RECORDED), found[0] if found else Standing(slug, NOT_RUN))


def at_scale(slug: str, scale: str, folder: Path = LEDGER) -> Standing:
    """Return what the ledger says about a paper at one scale."""
    records = read(folder / f"{slug}.json")
    return _standing(slug, records[scale]) if scale in records else Standing(slug, NOT_RUN)


def _standing(slug: str, record: Record) -> Standing:
    if sealed(record)["seal"] != record.get("seal"):
        return Standing(slug, EDITED, "its content does not match its seal", record)
    try:
        now = hashes(load_paper(slug), record["scale"])
    except FlowerbedError as error:
        return Standing(slug, STALE, str(error), record)
    changed = [name for name, value in now.items() if record["hashes"].get(name) != value]
    if changed:
        return Standing(slug, STALE, f"{' and '.join(changed)} changed", record)
    return Standing(slug, RECORDED, "", record)


def hardware() -> dict[str, Any]:
    """Return what this machine is: processor, cores, memory, GPU."""
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "processor": processor(),
    }
    with contextlib.suppress(ValueError, OSError, AttributeError):
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        found["memory_gib"] = round(pages / 2**30, 1)
    found["gpu"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return found


def summary(record: Mapping[str, Any]) -> str:
    """Return a record in a line: how many claims came out how."""
    verdicts = [claim["verdict"] for claim in record["claims"]]
    counted = (f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
    return ", ".join(counted) or "no claims evaluated"
