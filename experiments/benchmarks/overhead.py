"""What one client message costs beside the training: CPU and wall milliseconds of clients that do nothing.

A client loads the received weights into a state dict and returns them. Compared are a bare loop (the copies
that nobody can avoid), the in-process grid, the Ray grid, and Flower's own ``run_simulation``, all under the
stock ``FedAvg.start`` except the bare loop, which averages by hand. Every case runs in its own process;
CPU time is that of its whole process tree (Ray's daemons and workers too), the first round is left out.

Flower's simulation runs the client as Flower's documentation writes it, on ``ArrayRecord(state_dict)``. The
grids run both that client ("stock client") and the same one written with ``flowerbed.messages``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from flowerbed.messages import array_record, tensors
from flowerbed.server.grids.base import SimulationGrid
from flowerbed.server.grids.inprocess import InProcessGrid
from flowerbed.server.grids.ray_grid import RayGrid

CLIENTS = 100
COHORT = 10
WORKERS = 2
# Parameters in millions -> number of tensors: a small model, a mid-size one, and a ResNet-18.
SIZES = {"10k": (10_000, 8), "1M": (1_000_000, 8), "11M": (11_000_000, 99)}
CASES = ("bare", "inprocess", "ray", "inprocess-stock-client", "ray-stock-client", "flower")
BARS = (
    ("ray", "flower", "1M", "cpu_ms", 1 / 4),
    ("ray", "flower", "10k", "wall_ms", 1 / 20),
)
IN_PROCESS_CPU_MS_AT_10K = 0.5


@dataclass(frozen=True)
class Cost:
    """Milliseconds per client message of one case at one size."""

    case: str
    size: str
    cpu_ms: float
    wall_ms: float
    rounds: int


def weights(size: str) -> dict[str, torch.Tensor]:
    """Return a state dict of zeros with about the parameters and exactly the number of tensors of ``size``."""
    parameters, count = SIZES[size]
    return {f"layer{i}.weight": torch.zeros(parameters // count) for i in range(count)}


def client_factory(stock: bool) -> Callable[[], ClientApp]:
    """Return the factory of the client that loads and returns, written for Flower or for flowerbed."""

    def factory() -> ClientApp:
        app = ClientApp()
        model: dict[str, torch.Tensor] = {}

        @app.train()
        def train(message: Message, context: Context) -> Message:
            record = message.content["arrays"]
            received = record.to_torch_state_dict() if stock else tensors(record)
            for name, value in received.items():
                # A model that stays in the worker, loaded as load_state_dict does.
                model.setdefault(name, torch.empty_like(value)).copy_(value)
            if stock:
                arrays = ArrayRecord(model)
            else:
                arrays = array_record({name: value.clone() for name, value in model.items()})
            content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
            return Message(content, reply_to=message)

        return app

    return factory


class Clock(FedAvg):
    """Stock FedAvg that notes the time and the CPU time of the process tree after each round."""

    def __init__(self) -> None:
        """Sample ``COHORT`` of ``CLIENTS`` and do not evaluate."""
        super().__init__(
            fraction_train=COHORT / CLIENTS,
            fraction_evaluate=0.0,
            min_train_nodes=COHORT,
            min_available_nodes=CLIENTS,
        )
        self.marks: list[tuple[float, float, int]] = []

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """Aggregate, then take the time; fail if a client did, for then the costs mean nothing."""
        replies = list(replies)
        result = super().aggregate_train(server_round, replies)
        if any(reply.has_error() for reply in replies):
            raise RuntimeError(f"a benchmark client failed: {replies}")
        self.marks.append((time.perf_counter(), tree_cpu_seconds(), len(replies)))
        return result

    def cost(self, case: str, size: str) -> Cost:
        """Return the mean cost of a message after the first round."""
        messages = sum(count for _, _, count in self.marks[1:])
        (wall0, cpu0, _), (wall1, cpu1, _) = self.marks[0], self.marks[-1]
        per_message = 1000.0 / messages
        return Cost(
            case, size, (cpu1 - cpu0) * per_message, (wall1 - wall0) * per_message, len(self.marks) - 1
        )


def tree_cpu_seconds() -> float:
    """Return the CPU seconds, user and system, of this process, its descendants and those it has buried.

    Reads ``/proc``, so Linux only.
    """
    children: dict[int, list[int]] = {}
    spent: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The second field, the command's name in brackets, may contain anything.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(int(fields[1]), []).append(int(entry.name))
        spent[int(entry.name)] = sum(map(int, fields[11:15]))
    ticks, todo = 0, [os.getpid()]
    while todo:
        process = todo.pop()
        ticks += spent.get(process, 0)
        todo += children.get(process, [])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure_bare(size: str, rounds: int) -> Cost:
    """Time the loop without any platform: copy into the model, copy out, add to the mean."""
    state = weights(size)
    model = {name: torch.empty_like(value) for name, value in state.items()}
    marks: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        mean: dict[str, torch.Tensor] = {name: torch.zeros_like(value) for name, value in state.items()}
        for _ in range(COHORT):
            for name, value in state.items():
                model[name].copy_(value)
            reply = {name: value.clone() for name, value in model.items()}
            for name, value in reply.items():
                mean[name].add_(value, alpha=1 / COHORT)
        state = mean
        marks.append((time.perf_counter(), time.process_time()))
    per_message = 1000.0 / (rounds * COHORT)
    cpu, wall = marks[-1][1] - marks[0][1], marks[-1][0] - marks[0][0]
    return Cost("bare", size, cpu * per_message, wall * per_message, rounds)


def measure(case: str, size: str, rounds: int) -> Cost:
    """Run one case in this process and return its cost."""
    torch.set_num_threads(1)
    if case == "bare":
        return measure_bare(size, rounds)
    stock = case not in ("inprocess", "ray")
    strategy, start = Clock(), ArrayRecord(weights(size))
    factory = client_factory(stock)

    def serve(grid: Grid) -> None:
        strategy.start(grid=grid, initial_arrays=start, num_rounds=rounds + 1)

    if case == "flower":
        from flwr.simulation import run_simulation

        server = ServerApp()
        server.main()(lambda grid, context: serve(grid))
        run_simulation(
            server_app=server,
            client_app=factory(),
            num_supernodes=CLIENTS,
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {"num_cpus": WORKERS, "log_to_driver": False},
            },
        )
    else:
        grid: SimulationGrid
        if case.startswith("ray"):
            grid = RayGrid(factory, CLIENTS, workers=WORKERS)
        else:
            grid = InProcessGrid(factory, CLIENTS)
        with grid:
            serve(grid)
    return strategy.cost(case, size)


def run(
    sizes: Sequence[str] = tuple(SIZES), cases: Sequence[str] = CASES, rounds: dict[str, int] | None = None
) -> list[Cost]:
    """Measure every case at every size, each in a fresh process, and return the costs in that order.

    Raises ``RuntimeError`` with the child's last words if a case fails.
    """
    rounds = rounds or {"10k": 20, "1M": 10, "11M": 4}
    costs = []
    for size in sizes:
        for case in cases:
            command = [sys.executable, "-m", "flowerbed.experiments.benchmarks.overhead"]
            command += ["--one", case, size, str(rounds[size])]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            environment |= {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"benchmark case {case} at {size} failed:\n{done.stderr[-3000:]}")
            costs.append(Cost(**json.loads(done.stdout.splitlines()[-1])))
    return costs


def table(costs: Sequence[Cost]) -> str:
    """Return the costs and their ratios to the bare loop and to Flower as a Markdown table."""
    found = {(cost.case, cost.size): cost for cost in costs}
    lines = [
        "| parameters | case | CPU ms | wall ms | CPU / bare | CPU / Flower | wall / Flower |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for cost in costs:
        bare, flower = found.get(("bare", cost.size)), found.get(("flower", cost.size))
        lines.append(
            f"| {cost.size} | {cost.case} | {cost.cpu_ms:.3g} | {cost.wall_ms:.3g} "
            f"| {_ratio(cost.cpu_ms, bare and bare.cpu_ms)} | {_ratio(cost.cpu_ms, flower and flower.cpu_ms)} "
            f"| {_ratio(cost.wall_ms, flower and flower.wall_ms)} |"
        )
    return "\n".join(lines)


def verdicts(costs: Sequence[Cost]) -> list[str]:
    """Return one sentence per bar whose cases were measured."""
    found = {(cost.case, cost.size): cost for cost in costs}
    sentences = []
    for case, reference, size, quantity, bar in BARS:
        if (case, size) in found and (reference, size) in found:
            ratio = getattr(found[case, size], quantity) / getattr(found[reference, size], quantity)
            kept = "kept" if ratio <= bar else "MISSED"
            sentences.append(
                f"{case} / {reference} at {size}, {quantity}: {ratio:.3f}, bar {bar:.3f}: {kept}"
            )
    if ("inprocess", "10k") in found:
        spent = found["inprocess", "10k"].cpu_ms
        kept = "kept" if spent <= IN_PROCESS_CPU_MS_AT_10K else "MISSED"
        sentences.append(f"inprocess at 10k, cpu_ms: {spent:.3f}, bar {IN_PROCESS_CPU_MS_AT_10K}: {kept}")
    return sentences


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line; the exit status is 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        prog="flowerbed bench overhead", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", action="store_true", help="print the costs as JSON instead of a table")
    parser.add_argument("--out", type=Path, help="also write FILE.json and FILE.md", metavar="FILE")
    parser.add_argument("--one", nargs=3, metavar=("CASE", "SIZE", "ROUNDS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        warnings.simplefilter("ignore")
        logging.getLogger("flwr").setLevel(logging.ERROR)
        case, size, rounds = arguments.one
        print(json.dumps(asdict(measure(case, size, int(rounds)))), flush=True)
        return 0
    costs = run(arguments.sizes, arguments.cases)
    sentences = verdicts(costs)
    document = json.dumps({"costs": [asdict(cost) for cost in costs], "bars": sentences}, indent=2)
    report = table(costs) + "\n\n" + "\n".join(f"- {sentence}" for sentence in sentences) + "\n"
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".json").write_text(document + "\n")
        arguments.out.with_suffix(".md").write_text(report)
    print(document if arguments.json else report)
    return int(any(sentence.endswith("MISSED") for sentence in sentences))


def _ratio(value: float, reference: float | None) -> str:
    return f"{value / reference:.3g}" if reference else "-"


if __name__ == "__main__":
    raise SystemExit(main())
