"""Robust rules: hand-worked with outliers, breakdown, order, and their relation to the mean."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from flowerbed.clients.params import LocalParams
from flowerbed.errors import ConfigError, RunError
from flowerbed.experiments.simulation import simulate
from flowerbed.models.info import ModelInfo
from flowerbed.server.sampling import UniformSampler
from flowerbed.storage import Tensors
from flowerbed.strategies import robust
from flowerbed.strategies.base import ClientReply, FederatedStrategy, Setting
from flowerbed.strategies.bulyan import Bulyan
from flowerbed.strategies.centered_clipping import CenteredClipping, CenteredClippingParams
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams
from flowerbed.strategies.krum import Krum, MultiKrum, MultiKrumParams
from flowerbed.strategies.median import Median
from flowerbed.strategies.norm_bounding import NormBounding, NormBoundingParams
from flowerbed.strategies.robust import RobustParams, RobustStrategy
from flowerbed.strategies.trimmed_mean import TrimmedMean

RULES: tuple[type[RobustStrategy], ...] = (Median, TrimmedMean, Krum, MultiKrum, Bulyan)


def replies(*values: Any) -> list[ClientReply]:
    """Replies with the model {"w": value}; sizes differ, since no robust rule may look at them."""
    return [
        ClientReply(k, {"arrays": {"w": torch.as_tensor(v, dtype=torch.float32)}}, {"num-examples": 1 + k})
        for k, v in enumerate(values)
    ]


def aggregate(strategy: FederatedStrategy, *values: Any, start: float = 0.0) -> torch.Tensor:
    answers = replies(*values)
    current = {"w": torch.full_like(answers[0].model["w"], start)}
    return strategy.aggregate(1, current, answers)["w"]


def make(rule: type[RobustStrategy], f: int) -> RobustStrategy:
    return rule(rule.Params(f=f))


# By hand.


def test_median_of_odd_and_even_numbers_of_replies() -> None:
    assert aggregate(make(Median, 1), [3.0, -1.0], [1e30, 0.0], [2.0, -1e30]).tolist() == [3.0, -1.0]
    assert aggregate(make(Median, 1), 1.0, 2.0, 4.0, 1e30) == 3.0


def test_trimmed_mean_leaves_out_both_ends_of_every_coordinate() -> None:
    values = ([1.0, -1e30], [2.0, 5.0], [6.0, 7.0], [1e30, 9.0], [-1e30, 1e30])
    assert aggregate(make(TrimmedMean, 1), *values).tolist() == [3.0, 7.0]
    assert aggregate(make(TrimmedMean, 2), *values).tolist() == [2.0, 7.0]


def test_krum_takes_the_model_with_the_nearest_neighbours() -> None:
    # Two neighbours count. Scores: 1 + 2.25, 1/4 + 1, 1/4 + 1/4, 1/4 + 1, huge.
    assert aggregate(make(Krum, 1), 0.0, 1.0, 1.5, 2.0, 50.0) == 1.5
    # The four best are all but the outlier, the two best are 1.5 and 1 (as good as 2, but nearer to the third).
    assert aggregate(MultiKrum(MultiKrumParams(f=1)), 0.0, 1.0, 1.5, 2.0, 50.0) == 1.125
    assert aggregate(MultiKrum(MultiKrumParams(f=1, m=2)), 0.0, 1.0, 1.5, 2.0, 50.0) == 1.25


def test_bulyan_by_hand() -> None:
    values = [[0.0], [1.0], [2.0], [3.0], [4.0], [5.0], [100.0]]
    models = [{"w": torch.tensor(v)} for v in values]
    # Neighbours 4, 3, 2, 1, 1. Best scores: 10 (2 and 3, which is nearer to the last), 9 (2), 10 (1 and 4, which
    # is nearer to the last), 1 (0 and 1, which is nearer to 5), 25 (0 and 5, which is nearer to the last).
    assert robust.bulyan_selection(robust.squared_distances(models, ["w"]), 1) == [3, 2, 4, 1, 5]
    # Of 1, 2, 3, 4, 5 the three nearest to the median 3 are 2, 3, 4.
    assert aggregate(make(Bulyan, 1), *values) == 3.0


def test_the_mean_around_the_median_prefers_the_lower_of_two_equally_far() -> None:
    values = torch.tensor([[0.0], [8.0], [4.0], [5.0], [3.0]])
    # Median 4; 3 and 5 are equally far from it.
    assert robust.mean_around_median(values, 2) == 3.5
    assert robust.mean_around_median(values, 3) == 4.0


def test_norm_bounding_by_hand() -> None:
    strategy = NormBounding(NormBoundingParams(M=1.0))
    # From (1, 1): updates (3, 4), clipped to (0.6, 0.8), and (0, -0.5), kept.
    moved = aggregate(strategy, [4.0, 5.0], [1.0, 0.5], start=1.0)
    torch.testing.assert_close(moved, torch.tensor([1.3, 1.15]))


def test_centered_clipping_by_hand_over_two_rounds() -> None:
    strategy = CenteredClipping(CenteredClippingParams(f=0, tau=3.0))
    # Updates 1, 2, 12 around 0: the last is clipped to 3.
    assert aggregate(strategy, 1.0, 2.0, 12.0) == pytest.approx(2.0, abs=1e-6)
    # Around the last center, 2: offsets -1, 0, 10 -> 3.
    assert aggregate(strategy, 1.0, 2.0, 12.0) == pytest.approx(2.0 + 2 / 3, abs=1e-6)
    twice = CenteredClipping(CenteredClippingParams(f=0, tau=3.0, L=2))
    assert aggregate(twice, 1.0, 2.0, 12.0) == pytest.approx(2.0 + 2 / 3, abs=1e-6)


def test_what_is_no_parameter_takes_the_median() -> None:
    strategy = make(Krum, 0)
    info = ModelInfo({}, frozenset({"w"}), frozenset(), {})
    strategy.setup(Setting(0, 3, 1, info, UniformSampler(0, 0)))
    models: list[Tensors] = [
        {"w": torch.tensor([w]), "mean": torch.tensor([m]), "count": torch.tensor(c)}
        for w, m, c in ((0.0, 1.0, 7), (0.1, 1e30, 5), (0.2, 3.0, 10**15))
    ]
    answers = [ClientReply(k, {"arrays": model}, {"num-examples": 1}) for k, model in enumerate(models)]
    result = strategy.aggregate(1, models[0], answers)
    assert result["mean"] == 3.0
    assert result["count"] == 7
    assert result["count"].dtype == torch.int64


# Near convergence.


def test_distances_are_exact_where_flowers_are_noise() -> None:
    """Six models 1e-4 apart in 200 000 weights: true squared distances are about 0.004."""
    multikrum = pytest.importorskip("flwr.serverapp.strategy.multikrum")
    rng = np.random.default_rng(0)
    base = rng.normal(size=200_000)
    models = [(base + 1e-4 * rng.normal(size=base.size)).astype(np.float32) for _ in range(6)]
    wide = [m.astype(np.float64) for m in models]
    exact = np.array([[math.fsum((a - b) ** 2) for b in wide] for a in wide])
    tensors = [{"w": torch.from_numpy(m)} for m in models]
    ours = robust.squared_distances(tensors, ["w"]).numpy()
    np.testing.assert_allclose(ours, exact, rtol=1e-9)
    from flowerbed import messages

    theirs = multikrum.compute_distances([messages.array_record(t) for t in tensors])
    assert exact.max() < 0.005
    assert np.abs(theirs - exact).max() > exact.max()


def test_krum_finds_the_odd_one_out_near_convergence() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(size=50_000)
    spread = [1e-4, 1e-4, 3e-5, 1e-4, 4e-4]
    models = [(base + s * rng.normal(size=base.size)).astype(np.float32) for s in spread]
    assert torch.equal(aggregate(make(Krum, 1), *models), torch.from_numpy(models[2]))


# Properties.


def random_models(seed: int, n: int, dimension: int = 5) -> list[torch.Tensor]:
    return list(torch.randn(n, dimension, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("rule", RULES)
@given(seed=st.integers(0, 10**6), f=st.integers(0, 2), extra=st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_the_order_of_replies_does_not_matter(
    rule: type[RobustStrategy], seed: int, f: int, extra: int
) -> None:
    strategy = make(rule, f)
    models = random_models(seed, strategy.least_replies() + extra)
    order = np.random.default_rng(seed).permutation(len(models))
    assert torch.equal(aggregate(strategy, *models), aggregate(strategy, *[models[i] for i in order]))


@pytest.mark.parametrize("rule", RULES)
@given(
    seed=st.integers(0, 10**6),
    f=st.integers(1, 2),
    size=st.sampled_from([1e3, 1e8, 1e18]),
    together=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_f_outliers_do_not_leave_the_honest_range(
    rule: type[RobustStrategy], seed: int, f: int, size: float, together: bool
) -> None:
    strategy = make(rule, f)
    models = random_models(seed, strategy.least_replies())
    signs = [1.0 if together or k % 2 else -1.0 for k in range(f)]
    forged = [s * size + m for s, m in zip(signs, models)]
    honest = torch.stack(models[f:])
    result = aggregate(strategy, *forged, *models[f:])
    assert (result >= honest.amin(0)).all()
    assert (result <= honest.amax(0)).all()


@pytest.mark.parametrize("rule", RULES)
def test_more_than_half_break_every_rule(rule: type[RobustStrategy]) -> None:
    """Guards the test above: it is the honest majority that protects."""
    strategy = make(rule, 1)
    n = strategy.least_replies()
    forged = [torch.full((5,), 1e6) + m for m in random_models(0, n)]
    result = aggregate(strategy, *forged[: n // 2 + 1], *random_models(1, n)[n // 2 + 1 :])
    assert (result > 1e3).any()


@pytest.mark.parametrize("rule", [TrimmedMean, MultiKrum, Bulyan])
@given(seed=st.integers(0, 10**6), n=st.integers(3, 9))
@settings(max_examples=12, deadline=None)
def test_without_byzantine_clients_it_is_the_uniform_mean(
    rule: type[RobustStrategy], seed: int, n: int
) -> None:
    models = random_models(seed, n)
    mean = aggregate(FedAvg(FedAvgParams(weighting="uniform")), *models)
    torch.testing.assert_close(aggregate(make(rule, 0), *models), mean, rtol=2e-7, atol=1e-8)


def test_a_bound_that_binds_nobody_is_fedavg() -> None:
    models = random_models(3, 5)
    for weighting in ("examples", "uniform"):
        mean = aggregate(FedAvg(FedAvgParams(weighting=weighting)), *models)
        bounded = NormBounding(NormBoundingParams(weighting=weighting, M=1e6))
        assert torch.equal(aggregate(bounded, *models), mean)
    clipping = CenteredClipping(CenteredClippingParams(f=0, tau=1e6))
    torch.testing.assert_close(aggregate(clipping, *models), mean, rtol=1e-6, atol=1e-7)


@given(seed=st.integers(0, 10**6), n=st.integers(2, 8), size=st.sampled_from([1.0, 1e4, 1e20]))
@settings(max_examples=15, deadline=None)
def test_one_client_moves_the_model_no_further_than_its_bound(seed: int, n: int, size: float) -> None:
    models = random_models(seed, n)
    other = [models[0] * -size, *models[1:]]
    for strategy, bound in (
        (lambda: NormBounding(NormBoundingParams(M=0.5)), 0.5),
        (lambda: CenteredClipping(CenteredClippingParams(f=0, tau=0.5)), 0.5),
    ):
        distance = float((aggregate(strategy(), *models) - aggregate(strategy(), *other)).norm())
        assert distance <= 2 * bound / n + 1e-6


@pytest.mark.parametrize("strategy", [make(Median, 0), make(TrimmedMean, 0)], ids=["median", "trimmed mean"])
def test_two_quadratics_reach_fedavgs_fixed_point(strategy: FederatedStrategy) -> None:
    """Of two clients the median is the mean; one pulls the weight down, the other up."""
    local = LocalParams(lr=0.1, batch_size=0, steps=10)
    toys.with_half(strategy, toys.QuadraticHalf())
    result = toys.quadratic_federation(strategy, 40, local).run()
    assert float(result.model["w"]) == pytest.approx(0.598711121, abs=1e-9)


# Refusals.


@pytest.mark.parametrize(
    ("name", "cohort", "needed"),
    [("median", 2, 3), ("krum", 4, 5), ("bulyan", 6, 7), ("centered_clipping", 9, 10)],
)
def test_a_cohort_that_is_too_small_is_refused_before_the_start(name: str, cohort: int, needed: int) -> None:
    with pytest.raises(ConfigError, match=rf"with f=1 needs .* = {needed} replies a round.*has {cohort}"):
        simulate(strategy=name, federation={"clients": 20, "cohort": cohort, "rounds": 1})


def test_too_few_replies_in_a_round_are_named() -> None:
    with pytest.raises(RunError, match=r"Round 1: Bulyan with f=1 needs 4f \+ 3 = 7 .*but only 6 came"):
        aggregate(make(Bulyan, 1), *random_models(0, 6))


def test_multi_krum_refuses_to_average_byzantine_clients() -> None:
    with pytest.raises(ConfigError, match=r"max\(2f \+ 3, m \+ f\) = 11 replies a round.*has 10"):
        simulate(strategy={"name": "multi_krum", "f": 2, "m": 9}, federation={"clients": 10, "rounds": 1})


@pytest.mark.parametrize(
    ("params", "bad"),
    [
        (RobustParams, {"f": -1}),
        (MultiKrumParams, {"m": -1}),
        (NormBoundingParams, {"M": 0.0}),
        (NormBoundingParams, {"M": math.inf}),
        (CenteredClippingParams, {"tau": -1.0}),
        (CenteredClippingParams, {"L": 0}),
    ],
)
def test_bad_parameters_are_named(params: type, bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"strategy.{next(iter(bad))} is"):
        params(**bad)


def test_complex_parameters_are_two_coordinates() -> None:
    values = [torch.tensor([complex(a, b)]) for a, b in ((1, 9), (2, -5), (1e9, 3))]
    result = robust.by_coordinate([{"w": v} for v in values], ["w"], robust.median)["w"]
    assert result.tolist() == [complex(2, 3)]
