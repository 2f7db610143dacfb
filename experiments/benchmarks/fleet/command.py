"""The command ``flowerbed bench fleet``: rounds over node processes, some of which misbehave, and what they cost."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowerbed.clients.device_data import save_npz
from flowerbed.errors import require
from flowerbed.experiments.benchmarks import accounting
from flowerbed.experiments.benchmarks.fleet.grid import MOST_NODES, LoopbackGrid
from flowerbed.experiments.benchmarks.fleet.nodes import BEHAVIOURS, GOOD
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.deploy.device import RUN_KEY, Expectations
from flowerbed.experiments.parts import Parts, build_parts
from flowerbed.experiments.simulation import make_federation
from flowerbed.server.devices import DeviceLink

MODULE = "flowerbed.experiments.deploy.device"
"""What a client process imports before it can answer."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; the exit status is 1 if a good node failed."""
    options = _parser().parse_args(argv)
    accounting.require_proc()
    require(
        1 <= options.nodes <= MOST_NODES,
        f"--nodes is {options.nodes}; give 1 to {MOST_NODES}, for one machine.",
    )
    require(
        0 <= options.bad <= options.nodes,
        f"--bad is {options.bad}; give 0 to {options.nodes}, that is --nodes.",
    )
    require(options.parallel >= 1, f"--parallel is {options.parallel}; give at least 1.")
    bad = [kind for kind in BEHAVIOURS if kind != GOOD]
    behaviours = [bad[i % len(bad)] if i < options.bad else GOOD for i in range(options.nodes)]
    found = measure(options.nodes, options.rounds, behaviours, options.parallel, options.strategy)
    print(json.dumps(found, indent=1) if options.json else text(found))
    return int(found["good nodes that failed"] > 0)


def measure(
    nodes: int, rounds: int, behaviours: Sequence[str], parallel: int, strategy: str
) -> dict[str, Any]:
    """Run some rounds and return what was seen, as plain values by name."""
    parts = build_parts(
        Simulation.of(
            {
                "strategy": strategy,
                "federation": {"clients": nodes, "rounds": rounds, "quorum": 0.0},
                "local": {"batch_size": 16},
                "evaluation": {"every": 0},
                "grid": {"device": "cpu"},
            }
        )
    )
    expected = Expectations.of(parts.simulation, parts.dataset, parts.model, "fleet")
    with tempfile.TemporaryDirectory() as folder:
        configs = [_device(Path(folder) / str(k), parts, k) for k in range(nodes)]
        started, spent = time.perf_counter(), accounting.tree_cpu_seconds()
        with LoopbackGrid(configs, {RUN_KEY: expected.dumps()}, behaviours, parallel) as grid:
            up = time.perf_counter() - started
            federation = make_federation(parts, grid)
            federation.link = DeviceLink(parts.simulation.devices, [], tickets=True)
            result = federation.run()
            memory = proportional_bytes(grid.process.pid)
            spent = accounting.tree_cpu_seconds() - spent
    failures = Counter(f"{failure.kind} ({behaviours[failure.client]})" for failure in result.failures)
    seconds, modules = import_cost()
    return {
        "nodes": nodes,
        "seconds until all were connected": up,
        "seconds of each round": [record.seconds for record in result.history if record.phase == "train"],
        "usable replies of each round": [r.answered for r in result.history if r.phase == "train"],
        "bytes up of each round": [r.bytes_up for r in result.history if r.phase == "train"],
        "failures": dict(sorted(failures.items())),
        "good nodes that failed": len({f.client for f in result.failures if behaviours[f.client] == GOOD}),
        "CPU seconds of all processes": spent,
        "MB of all nodes, shared pages once": memory / 1e6,
        "seconds to import the device client": seconds,
        "modules it imports": modules,
    }


def import_cost() -> tuple[float, int]:
    """Return the seconds that a fresh process needs to import the device client, and how many modules that loads."""
    timed = f"t = time.perf_counter(); import {MODULE}; t = time.perf_counter() - t"
    code = f"import sys, time; {timed}; print(t, len(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, modules = done.stdout.split()
    return float(seconds), int(modules)


def proportional_bytes(root: int) -> int:
    """Return the memory of a process and its children in bytes, pages shared by several counted once over all."""
    total = 0
    for entry in accounting.PROC.iterdir():
        try:
            if not entry.name.isdigit():
                continue
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if root in (int(entry.name), parent):
                rollup = (entry / "smaps_rollup").read_text()
                total += int(rollup.partition("Pss:")[2].split()[0]) * 1024
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return total


def text(found: dict[str, Any]) -> str:
    """Return what was seen as lines."""
    width = max(map(len, found))
    return "\n".join(f"{name:{width}}  {_shown(value)}" for name, value in found.items())


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items()) or "none"
    return str(value)


def _device(folder: Path, parts: Parts, client: int) -> Path:
    folder.mkdir()
    save_npz(folder / "data.npz", parts.dataset, parts.train.indices(client), parts.test.indices(client))
    (folder / "device.toml").write_text(f'client = {client}\n[data]\nkind = "npz"\npath = "data.npz"\n')
    return folder / "device.toml"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flowerbed bench fleet", description=__doc__)
    parser.add_argument("--nodes", type=int, default=50, help="node processes (50)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (3)")
    parser.add_argument(
        "--bad", type=int, default=14, help="how many of them misbehave, each way in turn (14)"
    )
    parser.add_argument("--parallel", type=int, default=2, help="clients that compute at the same time (2)")
    parser.add_argument("--strategy", default="fedavg", help="the algorithm (fedavg)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser
