"""GGEUR as a paper: its own measure by hand, its twin, and that its arms differ in nothing but the method."""

from __future__ import annotations

import pytest
import torch

from flowerbed.experiments.papers.ggeur import BASES, PANELS, PAPER, figure, pooled_covariance
from flowerbed.experiments.reproduction.engine import Reproduction, reproduce
from flowerbed.experiments.reproduction.paper import load_paper, load_scale
from flowerbed.strategies.ggeur_geometry import Moments, total

QUICK = load_scale(load_paper("ggeur"), "quick")
RUNS = {name: arm.simulation(0, {}) for name, arm in QUICK.arms.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Reproduction:
    claims = ["exact covariance", "floor", "one shot"]
    return reproduce("ggeur", "smoke", tmp_path_factory.mktemp("ggeur"), claims=claims, workers=1)


def test_the_direct_covariance_by_hand() -> None:
    """{0, 2} and {6}: 56/9 with 1/n; with 1/(n-1) it would be 28/3."""
    x, y = torch.tensor([[0.0], [2.0], [6.0]]), torch.zeros(3, dtype=torch.int64)
    assert float(pooled_covariance(x, y, 1)) == pytest.approx(56 / 9, rel=1e-12)
    parts = [Moments.of(x[:2], y[:2], 1), Moments.of(x[2:], y[2:], 1)]
    assert float(total(parts).covariance) == pytest.approx(56 / 9, rel=1e-12)


def test_only_the_methods_arm_measures_the_covariance(made: Reproduction) -> None:
    assert made.outcomes["ggeur", 0].values["covariance-error"] <= 1e-10
    assert "covariance-error" not in made.outcomes["one-shot-raw", 0].values


def test_a_figure_of_some_arms_leaves_the_others_empty(made: Reproduction) -> None:
    axes = figure(made).axes
    assert len(axes) == len(PANELS)
    assert [len(axis.lines) for axis in axes] == [2, 4, 4, 0]


def test_all_arms_make_the_same_steps_with_the_same_rate() -> None:
    assert {run.local.lr for run in RUNS.values()} == {0.005}
    steps = {name: run.local.steps * run.federation.clients for name, run in RUNS.items()}
    assert {steps[name] for name in steps if not name.startswith("domains")} == {400}
    assert {steps[name] for name in steps if name.startswith("domains")} == {160}
    assert len({run.identity for run in RUNS.values()}) == len(RUNS)


@pytest.mark.parametrize("group", ["", "mild-", "pixels-", "trained-", "domains-"])
def test_arms_of_one_setting_differ_in_the_strategy_alone(group: str) -> None:
    others = ("mild-", "pixels-", "trained-", "domains-", "one-place")
    members = [n for n in RUNS if (n.startswith(group) if group else not n.startswith(others))]
    assert len(members) >= 3
    plain = [{k: v for k, v in RUNS[n].plain().items() if k != "strategy"} for n in members]
    assert all(p == plain[0] for p in plain)


def test_the_figure_and_the_claims_speak_of_arms_that_exist() -> None:
    assert {arm for _, _, arms in PANELS for arm in arms.values()} <= set(QUICK.arms)
    assert {f"{base}-ggeur" for base in BASES} <= {arm for c in PAPER.claims for _, arm in c.needs()}


def test_one_place_is_one_client_with_everything() -> None:
    assert RUNS["one-place"].federation.clients == 1
    assert RUNS["one-place"].local.persist
    assert not RUNS["raw"].local.persist
