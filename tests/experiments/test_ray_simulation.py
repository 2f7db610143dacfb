"""A whole simulation on Ray: the bits of the in-process grid, whatever happens to the workers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import toys

from flowerbed.clients.half import ClientHalf
from flowerbed.clients.store import DiskStore
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.parts import build_parts
from flowerbed.experiments.simulation import make_federation, open_grid, simulate
from flowerbed.server.loop import RunResult

SETTINGS: dict[str, Any] = {
    "partition": {"name": "dirichlet", "alpha": 0.3},
    "model": {"name": "small_cnn"},
    "federation": {"clients": 12, "cohort": 6, "rounds": 3},
    "local": {"momentum": 0.9, "persist": True, "batch_size": 16},
    "evaluation": {"every": 0, "clients_every": 1},
}


def test_one_and_two_actors_give_the_bits_of_the_in_process_grid(tmp_path: Path) -> None:
    direct = simulate(**SETTINGS, grid={"device": "cpu"})
    for workers in (1, 2):
        ray = simulate(
            **SETTINGS,
            grid={"name": "ray", "workers": workers, "device": "cpu"},
            run={"dir": str(tmp_path / str(workers))},
        )
        for name, value in direct.model.items():
            assert torch.equal(ray.model[name], value), f"{workers} workers: {name}"
        assert ray.final("evaluate-clients") == direct.final("evaluate-clients")


def run_with(half: ClientHalf, grid: dict[str, Any], folder: Path) -> tuple[RunResult, DiskStore]:
    """Run stateful clients with private heads, and return the result and the clients' store."""
    parts = build_parts(Simulation.of({**SETTINGS, "grid": {**grid, "device": "cpu"}}))
    parts.strategy.half = half
    parts = replace(parts, spec=replace(parts.spec, half=half))
    store = DiskStore(folder)
    with open_grid(parts, store) as opened:
        return make_federation(parts, opened).run(), store


def test_a_worker_that_dies_costs_nothing(tmp_path: Path) -> None:
    """Counts, private heads and momentum of all clients are those of a run in which nobody died."""
    calm, kept = run_with(toys.CountingHalf(), {}, tmp_path / "calm")
    marker = tmp_path / "killed"
    half = toys.KillsItsWorkerOnce(str(marker))
    hit, rescued = run_with(half, {"name": "ray", "workers": 2}, tmp_path / "hit")
    asked = [record.asked for record in hit.history if record.phase == "train"]
    assert marker.exists(), "the worker was not killed, so nothing was tested"
    assert not hit.failures
    assert asked == [6, 6, 6]
    for name, value in calm.model.items():
        assert torch.equal(hit.model[name], value), name
    for client in range(12):
        before, after = kept.read(client, 99), rescued.read(client, 99)
        assert before.keys() == after.keys()
        for group, tensors in before.items():
            for name, value in tensors.items():
                assert torch.equal(after[group][name], value), f"client {client}: {group} {name}"


def test_one_client_never_starts_ray(tmp_path: Path) -> None:
    parts = build_parts(Simulation.of({"federation": {"clients": 1}, "grid": "ray"}))
    with open_grid(parts, DiskStore(tmp_path)) as grid:
        assert type(grid).__name__ == "InProcessGrid"
