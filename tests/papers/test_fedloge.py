"""FedLoGe as a paper: its measures against the platform's own evaluation, and its controls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flowerbed.experiments.papers.fedloge import figure, personal_heads, simplex, uniform_rows
from flowerbed.experiments.reproduction.engine import Reproduction, reproduce
from flowerbed.experiments.reproduction.paper import load_paper, load_scale
from flowerbed.experiments.simulation import simulate
from flowerbed.models.sparse_etf import SparseEtf, sparse_simplex
from flowerbed.strategies.fedloge import local_rows

QUICK = load_scale(load_paper("fedloge"), "quick")
SMOKE = load_scale(load_paper("fedloge"), "smoke")
CLAIMS = ["GA", "lengths", "GA on FedAvg"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Reproduction:
    return reproduce("fedloge", "smoke", tmp_path_factory.mktemp("fedloge"), claims=CLAIMS, workers=1)


def head(*rows: list[float]) -> dict[str, torch.Tensor]:
    return {"weight": torch.tensor(rows), "bias": torch.zeros(len(rows))}


def test_the_control_has_one_length_by_hand() -> None:
    auxiliary, own = head([1.0, 0.0], [0.0, 2.0]), head([3.0, 4.0], [1.0, 0.0])
    # Lengths 5 and 1: LA takes each, the control their mean.
    assert local_rows(auxiliary, own)["weight"].tolist() == [[5.0, 0.0], [0.0, 2.0]]
    assert uniform_rows(auxiliary, own)["weight"].tolist() == [[3.0, 0.0], [0.0, 6.0]]
    assert personal_heads(auxiliary, own)["uniform"]["weight"].tolist() == [[6.0, 4.0], [1.0, 6.0]]


def test_with_rows_of_one_length_the_control_is_la() -> None:
    auxiliary, own = head([1.0, 3.0], [0.5, 2.0]), head([3.0, 4.0], [0.0, 5.0])
    assert torch.equal(uniform_rows(auxiliary, own)["weight"], local_rows(auxiliary, own)["weight"])


def test_personal_figures_are_those_of_the_clients_own_evaluation(made: Reproduction) -> None:
    for arm in made.arms:
        values = made.outcomes[arm, 0].values
        for form, name in (
            ("code", "personal-"),
            ("sum", "sum-"),
            ("local", "local-"),
            ("auxiliary", "auxiliary-"),
        ):
            assert values[f"personal-{form}"] == pytest.approx(
                values[f"clients:{name}accuracy-mean"], abs=1e-6
            )


def test_masked_figures_are_those_of_a_masked_evaluation(made: Reproduction, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"evaluation": {"mask": "train"}}
    masked = reproduce("fedloge", "smoke", tmp_path, claims=["lengths"], settings=settings, workers=1)
    values, plain = masked.outcomes["fedloge", 0].values, made.outcomes["fedloge", 0].values
    for form, name in (
        ("code", "personal-"),
        ("sum", "sum-"),
        ("local", "local-"),
        ("auxiliary", "auxiliary-"),
    ):
        expected = values[f"clients:{name}accuracy-mean"]
        assert plain[f"personal-{form}-masked"] == pytest.approx(expected, abs=1e-6)
    assert any(
        plain[f"personal-{f}-masked"] != plain[f"personal-{f}"] for f in ("code", "sum", "local", "auxiliary")
    )


def test_the_control_is_fedavg_with_a_tau_normalised_head(made: Reproduction) -> None:
    """Its generic model is FedAvg's with rows of length 1.7, and its auxiliary head FedAvg's own."""
    settings = SMOKE.arms["realigned-fedavg"].filled(0, {})
    strategy = {"name": "tau_norm", "scale": 1.7, "keep_bias": True}
    settings |= {"strategy": strategy, "run": {"progress": False}}
    expected = simulate(**settings).model
    found = load_file(made.directories["realigned-fedavg", 0] / "model.safetensors")
    shared = expected.keys() & found.keys()
    assert len(shared) == len(expected)
    assert all(torch.equal(expected[name], found[name]) for name in shared)


def test_angles_and_lengths_of_a_simplex() -> None:
    dense = sparse_simplex(12, 5, SparseEtf(0.0, 1.0, 0, 1e-3), torch.Generator().manual_seed(0)).T
    found = simplex(dense)
    assert abs(found["simplex-angle-missing"]) < 1e-3
    assert found["simplex-length-deviation"] < 1e-6
    turned = dense.clone()
    turned[0] = 2 * (dense[0] + dense[1])
    found = simplex(turned)
    assert found["simplex-angle-missing"] > 5
    assert found["simplex-length-deviation"] > 0.1
    assert simplex(torch.zeros(5, 12)) == {}


@pytest.mark.parametrize("net", ["", "bn-", "gn-"])
def test_arms_of_one_network_differ_in_the_strategy_alone(net: str) -> None:
    members = [n for n in QUICK.arms if (n.startswith(net) if net else not n.startswith(("bn-", "gn-")))]
    assert len(members) >= 2
    runs = [QUICK.arms[name].simulation(0, {}).plain() for name in members]
    assert all({**run, "strategy": 0} == {**runs[0], "strategy": 0} for run in runs)
    assert all(run["evaluation"]["mask"] == "none" for run in runs)


def test_the_figure_has_a_panel_for_each_network(made: Reproduction) -> None:
    axes = figure(made).axes
    assert len(axes) == 6
    assert len(axes[0].lines) == 5
    assert len(axes[3].lines) == 2
    assert not axes[1].lines
