"""Attacks x defences x states of the model, by one command: what leaks, what it costs, what the model is worth.

A matrix is a YAML file::

    settings: dataset=fashion_mnist model=dlg_lenet federation.clients=20 local.steps=1 local.batch_size=1
    rounds: [1, 50]                      # states of the model: as it was sent in these rounds
    clients: [0, 1, 2, 3]                # victims
    defences:
      none: ""
      "prune 95 %": defence=prune defence.keep=0.05
    attacks:
      IG: attack=ig attack.steps=800 attack.tv=0.01
      GIFD: attack=gifd attack.steps=200 attack.prior=prior.safetensors

Every defence is one run, observed in all rounds; its utility is that of the run. Any settings may be a defence: a
larger batch (``local.batch_size=8``), more steps, ``secure.enabled=true`` (then the mean of the cohort is attacked),
``privacy.mode=local``, or ``privacy.mode=central observe.view=released``. Every attack is made on each of them twice
where it can make use of knowing the defence: by an attacker who does not know of it, and by one who does. What is
there already is not made again.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from flowerbed.errors import ConfigError, require, unknown_name
from flowerbed.experiments.comparison import FINISHED
from flowerbed.experiments.composition import compose_simulations
from flowerbed.experiments.config import ObserveParams, Simulation
from flowerbed.experiments.leakage import report
from flowerbed.experiments.leakage.attacking import attack_run, known_of, useful
from flowerbed.experiments.leakage.scoring import Summary
from flowerbed.experiments.simulation import run_simulation
from flowerbed.experiments.transforms import OBSERVATIONS, view_of
from flowerbed.storage import atomic_write
from flowerbed.strategies.attacks.observer import SERVER, stems

KEYS = ("settings", "rounds", "clients", "defences", "attacks", "grant", "normalisation")
OBLIVIOUS, ADAPTIVE = "oblivious", "adaptive"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """A matrix as it was asked for."""

    runs: Mapping[str, Simulation]
    """By defence."""
    attacks: Mapping[str, tuple[str, Mapping[str, Any]]]
    """Name and options by label."""
    rounds: tuple[int, ...]
    clients: tuple[int, ...]
    grant: tuple[str, ...] = ()
    normalisation: str = "eval"


@dataclass(frozen=True)
class Cell:
    """One attack on one run in one state of the model."""

    defence: str
    attack: str
    round: int
    knows: str
    """oblivious or adaptive."""
    summary: Mapping[str, Summary]
    evaluations: int
    """Gradients of the victims' model, over all victims."""
    seconds: float
    utility: float | None
    """The run's accuracy, the mean of its last evaluations; None where it was not evaluated."""
    bytes_up: float
    """Of all clients in a round."""


def read_plan(path: Path, more: Sequence[str] = ()) -> Plan:
    """Read a matrix; ``more`` are further settings of every run. Raises ``ConfigError`` for what cannot work."""
    if not path.exists():
        raise ConfigError(f"There is no file {path}; it holds a matrix, see flowerbed attack --help.")
    asked = yaml.safe_load(path.read_text())
    require(isinstance(asked, Mapping), f"{path} holds no matrix.")
    for key in asked:
        require(key in KEYS, unknown_name(f"key of {path.name}", key, KEYS))
    for key in ("rounds", "attacks"):
        require(bool(asked.get(key)), f"{path}: '{key}' is missing.")
    shared = [*shlex.split(asked.get("settings", "")), *more]
    observe = ObserveParams(tuple(asked["rounds"]), tuple(asked.get("clients") or ()))
    runs = {}
    for label, text in (asked.get("defences") or {"none": ""}).items():
        (one,) = compose_simulations([*shared, *shlex.split(text)])
        last = max(observe.rounds)
        require(
            one.federation.rounds >= last,
            f"{path}: round {last} is to be attacked and federation.rounds is {one.federation.rounds}.",
        )
        runs[str(label)] = one
    attacks = {str(label): attack_settings(shlex.split(text)) for label, text in asked["attacks"].items()}
    return Plan(
        {label: _observed(one, observe) for label, one in _placed(runs).items()},
        attacks,
        observe.rounds,
        observe.clients,
        tuple(asked.get("grant") or ()),
        str(asked.get("normalisation", "eval")),
    )


def _placed(runs: Mapping[str, Simulation]) -> dict[str, Simulation]:
    """Return the runs with a directory that ``run`` replaces: observing needs one."""
    return {label: replace(one, run=replace(one.run, dir=f"matrix/{label}")) for label, one in runs.items()}


def _observed(simulation: Simulation, observe: ObserveParams) -> Simulation:
    """Return the run with what is to be kept of it; where only a cohort is seen, no client can be chosen."""
    own = replace(observe, view=simulation.observe.view)
    single = view_of(simulation) == SERVER
    return replace(simulation, observe=own if single else replace(own, clients=()))


def attack_settings(settings: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return an attack's name and its options from ``attack=NAME`` and ``attack.KEY=VALUE``."""
    name, options = "", {}
    for text in settings:
        key, found, value = text.partition("=")
        if not found or not (key == "attack" or key.startswith("attack.")):
            raise ConfigError(f"'{text}' is no setting of an attack; write attack=NAME or attack.KEY=VALUE.")
        if key == "attack":
            name = value
        else:
            options[key.removeprefix("attack.")] = yaml.safe_load(value)
    return name, options


def run_matrix(plan: Plan, out: Path, say: Say = print) -> list[Cell]:
    """Make all runs and attacks that are not there yet, and return the cells in the order of the plan."""
    cells = []
    for label, simulation in plan.runs.items():
        directory = out / "runs" / _name(label)
        own = replace(
            simulation,
            run=replace(simulation.run, dir=str(directory), overwrite=True, progress=False, figures=False),
        )
        summary = _made(own, directory, say, label)
        known = known_of(own)
        for attack, (name, options) in plan.attacks.items():
            for round_ in plan.rounds:
                for knows in attackers(known, name, options):
                    cell = _cell(plan, label, attack, round_, knows, directory, summary, name, options)
                    say(
                        f"{label}, {attack}, round {round_}, {knows}: PSNR {cell.summary['psnr'].mean:.1f} dB, "
                        f"null {cell.summary['null: class mean'].mean:.1f}"
                    )
                    cells.append(cell)
    return cells


def _made(simulation: Simulation, directory: Path, say: Say, label: str) -> Mapping[str, Any]:
    """Return the summary of the run, made now or earlier."""
    path = directory / "summary.json"
    if path.exists():
        summary: Mapping[str, Any] = json.loads(path.read_text())
        kept = {int(stem.name.split("-")[1]) for stem in stems(directory / OBSERVATIONS)}
        same = summary["config_hash"] == simulation.identity and set(simulation.observe.rounds) <= kept
        if summary["status"] in FINISHED and same:
            return summary
    say(f"{label}: running")
    run_simulation(simulation)
    made: Mapping[str, Any] = json.loads(path.read_text())
    return made


def attackers(known: Mapping[str, Any], name: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return who attacks: knowing of a defence makes a difference only where the attack can make use of it.

    What the matrix itself asks of an attack is asked of both.
    """
    return (OBLIVIOUS, ADAPTIVE) if useful(name, known).keys() - options.keys() else (OBLIVIOUS,)


def _cell(
    plan: Plan,
    label: str,
    attack: str,
    round_: int,
    knows: str,
    directory: Path,
    summary: Mapping[str, Any],
    name: str,
    options: Mapping[str, Any],
) -> Cell:
    folder = directory / "attacks" / _name(f"{attack}-round-{round_}-{knows}")
    key = json.dumps(
        [name, dict(options), summary["config_hash"], plan.clients, plan.grant, plan.normalisation]
    )
    kept = folder / "cell.json"
    if kept.exists():
        stored = json.loads(kept.read_text())
        if stored["key"] == key:
            figures = {n: Summary(**value) for n, value in stored["cell"].pop("summary").items()}
            return Cell(**stored["cell"], summary=figures)
    made = attack_run(
        directory,
        name,
        options,
        clients=plan.clients or None,
        rounds=[round_],
        grant=plan.grant,
        adaptive=knows == ADAPTIVE,
        normalisation=plan.normalisation,
    )
    require(
        not made.vocabulary, "A matrix compares PSNR, so it is for images; attack text with flowerbed attack."
    )
    report.write(made, folder, options)
    rounds = max(1, int(summary["rounds"]))
    final = next((v for k, v in summary.items() if k.startswith("mean_of_last")), None) or {}
    cell = Cell(
        label,
        attack,
        round_,
        knows,
        made.summary(),
        sum(victim.found.evaluations for victim in made.victims),
        round(sum(victim.found.seconds for victim in made.victims), 3),
        final.get("accuracy"),
        summary["bytes"]["up"] / rounds,
    )
    atomic_write(kept, (json.dumps({"key": key, "cell": asdict(cell)}) + "\n").encode())
    return cell


def _name(label: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in label)


def worst_attack(cells: Sequence[Cell], defence: str, round_: int) -> Cell:
    """Return the attack that leaks most from a defence: what it must be judged by."""
    return max(
        (c for c in cells if c.defence == defence and c.round == round_), key=lambda c: c.summary["psnr"].mean
    )
