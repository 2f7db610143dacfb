"""From settings to a run: one description, however it was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flowerbed.errors import ConfigError
from flowerbed.experiments.composition import compose_simulations
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.parts import build_parts
from flowerbed.experiments.run_directory import load_simulation
from flowerbed.experiments.simulation import simulate


def identity(**settings: Any) -> str:
    return build_parts(Simulation.of(settings)).simulation.identity


def test_defaults_written_out_or_not_are_the_same_run() -> None:
    short = identity(strategy="fedavg")
    assert short == identity(strategy={"name": "fedavg", "server_lr": 1.0}, model="mlp", grid="ray")
    assert short != identity(strategy={"name": "fedavg", "server_lr": 0.5})
    (composed,) = compose_simulations([])
    assert short == build_parts(composed).simulation.identity


def test_a_flower_strategy_has_one_description() -> None:
    short = identity(strategy={"name": "flower:FedAdam", "eta": 0.01})
    assert short == identity(strategy={"name": "flower", "flower": "FedAdam", "options": {"eta": 0.01}})
    (composed,) = compose_simulations(["strategy=flower:FedAdam", "+strategy.options.eta=0.01"])
    assert short == build_parts(composed).simulation.identity


def test_the_stored_configuration_is_complete_and_makes_the_same_run(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "federation": {"clients": 4, "rounds": 2},
        "partition": "dirichlet",
        "seed": 3,
    }
    first = simulate(**settings, run={"dir": str(tmp_path / "first")})
    stored = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())
    assert stored["partition"]["alpha"] > 0
    assert stored["model"]["name"] == "mlp"
    again = load_simulation(tmp_path / "first").plain()
    again["run"]["dir"] = str(tmp_path / "second")
    second = simulate(**again)
    for name, value in first.model.items():
        assert torch.equal(second.model[name], value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategi": "fedavg"}, "Did you mean 'strategy'"),
        ({"local": {"lrr": 0.1}}, "Did you mean 'lr'"),
        ({"strategy": {"name": "fedavg", "server_l": 1}}, "Did you mean 'server_lr'"),
        ({"federation": 5}, "several settings"),
        ({"strategy": {"server_lr": 1.0}}, "needs a name"),
        ({"partition": {"name": "dirichlet", "alfa": 1.0}}, "alfa"),
        ({"model": {"name": "mlp", "hiden": [3]}}, "hidden"),
        ({"federation": {"clients": 5000}}, "5000 clients cannot share"),
    ],
)
def test_what_cannot_work_is_said_before_any_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulate(**settings)
