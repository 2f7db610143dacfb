"""Flower's own ``run_simulation`` on the workload: stock ``FedAvg``, and a client as lean as its users can write it.

The client keeps its model and the mapped data in the process of the Ray actor, takes slices instead of a
``DataLoader``, and sends back its state dict. A function of a module, so that Ray sends it by name and the
actor's cache survives the round.
"""

from __future__ import annotations

import functools
import logging
import time
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.experiments.benchmarks.competitors import plain
from flowerbed.experiments.benchmarks.gate import Finished, Gate
from flowerbed.experiments.benchmarks.workload import MODELS, Work, read_work

ENDLESS = 10**9


@functools.cache
def resident(folder: Path, model: str) -> tuple[nn.Module, torch.optim.Optimizer, Tensor, Tensor, Work]:
    """Return what stays in an actor: model, optimizer, inputs, labels and sizes."""
    torch.set_num_threads(1)
    work = read_work(folder)
    net = plain.build(model)
    net.train()
    x, y = plain.tensors(folder, MODELS[model].view, "cpu")
    return net, torch.optim.SGD(net.parameters(), lr=work.lr), x, y, work


def train(message: Message, context: Context, *, folder: Path, model: str) -> Message:
    """Train one client."""
    net, optimizer, x, y, work = resident(folder, model)
    user = int(cast(int, context.node_config["partition-id"]))
    net.load_state_dict(cast(ArrayRecord, message.content["arrays"]).to_torch_state_dict())
    for first in range(0, work.samples, work.batch):
        rows = slice(first, first + work.batch)
        optimizer.zero_grad()
        F.cross_entropy(net(x[user, rows]), y[user, rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    metrics = MetricRecord({"num-examples": work.samples})
    return Message(
        RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message
    )


class GatedFedAvg(FedAvg):
    """Stock FedAvg without evaluation that reports each round."""

    def __init__(self, gate: Gate, work: Work) -> None:
        """Configure Flower's sampling for exactly the cohort."""
        super().__init__(
            fraction_train=work.cohort / work.users,
            fraction_evaluate=0.0,
            min_train_nodes=work.cohort,
            min_available_nodes=work.users,
        )
        self.gate, self.cohort = gate, work.cohort

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """Aggregate as FedAvg does, then count the round; raises ``RuntimeError`` if a client failed."""
        replies = list(replies)
        if len(replies) != self.cohort or any(reply.has_error() for reply in replies):
            errors = [reply.error.reason for reply in replies if reply.has_error()]
            raise RuntimeError(f"{len(errors)} clients of Flower's simulation failed: {errors[:1]}")
        result = super().aggregate_train(server_round, replies)
        self.gate.passed()
        return result


def run(gate: Gate, folder: Path, model: str, workers: int) -> dict[str, Any]:
    """Train until the gate says that it is over; Ray runs ``workers`` actors of one CPU each."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    work = read_work(folder)
    server, client = ServerApp(), ClientApp()
    client.train()(functools.partial(train, folder=folder, model=model))
    failures: list[BaseException] = []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            torch.set_num_threads(1)
            torch.manual_seed(0)
            initial = ArrayRecord(plain.build(model).state_dict())
            while len(list(grid.get_node_ids())) < work.users:
                time.sleep(0.1)  # Nodes are registered while the server already runs.
            strategy = GatedFedAvg(gate, work)
            gate.open()
            strategy.start(grid=grid, initial_arrays=initial, num_rounds=ENDLESS)
        except Finished:
            pass
        except BaseException as error:  # noqa: BLE001
            # In this thread Flower would log it and end as if all was well.
            failures.append(error)

    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=work.users,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": workers, "log_to_driver": False},
        },
    )
    if failures:
        raise failures[0]
    return {}
