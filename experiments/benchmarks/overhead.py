"""What one client message costs beside the training: CPU and wall milliseconds of clients that do nothing.

A client loads the received weights into a state dict and returns them; the server averages. Compared are a
bare loop (the copies that nobody can avoid), the in-process grid and the Ray grid with a client written with
``flowerbed.messages``, and Flower's own ``run_simulation`` with the same client as Flower's documentation
writes it, on ``ArrayRecord(state_dict)``. The cases ``...-fedavg`` run one unmodified Flower app (that client
and stock ``FedAvg.start``) on the three runtimes, so they also count what FedAvg costs.

Every case runs in its own process; CPU time is that of its whole process tree (Ray's daemons and workers
too); the first round is left out.
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
from typing import Any, cast

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
CASES = ("bare", "inprocess", "ray", "flower", "inprocess-fedavg", "ray-fedavg", "flower-fedavg")
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
            record = cast(ArrayRecord, message.content["arrays"])
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


class Meter:
    """Wall and CPU time between the end of the first and the end of the last round."""

    def __init__(self, rounds: int) -> None:
        """``rounds``: the number of the last round, counted from one."""
        self.rounds = rounds
        self.marks: list[tuple[float, float]] = []

    def after(self, round_: int, replies: Sequence[Message]) -> None:
        """Take the time if it is due; raise ``RuntimeError`` if a client failed: costs mean nothing then."""
        if len(replies) != COHORT or any(reply.has_error() for reply in replies):
            raise RuntimeError(f"a benchmark client failed: {replies}")
        if round_ in (1, self.rounds):
            # Reading the CPU time of the tree costs milliseconds itself, so not after every round.
            cpu = tree_cpu_seconds()
            self.marks.append((time.perf_counter(), cpu))

    def cost(self, case: str, size: str) -> Cost:
        """Return the mean cost of a message after the first round."""
        (wall0, cpu0), (wall1, cpu1) = self.marks
        per_message = 1000.0 / (COHORT * (self.rounds - 1))
        return Cost(case, size, (cpu1 - cpu0) * per_message, (wall1 - wall0) * per_message, self.rounds - 1)


class MeteredFedAvg(FedAvg):
    """Stock FedAvg on a cohort of ``COHORT``, without evaluation, with a meter."""

    def __init__(self, meter: Meter) -> None:
        """Configure Flower's sampling for exactly the cohort."""
        super().__init__(
            fraction_train=COHORT / CLIENTS,
            fraction_evaluate=0.0,
            min_train_nodes=COHORT,
            min_available_nodes=CLIENTS,
        )
        self.meter = meter

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """Aggregate as FedAvg does, then take the time."""
        replies = list(replies)
        result = super().aggregate_train(server_round, replies)
        self.meter.after(server_round, replies)
        return result


def serve_mean(grid: Grid, state: dict[str, torch.Tensor], meter: Meter) -> None:
    """Send the weights to a cohort and average the replies, as the bare loop does, round after round."""
    while len(nodes := sorted(grid.get_node_ids())) < CLIENTS:
        time.sleep(0.1)  # Flower's simulation registers its nodes while the server already runs.
    for round_ in range(1, meter.rounds + 1):
        content = RecordDict({"arrays": array_record(state)})
        cohort = [nodes[(round_ * COHORT + i) % CLIENTS] for i in range(COHORT)]
        replies = list(grid.send_and_receive([Message(content, node, "train") for node in cohort]))
        state = {name: torch.zeros_like(value) for name, value in state.items()}
        for reply in replies:
            for name, value in tensors(cast(ArrayRecord, reply.content["arrays"])).items():
                state[name].add_(value, alpha=1 / COHORT)
        meter.after(round_, replies)


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
    runtime, _, app = case.partition("-")
    meter = Meter(rounds + 1)
    factory = client_factory(stock=runtime == "flower" or app == "fedavg")

    def serve(grid: Grid) -> None:
        if app == "fedavg":
            arrays = ArrayRecord(weights(size))
            MeteredFedAvg(meter).start(grid=grid, initial_arrays=arrays, num_rounds=meter.rounds)
        else:
            serve_mean(grid, weights(size), meter)

    if runtime == "flower":
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
        if runtime == "ray":
            grid = RayGrid(factory, CLIENTS, workers=WORKERS)
        else:
            grid = InProcessGrid(factory, CLIENTS)
        with grid:
            serve(grid)
    return meter.cost(case, size)


def run(
    sizes: Sequence[str] = tuple(SIZES), cases: Sequence[str] = CASES, rounds: dict[str, int] | None = None
) -> list[Cost]:
    """Measure every case at every size, each in a fresh process, and return the costs in that order.

    Raises ``RuntimeError`` with the child's last words if a case fails.
    """
    rounds = rounds or {"10k": 100, "1M": 20, "11M": 5}
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
        app = "".join(cost.case.partition("-")[1:])
        bare, flower = found.get(("bare", cost.size)), found.get(("flower" + app, cost.size))
        over_bare = f"{cost.cpu_ms / bare.cpu_ms:.3g}" if bare else "-"
        cpu = f"{cost.cpu_ms / flower.cpu_ms:.3g}" if flower else "-"
        wall = f"{cost.wall_ms / flower.wall_ms:.3g}" if flower else "-"
        lines.append(
            f"| {cost.size} | {cost.case} | {cost.cpu_ms:.3g} | {cost.wall_ms:.3g} | {over_bare} | {cpu} | {wall} |"
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


if __name__ == "__main__":
    raise SystemExit(main())
