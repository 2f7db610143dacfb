"""The command ``flowerbed compare``."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml

from flowerbed.errors import ConfigError
from flowerbed.experiments import compare_report
from flowerbed.experiments.compare import Watcher, compare_simulations
from flowerbed.experiments.comparison import Comparison, Run
from flowerbed.experiments.composition import compose_simulations, whole_numbers
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.failure import FAILED
from flowerbed.server.callbacks import SERVER, Record

DESCRIPTION = "Run methods x seeds on the same data, and say what can be said about the difference."
EPILOG = """\
The methods are given in one of two ways, with the settings that all share beside them:
  strategy=A,B,C     strategies by name; strategy.A.KEY=VALUE sets an option of A alone,
                     strategy.KEY=VALUE one of all
  methods=FILE.yaml  any settings under a label, in the grammar of the command line:
                       FedAvg: strategy=fedavg
                       FedProx, 5 epochs: strategy=fedprox strategy.mu=0.1 local.epochs=5
The first method is the reference of the tests, unless --reference names another.

A metric is that of the server's test set; clients:NAME is that of the clients' own test data, and needs
evaluation.clients_every.

examples:
  flowerbed compare strategy=fedavg,fedprox seeds=0,1,2 strategy.fedprox.mu=0.1 \\
      partition=dirichlet partition.alpha=0.1 federation.rounds=50 --out runs/prox
  flowerbed compare methods=personal.yaml seeds=0,1,2 evaluation.clients_every=5 \\
      --metric clients:accuracy,clients:personal-accuracy-mean

Called again it uses the runs that are there and goes on where it was interrupted.
Exit codes: 0 all runs finished, 1 a run failed, 2 it could not start as asked, 130 interrupted.
"""


def compare(arguments: Sequence[str], as_json: bool = False) -> int:
    """Compare what the command line ``arguments`` asks for; return the exit code."""
    asked = _parser().parse_intermixed_args(list(arguments))
    methods, seeds = read(asked.settings)
    watcher = Board(len(methods) * len(seeds)) if sys.stderr.isatty() and not as_json else Lines()
    with watcher:
        comparison = compare_simulations(
            methods,
            seeds,
            asked.out,
            metrics=asked.metric.split(","),
            reference=asked.reference,
            watcher=watcher,
        )
    _show(comparison, asked.out, as_json)
    return FAILED if comparison.failed else 0


def read(settings: Sequence[str]) -> tuple[dict[str, Simulation], list[int]]:
    """Return the methods by label, composed and checked, and the seeds."""
    values = dict(text.split("=", 1) for text in settings if "=" in text)
    for key, instead in (("seed", "seeds=0,1,2"), ("run.dir", "--out DIR"), ("run.overwrite", "--out DIR")):
        if key in values:
            raise ConfigError(f"{key} is set by the comparison itself; give {instead}.")
    shared = [text for text in settings if text.split("=", 1)[0] not in ("seeds", "strategy", "methods")]
    if ("strategy" in values) == ("methods" in values):
        raise ConfigError("Give the methods either as strategy=fedavg,fedprox or as methods=FILE.yaml.")
    if "methods" in values:
        own = _from_file(Path(values["methods"]))
    else:
        own, shared = _from_names(values["strategy"].split(","), shared)
    methods: dict[str, Simulation] = {}
    for label, overrides in own.items():
        try:
            (methods[label],) = compose_simulations([*shared, *overrides])
        except ConfigError as error:
            raise ConfigError(f"{label}: {error}") from error
    return methods, whole_numbers(values.get("seeds", "0"), "seeds")


def _from_names(names: Sequence[str], shared: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return each strategy's own overrides by name, and those that are left for all."""
    own = {name: [f"strategy={name}"] for name in names}
    if len(own) < len(names):
        raise ConfigError(f"strategy={','.join(names)} repeats a name; methods=FILE.yaml gives labels.")
    rest = []
    for text in shared:
        owner = next((name for name in names if text.startswith(f"strategy.{name}.")), None)
        if owner is None:
            rest.append(text)
        else:
            own[owner].append(f"strategy.{text.removeprefix(f'strategy.{owner}.')}")
    return own, rest


def _from_file(path: Path) -> dict[str, list[str]]:
    if not path.exists():
        raise ConfigError(
            f"There is no file {path}; methods=FILE.yaml holds 'label: strategy=NAME ...' lines."
        )
    found = yaml.safe_load(path.read_text())
    if not isinstance(found, Mapping) or not found:
        raise ConfigError(f"{path} must map labels to settings: 'FedProx: strategy=fedprox strategy.mu=0.1'.")
    return {str(label): _overrides(path, str(label), value) for label, value in found.items()}


def _overrides(path: Path, label: str, value: Any) -> list[str]:
    if isinstance(value, str):
        return shlex.split(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise ConfigError(f"{path}, '{label}': give the settings as text, 'strategy=fedprox strategy.mu=0.1'.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowerbed compare",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="KEY=VALUE",
        help="strategy= or methods=, seeds=, and any setting of simulate",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compare"), metavar="DIR", help="runs and report (%(default)s)"
    )
    parser.add_argument(
        "--metric", default="accuracy", metavar="NAME[,NAME]", help="what is compared (%(default)s)"
    )
    parser.add_argument("--reference", metavar="METHOD", help="whom the others are tested against")
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")
    return parser


def _show(comparison: Comparison, out: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(compare_report.plain(comparison)))
        return
    from rich.console import Console

    console = Console()
    for table in compare_report.tables(comparison):
        console.print(table)
    for note in (compare_report.selection(comparison), *compare_report.notes(comparison)):
        console.print(f"- {note}", style="dim", markup=False, highlight=False)
    print(f"files: {out}/ (comparison.md, comparison.csv, comparison.json, comparison.png, runs/)")


class Lines(Watcher):
    """A line for every run that ends, on standard error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *about: object) -> None:
        """Nothing is open."""

    def ended(self, run: Run) -> None:
        print(outcome(run), file=sys.stderr, flush=True)


class Board(Lines):
    """A live display: the runs, and the rounds of the one that goes on."""

    def __init__(self, runs: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._runs = self._bars.add_task("runs", total=runs, note="")
        self._rounds = self._bars.add_task("rounds", total=None, note="")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *about: object) -> None:
        self._bars.stop()

    def begins(self, method: str, seed: int) -> None:
        self._bars.reset(self._rounds, total=None, note="", description=f"{method}, seed {seed}")

    def started(self, rounds: int, first_round: int) -> None:
        self._bars.update(self._rounds, total=rounds, completed=first_round - 1)

    def recorded(self, record: Record) -> None:
        self._bars.update(self._rounds, completed=record.round)
        if record.phase == SERVER:
            self._bars.update(self._rounds, note=f"accuracy {record.metrics['accuracy']:.4g}")

    def ended(self, run: Run) -> None:
        self._bars.console.print(outcome(run), markup=False, highlight=False)
        self._bars.advance(self._runs)


def outcome(run: Run) -> str:
    """Return the line that says how a run ended."""
    figures = ", ".join(f"{name} {value:.4g}" for name, value in run.values.items())
    said = figures or run.reason
    return f"{run.method}, seed {run.seed}: {run.status}{' earlier' if run.reused else ''}, {said}"
