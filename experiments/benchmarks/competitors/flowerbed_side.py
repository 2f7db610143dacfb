"""flowerbed through its ordinary interface, and the central loop that a federation of one client equals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from flowerbed.datasets.sources import load_dataset
from flowerbed.experiments.benchmarks.gate import Gate, digest
from flowerbed.experiments.simulation import simulate
from flowerbed.models.base import ModelSpec
from flowerbed.seeds import seed_sequence, torch_seed
from flowerbed.server.callbacks import CLIENTS, SERVER, Callback, Record

ENDLESS = 10**6
"""Rounds of a run that only the gate ends; the loop plans each, so not more than that."""


class AtTheGate(Callback):
    """Reports each training round; raises ``RuntimeError`` if a client failed, since costs mean nothing then."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def started(self, rounds: int, first_round: int) -> None:
        """Wait for the first turn."""
        self.gate.open()

    def recorded(self, record: Record) -> None:
        """Count the round."""
        if record.phase in (SERVER, CLIENTS):
            return
        if record.failed or record.answered != record.asked:
            raise RuntimeError(f"a client of the benchmark failed: {record.failures}")
        self.gate.passed()


def run(gate: Gate, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Run the simulation of ``settings`` with a gate after each round; return the digest of its model."""
    result = simulate(callbacks=[AtTheGate(gate)], **settings)
    return {"digest": digest(result.model)}


def central(gate: Gate, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train centrally, plainly, as the federation of one client in ``settings`` does; a round is an epoch.

    Takes from flowerbed the data, the model, and the documented order of samples and seeds; the loop is its own.
    """
    seed, local = settings["seed"], settings["local"]
    data = load_dataset(settings["dataset"]["name"], cache_dir=settings["data"]["cache"])
    x, y = data.prepare(data.train.inputs), data.train.labels
    options = dict(settings["model"])
    net = ModelSpec(options.pop("name"), data.input_shape, data.num_classes, options).build(seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=local["lr"])
    torch.manual_seed(torch_seed(seed, "modules", 0))
    net.train()
    gate.open()
    for epoch in range(settings["federation"]["rounds"]):
        order = np.random.Generator(np.random.PCG64(seed_sequence(seed, "data order", 0, epoch)))
        rows = torch.from_numpy(order.permutation(len(y)))
        for first in range(0, len(y), local["batch_size"]):
            batch = rows[first : first + local["batch_size"]]
            optimizer.zero_grad()
            F.cross_entropy(net(x[batch]), y[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        gate.passed()
    return {"digest": digest(net.state_dict())}


def settings_of(
    folder: Path,
    view: str,
    model: Mapping[str, Any],
    *,
    clients: int,
    cohort: int,
    rounds: int,
    local: Mapping[str, Any],
    device: str = "cpu",
) -> dict[str, Any]:
    """Return the settings of a simulation on the prepared ``folder``, before what a variant adds."""
    return {
        "strategy": "fedavg",
        "dataset": {"name": f"npz:{folder / view}.npz"},
        "partition": "iid",
        "model": dict(model),
        "seed": 0,
        "federation": {"clients": clients, "cohort": cohort, "rounds": rounds},
        "local": dict(local),
        "evaluation": {"every": 0},
        "data": {"cache": str(folder / "cache")},
        "grid": {"device": device},
        "run": {"progress": False, "checkpoint_every": 0},
    }


def merged(settings: Mapping[str, Any], more: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings with the keys of each section in ``more`` added or replaced."""
    result = dict(settings)
    for section, values in more.items():
        result[section] = {**result.get(section, {}), **values}
    return result
