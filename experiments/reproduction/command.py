"""The command ``flowerbed reproduce``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from flowerbed.errors import ConfigError, FlowerbedError, require
from flowerbed.experiments.composition import import_from_current_directory, parse, whole_numbers
from flowerbed.experiments.config import Settings, merged
from flowerbed.experiments.failure import FAILED, describe, exit_code
from flowerbed.experiments.reproduction import digests, ledger, report
from flowerbed.experiments.reproduction.engine import OUT, SMOKE, Reproduction, cores, reproduce
from flowerbed.experiments.reproduction.paper import SCALES, Paper, built, load_paper
from flowerbed.experiments.reproduction.running import Job, Outcome
from flowerbed.experiments.reproduction.schedule import Watcher
from flowerbed.experiments.text import duration

DESCRIPTION = "Run a paper's arms and seeds through the ordinary simulation, and judge its claims."
EPILOG = """\
KEY=VALUE is any setting of simulate, laid over every arm. What decides a result makes another experiment of it,
which is kept apart and goes into no ledger:
  flowerbed reproduce ps-kd                                   the quick scale, all seeds and claims
  flowerbed reproduce ps-kd --claims calibration,accuracy     only these, and the arms that they need
  flowerbed reproduce ps-kd --scale full grid.device=cuda     for one GPU
  flowerbed reproduce ps-kd federation.clients=10 --out runs/ten-clients
  flowerbed reproduce --all --scale quick                     every paper whose record is missing or stale

Called again it uses the runs that are there and goes on where it was interrupted.
Exit codes: 0 all runs came to an end, 1 a run failed, 2 it could not start as asked, 130 interrupted. A claim that is
not reproduced, and an arm that diverges, are results: they change no exit code.
"""


def main(arguments: Sequence[str], as_json: bool = False) -> int:
    """Reproduce what the command line ``arguments`` asks for; return the exit code."""
    asked = _parser().parse_intermixed_args(list(arguments))
    words = [text for text in asked.words if "=" not in text]
    overrides = [text for text in asked.words if "=" in text]
    import_from_current_directory()
    settings, shared = divided(overrides)
    if not asked.all:
        require(len(words) == 1, f"Name one paper, or use --all. There are: {', '.join(built())}.")
        return _one(words[0], asked, settings, shared, as_json)
    require(
        not words and not settings and not asked.claims and not asked.seeds,
        "--all runs every paper as it stands; it takes no names, claims, seeds or settings.",
    )
    return _all(asked, shared, as_json)


def divided(overrides: Sequence[str]) -> tuple[Settings, Settings]:
    """Return the settings that decide results, and those that do not (grid, tracking, folders of data)."""
    settings: Settings = {}
    shared: Settings = {}
    for override in parse(overrides):
        if override.is_sweep_override() or override.is_delete() or override.package:
            raise ConfigError(f"'{override.input_line}' cannot be used here; write key=value.")
        section, _, key = override.key_or_group.partition(".")
        require(section not in ("seed", "run"), f"'{override.input_line}': give --seeds or --out.")
        value: Any = override.value()
        one = {section: {key: value} if key else value}
        if not digests.deciding(one):
            shared = merged(shared, one)
        else:
            settings = merged(settings, one)
    return settings, shared


def claim_names(text: str, paper: Paper) -> list[str]:
    """Return the names in a list with commas; a claim's own name may have commas too."""
    known, found, rest = {claim.name for claim in paper.claims}, [], text.split(",")
    while rest:
        lengths = (n for n in range(len(rest), 0, -1) if ",".join(rest[:n]).strip() in known)
        length = next(lengths, 1)
        found.append(",".join(rest[:length]).strip())
        rest = rest[length:]
    return found


def _one(name: str, asked: argparse.Namespace, settings: Settings, shared: Settings, as_json: bool) -> int:
    with Board() if sys.stderr.isatty() and not as_json else Lines() as board:
        made = reproduce(
            name,
            asked.scale,
            asked.out,
            claims=claim_names(asked.claims, load_paper(name)) if asked.claims else None,
            seeds=None if asked.seeds is None else whole_numbers(asked.seeds, "--seeds"),
            settings=settings,
            shared=shared,
            workers=asked.jobs,
            watcher=board,
        )
    record = ledger.record_of(made)
    files = report.write(made, record, asked.out)
    if made.whole and asked.scale != SMOKE and not any(o.status == "failed" for o in made.outcomes.values()):
        files.append(ledger.write(record, asked.ledger))
    if as_json:
        print(json.dumps(record))
    else:
        _show(made, record, files)
    return FAILED if any(outcome.status == "failed" for _, _, outcome in made.broken) else 0


