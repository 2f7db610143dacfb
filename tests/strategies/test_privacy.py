"""Differential privacy: clipping and noise against closed forms, accounting against independent figures."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowerbed.clients.transform_params import PrivacyParams
from flowerbed.errors import ConfigError, RunError
from flowerbed.experiments.simulation import resume, simulate
from flowerbed.server.loop import RunResult
from flowerbed.storage import Tensors
from flowerbed.strategies.accountant import Release, epsilon
from flowerbed.strategies.base import ClientReply
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams
from flowerbed.strategies.privacy import CentralPrivacy

NAMES = frozenset({"w"})
MODEL = {"name": "mlp", "hidden": [16]}


def replies(*values: Any, **streams: torch.Tensor) -> list[ClientReply]:
    more = {name: {"v": value} for name, value in streams.items()}
    return [
        ClientReply(
            k, {"arrays": {"w": torch.as_tensor(v, dtype=torch.float32)}, **more}, {"num-examples": k + 1}
        )
        for k, v in enumerate(values)
    ]


def private(params: PrivacyParams, cohort: int = 10) -> CentralPrivacy:
    return CentralPrivacy(params, seed=5, clients=100, cohort=cohort)


def through(
    transform: CentralPrivacy, answers: list[ClientReply], start: float = 0.0, round_: int = 1
) -> Tensors:
    """Return the one model that every reply carries after the transform."""
    current = {"w": torch.full_like(answers[0].model["w"], start)}
    after = transform.replies(round_, current, answers, NAMES)
    for reply in after[1:]:
        assert torch.equal(reply.model["w"], after[0].model["w"])
    return after[0].model


def run(rounds: int = 1, **sections: Any) -> RunResult:
    base: dict[str, Any] = {
        "model": MODEL,
        "federation": {"clients": 6, "cohort": 4, "rounds": rounds},
        "local": {"batch_size": 128},
        "evaluation": {"every": 0},
        "grid": {"device": "cpu"},
    }
    return simulate(**{**base, **sections})


def metrics(result: RunResult) -> dict[str, Any]:
    return dict(next(r for r in reversed(result.history) if r.phase == "train").metrics)


# Clipping.


def test_updates_are_clipped_and_weigh_the_same() -> None:
    quiet = PrivacyParams(mode="central", clip=1.0, noise=0.0)
    # From (1, 1): updates (3, 4), clipped to (0.6, 0.8), and (0, -0.5), kept.
    mean = through(private(quiet), replies([4.0, 5.0], [1.0, 0.5]), start=1.0)
    torch.testing.assert_close(mean["w"], torch.tensor([1.3, 1.15]))


def test_a_clip_that_binds_nobody_is_the_uniform_mean() -> None:
    answers = replies(*torch.randn(5, 7, generator=torch.Generator().manual_seed(0)))
    mean = FedAvg(FedAvgParams(weighting="uniform")).aggregate(1, answers[0].model, answers)
    quiet = private(PrivacyParams(mode="central", clip=1e6, noise=0.0))
    torch.testing.assert_close(through(quiet, answers, start=0.2)["w"], mean["w"])


@given(seed=st.integers(0, 10**6), n=st.integers(1, 8), size=st.sampled_from([0.0, 1.0, 1e6]))
@settings(max_examples=25, deadline=None)
def test_one_client_moves_the_mean_by_twice_the_clip_norm_at_most(seed: int, n: int, size: float) -> None:
    models = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    other = torch.cat([models[:1] * -size, models[1:]])
    quiet = PrivacyParams(mode="central", clip=0.5, noise=0.0)
    one, two = through(private(quiet), replies(*models)), through(private(quiet), replies(*other))
    assert float((one["w"] - two["w"]).norm()) <= 2 * 0.5 / n + 1e-6


def test_further_streams_are_clipped_with_the_model() -> None:
    quiet = private(PrivacyParams(mode="central", clip=1.0, noise=0.0))
    answers = replies([3.0], control=torch.tensor([4.0]))
    after = quiet.replies(1, {"w": torch.zeros(1)}, answers, NAMES)[0]
    torch.testing.assert_close(after.streams["control"]["v"], torch.tensor([0.8]))
    torch.testing.assert_close(after.model["w"], torch.tensor([0.6]))


def test_streams_of_whole_numbers_are_refused() -> None:
    with pytest.raises(RunError, match="stream 'counts' holds whole numbers"):
        through(private(PrivacyParams(mode="central", noise=0.0)), replies([1.0], counts=torch.tensor([3])))


# Noise.


def test_the_noise_of_the_mean_has_its_standard_deviation() -> None:
    pytest.importorskip("dp_accounting")
    params = PrivacyParams(mode="central", clip=0.5, noise=2.0)
    zeros = replies(*torch.zeros(10, 200_000))
    noise = through(private(params), zeros)["w"]
    # z C / n = 2 * 0.5 / 10; the standard error of the deviation is 0.1 / sqrt(2 * 200 000).
    assert float(noise.std()) == pytest.approx(0.1, abs=6 * 0.1 / math.sqrt(400_000))
    assert float(noise.mean()) == pytest.approx(0.0, abs=6 * 0.1 / math.sqrt(200_000))
    assert torch.equal(through(private(params), zeros)["w"], noise)
    assert not torch.equal(through(private(params), zeros, round_=2)["w"], noise)


def test_buffers_and_metrics_of_the_replies_stay() -> None:
    pytest.importorskip("dp_accounting")
    answers = [
        ClientReply(
            k, {"arrays": {"w": torch.ones(2), "mean": torch.tensor([float(k)])}}, {"num-examples": k}
        )
        for k in range(1, 4)
    ]
    after = private(PrivacyParams(mode="central")).replies(1, {"w": torch.zeros(2)}, answers, NAMES)
    assert [float(r.model["mean"]) for r in after] == [1.0, 2.0, 3.0]
    assert [r.examples for r in after] == [1, 2, 3]


def test_the_algorithm_acts_on_the_noisy_mean() -> None:
    """A server learning rate scales the noise as well; noise added afterwards would not be scaled."""
    pytest.importorskip("dp_accounting")
    sections: dict[str, Any] = {"privacy": {"mode": "central", "noise": 1.0}, "local": {"lr": 0.0}}
    initial = run(strategy="fedavg", local={"lr": 0.0}).model
    whole = run(strategy="fedavg", **sections).model
    half = run(strategy={"name": "fedavg", "server_lr": 0.5}, **sections).model
    for name, start in initial.items():
        torch.testing.assert_close(half[name], start + 0.5 * (whole[name] - start))


def flat_change(result: RunResult, initial: Tensors) -> torch.Tensor:
    return torch.cat([(result.model[n] - v).flatten() for n, v in initial.items()])


@pytest.mark.parametrize(("mode", "share"), [("central", 1 / 4), ("local", 1 / 2)])
def test_the_noise_of_a_whole_run(mode: str, share: float) -> None:
    """With lr = 0 a round adds noise alone: of the sum z C / n centrally, of n clients z C / sqrt(n) locally."""
    pytest.importorskip("dp_accounting")
    wide: dict[str, Any] = {"model": {"name": "mlp", "hidden": [512]}, "local": {"lr": 0.0}}
    initial = run(**wide).model
    noisy = flat_change(run(**wide, privacy={"mode": mode, "clip": 0.3, "noise": 0.5}), initial)
    expected = 0.5 * 0.3 * share
    assert float(noisy.std()) == pytest.approx(expected, abs=6 * expected / math.sqrt(2 * len(noisy)))


@pytest.mark.parametrize("mode", ["central", "local"])
def test_clipping_bounds_a_round_and_a_wide_clip_changes_nothing(mode: str) -> None:
    start = run(local={"lr": 0.0}).model
    tight = flat_change(run(privacy={"mode": mode, "clip": 0.01, "noise": 0.0}), start)
    assert float(tight.norm()) == pytest.approx(0.01, rel=0.2)
    assert float(tight.norm()) <= 0.01 + 1e-6
    uniform = {"name": "fedavg", "weighting": "uniform"}
    free = run(strategy=uniform).model
    for name, value in run(strategy=uniform, privacy={"mode": mode, "clip": 1e6, "noise": 0.0}).model.items():
        torch.testing.assert_close(value, free[name], rtol=1e-5, atol=1e-6)


def test_batch_norm_statistics_are_averaged_without_noise_once_that_is_accepted() -> None:
    pytest.importorskip("dp_accounting")
    model = {"name": "resnet8", "norm": "bn"}
    with pytest.raises(ConfigError, match=r"privacy.allow_buffers=true"):
        run(model=model, privacy={"mode": "central"})
    noisy = run(model=model, privacy={"mode": "central", "allow_buffers": True}).model
    plain = run(model=model).model
    buffers = [n for n in plain if "running" in n or "tracked" in n]
    assert buffers
    assert all(torch.equal(noisy[n], plain[n]) for n in buffers)
    assert not torch.equal(noisy["head.weight"], plain["head.weight"])


# Adaptive clipping.


def test_the_clip_norm_follows_the_quantile_by_hand() -> None:
    answers = replies([1.0], [2.0], [3.0], [4.0])
    for clip, share in ((2.5, 0.5), (10.0, 1.0), (0.5, 0.0), (3.0, 0.75)):
        transform = private(PrivacyParams(mode="central", clip=clip, noise=0.0, adaptive=True))
        through(transform, answers)
        assert transform.clip == pytest.approx(clip * math.exp(-0.2 * (share - 0.5)))


def test_the_clip_norm_converges_to_the_quantile() -> None:
    answers = replies(*[[float(k)] for k in range(1, 11)])
    params = PrivacyParams(mode="central", clip=0.1, noise=0.0, adaptive=True, quantile=0.75)
    transform = private(params)
    for round_ in range(300):
        through(transform, answers, round_=round_)
    assert 7.0 <= transform.clip <= 8.1


def test_the_noise_is_split_between_the_mean_and_the_count() -> None:
    """1/z^2 = 1/z_u^2 + 1/(2 sigma_b)^2: with z = 1 and sigma_b = 1, z_u = (3/4)^(-1/2)."""
    pytest.importorskip("dp_accounting")
    params = PrivacyParams(mode="central", clip=1.0, noise=1.0, adaptive=True, bit_noise=1.0)
    noise = through(private(params), replies(*torch.zeros(10, 200_000)))["w"]
    assert float(noise.std()) == pytest.approx(0.1 / math.sqrt(0.75), rel=0.01)


def test_too_small_a_cohort_for_adaptive_clipping_is_refused() -> None:
    pytest.importorskip("dp_accounting")
    with pytest.raises(ConfigError, match=r"privacy.noise=1.0 .* privacy.bit_noise, here 0.5"):
        private(PrivacyParams(mode="central", noise=1.0, adaptive=True))


# Accounting.


def exact_delta(sigma: float, eps: float) -> float:
    """Balle and Wang 2018, theorem 8: the Gaussian mechanism with noise sigma and sensitivity one."""

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    return phi(0.5 / sigma - eps * sigma) - math.exp(eps) * phi(-0.5 / sigma - eps * sigma)


@pytest.mark.parametrize(("noise", "count"), [(1.0, 1), (2.0, 10), (5.0, 100), (0.7, 3)])
def test_without_sampling_epsilon_bounds_the_exact_one_closely(noise: float, count: int) -> None:
    pytest.importorskip("dp_accounting")
    found = epsilon(Release(noise, "none", 10, 10), count, 1e-5)
    # count releases are one with noise / sqrt(count); the exact delta falls as epsilon grows.
    sigma = noise / math.sqrt(count)
    assert exact_delta(sigma, found) <= 1e-5
    assert exact_delta(sigma, 0.85 * found) > 1e-5


def test_poisson_sampling_gives_the_known_figure() -> None:
    """Abadi et al. 2016, section 5.1: q = 0.01, sigma = 4, T = 10 000, delta = 1e-5 cost epsilon 1.26 at most."""
    pytest.importorskip("dp_accounting")
    assert 0.9 < epsilon(Release(4.0, "poisson", 10_000, 100), 10_000, 1e-5) < 1.26


def test_the_sampling_assumptions_meet_at_full_participation() -> None:
    pytest.importorskip("dp_accounting")
    full = epsilon(Release(2.0, "none", 8, 8), 5, 1e-5)
    assert epsilon(Release(2.0, "poisson", 8, 8), 5, 1e-5) == pytest.approx(full)
    # Replacing a client moves the sum twice as far as taking it out.
    assert epsilon(Release(4.0, "fixed-size", 8, 8), 5, 1e-5) == pytest.approx(full)


def test_sampling_amplifies_and_rounds_add_up() -> None:
    pytest.importorskip("dp_accounting")
    for sampling in ("poisson", "fixed-size"):
        few, many = Release(2.0, sampling, 1000, 10), Release(2.0, sampling, 1000, 500)
        assert epsilon(few, 10, 1e-5) < epsilon(many, 10, 1e-5)
        assert 0 == epsilon(few, 0, 1e-5) < epsilon(few, 1, 1e-5) < epsilon(few, 20, 1e-5)


def test_epsilon_is_reported_every_round() -> None:
    pytest.importorskip("dp_accounting")
    result = run(3, privacy={"mode": "central", "noise": 2.0, "delta": 1e-4})
    found = [r.metrics["privacy-epsilon"] for r in result.history if r.phase == "train"]
    assert found == [epsilon(Release(2.0, "fixed-size", 6, 4), t, 1e-4) for t in (1, 2, 3)]


def test_local_epsilon_is_that_of_the_client_asked_most_often() -> None:
    """Two data sets of a client differ by twice the clip norm, so z counts half."""
    pytest.importorskip("dp_accounting")
    everyone = run(2, federation={"clients": 3, "rounds": 2}, privacy={"mode": "local", "noise": 4.0})
    assert metrics(everyone)["privacy-epsilon"] == epsilon(Release(2.0, "none", 1, 1), 2, 1e-5)
    one_of_many = run(
        2, federation={"clients": 50, "cohort": 1, "rounds": 2}, privacy={"mode": "local", "noise": 4.0}
    )
    assert metrics(one_of_many)["privacy-epsilon"] == epsilon(Release(2.0, "none", 1, 1), 1, 1e-5)


def test_without_noise_nothing_is_claimed() -> None:
    assert "privacy-epsilon" not in metrics(run(privacy={"mode": "central", "noise": 0.0}))
    assert "privacy-epsilon" not in metrics(run(privacy={"mode": "local", "noise": 0.0}))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"needs dp-accounting.*flowerbed\[privacy\]"):
        run(privacy={"mode": "central", "noise": 3.21})


# With every algorithm.


CENTRAL = {"mode": "central", "noise": 0.1, "adaptive": True, "bit_noise": 1.0}
LOCAL = {"mode": "local", "noise": 0.01}


@pytest.mark.parametrize(
    ("strategy", "privacy"),
    [
        ("fedadam", CENTRAL),
        ("flower:FedAdam", CENTRAL),
        ("scaffold", CENTRAL),
        ("fedbabu", CENTRAL),
        ("scaffold", LOCAL),
        ("flower:FedMedian", LOCAL),
    ],
)
def test_private_runs_resume_to_the_same_bits(strategy: str, privacy: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    whole = run(3, strategy=strategy, privacy=privacy)
    assert not whole.failures
    run(2, strategy=strategy, privacy=privacy, run={"dir": str(tmp_path / "short")})
    longer = resume(tmp_path / "short", federation={"rounds": 3})
    for name, value in whole.model.items():
        assert torch.equal(longer.model[name], value), name
    assert metrics(longer) == metrics(whole)
    plain = run(3, strategy=strategy).model
    assert any(not torch.equal(value, plain[name]) for name, value in whole.model.items())


@pytest.mark.parametrize("strategy", ["median", "fedbuff", "flower:Krum", "norm_bounding"])
def test_algorithms_that_need_each_reply_are_refused_centrally(strategy: str) -> None:
    with pytest.raises(ConfigError, match="needs each of them; use privacy.mode=local"):
        run(strategy=strategy, privacy={"mode": "central", "noise": 0.0})
    assert not run(strategy=strategy, privacy={"mode": "local", "noise": 0.0}).failures


def test_local_privacy_refuses_replies_that_are_not_used() -> None:
    with pytest.raises(ConfigError, match="federation.oversample"):
        run(
            federation={"clients": 6, "cohort": 2, "rounds": 1, "oversample": 0.5},
            privacy={"mode": "local", "noise": 0.0},
        )


BAD: Sequence[dict[str, Any]] = (
    {"mode": "both"},
    {"clip": 0.0},
    {"clip": math.inf},
    {"noise": -0.1},
    {"noise": math.nan},
    {"delta": 0.0},
    {"delta": 1.0},
    {"quantile": 1.0},
    {"clip_lr": 0.0},
    {"bit_noise": -1.0},
    {"sampling": "random"},
)


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_parameters_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"privacy.{next(iter(bad))} is"):
        PrivacyParams(**bad)


def test_adaptive_clipping_is_the_servers() -> None:
    with pytest.raises(ConfigError, match=r"privacy.adaptive needs privacy.mode=central"):
        PrivacyParams(mode="local", adaptive=True)
