"""The server's evaluation on workers: the figures of the driver's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowerbed.clients.store import MemoryStore
from flowerbed.errors import ConfigError, RunError
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.parts import Parts, build_parts, server_evaluator
from flowerbed.experiments.sharded import Sharded, parts
from flowerbed.experiments.simulation import open_grid, simulate
from flowerbed.models.evaluation import BATCH

# 1,232 test samples: three batches.
SETTINGS: dict[str, Any] = {
    "dataset": {"name": "flowerbed.datasets.algorithmic:modular", "p": 37, "train_share": 0.1},
    "federation": {"clients": 2, "rounds": 2},
    "local": {"lr": 0.5},
    "evaluation": {"sharded": True},
}


def built(**sections: Any) -> Parts:
    return build_parts(Simulation.of({**SETTINGS, "grid": {"device": "cpu"}, **sections}))


@given(st.integers(0, 40 * BATCH), st.integers(1, 9))
def test_parts_are_whole_batches_that_cover_everything_once(samples: int, count: int) -> None:
    found = parts(samples, count)
    assert [row for part in found for row in (part.start, part.stop)][1:-1] == [
        edge for part in found[1:] for edge in (part.start, part.start)
    ]
    assert not found or (found[0].start, found[-1].stop) == (0, samples)
    assert sum(map(len, found)) == samples
    assert all(part.start % BATCH == 0 and len(part) for part in found)
    assert len(found) <= count
    batches = [-(-len(part) // BATCH) for part in found]
    assert not batches or max(batches) - min(batches) <= 1


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_figures_are_those_of_the_driver(workers: int) -> None:
    made = built()
    model = {name: torch.randn_like(value) for name, value in made.model.items()}
    with open_grid(made, MemoryStore()) as grid:
        shared = server_evaluator(made.spec, count=Sharded(grid, len(made.dataset.test), workers))(model)
    assert shared == server_evaluator(made.spec)(model)
    assert sum(shared["total-per-class"]) == 1232


def test_a_run_on_workers_reports_the_same(tmp_path: Path) -> None:
    direct = simulate(**SETTINGS, grid={"device": "cpu"})
    ray = simulate(
        **SETTINGS, grid={"name": "ray", "workers": 2, "device": "cpu"}, run={"dir": str(tmp_path / "ray")}
    )
    told = [record.metrics for record in direct.history if record.phase == "evaluate-server"]
    assert [record.metrics for record in ray.history if record.phase == "evaluate-server"] == told
    assert len(told) == 3


def test_a_part_that_cannot_be_counted_ends_the_run() -> None:
    made = built()
    with (
        open_grid(made, MemoryStore()) as grid,
        pytest.raises(RunError, match=r"set evaluation.sharded=false, or mend this: RuntimeError: Error"),
    ):
        Sharded(grid, 1232, 2)({"w": torch.zeros(1)})


def test_a_limit_on_clients_would_be_one_on_the_evaluation() -> None:
    with pytest.raises(ConfigError, match=r"evaluation.sharded asks workers as clients"):
        built(federation={"clients": 2, "rounds": 1, "time_limit": 5})
