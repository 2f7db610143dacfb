"""FedLabel as a paper: equal steps, arms that differ in nothing else, and claims that mean what they say."""

from __future__ import annotations

from typing import Any

import pytest

from flowerbed.experiments.papers.fedlabel import PAPER, figure
from flowerbed.experiments.reproduction.claims import REPRODUCED, Observed, judge
from flowerbed.experiments.reproduction.engine import Reproduction, reproduce
from flowerbed.experiments.reproduction.paper import load_paper, load_scale
from flowerbed.strategies.fedlabel import FedLabelParams

QUICK = load_scale(load_paper("fedlabel"), "quick")
RUNS = {name: arm.simulation(0, {}) for name, arm in QUICK.arms.items()}
SETTINGS = ("mismatch-", "mnist-", "central-fashion-", "central-mnist-", "bn-", "gn-")
EXCEPTIONS = ("labels-only-tau", "all-labels")
CLAIMS = {claim.name: claim for claim in PAPER.claims}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Reproduction:
    claims = ["choice", "choice in the same models", "traffic"]
    return reproduce("fedlabel", "smoke", tmp_path_factory.mktemp("fedlabel"), claims=claims, workers=1)


def members(group: str) -> list[str]:
    return [n for n in RUNS if (n.startswith(group) if group else not n.startswith(SETTINGS))]


@pytest.mark.parametrize("group", ["", *SETTINGS])
def test_arms_of_one_setting_differ_in_the_strategy_alone(group: str) -> None:
    found = [RUNS[name].plain() for name in members(group) if name not in EXCEPTIONS]
    assert len(found) >= 2
    assert all({**run, "strategy": 0} == {**found[0], "strategy": 0} for run in found)


def test_the_methods_steps_are_those_of_the_controls() -> None:
    for name, run in RUNS.items():
        if run.strategy.name == "fedlabel":
            tau, tau_prime = FedLabelParams(**run.strategy.options).steps(run.local.steps)
            assert (tau, tau_prime) == (10, 10), name
    assert RUNS["labels-only"].local.steps == 20
    assert RUNS["labels-only-tau"].local.steps == 10


def test_only_the_upper_bound_sees_all_labels() -> None:
    assert {name for name, run in RUNS.items() if run.data.labelled == 1} == {"all-labels"}
    assert {n for n, run in RUNS.items() if run.data.labelled_classes < 1} == set(members("mismatch-"))


def test_one_model_is_sent_and_as_released_two(made: Reproduction) -> None:
    sent = {
        arm: made.outcomes[arm, 0].values["cost:bytes_up"] for arm in ("labels-only", "fedlabel", "flute")
    }
    assert sent["labels-only"] < sent["fedlabel"] < 1.5 * sent["labels-only"]
    assert sent["flute"] > 1.4 * sent["labels-only"]


def test_coverage_times_precision_is_the_share_that_is_judged(made: Reproduction) -> None:
    values = made.outcomes["fedlabel", 0].curves
    shares = [v for _, v in values["train:pseudo-correct-share"]]
    products = [
        c * p
        for (_, c), (_, p) in zip(
            values["train:pseudo-coverage"], values["train:pseudo-precision"], strict=True
        )
    ]
    assert shares == pytest.approx(products, abs=1e-12)
    assert max(shares) > 0


@pytest.mark.parametrize(
    ("name", "values", "holds"),
    [
        ("choice", {"fedlabel": 0.30, "global-expert": 0.31, "local-expert": 0.2}, True),
        ("choice", {"fedlabel": 0.30, "global-expert": 0.2, "local-expert": 0.312}, False),
        ("helps", {"fedlabel": 0.71, "labels-only": 0.70, "fixmatch": 0.71, "labels-only-tau": 0.6}, True),
        ("helps", {"fedlabel": 0.709, "labels-only": 0.70, "fixmatch": 0.6, "labels-only-tau": 0.6}, False),
        ("helps", {"fedlabel": 0.72, "labels-only": 0.70, "fixmatch": 0.73, "labels-only-tau": 0.6}, False),
        ("precondition (mnist)", {"central-mnist-fixmatch": 0.75, "central-mnist-labels-only": 0.73}, True),
        ("precondition (mnist)", {"central-mnist-fixmatch": 0.75, "central-mnist-labels-only": 0.74}, False),
    ],
)
def test_claims_on_made_up_figures(name: str, values: dict[str, float], holds: bool) -> None:
    claim = CLAIMS[name]
    # An epsilon for what binary fractions make of a margin that is met exactly.
    observed: dict[tuple[str, int], Any] = {
        (arm, seed): Observed("completed", {metric: values[arm] + (1e-9 if arm == "fedlabel" else 0)})
        for metric, arm in claim.needs()
        for seed in (0, 1, 2)
    }
    assert (judge(claim, observed, (0, 1, 2)).verdict == REPRODUCED) is holds


def test_the_figure_shows_what_was_run(made: Reproduction) -> None:
    axes = figure(made).axes
    assert [len(axis.lines) for axis in axes[:2]] == [3, 3]
    assert len(axes) % 3 == 0
    assert axes[0].get_legend() is not None
