"""The command ``flowerbed report``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from flowerbed import __version__
from flowerbed.errors import ConfigError
from flowerbed.experiments.reports import render
from flowerbed.experiments.reports.attack import attack_part, matrix_part
from flowerbed.experiments.reports.collect import (
    ATTACK,
    COMPARISON,
    MATRIX,
    PAPERS,
    RUN,
    attacks_below,
    read_run,
    require_kind,
)
from flowerbed.experiments.reports.page import Page, Part
from flowerbed.experiments.reports.papers import ledger_part, reproductions_part
from flowerbed.experiments.reports.run import run_part
from flowerbed.experiments.reports.sweep import comparison_part, member, runs_part, sweep_part
from flowerbed.storage import atomic_write

DESCRIPTION = """\
Write one HTML file about runs, sweeps, comparisons, attacks or papers. It opens from disk and fetches nothing."""
EPILOG = """\
What a directory holds is recognised:
  a run                  curves with the spread of clients, classes, partition, failures, time, bytes, settings;
                         the attacks on it, if there are any
  a sweep or a folder    of runs: settings with intervals, curves, parallel coordinates, the best by rule
  a comparison           (flowerbed compare) its statistics, curves and costs
  an attack or a matrix  (flowerbed attack) gallery, null models, heat maps, leakage and utility
  papers                 (flowerbed reproduce) claims, verdicts, arms and figures
Several runs are compared first and then shown one by one. What is damaged, missing or of another version is said in
the report, which is made all the same.

examples:
  flowerbed report runs/first                          writes runs/first/report.html
  flowerbed report runs/a runs/b runs/c --out abc.html
  flowerbed report runs/compare
  flowerbed report --papers runs/papers                the ledger, with the papers' own pictures

Exit codes: 0 written, 2 there is nothing to report.
"""
FILE = "report.html"
MOST_SINGLE = 12
"""Runs that are shown one by one beside their comparison."""


def main(arguments: Sequence[str], as_json: bool = False) -> int:
    """Write the report that the command line ``arguments`` asks for; return the exit code."""
    asked = _parser().parse_intermixed_args(list(arguments))
    directories = [Path(text) for text in asked.directories]
    page = make_page(directories, asked.papers, asked.title)
    out = asked.out or _place(directories, asked.papers)
    write(page, out)
    missing = [text for part in page.parts for text in part.missing]
    if as_json:
        parts = [{"kind": p.kind, "title": p.title, "missing": list(p.missing)} for p in page.parts]
        print(json.dumps({"file": str(out), "parts": parts}))
    else:
        print(
            f"{out} ({out.stat().st_size / 1e6:.1f} MB): {', '.join(f'{p.kind} {p.title}' for p in page.parts)}"
        )
        for text in missing:
            print(f"- {text}")
    return 0


def make_page(directories: Sequence[Path], papers: bool = False, title: str | None = None) -> Page:
    """Return a page about everything that is in ``directories``, and about the ledger if ``papers`` is set.

    Raises ``ConfigError`` for a directory that holds nothing of ours, before anything is read.
    """
    if not directories and not papers:
        raise ConfigError("Name the directory of a run, a sweep, an attack or papers; or give --papers.")
    kinds = {path: require_kind(path) for path in dict.fromkeys(directories)}
    # Whatever cannot be written should not be found out after minutes of reading.
    render.library()
    parts: list[Part] = []
    if papers:
        parts.append(ledger_part([path for path, kind in kinds.items() if kind == PAPERS]))
    runs = [path for path, kind in kinds.items() if kind == RUN]
    if len(runs) > 1:
        found = [read_run(path) for path in runs]
        members = [member(run, str(run.directory)) for run in found]
        several: list[str] = []
        if len(runs) > MOST_SINGLE:
            several.append(f"The first {MOST_SINGLE} of {len(runs)} runs are shown one by one.")
        parts.append(runs_part(members, f"{len(runs)} runs", "as they were named", found, several))
    for path, kind in kinds.items():
        if kind == RUN and path in runs[:MOST_SINGLE]:
            parts.append(run_part(read_run(path)))
            parts += [attack_part(folder) for folder in attacks_below(path)]
        elif kind == COMPARISON:
            parts.append(comparison_part(path))
        elif kind == MATRIX:
            parts.append(matrix_part(path))
        elif kind == ATTACK:
            parts.append(attack_part(path))
        elif kind == PAPERS and not papers:
            parts.append(reproductions_part(path))
        elif kind not in (RUN, PAPERS):
            parts.append(sweep_part(path))
    made = f"Made by flowerbed {__version__} on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
    return Page(title or _title(parts), parts, made)


def write(page: Page, out: Path) -> None:
    """Write a page; its folder is made if need be."""
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, render.html(page).encode())


def _title(parts: Sequence[Part]) -> str:
    return f"{parts[0].title} – flowerbed report" if parts else "flowerbed report"


def _place(directories: Sequence[Path], papers: bool) -> Path:
    """Return the file beside what it is about; in the current directory if that is more than one thing."""
    return directories[0] / FILE if len(directories) == 1 and not papers else Path(FILE)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowerbed report",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directories", nargs="*", metavar="DIR", help="what the report is about")
    parser.add_argument("--papers", action="store_true", help="show the ledger of the papers")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the file (DIR/{FILE}, else {FILE})")
    parser.add_argument("--title", metavar="TEXT", help="the heading")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser
