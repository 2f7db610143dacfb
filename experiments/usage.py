"""``flowerbed simulate --help``: every group and key, from the code that reads them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from flowerbed.experiments.config import CHOICES, SECTIONS, Simulation
from flowerbed.experiments.hydra_schema import CONF, NAMED
from flowerbed.experiments.listing import option_lines, shown, things
from flowerbed.experiments.options import Thing, options_of, thing

HEAD = """\
flowerbed simulate [KEY=VALUE ...] [--multirun] [--config-dir DIR] [--json]

Runs a federation. Without arguments: FedAvg on scikit-learn's digits, 10 clients, in this process.

Examples
  flowerbed simulate
  flowerbed simulate strategy=fedavg dataset=cifar10 partition=dirichlet partition.alpha=0.3 \\
      model=resnet8 model.norm=gn federation.clients=100 federation.cohort=10 federation.rounds=50
  flowerbed simulate grid=ray grid.workers=4 run.dir=runs/first
  flowerbed simulate strategy=flower:FedAdam strategy.options.eta=0.01
  flowerbed simulate strategy=my_package.my_module:MyStrategy strategy.mu=0.1
  flowerbed simulate --multirun seed=0,1,2 partition.alpha=0.1,1 partition=dirichlet
"""
FLAGS = """\
Flags
  --multirun, -m     run every combination of values given with commas, one after the other
  --config-dir DIR   a folder of your own with further group files, for example DIR/strategy/mine.yaml
  --cfg job          print the configuration instead of running it
  --json             print the result as JSON
  --hydra-help       Hydra's other flags (--info, --shell-completion, ...)

Your own strategy, data set, partition or model is named by import path, package.module:Name, with the
current directory on the path. The options of others: flowerbed list models, and likewise strategies, datasets,
partitions, encoders, defences, tamperings; or: flowerbed simulate strategy=NAME --help
"""
EXPERIMENT = "experiment"
"""The group of whole settings, which stores no name."""
WIDTH = 100
COLUMN = 38


def simulate_help(chosen: Mapping[str, str]) -> str:
    """Return the help; the options of the choices are those of ``chosen`` (by default the defaults)."""
    defaults = Simulation()
    groups = {kind: [t.name for t in things(kind) if ":" not in t.name] for kind in CHOICES}
    groups["strategy"].append("flower:NAME")
    groups["dataset"] += ["npz:PATH", "hf:NAME"]
    groups["model"].append("timm:NAME")
    files = (*NAMED, EXPERIMENT)
    groups |= {name: sorted(path.stem for path in (CONF / name).glob("*.yaml")) for name in files}
    parts = [HEAD, "Groups, chosen with GROUP=NAME (* is chosen now)"]
    names = {kind: chosen.get(kind, getattr(defaults, kind).name) for kind in (*CHOICES, *NAMED)}
    for group, options in groups.items():
        listed = " ".join(f"*{name}" if name == names.get(group) else name for name in options)
        parts.append(_entry(group, listed, 13))
    parts.append("\nKeys, with their defaults")
    parts.append(_entry("seed=0", "Seed of every random decision of the run."))
    for kind in CHOICES:
        described: Thing = thing(kind, names[kind])
        for key, doc in option_lines(kind, described.options):
            parts.append(_entry(key, doc))
    for section, cls in SECTIONS.items():
        parts.append("")
        for option in options_of(cls)[0]:
            default = names[section] if section in NAMED and option.name == "name" else shown(option.default)
            parts.append(_entry(f"{section}.{option.name}={default}", option.doc))
    return "\n".join([*parts, "", FLAGS])


def _entry(key: str, text: str, column: int = COLUMN) -> str:
    first = f"  {key}".ljust(column)
    gap = " " if len(first) > column else ""
    lines = textwrap.wrap(text, WIDTH - column) or [""]
    rest = [" " * column + line for line in lines[1:]]
    return "\n".join([f"{first}{gap}{lines[0]}".rstrip(), *rest])
