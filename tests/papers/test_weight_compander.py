"""Weight Compander: the curve, its start, its bounds, and averaging in either space."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from scipy.optimize import brentq
from torch import Tensor, nn

from flowerbed.clients.local_round import LocalRound
from flowerbed.clients.params import LocalParams
from flowerbed.datasets.sources import load_dataset
from flowerbed.errors import ClientError, ConfigError
from flowerbed.experiments.measures import Measured
from flowerbed.experiments.papers.weight_compander import (
    CURVES,
    WeightCompander,
    WeightCompanderHalf,
    WeightCompanderParams,
    bounded,
    companded,
    curve,
    psi,
    psi_inverse,
)
from flowerbed.experiments.papers.weight_compander.claims import at_best
from flowerbed.experiments.papers.weight_compander.probes import at_the_best_rate, companding, conv3
from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.models.base import ModelSpec
from flowerbed.models.reparametrised import effective_state_dict, fold, part_name, raw_name, raw_names
from flowerbed.models.zoo import build_model
from flowerbed.strategies.base import ClientReply

HERE = "flowerbed.experiments.papers.weight_compander"
WC = f"{HERE}:WeightCompander"
A, B = torch.tensor(3.0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)


def network(of: str = f"{HERE}.probes:conv3", seed: int = 5, **asked: Any) -> nn.Module:
    return build_model(f"{HERE}:companded", (1, 8, 8), 10, seed, of=of, asked=asked, options={}).eval()


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("shape", CURVES)
def test_curve_is_odd_with_slope_a_over_b_and_an_inverse(shape: str) -> None:
    v = torch.linspace(-4, 4, 33, dtype=torch.float64)
    w = psi(shape, v, A, B)
    assert torch.equal(w, -w.flip(0)) or torch.allclose(w, -psi(shape, -v, A, B), rtol=0, atol=0)
    step = torch.tensor(1e-6, dtype=torch.float64)
    slope = (psi(shape, step, A, B) - psi(shape, -step, A, B)) / (2 * step)
    assert float(slope) == pytest.approx(1.5, abs=1e-5)
    torch.testing.assert_close(psi_inverse(shape, w, A, B), v)


def test_gradient_reaches_v_with_the_slope_of_the_curve() -> None:
    """dL/dv = dL/dw (a / b) / (1 + (v / b)^2), so that w moves by - lr Psi'^2 dL/dw."""
    v = torch.tensor([-7.0, -0.1, 0.0, 1.0, 20.0], dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([1.0, -2.0, 3.0, 0.5, 4.0], dtype=torch.float64)
    (found,) = torch.autograd.grad(psi("arctan", v, A, B), v, upstream)
    slope = 1.5 / (1 + (v.detach() / 2) ** 2)
    torch.testing.assert_close(found, upstream * slope)
    lr = 1e-6
    moved = psi("arctan", v.detach() - lr * found, A, B) - psi("arctan", v.detach(), A, B)
    torch.testing.assert_close(moved, -lr * slope**2 * upstream, rtol=1e-4, atol=1e-12)


def test_small_weights_grow_and_large_ones_shrink_about_the_fixed_point() -> None:
    fixed = brentq(lambda v: 3 * math.atan(v / 2) - v, 0.5, 4.7)
    at = torch.tensor([0.01, fixed - 0.01, fixed + 0.01, 100.0], dtype=torch.float64)
    ratio = psi("arctan", at, A, B) / at
    assert (ratio[:2] > 1).all()
    assert (ratio[2:] < 1).all()
    assert float(psi("arctan", at, A, B).max()) < 3 * math.pi / 2


def test_all_start_as_the_plain_network() -> None:
    plain, x = build_model(f"{HERE}.probes:conv3", (1, 8, 8), 10, 5).eval(), images()
    for asked in ({}, {"learned": True}, {"shape": "tanh"}, {"shape": "mulaw"}):
        torch.testing.assert_close(network(**asked)(x), plain(x), rtol=0, atol=1e-6)
    naive = network(start="naive")
    assert torch.equal(naive.state_dict()[raw_name("head.weight")], plain.state_dict()["head.weight"])
    assert not torch.allclose(naive(x), plain(x), atol=1e-3)


def test_units_are_the_spread_of_the_layers_initial_weights() -> None:
    plain, model = build_model(f"{HERE}.probes:conv3", (1, 8, 8), 10, 5), network()
    for raw in raw_names(model.state_dict()):
        name = raw.replace("parametrizations.", "").replace(".original", "")
        s = plain.state_dict()[name].std()
        a, b = curve(model.state_dict(), raw)
        torch.testing.assert_close(torch.stack((a, b)), torch.stack((3 * s, 2 * s)))


def test_no_weight_passes_the_cap_whatever_is_trained() -> None:
    model = network()
    with torch.no_grad():
        for raw in raw_names(model.state_dict()):
            model.get_parameter(raw).mul_(1e4)
    state = effective_state_dict(model)
    for raw in raw_names(model.state_dict()):
        a, _ = curve(model.state_dict(), raw)
        largest = state[raw.replace("parametrizations.", "").replace(".original", "")].abs().max()
        assert 0.99 < float(largest / (a * math.pi / 2)) <= 1 + 1e-6


def test_a_wide_curve_trains_like_plain_weights() -> None:
    """a = b large: one federation of each, compared after folding."""
    wide = worlds.run(WC, {"a": 1e4, "b": 1e4}, federation={"clients": 2})
    plain = worlds.run("fedavg", federation={"clients": 2}).result.model
    module = wide.parts.spec.model.build(3)
    module.load_state_dict(wide.result.model)
    for name, value in effective_state_dict(module).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-5)


