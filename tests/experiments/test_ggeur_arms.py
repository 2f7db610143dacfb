"""GGEUR's comparisons: every arm is a valid run, differs from the others, and makes as many steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowerbed.experiments.compare_command import read
from flowerbed.experiments.composition import compose_simulations

BENCHMARKS = Path(__file__).resolve().parents[2] / "experiments" / "benchmarks"


@pytest.mark.parametrize(("name", "arms"), [("quick", 14), ("domains", 6), ("full", 19)])
def test_all_arms_are_valid_and_equal_in_steps(name: str, arms: int) -> None:
    methods, _ = read(
        [f"methods={BENCHMARKS / f'ggeur_{name}.yaml'}", f"experiment=embeddings_{name}", "seeds=0"]
    )
    assert len({simulation.identity for simulation in methods.values()}) == len(methods) == arms
    assert {simulation.local.steps for simulation in methods.values()} == {40}
    assert {simulation.encoder.name for simulation in methods.values()} == {
        "trained" if name == "full" else "patches"
    }


def test_the_command_line_reaches_the_base() -> None:
    (simulation,) = compose_simulations(
        ["strategy=ggeur", "strategy.base=fedprox", "strategy.base_options={mu:0.5}"]
    )
    assert simulation.strategy.options["base_options"] == {"mu": 0.5}
    (simulation,) = compose_simulations(
        ["strategy=ggeur", "strategy.base=fedprox", "strategy.base_options.mu=0.5"]
    )
    assert simulation.strategy.options["base_options"] == {"mu": 0.5}


def test_ggeur_at_full_size() -> None:
    (simulation,) = compose_simulations(["experiment=ggeur_full", "partition.alpha=0.01"])
    assert (simulation.strategy.name, simulation.strategy.options["T"]) == ("ggeur", 2000)
    assert (simulation.encoder.name, simulation.encoder.options["model"]) == ("trained", "resnet18")
    assert simulation.partition.options == {"alpha": 0.01, "floor": 1}