def _all(asked: argparse.Namespace, shared: Settings, as_json: bool) -> int:
    codes = []
    for slug in built():
        standing = ledger.at_scale(slug, asked.scale, asked.ledger)
        if standing.status == ledger.RECORDED:
            print(f"{slug}: the record holds", file=sys.stderr)
            continue
        print(
            f"{slug}: {standing.status}{f' ({standing.reason})' if standing.reason else ''}", file=sys.stderr
        )
        try:
            codes.append(_one(slug, asked, {}, shared, as_json))
        except FlowerbedError as error:
            # The other papers may work.
            print(describe(error), file=sys.stderr)
            codes.append(exit_code(error))
    return max(codes, default=0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowerbed reproduce",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words", nargs="*", metavar="SLUG | KEY=VALUE", help="the paper, and settings of simulate"
    )
    parser.add_argument("--all", action="store_true", help="every paper whose record is missing or stale")
    parser.add_argument("--scale", choices=SCALES, default="quick", help="how large (%(default)s)")
    parser.add_argument(
        "--claims", metavar="NAME[,NAME]", help="only these claims, and the arms that they need"
    )
    parser.add_argument("--seeds", metavar="N[,N]", help="in place of the protocol's")
    parser.add_argument(
        "--jobs", type=_positive, metavar="N", help=f"runs side by side (one a core: {cores()})"
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="runs and reports (%(default)s)")
    parser.add_argument(
        "--ledger", type=Path, default=ledger.LEDGER, metavar="DIR", help="where records are kept"
    )
    parser.add_argument("--json", action="store_true", help="print the record as JSON")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _show(made: Reproduction, record: ledger.Record, files: Sequence[Path]) -> None:
    from rich.console import Console

    console = Console()
    console.print(report.arms_table(made))
    if made.verdicts:
        console.print(report.claims_table(made))
    console.print(f"- {report.about(made, record)}", style="dim", markup=False, highlight=False)
    for arm, seed, outcome in made.broken:
        console.print(f"- {arm}, seed {seed} {outcome.status}: {outcome.reason}", style="red", markup=False)
    print(f"{ledger.summary(record)}\nfiles: {', '.join(map(str, files))}")


def outcome_line(job: Job, outcome: Outcome) -> str:
    """Return the line that says how a run ended."""
    said = outcome.reason or ", ".join(
        f"{name} {outcome.values[name]:.4g}" for name in ("accuracy", "loss") if name in outcome.values
    )
    return f"{job.arm}, seed {job.seed}: {outcome.status} in {duration(outcome.seconds)}, {said}".rstrip(", ")


class Lines(Watcher):
    """A line for every run that ends, on standard error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *about: object) -> None:
        """Nothing is open."""

    def ended(self, job: Job, outcome: Outcome) -> None:
        print(outcome_line(job, outcome), file=sys.stderr, flush=True)


class Board(Lines):
    """A live display: a bar for all runs, and one for each that goes on."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._runs = self._bars.add_task("runs", total=None)
        self._open: dict[tuple[str, str, int], Any] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *about: object) -> None:
        self._bars.stop()

    def planned(self, runs: int) -> None:
        self._bars.update(self._runs, total=runs)

    def begins(self, job: Job) -> None:
        rounds = job.settings.get("federation", {}).get("rounds")
        self._open[job.key] = self._bars.add_task(f"{job.arm}, seed {job.seed}", total=rounds)

    def advanced(self, job: Job, round_: int) -> None:
        self._bars.update(self._open[job.key], completed=round_)

    def ended(self, job: Job, outcome: Outcome) -> None:
        self._bars.remove_task(self._open.pop(job.key))
        self._bars.console.print(outcome_line(job, outcome), markup=False, highlight=False)
        self._bars.advance(self._runs)
