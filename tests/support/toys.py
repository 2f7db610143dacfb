"""Small worlds with known answers, importable by name also in subprocesses and Ray workers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from flowerbed.clients.app import ClientSpec
from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound, Reply, Trained
from flowerbed.clients.params import LocalParams
from flowerbed.clients.store import ClientStore, MemoryStore
from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.datasets.partitions import Partition
from flowerbed.models.base import ModelSpec
from flowerbed.models.info import ModelInfo
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.server.grids.inprocess import InProcessGrid
from flowerbed.server.loop import Federation
from flowerbed.server.params import FederationParams
from flowerbed.server.sampling import UniformSampler
from flowerbed.strategies.base import FederatedStrategy, Setting

CURVATURES, MINIMA = (1.0, 3.0), (0.0, 1.0)
"""The two quadratics F_i(w) = a_i / 2 (w - b_i)^2; their mean is least at w = 0.75."""


class Scalar(nn.Module):
    """A model that is one float64 number, starting at 0.3."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x), 1)


def quadratics() -> Dataset:
    """One sample (a_i, b_i) for each client."""
    rows = torch.tensor(list(zip(CURVATURES, MINIMA, strict=True)), dtype=torch.float32)
    split = Split(rows, torch.zeros(len(rows), dtype=torch.int64))
    return Dataset("quadratics", split, split, ("only",), (0.0,), (1.0,))


def quadratic_loss(
    model: ModelParts, batch: Batch, extras: Extras, task: Task
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Return a/2 (w - b)^2, averaged over the batch."""
    a, b = batch["x"].double().unbind(1)
    return (0.5 * a * (model(batch["x"])[:, 0] - b) ** 2).mean(), {}


class QuadraticHalf(ClientHalf):
    """FedAvg's client on the quadratics."""

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return quadratic_loss(model, batch, extras, task)


class CountingHalf(ClientHalf):
    """Counts its rounds in the client's state and reports the count; private head. For state tests."""

    stateful = True

    def private(self, info: ModelInfo) -> frozenset[str]:
        return info.head

    def end(self, local: LocalRound, trained: Trained, extras: Extras) -> Mapping[str, Mapping[str, Tensor]]:
        before = local.state.get("count", {}).get("rounds", torch.zeros((), dtype=torch.int64))
        local.state["count"] = {"rounds": before + 1}
        return {**super().end(local, trained, extras), "count": {"rounds": (before + 1).double()}}


class KillsItsWorkerOnce(CountingHalf):
    """Client 7 takes its process down in round 2, the first time; afterwards a file says that it did."""

    def run(self, local: LocalRound) -> Reply:
        marker = Path(self.params)
        if local.client == 7 and local.clock.round == 2 and not marker.exists():
            marker.touch()
            os._exit(1)
        return super().run(local)


class Unreliable(ClientHalf):
    """FedAvg's client, but some fail in every way there is; which do is a function of round and client."""

    def run(self, local: LocalRound) -> Reply:
        reply = super().run(local)
        model = {name: value.clone() for name, value in reply.streams["arrays"].items()}
        name = next(iter(model))
        metrics = dict(reply.metrics)
        match (local.client + local.clock.round) % 13:
            case 0:
                raise ValueError(f"client {local.client} has no time")
            case 1:
                model[name].view(-1)[-1] = float("nan")
            case 2:
                model[name] = model[name][:-1]
            case 3:
                del metrics["loss"]
            case 4:
                raise SystemExit(3)
            case 5:
                metrics["loss"] = float("inf")
            case 6:
                model["unheard of"] = torch.zeros(2)
        return Reply({"arrays": model}, metrics)


class KillsItsWorkerAlways(ClientHalf):
    """Client 7 takes its process down whenever it trains, or raises an error if there is no process to spare."""

    def run(self, local: LocalRound) -> Reply:
        if local.client == 7:
            if self.params == "kill":
                os._exit(1)
            raise ValueError("client 7 fails")
        return super().run(local)


def with_half(strategy: FederatedStrategy, half: ClientHalf) -> FederatedStrategy:
    """Give a strategy another client half."""
    strategy.half = half
    return strategy


def on_quadratics(strategy: FederatedStrategy) -> FederatedStrategy:
    """Let the strategy's own client half train on the quadratics."""
    half = type("OnQuadratics", (QuadraticHalf, type(strategy.half)), {})
    return with_half(strategy, half(strategy.params))


def quadratic_federation(
    strategy: FederatedStrategy,
    rounds: int,
    local: LocalParams,
    *,
    store: ClientStore | None = None,
    cohort: int = 0,
    owners: Sequence[int] = (0, 1),
) -> Federation:
    """Return a federation of the two quadratics; ``owners`` says which client holds which sample."""
    dataset = quadratics()
    clients = max(owners) + 1
    partition = Partition.from_owners(list(owners), clients)
    spec = ModelSpec("toys:Scalar", dataset.input_shape, 1)
    module = spec.build(0)
    strategy.setup(
        Setting(0, clients, rounds, ModelInfo.of(module), UniformSampler(0, cohort), cohort, local)
    )
    kept = store or MemoryStore()
    client = ClientSpec(0, rounds, strategy.half, spec, dataset, partition, None, local, kept, "cpu")
    params = FederationParams(clients=clients, cohort=cohort, rounds=rounds)
    model = {name: value.clone() for name, value in module.state_dict().items()}
    return Federation(strategy, model, InProcessGrid(client, clients), params, store=kept)
