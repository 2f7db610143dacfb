"""Claims: gaps by hand, verdicts, and what is said of runs that have no figures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowerbed.errors import ConfigError
from flowerbed.experiments.reproduction.claims import (
    DIRECTION,
    MECHANISM,
    NOT_EVALUATED,
    NOT_REPRODUCED,
    REPRODUCED,
    Claim,
    Inequality,
    Observed,
    judge,
    mean,
    metric,
)

loss, accuracy = metric("loss"), metric("accuracy")
SEEDS = (0, 1, 2)


def runs(**arms: list[float]) -> dict[tuple[str, int], Observed]:
    """Return completed runs with these losses by seed."""
    return {
        (arm, seed): Observed("completed", {"loss": value, "diverged": 0.0})
        for arm, values in arms.items()
        for seed, value in enumerate(values)
    }


def verdict(
    holds: Inequality | list[Inequality], observed: dict[tuple[str, int], Observed], **more: object
) -> str:
    return judge(Claim("c", "text", holds, **more), observed, SEEDS).verdict  # type: ignore[arg-type]


def test_a_gap_by_hand() -> None:
    claim = Claim("c", "half the loss, and a bit", loss["a"] <= 0.5 * loss["b"] - 0.1)
    found = judge(claim, runs(a=[1.0, 2.0, 3.0], b=[4.0, 4.0, 10.0]), SEEDS)
    (condition,) = found.conditions
    # 0.5 b - 0.1 - a = 0.9, -0.1, 1.9: mean 0.9, s = 1, t(0.975, 2) = 4.302653.
    assert condition.gaps == pytest.approx((0.9, -0.1, 1.9))
    assert condition.mean == pytest.approx(0.9)
    assert condition.low == pytest.approx(0.9 - 4.302653 / 3**0.5)
    assert condition.high == pytest.approx(0.9 + 4.302653 / 3**0.5)
    assert found.verdict == REPRODUCED
    assert not found.clear
    assert condition.text == "loss[a] <= 0.5 loss[b] - 0.1"


def test_every_verdict() -> None:
    clearly, slightly = runs(a=[1, 1, 1], b=[4, 4, 4]), runs(a=[3.5, 3.5, 3.5], b=[4, 4, 4])
    half = loss["a"] <= 0.5 * loss["b"]
    assert verdict(half, clearly) == REPRODUCED
    assert verdict(half, slightly) == DIRECTION
    assert verdict(half, runs(a=[5, 5, 5], b=[4, 4, 4])) == NOT_REPRODUCED
    assert verdict(half, runs(a=[5, 5, 5], b=[4, 4, 4]), mechanism=loss["a"] <= 6) == MECHANISM
    assert verdict(half, runs(a=[5, 5, 5], b=[4, 4, 4]), mechanism=loss["a"] <= 4) == NOT_REPRODUCED


def test_all_conditions_must_hold() -> None:
    observed = runs(a=[1, 1, 1], b=[2, 2, 2], c=[0, 0, 0])
    assert verdict([loss["a"] <= loss["b"], loss["c"] <= loss["a"]], observed) == REPRODUCED
    assert verdict([loss["a"] <= loss["b"], loss["a"] <= loss["c"]], observed) == NOT_REPRODUCED


def test_a_margin_that_allows_a_little_is_no_direction() -> None:
    """error(a) <= error(b) + 1 fails at 6 and 4, and then a is not below b either."""
    assert verdict(loss["a"] <= loss["b"] + 1, runs(a=[6, 6, 6], b=[4, 4, 4])) == NOT_REPRODUCED
    assert verdict(loss["a"] <= loss["b"] + 1, runs(a=[4.5] * 3, b=[4] * 3)) == REPRODUCED


def test_against_a_number_there_is_no_direction() -> None:
    assert verdict(loss["a"] >= 2, runs(a=[1, 1, 1])) == NOT_REPRODUCED


def test_the_mean_of_arms() -> None:
    observed = runs(a=[1, 1, 1], b=[3, 3, 3], c=[2.5, 2.5, 2.5])
    middle = mean([loss["a"], loss["b"]])
    assert verdict(middle <= loss["c"] - 0.5, observed) == REPRODUCED
    assert verdict(middle <= loss["c"] - 0.6, observed) == DIRECTION
    assert str(middle <= loss["c"] - 0.6) == "0.5 loss[a] + 0.5 loss[b] <= loss[c] - 0.6"


@given(
    st.lists(st.tuples(*[st.floats(-10, 10)] * 2), min_size=3, max_size=3), st.floats(-2, 2), st.floats(-2, 2)
)
def test_both_ways_to_write_it_agree(pairs: list[tuple[float, float]], factor: float, margin: float) -> None:
    observed = runs(a=[p[0] for p in pairs], b=[p[1] for p in pairs])
    one = judge(Claim("c", "t", loss["a"] <= factor * loss["b"] + margin), observed, SEEDS)
    other = judge(Claim("c", "t", factor * loss["b"] + margin >= loss["a"]), observed, SEEDS)
    assert one.conditions[0].gaps == other.conditions[0].gaps
    expected = [factor * b + margin - a for a, b in pairs]
    assert one.conditions[0].gaps == pytest.approx(expected, abs=1e-9)


def test_a_diverged_run_is_not_averaged_away() -> None:
    observed = runs(a=[1, 1, 1], b=[4, 4, 4])
    observed["b", 1] = Observed("diverged", {"diverged": 1.0}, "not finite")
    found = judge(Claim("c", "t", loss["a"] <= loss["b"]), observed, SEEDS)
    assert found.verdict == NOT_REPRODUCED
    assert "b diverged with seed 1" in found.reason
    assert found.conditions == ()


def test_divergence_itself_can_be_claimed() -> None:
    observed = runs(a=[1, 1, 1])
    observed |= {("b", s): Observed("diverged", {"diverged": 1.0}) for s in SEEDS}
    diverged = metric("diverged")
    assert verdict([diverged["b"] >= 1, diverged["a"] <= 0], observed) == REPRODUCED


def test_a_failed_run_leaves_it_open() -> None:
    observed = runs(a=[1, 1, 1], b=[4, 4, 4])
    observed["b", 1] = Observed("failed", {}, "disk full")
    found = judge(Claim("c", "t", loss["a"] <= loss["b"]), observed, SEEDS)
    assert (found.verdict, found.reason) == (NOT_EVALUATED, "b, seed 1 failed: disk full")


def test_too_few_seeds_leave_it_open() -> None:
    found = judge(Claim("c", "t", loss["a"] <= loss["b"]), runs(a=[1, 1], b=[4, 4]), (0, 1))
    assert found.verdict == NOT_EVALUATED
    assert "needs 3 seeds and has 2" in found.reason


def test_a_metric_that_an_arm_lacks_fails_loudly() -> None:
    with pytest.raises(ConfigError, match=r"claim 'c': arm 'a', seed 0: Unknown metric 'accuracy'.*loss"):
        judge(Claim("c", "t", accuracy["a"] >= 0.5), runs(a=[1, 1, 1]), SEEDS)


def test_a_chained_comparison_is_refused() -> None:
    with pytest.raises(TypeError, match="write two"):
        _ = 0 <= loss["a"] <= 1


def test_a_claim_that_states_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="states nothing"):
        Claim("c", "t", ())
