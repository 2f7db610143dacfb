"""What one client message costs beside the training: CPU and wall milliseconds of clients that do nothing.

A client loads the received weights into a model and returns them; the server averages. There are three ways to
compare, and a bare loop (the copies that nobody can avoid) beside them:

- ``platform``: what a user gets. Ours is flowerbed's round loop, its FedAvg (in float64, with every reply
  checked) and its ClientApp; Flower's is ``run_simulation`` with stock ``FedAvg.start`` and the client as
  Flower's documentation writes it. The bars are judged here.
- ``messages``: the same bare averaging server for all, so that only the carrying of messages differs. The
  client is written with ``flowerbed.messages`` on our grids, as Flower's documentation writes it on Flower.
- ``same-app``: one unmodified Flower app (that client and stock ``FedAvg.start``) on the three runtimes.

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
from torch import nn

from flowerbed.clients.app import ClientSpec
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import MODEL, LocalRound, Reply, shared_model
from flowerbed.clients.params import LocalParams
from flowerbed.clients.store import MemoryStore
from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.datasets.partitions import Partition
from flowerbed.experiments.benchmarks.accounting import tree_cpu_seconds
from flowerbed.messages import array_record, tensors
from flowerbed.models.base import ModelSpec
from flowerbed.models.info import ModelInfo
from flowerbed.server.callbacks import Callback, Record
from flowerbed.server.grids.base import SimulationGrid
from flowerbed.server.grids.inprocess import InProcessGrid
from flowerbed.server.grids.ray_grid import RayGrid
from flowerbed.server.loop import Federation
from flowerbed.server.params import FederationParams
from flowerbed.server.sampling import UniformSampler
from flowerbed.strategies.base import Setting
from flowerbed.strategies.fedavg import FedAvg as FlowerbedFedAvg

CLIENTS = 100
COHORT = 10
WORKERS = 2
# Parameters in millions -> number of tensors: a small model, a mid-size one, and a ResNet-18.
SIZES = {"10k": (10_000, 8), "1M": (1_000_000, 8), "11M": (11_000_000, 99)}
CASES = (
    "bare",
    "inprocess platform",
    "ray platform",
    "flower platform",
    "inprocess messages",
    "ray messages",
    "flower messages",
    "inprocess same-app",
    "ray same-app",
)
# Flower's platform case runs exactly the app of the same-app cases.
REFERENCE = {"platform": "flower platform", "messages": "flower messages", "same-app": "flower platform"}
BARS = (
    ("ray", "1M", "cpu_ms", 1 / 4),
    ("ray", "10k", "wall_ms", 1 / 20),
)
IN_PROCESS_CPU_MS_AT_10K = 0.1


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
        self.mark(round_)

    def mark(self, round_: int) -> None:
        """Take the time if it is due."""
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


class Idle(ClientHalf):
    """The client half that trains nothing."""

    def run(self, local: LocalRound) -> Reply:
        """Return the model as it came."""
        return Reply({MODEL: shared_model(local, frozenset())}, {"num-examples": 1})


def build_weights(input_shape: tuple[int, ...], num_classes: int, size: str = "10k") -> nn.Module:
    """Return a module that is nothing but the parameters of ``weights(size)``."""
    module = nn.Module()
    for name, value in weights(size).items():
        layer = nn.Module()
        layer.weight = nn.Parameter(value)
        module.add_module(name.partition(".")[0], layer)
    return module


class MeterRounds(Callback):
    """Marks the end of every training round of our loop."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def recorded(self, record: Record) -> None:
        """Take the time; raise ``RuntimeError`` if a client failed."""
        if record.answered != COHORT:
            raise RuntimeError(f"a benchmark client failed: {record.failures}")
        self.meter.mark(record.round)


def serve_platform(runtime: str, size: str, meter: Meter) -> None:
    """Run flowerbed's own loop, strategy and ClientApp with clients that do nothing."""
    spec = ModelSpec(f"{__spec__.name if __spec__ else __name__}:build_weights", (1,), 2, {"size": size})
    rows = Split(torch.zeros(CLIENTS, 1), torch.zeros(CLIENTS, dtype=torch.int64))
    dataset = Dataset("nothing", rows, rows, ("a", "b"), (0.0,), (1.0,))
    partition = Partition.from_owners(range(CLIENTS), CLIENTS)
    strategy = FlowerbedFedAvg()
    strategy.half = Idle()
    model = spec.build(0)
    sampler = UniformSampler(0, COHORT)
    strategy.setup(Setting(0, CLIENTS, meter.rounds, ModelInfo.of(model), sampler, COHORT))
    local, store = LocalParams(), MemoryStore()
    client = ClientSpec(0, meter.rounds, strategy.half, spec, dataset, partition, None, local, store, "cpu")
    grid: SimulationGrid
    grid = RayGrid(client, CLIENTS, workers=WORKERS) if runtime == "ray" else InProcessGrid(client, CLIENTS)
    params = FederationParams(clients=CLIENTS, cohort=COHORT, rounds=meter.rounds)
    initial = {name: value.detach().clone() for name, value in model.state_dict().items()}
    with grid:
        Federation(strategy, initial, grid, params, callbacks=[MeterRounds(meter)]).run()


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
    runtime, _, way = case.partition(" ")
    meter = Meter(rounds + 1)
    if way == "platform" and runtime != "flower":
        serve_platform(runtime, size, meter)
        return meter.cost(case, size)
    factory = client_factory(stock=runtime == "flower" or way == "same-app")

    def serve(grid: Grid) -> None:
        if way != "messages":
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
        reference = REFERENCE.get(cost.case.partition(" ")[2], "flower platform")
        bare, flower = found.get(("bare", cost.size)), found.get((reference, cost.size))
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
    for way, reference in REFERENCE.items():
        for runtime, size, quantity, bar in BARS:
            case = f"{runtime} {way}"
            if (case, size) in found and (reference, size) in found:
                ratio = getattr(found[case, size], quantity) / getattr(found[reference, size], quantity)
                kept = "kept" if ratio <= bar else "MISSED"
                sentences.append(
                    f"{case} / {reference} at {size}, {quantity}: {ratio:.3f}, bar {bar:.3f}: {kept}"
                )
        case = f"inprocess {way}"
        if (case, "10k") in found:
            spent = found[case, "10k"].cpu_ms
            kept = "kept" if spent <= IN_PROCESS_CPU_MS_AT_10K else "MISSED"
            sentences.append(f"{case} at 10k, cpu_ms: {spent:.3f}, bar {IN_PROCESS_CPU_MS_AT_10K}: {kept}")
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
