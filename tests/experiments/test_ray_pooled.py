"""The pooled exchange on Ray workers: the bits of one process, whoever adds up what and whoever dies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toys

from flowerbed.clients.half import ClientHalf
from flowerbed.clients.store import DiskStore
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.parts import build_parts
from flowerbed.experiments.simulation import make_federation, open_grid
from flowerbed.server.grids import ray_grid
from flowerbed.server.loop import RunResult

SETTINGS: dict[str, Any] = {
    "partition": {"name": "dirichlet", "alpha": 0.3},
    "model": {"name": "mlp", "hidden": [8]},
    "federation": {"clients": 50, "cohort": 44, "rounds": 2, "quorum": 0.2},
    "local": {"batch_size": 16},
    "evaluation": {"every": 0},
}


@pytest.fixture(scope="module", autouse=True)
def ray_ends() -> Iterator[None]:
    yield
    ray_grid.shutdown()


def run(folder: Path, half: ClientHalf | None = None, **settings: Any) -> RunResult:
    """Run on a grid of these settings, with a client half if one is given."""
    grid = {"device": "cpu", **settings.pop("grid", {})}
    parts = build_parts(Simulation.of({**SETTINGS, **settings, "grid": grid}))
    if half is not None:
        parts.strategy.half = half
        parts = replace(parts, spec=replace(parts.spec, half=half))
    with open_grid(parts, DiskStore(folder)) as opened:
        federation = make_federation(parts, opened)
        assert (federation.pooling_refusal() is None) == (grid.get("exchange") != "messages")
        return federation.run()


def told(result: RunResult) -> list[dict[str, Any]]:
    """Return everything that the records say but the time, of failures the first line."""
    return [
        {k: v for k, v in vars(r).items() if k not in ("seconds", "failures")}
        | {"failures": [(f.client, f.kind, f.reason.splitlines()[0]) for f in r.failures]}
        for r in result.history
    ]


def assert_same(one: RunResult, other: RunResult) -> None:
    for name, value in one.model.items():
        assert torch.equal(value, other.model[name]), name
    assert told(one) == told(other)


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_one_and_two_workers_give_the_bits_of_one_process(strategy: str, tmp_path: Path) -> None:
    direct = run(tmp_path / "direct", strategy=strategy)
    for workers in (1, 2):
        grid = {"name": "ray", "workers": workers}
        assert_same(direct, run(tmp_path / str(workers), strategy=strategy, grid=grid))


def test_failures_are_those_of_one_process(tmp_path: Path) -> None:
    direct = run(tmp_path / "direct", toys.Unreliable(), grid={"exchange": "messages"})
    assert_same(direct, run(tmp_path / "ray", toys.Unreliable(), grid={"name": "ray"}))


def test_clients_computed_together_give_the_same_bits_with_any_number_of_workers(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"cohort": {"kernel": "vmap", "block": 4}}
    one, two = (
        run(tmp_path / str(n), grid={"name": "ray", "workers": n, "engine": "cohort"}, **settings)
        for n in (1, 2)
    )
    assert_same(one, two)
    direct = run(tmp_path / "direct", grid={"engine": "cohort"}, **settings)
    for name, value in direct.model.items():
        torch.testing.assert_close(one.model[name], value, rtol=1e-5, atol=1e-6)


def test_a_worker_that_dies_once_costs_nothing(tmp_path: Path) -> None:
    calm = run(tmp_path / "calm", toys.CountingHalf())
    marker = tmp_path / "killed"
    hit = run(tmp_path / "hit", toys.KillsItsWorkerOnce(str(marker)), grid={"name": "ray"})
    assert marker.exists(), "the worker was not killed, so nothing was tested"
    assert_same(calm, hit)


def test_a_client_that_kills_workers_is_quarantined_and_costs_nobody_else_anything(tmp_path: Path) -> None:
    calm = run(tmp_path / "calm", toys.KillsItsWorkerAlways("raise"))
    hit = run(tmp_path / "hit", toys.KillsItsWorkerAlways("kill"), grid={"name": "ray"})
    for name, value in calm.model.items():
        assert torch.equal(hit.model[name], value), name
    rounds = [
        [(f.client, f.kind) for f in record.failures] for record in hit.history if record.phase == "train"
    ]
    assert [found for found in rounds if found] == [[(7, "quarantined")]] * sum(map(bool, rounds))
    assert any(rounds), "client 7 was never asked"
    assert [len(r.failures) for r in calm.history] == [len(r.failures) for r in hit.history]


@pytest.mark.slow
def test_two_nodes_give_the_bits_of_one_process(tmp_path: Path) -> None:
    """A cluster of two nodes on this machine; each can hold one worker only, so that both nodes work."""
    from ray.cluster_utils import Cluster

    ray_grid.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        for strategy in ("fedavg", "scaffold"):
            grid = {"name": "ray", "workers": 2, "address": cluster.address}
            direct = run(tmp_path / f"direct {strategy}", strategy=strategy)
            assert_same(direct, run(tmp_path / f"two {strategy}", strategy=strategy, grid=grid))
        import ray

        assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    finally:
        ray_grid.shutdown()
        cluster.shutdown()
