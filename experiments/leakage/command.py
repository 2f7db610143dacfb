"""The command ``flowerbed attack``."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowerbed.errors import require
from flowerbed.experiments.composition import import_from_current_directory, whole_numbers
from flowerbed.experiments.leakage import matrix, matrix_report, report
from flowerbed.experiments.leakage.attacking import GRANTS, Attacked, attack_run, composed
from flowerbed.experiments.progress import Steps, waiting
from flowerbed.strategies.attacks.presets import ATTACKS

DESCRIPTION = "Attack what a run's server saw of single clients, and score what was found."
EPILOG = """\
First keep the exchange of some rounds:
  flowerbed simulate dataset=cifar10 federation.clients=20 local.steps=1 local.batch_size=1 \\
      observe.rounds=[1] observe.clients=[0,1,2,3] run.dir=runs/watched
then:
  flowerbed attack runs/watched                                  Inverting Gradients, 2000 steps
  flowerbed attack runs/watched attack=dlg attack.restarts=3
  flowerbed attack runs/watched attack=gifd attack.prior=runs/prior/model.safetensors
  flowerbed attack runs/watched attack=ig attack.steps=8000 attack.tv=0.01 --grant labels

docs/attacks.md says of every attack what it needs, what it returns and when it fails. Attacks that need a malicious
server get one in the run itself: flowerbed simulate ... attack=trap, or tampering=NAME with observe.rounds.

A matrix of attacks, defences and states of the model is one file (flowerbed.experiments.leakage.matrix says how):
  flowerbed attack matrix=leakage.yaml --out runs/leakage

Defences and who knows of them: docs/defences.md; known breaks as matrices: experiments/leakage/breaks.

Only one plain local step gives a gradient; the tool says where an update is none.
Exit codes: 0 done, 2 it could not start as asked, 130 interrupted.
"""
DEFAULT = "ig"
STEPS = 2000
"""Of the default attack, whose paper's 24,000 take hours on a CPU."""


def main(arguments: Sequence[str], as_json: bool = False) -> int:
    """Attack what the command line ``arguments`` asks for; return the exit code."""
    asked = _parser().parse_intermixed_args(list(arguments))
    import_from_current_directory()
    settings = [text for text in asked.words if "=" in text]
    directories = [Path(text) for text in asked.words if "=" not in text]
    matrices = [text for text in settings if text.startswith("matrix=")]
    if matrices:
        further = [text for text in settings if text not in matrices]
        return _matrix(Path(matrices[-1].removeprefix("matrix=")), further, asked.out, as_json)
    require(len(directories) == 1, "Name the directory of one run, or give matrix=FILE.yaml.")
    name, options = read(settings)
    made = _attacked(directories[0], name, options, asked, as_json)
    files = report.write(made, asked.out or directories[0] / "attacks" / name, options)
    if as_json:
        print(json.dumps(report.plain(made, options)))
    else:
        _show(made, files)
    return 0


def _attacked(
    directory: Path, name: str, options: dict[str, Any], asked: argparse.Namespace, as_json: bool
) -> Attacked:
    """Attack a run, and show the steps."""
    with contextlib.nullcontext() if as_json else Steps(f"attack {name}") as watch:
        return attack_run(
            directory,
            name,
            options,
            clients=None if asked.clients is None else whole_numbers(asked.clients, "--clients"),
            rounds=None if asked.rounds is None else whole_numbers(asked.rounds, "--rounds"),
            adaptive=asked.adaptive,
            grant=() if asked.grant is None else asked.grant.split(","),
            normalisation=asked.normalisation,
            device=asked.device,
            lpips=[Path(name) for name in asked.lpips.split(",")] if asked.lpips else (),
            watch=watch,
        )


def _matrix(path: Path, further: Sequence[str], out: Path | None, as_json: bool) -> int:
    """Make a matrix and show it."""
    plan = matrix.read_plan(path, further)
    out = out or Path("runs/matrix")
    with waiting("runs and attacks of the matrix"):
        cells = matrix.run_matrix(plan, out, lambda text: print(text, file=sys.stderr, flush=True))
    files = matrix_report.write(cells, out)
    if as_json:
        print(json.dumps(matrix_report.plain(cells)))
    else:
        print(matrix_report.markdown(cells))
        print(f"files: {', '.join(map(str, files))}")
    return 0


def check(settings: Sequence[str]) -> None:
    """Raise ``ConfigError`` for an attack, or an option, that does not exist, as far as that is known without a run."""
    name, options = read(settings)
    prior = options.pop("prior", None)
    if prior is None:
        composed(name, options)
    else:
        ATTACKS.get(name)


def read(settings: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the attack's name and its options, those of the default attack where none is named."""
    name, options = matrix.attack_settings(settings)
    name = name or DEFAULT
    if name == DEFAULT:
        options = {"steps": STEPS, **options}
    return name, options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowerbed attack",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RUN|KEY=VALUE",
        help=f"the directory of a run; attack={'|'.join(ATTACKS)}, attack.steps=N, attack.tv=WEIGHT, ...",
    )
    parser.add_argument("--clients", metavar="N[,N]", help="of the observed ones")
    parser.add_argument("--rounds", metavar="N[,N]", help="of the observed ones")
    parser.add_argument(
        "--grant", metavar="NAME[,NAME]", help=f"what the attacker knows beside: {', '.join(GRANTS)}"
    )
    parser.add_argument(
        "--adaptive", action="store_true", help="the attacker knows the run's defence and imitates it"
    )
    parser.add_argument(
        "--normalisation",
        default="eval",
        help="how the client's batch norms ran: eval or train (%(default)s)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--lpips",
        metavar="FILE,FILE",
        help="measure LPIPS as well: torchvision's AlexNet weights, and the heads of the package lpips",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go (RUN/attacks/NAME)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _show(made: Attacked, files: Sequence[Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "mean", "95 % interval", "worst", title=f"{made.attack.name}, {made.directory}")
    for row in report.rows(made):
        table.add_row(*row)
    Console().print(table)
    print(f"files: {', '.join(map(str, files))}")
