"""The command ``flowerbed papers``: every method of the catalogue, and what the ledger says about it."""

from __future__ import annotations

import argparse
import fnmatch
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowerbed.errors import ConfigError, unknown_name
from flowerbed.experiments.progress import waiting
from flowerbed.experiments.reproduction import ledger
from flowerbed.experiments.reproduction.catalogue import catalogue
from flowerbed.experiments.reproduction.ledger import ABSENT, EDITED, NOT_RUN, RECORDED, STALE, Standing
from flowerbed.experiments.reproduction.paper import built
from flowerbed.experiments.text import duration

COLOURS = {RECORDED: "green", STALE: "yellow", EDITED: "red", NOT_RUN: "cyan", ABSENT: "dim"}
WIDE = 150
"""Columns from which on there is room for the seam."""
EPILOG = """\
A record holds as long as the hashes of the protocol, of the paper's code and of its claims are what they were; else it
is stale, and one whose content was changed by hand is said to be.
claims: how many were reproduced / how many were evaluated and not reproduced as claimed.
"""


def main(arguments: Sequence[str], as_json: bool = False) -> int:
    """Print what the command line ``arguments`` asks for; return the exit code."""
    asked = _parser().parse_args(list(arguments))
    slugs = fnmatch.filter(catalogue(), asked.pattern)
    if not slugs:
        raise ConfigError(unknown_name("paper", asked.pattern, catalogue()))
    there = built()
    with waiting("reading the code of every paper"):
        standings = [ledger.standing(slug, slug in there, asked.ledger) for slug in slugs]
    if as_json:
        print(json.dumps([_plain(standing) for standing in standings], indent=1))
    else:
        _show(standings)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowerbed papers",
        description="Show every published method of the catalogue and how its reproduction stands.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pattern", nargs="?", default="*", help="glob on the slugs, for example '*-mp'")
    parser.add_argument(
        "--ledger", type=Path, default=ledger.LEDGER, metavar="DIR", help="where records are kept"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _plain(standing: Standing) -> dict[str, Any]:
    entry, record = catalogue()[standing.slug], standing.record
    return {
        "slug": entry.slug,
        "title": entry.title,
        "seam": entry.seam,
        "status": standing.status,
        "reason": standing.reason,
        "passed": standing.passed,
        "failed": standing.failed,
        "claims": len(standing.verdicts),
        "scale": record["scale"] if record else None,
        "age_days": standing.age_days,
        "seconds": record["seconds"] if record else None,
    }


def _show(standings: Sequence[Standing]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A pipe has no width; there is room for everything.
    width = shutil.get_terminal_size((WIDE, 24)).columns
    wide = width >= WIDE
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, expand=True)
    table.add_column("slug", no_wrap=True, min_width=max(len(s.slug) for s in standings))
    table.add_column("title", no_wrap=True, overflow="ellipsis", ratio=3)
    if wide:
        table.add_column("seam", no_wrap=True, overflow="ellipsis", ratio=2)
    for name in ("status", "claims", "scale", "age", "time"):
        table.add_column(name, no_wrap=True, justify="left" if name == "status" else "right")
    for standing in standings:
        entry, record = catalogue()[standing.slug], standing.record
        cells = ["", "", "", ""]
        if record is not None:
            claims = f"{standing.passed}/{standing.failed}"
            cells = [claims, record["scale"], _age(standing.age_days or 0.0), duration(record["seconds"])]
        status = Text(standing.status, COLOURS[standing.status])
        about = (Text(entry.title), Text(entry.seam)) if wide else (Text(entry.title),)
        table.add_row(entry.slug, *about, status, *cells)
    console = Console(width=width)
    console.print(table)
    console.print(_totals(standings), markup=False, highlight=False)
    for standing in standings:
        if standing.reason:
            console.print(
                f"- {standing.slug} is {standing.status}: {standing.reason}", style="dim", markup=False
            )


def _totals(standings: Sequence[Standing]) -> str:
    """Return the line under the table: how many stand how, and the time of all records at each scale."""
    counted = (f"{sum(s.status == name for s in standings)} {name}" for name in COLOURS)
    times: dict[str, float] = {}
    for standing in standings:
        if standing.record is not None:
            scale = standing.record["scale"]
            times[scale] = times.get(scale, 0.0) + standing.record["seconds"]
    spent = ", ".join(f"{scale}: {duration(seconds)}" for scale, seconds in times.items())
    claims = f"{sum(s.passed for s in standings)} reproduced, {sum(s.failed for s in standings)} not"
    return f"{len(standings)} papers: {', '.join(counted)}. Claims: {claims}. Time {spent or '-'}."


def _age(days: float) -> str:
    if days < 1 / 24:
        return "now"
    return f"{24 * days:.0f} h" if days < 2 else f"{days:.0f} d"