def test_without_a_curve_it_is_fedavg_bit_for_bit() -> None:
    assert worlds.equal(worlds.run(WC, {"shape": "none"}).result.model, worlds.run("fedavg").result.model)


def opened(local: LocalParams, **asked: Any) -> tuple[WeightCompanderHalf, LocalRound]:
    """Return a half and a round of a network with the curve."""
    params = WeightCompanderParams(**asked)
    spec = WeightCompander(params).model_spec(ModelSpec("mlp", (6,), 3, {"hidden": (5,)}))
    return WeightCompanderHalf(params), worlds.open_round(local, spec=spec)


def test_decay_moves_kernels_and_leaves_the_curve_alone_unless_asked() -> None:
    """With gradients of zero only weight decay moves anything."""
    for included in (False, True):
        half, local = opened(
            LocalParams(lr=0.1, weight_decay=0.5), learned=True, most=0, decay_curve=included
        )
        extras = half.begin(local)
        parameters = {n: torch.full_like(p, 2.0) for n, p in local.parts.parameters.items()}
        zero = {n: torch.zeros_like(p) for n, p in parameters.items()}
        seen = half.correct(zero, parameters, extras)
        for name in seen:
            total = seen[name] + 0.5 * parameters[name]
            alone = name.endswith(("log_a", "log_b")) and not included
            assert torch.allclose(total, torch.full_like(total, 0.0 if alone else 1.0)), name


def test_the_larger_step_is_on_kernels_alone() -> None:
    half, local = opened(LocalParams(), shape="none", kernel_gradient=2.25)
    ones = {n: torch.ones_like(p) for n, p in local.parts.parameters.items()}
    found = half.correct(ones, local.parts.parameters, half.begin(local))
    assert {n: float(g.mean()) for n, g in found.items()} == {
        n: 2.25 if p.ndim > 1 else 1.0 for n, p in ones.items()
    }


@pytest.mark.parametrize("log_a", [-9.0, -0.3, 0.0, 0.7, 9.0])
@pytest.mark.parametrize("log_b", [-9.0, 0.2, 9.0])
def test_bounds_of_a_learned_curve(log_a: float, log_b: float) -> None:
    raw = "l.parametrizations.weight.original"
    parts = {"a0": 3.0, "b0": 2.0, "log_a": log_a, "log_b": log_b}
    state = {raw: torch.zeros(1), **{part_name(raw, n): torch.tensor(v) for n, v in parts.items()}}
    a, b = (float(value) for value in curve({**state, **bounded(state, 4.0)}, raw))
    assert 1 - 1e-5 <= a / b <= 4 + 1e-5
    assert 3 / 4 - 1e-5 <= a <= 12 + 1e-4
    slope = 1.5 * math.exp(log_a - log_b)
    if 1 <= slope <= 4 and abs(log_a) <= math.log(4):
        assert (a, b) == pytest.approx((3 * math.exp(log_a), 2 * math.exp(log_b)))
    assert bounded(state, 0.0) == {}


def test_learning_moves_the_curve_and_stays_within_the_bounds() -> None:
    world = worlds.run(
        WC, {"learned": True}, federation={"clients": 1}, local={"lr": 2.0}, model={"name": "worlds:bn_net"}
    )
    model = world.result.model
    for raw in raw_names(model):
        a, b = curve(model, raw)
        assert 1 - 1e-5 <= float(a / b) <= 4 + 1e-5
        assert float(model[part_name(raw, "log_a")]) != 0


def test_averages_in_both_spaces() -> None:
    """Two replies of one weight each: the mean of v, or the v whose weight is the mean of the weights."""
    raw = "l.parametrizations.weight.original"
    current = {
        raw: torch.zeros(1),
        part_name(raw, "a0"): torch.tensor(3.0),
        part_name(raw, "b0"): torch.tensor(2.0),
    }
    sent = [{**current, raw: torch.tensor([1.0])}, {**current, raw: torch.tensor([5.0])}]
    replies = [
        ClientReply(i, {"arrays": s}, {"num-examples": n})
        for i, (s, n) in enumerate(zip(sent, (1, 3), strict=True))
    ]
    in_v = WeightCompander(WeightCompanderParams()).aggregate(1, current, replies)[raw]
    assert float(in_v) == pytest.approx(4.0)
    in_w = WeightCompander(WeightCompanderParams(aggregate_in="w")).aggregate(1, current, replies)[raw]
    mean = (3 * math.atan(0.5) + 3 * 3 * math.atan(2.5)) / 4
    assert float(in_w) == pytest.approx(2 * math.tan(mean / 3), rel=1e-5)


