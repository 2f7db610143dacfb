"""Whole settings by name: every file of the group composes, and means what it is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowerbed.errors import ConfigError
from flowerbed.experiments.compare_command import read
from flowerbed.experiments.composition import compose_simulations
from flowerbed.experiments.hydra_schema import CONF

NAMES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
ARMS = Path(__file__).resolve().parents[2] / "experiments" / "benchmarks" / "fedlabel_full.yaml"


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_is_a_valid_simulation(name: str) -> None:
    (simulation,) = compose_simulations([f"experiment={name}"])
    assert simulation != compose_simulations([])[0]


def test_the_command_line_has_the_last_word() -> None:
    (simulation,) = compose_simulations(["experiment=fedlabel_full", "strategy.tau_prime=5", "model.norm=bn"])
    assert (simulation.strategy.name, simulation.strategy.options["tau_prime"]) == ("fedlabel", 5)
    assert simulation.model.options["norm"] == "bn"
    (other,) = compose_simulations(["experiment=few_labels_full", "strategy=labels_only"])
    assert other.strategy.name == "labels_only"
    assert (other.federation, other.local, other.data) == (
        simulation.federation,
        simulation.local,
        simulation.data,
    )


def test_fedlabel_at_full_size() -> None:
    device, silo = (
        compose_simulations([f"experiment={name}"])[0] for name in ("fedlabel_full", "fedlabel_silo_full")
    )
    for simulation in (device, silo):
        assert simulation.strategy.options["tau_prime"] == 10
        assert simulation.local.steps == 40
        assert (simulation.dataset.name, simulation.model.name) == ("cifar10", "resnet18")
    assert (device.federation.clients, device.federation.cohort) == (100, 10)
    assert (silo.federation.clients, silo.federation.cohort, silo.data.labelled_classes) == (5, 0, 0.5)


def test_all_arms_beside_fedlabel_are_valid_and_make_as_many_steps() -> None:
    methods, seeds = read([f"methods={ARMS}", "experiment=few_labels_full", "seeds=0,1,2"])
    assert seeds == [0, 1, 2]
    assert len({simulation.identity for simulation in methods.values()}) == len(methods) == 10
    assert {simulation.local.steps for simulation in methods.values()} == {40}


def test_an_unknown_experiment_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"Unknown experiment 'fedlabel_ful'. Did you mean 'fedlabel_full'\?"
    ):
        compose_simulations(["experiment=fedlabel_ful"])
