"""What is seen of a whole cohort: means under secure aggregation, released models, and the gradients that follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from torch.nn import functional as F

from flowerbed.errors import ConfigError
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.leakage.attacking import attack_run, known_of, useful
from flowerbed.experiments.leakage.truth import truth_of_all
from flowerbed.experiments.parts import build_parts
from flowerbed.experiments.simulation import run_simulation
from flowerbed.strategies.attacks.observation import COHORT, Observation, SideInfo, batch_size, gradient_of
from flowerbed.strategies.attacks.observer import stems


def watched(directory: Path, **sections: Any) -> tuple[Simulation, list[Observation]]:
    base: dict[str, Any] = {
        "dataset": "digits",
        "model": {"name": "mlp", "hidden": [8]},
        "federation": {"clients": 4, "rounds": 2},
        "local": {"steps": 1, "batch_size": 2, "lr": 0.1},
        "evaluation": {"every": 0},
        "observe": {"rounds": [2]},
        "run": {"dir": str(directory), "progress": False, "figures": False},
        "grid": {"device": "cpu"},
        "seed": 3,
    }
    for name, value in sections.items():
        base[name] = {**base.get(name, {}), **value} if isinstance(base.get(name, {}), dict) else value
    simulation = Simulation.of(base)
    run_simulation(simulation)
    return simulation, [Observation.load(stem) for stem in stems(directory / "observations")]


@pytest.mark.parametrize(
    "sections",
    [
        # 22 bits over +-4 round to 1e-6, which the learning rate makes 1e-5 of the gradient.
        {"secure": {"enabled": True}},
        # FedAvg weighs by samples, of which clients have 359 or 360.
        {"observe": {"view": "released"}, "strategy": {"name": "fedavg", "weighting": "uniform"}},
    ],
)
def test_a_cohort_is_seen_as_its_mean_alone(sections: dict[str, Any], tmp_path: Path) -> None:
    """One observation a round, and its gradient is that of all clients' batches together."""
    simulation, found = watched(tmp_path, **sections)
    (observation,) = found
    assert (observation.client, observation.members) == (COHORT, (0, 1, 2, 3))
    parts = build_parts(simulation)
    side = SideInfo(local=simulation.local, rounds=2)
    assert batch_size(observation, side) == 8
    truth = truth_of_all(parts, observation.members, 2)
    module = observation.module()
    named = dict(module.named_parameters())
    expected = torch.autograd.grad(F.cross_entropy(module(truth.x), truth.y), list(named.values()))
    made = gradient_of(observation, side)
    for name, value in zip(named, expected, strict=True):
        torch.testing.assert_close(made[name], value, rtol=1e-3, atol=3e-5)
    # No file holds anything of a single client.
    assert [p.name for p in sorted((tmp_path / "observations").iterdir())] == [
        "round-00002-cohort.json",
        "round-00002-cohort.safetensors",
    ]


def test_a_cohort_is_attacked_and_scored(tmp_path: Path) -> None:
    watched(
        tmp_path, secure={"enabled": True}, federation={"clients": 3, "rounds": 2}, local={"batch_size": 1}
    )
    made = attack_run(tmp_path, "ig", {"steps": 2, "tv": 0})
    (victim,) = made.victims
    assert len(victim.truth.y) == len(victim.score.images) == 3
    assert victim.found.labels.shape == (3,)


def test_several_steps_of_a_cohort_are_not_imitated(tmp_path: Path) -> None:
    watched(tmp_path, secure={"enabled": True}, local={"steps": 0, "epochs": 1, "batch_size": 0, "lr": 0.1})
    assert attack_run(tmp_path, "ig", {"steps": 1}, rounds=[2]).victims
    watched(tmp_path / "more", secure={"enabled": True}, local={"steps": 0, "epochs": 2, "batch_size": 0})
    with pytest.raises(ConfigError, match="cohort of 4 cannot be attacked: the client made 2 steps"):
        attack_run(tmp_path / "more", "ig", {"steps": 1})


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"secure": {"enabled": True}, "observe": {"clients": [1]}}, "sees but the sum of a cohort"),
        ({"observe": {"clients": [1], "view": "released"}}, "observe.view=released sees but the model"),
        ({"observe": {"view": "everything"}}, "Unknown view 'everything'"),
    ],
)
def test_single_clients_of_a_cohort_cannot_be_chosen(
    sections: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        watched(tmp_path, **sections)


def test_local_privacy_is_in_what_the_server_sees(tmp_path: Path) -> None:
    """lr = 0: what is observed of a client is noise alone, of deviation z C."""
    pytest.importorskip("dp_accounting")
    simulation, found = watched(
        tmp_path, privacy={"mode": "local", "clip": 0.5, "noise": 2.0}, local={"lr": 0.0},
        model={"name": "mlp", "hidden": [200]},
    )  # fmt: skip
    moved = torch.cat([(found[0].returned[n] - v).flatten() for n, v in found[0].sent.items()])
    assert float(moved.std()) == pytest.approx(1.0, rel=0.03)
    assert known_of(simulation) == {"imitation": "clip", "update_noise": 1.0}


def test_central_privacy_protects_what_is_released_and_not_from_the_server(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    privacy = {"mode": "central", "clip": 0.5, "noise": 2.0}
    sections: dict[str, Any] = {"privacy": privacy, "model": {"name": "mlp", "hidden": [200]}}
    _, server = watched(tmp_path / "server", local={"lr": 0.0}, **sections)
    assert len(server) == 4
    assert all(worlds.equal(o.sent, o.returned) for o in server), (
        "no noise: the server sees what clients sent"
    )
    observe = {"rounds": [2], "view": "released"}
    simulation, (released,) = watched(tmp_path / "all", local={"lr": 0.0}, observe=observe, **sections)
    moved = torch.cat([(released.returned[n] - v).flatten() for n, v in released.sent.items()])
    assert float(moved.std()) == pytest.approx(2.0 * 0.5 / 4, rel=0.03)
    assert known_of(simulation) == {"update_noise": 0.25}


def test_knowledge_is_used_where_it_helps() -> None:
    known = {"joint": True, "encoded": True, "floor": 0.2, "imitation": "mask"}
    assert useful("readout", known) == {}
    assert useful("ig", known) == {"joint": True, "encoded": True, "imitation": "mask"}
    assert useful("dlg", known) == {"encoded": True, "imitation": "mask"}
    assert useful("gifd", known) == {"floor": 0.2, "imitation": "mask"}