def test_one_client_is_the_same_in_both_spaces_up_to_rounding() -> None:
    options: dict[str, Any] = {"federation": {"clients": 1}}
    one = worlds.run(WC, {"aggregate_in": "v"}, **options).result.model
    worlds.close(one, worlds.run(WC, {"aggregate_in": "w"}, **options).result.model)


def test_what_a_client_says_of_the_scales_is_ignored() -> None:
    raw = "l.parametrizations.weight.original"
    names = [part_name(raw, n) for n in ("a0", "b0", "log_a", "log_b")]
    current = {raw: torch.zeros(1), **dict(zip(names, map(torch.tensor, (3.0, 2.0, 0.0, 0.0)), strict=True))}
    lie = {
        raw: torch.full((1,), 1e6),
        **dict(zip(names, map(torch.tensor, (1e9, 1.0, 50.0, 0.0)), strict=True)),
    }
    replies = [ClientReply(0, {"arrays": lie}, {"num-examples": 1})]
    for space in ("v", "w"):
        found = WeightCompander(WeightCompanderParams(learned=True, aggregate_in=space)).aggregate(
            1, current, replies
        )
        a, b = curve(found, raw)
        assert float(psi("arctan", found[raw], a, b)) <= 4 * 3 * math.pi / 2 * (1 + 1e-6)


def test_figures_of_the_weights_by_hand() -> None:
    data, model = load_dataset("digits"), network()
    found = companding(Measured(model, data, 0, torch.device("cpu")))
    w = torch.cat([p.detach().flatten() for p in fold(network()).parameters() if p.ndim > 1]).double()
    spread = w - w.mean()
    assert found["largest-weight"] == float(w.abs().max())
    assert found["near-zero"] == int((w.abs() < 0.01).sum()) / len(w)
    assert found["kurtosis"] == pytest.approx(float((spread**4).mean() / (spread**2).mean() ** 2))
    assert found["saturated"] == 0
    assert found["steepest"] == pytest.approx(1.5)
    assert found["fold-gap"] <= 1e-5
    with torch.no_grad():
        model.get_parameter(raw_name("head.weight")).fill_(1.0)
    assert companding(Measured(model, data, 0, torch.device("cpu")))["saturated"] == pytest.approx(
        640 / len(w)
    )
    plain = conv3((1, 8, 8), 10).eval()
    assert companding(Measured(plain, data, 0, torch.device("cpu")))["steepest"] == 1.0


def test_bfloat16_does_not_reach_the_curve() -> None:
    model = network()
    with torch.autocast("cpu", torch.bfloat16):
        weight = model.get_submodule("head").weight
    assert weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"shape": "sine"}, "strategy.shape is 'sine'"),
        ({"b": 0.0}, "strategy.b 0.0; give numbers above 0"),
        ({"learned": True, "a": 1.0}, "starts between 1 and strategy.most"),
        ({"most": 0.5}, "strategy.most is 0.5"),
        ({"kernel_gradient": 0.0}, "strategy.kernel_gradient is 0.0"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        WeightCompanderParams(**options)


def test_adamw_with_an_exempt_curve_is_refused() -> None:
    half, local = opened(LocalParams(optimizer="adamw", weight_decay=0.1), learned=True)
    with pytest.raises(ClientError, match=r"strategy\.decay_curve=true"):
        half.begin(local)


def test_an_unknown_inner_model_is_named() -> None:
    with pytest.raises(ConfigError, match="lenet9"):
        companded((1, 28, 28), 10, of="lenet9")


def test_both_methods_are_compared_at_the_rate_that_is_best_for_plain_training() -> None:
    accuracies = {
        "plain-0.02": 0.7,
        "plain-0.05": 0.6,
        "plain-0.1": 0.5,
        "wc-0.02": 0.1,
        "wc-0.05": 0.9,
        "wc-0.1": 0.8,
    }
    runs = {arm: Finished(arm, 0, Path(), {"accuracy": a, "loss": 1 - a}) for arm, a in accuracies.items()}
    found = {(n, arm): v for arm, values in at_the_best_rate(runs).items() for n, v in values.items()}
    assert at_best("accuracy", "plain").value(found) == 0.7
    assert at_best("accuracy", "wc").value(found) == 0.1
    assert at_best("loss", "wc").value(found) == pytest.approx(0.9)
    del runs["wc-0.02"]
    assert at_the_best_rate(runs)["wc-0.05"]["best-rate:accuracy"] == 0.9
    assert at_the_best_rate({}) == {}
