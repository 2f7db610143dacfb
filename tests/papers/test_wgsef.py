"""WGSEF: the envelope, its proximal map, and training with it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from scipy.optimize import minimize
from torch import Tensor

from flowerbed.clients.local_round import Step
from flowerbed.clients.params import LocalParams
from flowerbed.errors import ConfigError
from flowerbed.experiments.papers.wgsef import (
    LAM,
    REGULARIZER,
    Plan,
    Wgsef,
    WgsefHalf,
    WgsefParams,
    envelope,
    envelope_factors,
    shares,
)
from flowerbed.experiments.papers.wgsef.probes import sparse_regression, tuned
from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.models.base import ModelSpec
from flowerbed.models.groups import norms
from flowerbed.models.info import ModelInfo
from flowerbed.models.zoo import build_model

HERE = "flowerbed.experiments.papers.wgsef"
WGSEF = f"{HERE}:Wgsef"
NET = {"name": f"{HERE}.probes:conv_net", "widths": (4, 4, 4, 8)}


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draws(m: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return norms and weights of groups."""
    rng = torch.Generator().manual_seed(seed)
    return (
        torch.rand(m, generator=rng, dtype=torch.float64) * 3,
        torch.rand(m, generator=rng, dtype=torch.float64) + 0.3,
    )


def test_worked_values_of_the_envelope() -> None:
    n, one = vector(1, 2), vector(1, 1)
    torch.testing.assert_close(shares(n, 0 * n, 1), vector(1 / 3, 2 / 3))
    assert float(envelope(n, one, 1)) == pytest.approx(4.5)


def test_special_cases_of_the_envelope() -> None:
    n, d = draws()
    assert float(envelope(n, d, 1)) == pytest.approx(0.5 * float((d.sqrt() * n).sum()) ** 2)
    assert float(envelope(n, d, 9)) == pytest.approx(0.5 * float((d * n**2).sum()))
    few = n * vector(1, 0, 0, 1, 0, 0, 0, 1, 0)
    assert float(envelope(few, d, 3)) == pytest.approx(0.5 * float((d * few**2).sum()))
    assert float(envelope(0 * n, d, 2)) == 0


def test_envelope_is_the_conjugate_of_the_conjugate() -> None:
    """Fenchel-Young: GS(w) + gs*(y) = <w, y> at the gradient y = d w / u; gs* sums the k largest squares."""
    for seed, k in itertools.product(range(5), (1, 3, 6)):
        n, d = draws(seed=seed)
        a = d.sqrt() * n
        y = d * n / shares(a, 0 * a, k)
        conjugate = 0.5 * float((y**2 / d).topk(k).values.sum())
        assert float(envelope(n, d, k)) + conjugate == pytest.approx(float(n @ y), rel=1e-12)


def test_gradient_of_the_envelope() -> None:
    n, d = draws()
    a = d.sqrt() * n
    step = 1e-6
    for j in range(len(n)):
        bump = torch.zeros_like(n)
        bump[j] = step
        slope = float(envelope(n + bump, d, 4) - envelope(n - bump, d, 4)) / (2 * step)
        assert slope == pytest.approx(float((d * n / shares(a, 0 * a, 4))[j]), rel=1e-5)


def test_worked_values_of_the_proximal_map() -> None:
    one = vector(1, 1)
    torch.testing.assert_close(vector(3, 1) * envelope_factors(vector(3, 1), one, 1, 1.0), vector(1.5, 0))
    n = vector(3, 2.5)
    torch.testing.assert_close(shares(math.sqrt(0.5) * n, 0.5 * one, 1), vector(13 / 22, 9 / 22))
    torch.testing.assert_close(n * envelope_factors(n, one, 1, 0.5), vector(1.625, 1.125))


@pytest.mark.parametrize("seed", range(4))
def test_proximal_map_is_never_worse_than_a_numerical_minimiser(seed: int) -> None:
    n, d = draws(6, seed)
    k, lam = 1 + seed, 0.4

    def objective(x: Any) -> float:
        x = torch.as_tensor(x, dtype=torch.float64).clamp_min(0)
        return float(0.5 * (x - n).square().sum() + lam * envelope(x, d, k))

    mine = objective(n * envelope_factors(n, d, k, lam))
    for start in (n.numpy(), 0.5 * n.numpy(), 0.01 + 0 * n.numpy()):
        found = minimize(objective, start, method="L-BFGS-B", bounds=[(0, None)] * 6)
        assert mine <= found.fun + 1e-9
        assert mine == pytest.approx(found.fun, abs=2e-3)


def test_shares_sum_to_k_also_when_norms_differ_by_many_orders() -> None:
    n = torch.cat([draws(5)[0], vector(1e-20, 1e-30, 1e-38, 0)])
    for k, lam in itertools.product((1, 4, 6, 7), (1e-6, 1e-2, 10.0)):
        c = torch.full_like(n, lam)
        u = shares(math.sqrt(lam) * n, c, k)
        assert float(u.sum()) == pytest.approx(k, rel=1e-9)
        assert u[-1] == 0


def test_at_least_k_groups_stay_and_more_than_k_for_a_small_lambda() -> None:
    n = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.2
    left = [int((envelope_factors(n, torch.ones_like(n), 16, lam) > 0).sum()) for lam in (0.01, 1, 10, 1e4)]
    assert left[0] == 64
    assert left == sorted(left, reverse=True)
    assert left[-1] == 16
    assert torch.equal(envelope_factors(n, torch.ones_like(n), 16, 0.0), torch.ones_like(n))
    torch.testing.assert_close(envelope_factors(n, torch.ones_like(n), 64, 0.5), torch.full_like(n, 1 / 1.5))


def test_proximal_map_is_firmly_nonexpansive() -> None:
    rng = torch.Generator().manual_seed(3)
    d = draws(5)[1]
    for _ in range(50):
        x, y = torch.randn(2, 5, 4, generator=rng, dtype=torch.float64)
        px, py = (v * envelope_factors(v.norm(dim=1), d, 2, 0.7)[:, None] for v in (x, y))
        assert float((px - py).square().sum()) <= float(((px - py) * (x - y)).sum()) + 1e-12


def opened(**asked: Any) -> tuple[WgsefHalf, Plan, Any, dict[str, Any]]:
    """Return a half in a round of a small network, its plan, and the extras."""
    half = WgsefHalf(WgsefParams(**asked))
    lam = torch.tensor(half.params.lam, dtype=torch.float64)
    local = worlds.open_round(
        LocalParams(batch_size=4),
        spec=ModelSpec("mlp", (6,), 3, {"hidden": (5,)}),
        received={REGULARIZER: {LAM: lam}},
    )
    extras = dict(half.begin(local))
    return half, extras["groups"], local, extras


def stepped(half: WgsefHalf, local: Any, extras: dict[str, Any], lr: float) -> None:
    half.after_step(Step(0, lr, {}, local.parts, extras, local.task))


def test_step_uses_the_learning_rate_that_the_optimizer_used() -> None:
    half, plan, local, extras = opened(k=0.4, lam=2.0)
    n = norms(plan.groups, local.parts.parameters)
    stepped(half, local, extras, 0.1)
    expected = n * envelope_factors(n, torch.ones_like(n), 2, 0.2)
    torch.testing.assert_close(norms(plan.groups, local.parts.parameters), expected, rtol=1e-6, atol=1e-9)
    before = local.parts.parameters["head.weight"].detach().clone()
    stepped(half, local, extras, 0.0)
    torch.testing.assert_close(norms(plan.groups, local.parts.parameters), expected, rtol=1e-6, atol=1e-9)
    assert torch.equal(local.parts.parameters["head.weight"], before)


def test_half_space_step_zeroes_groups_that_turn_back() -> None:
    half, plan, local, extras = opened(k=1.0, lam=0.0, half_space=0.1)
    layer = plan.groups[0]
    with torch.no_grad():
        for member in layer.members:
            local.parts.parameters[member.tensor][1] *= -0.5
            local.parts.parameters[member.tensor][2] *= 0.05
            local.parts.parameters[member.tensor][3] *= 0.2
    stepped(half, local, extras, 0.1)
    assert (norms(plan.groups, local.parts.parameters) > 0).tolist() == [True, False, False, True, True]


def test_weights_and_k_by_layer() -> None:
    info = ModelInfo.of(build_model(NET["name"], (1, 8, 8), 10, 0, widths=NET["widths"]))  # type: ignore[arg-type]
    sized = Plan.of(info, WgsefParams(d="size"))
    assert float(sized.d.mean()) == pytest.approx(1)
    assert float(sized.d[4] / sized.d[0]) == pytest.approx(math.sqrt((36 + 2) / (9 + 2)))
    layered = Plan.of(info, WgsefParams(scope="layer", k=0.3))
    assert layered.parts == [1, 1, 1, 2]
    n = torch.arange(1.0, 21).double()
    factors = layered.factors(n, 1e4)
    assert (factors > 0).nonzero().flatten().tolist() == [3, 7, 11, 18, 19]


def test_delivered_model_has_k_groups_and_lambda_grows_until_then() -> None:
    world = worlds.run(
        WGSEF, {"k": 0.3, "lam": 0.5, "growth": 3.0}, model=NET, federation={"clients": 1, "rounds": 4}
    )
    plan = Plan.of(
        world.parts.spec.model and ModelInfo.of(world.parts.spec.model.build(3)), WgsefParams(k=0.3)
    )
    assert plan.active(world.result.model) <= plan.k == 6
    records = [r.metrics for r in world.result.history if "next-lambda" in r.metrics]
    lam, held = 0.5, False
    for seen in records:
        held = held or seen["active-groups"] <= 1.05 * 6
        lam *= 1.0 if held else 3.0
        assert seen["next-lambda"] == pytest.approx(lam)
    assert len(records) == 4


def test_what_was_removed_stays_away_during_fine_tuning() -> None:
    world = worlds.run(
        WGSEF,
        {"method": "oneshot", "k": 0.5, "finetune": 2},
        model=NET,
        federation={"clients": 1, "rounds": 4},
        local={"momentum": 0.9, "persist": True},
    )
    active = [r.metrics["active-groups"] for r in world.result.history if "active-groups" in r.metrics]
    assert active == [20, 10, 10, 10]


def test_one_step_a_round_is_the_same_at_the_server_as_at_the_client() -> None:
    options: dict[str, Any] = {
        "model": {"name": "worlds:bn_net"},
        "federation": {"clients": 1, "rounds": 5},
        "local": {"steps": 1, "persist": True},
    }
    at = {
        p: worlds.run(WGSEF, {"k": 0.5, "lam": 1.0, "prox": p}, **options).trained
        for p in ("client", "server")
    }
    assert worlds.equal(at["client"], at["server"])


def test_the_mean_of_clients_is_dense_and_the_servers_map_makes_it_sparse() -> None:
    options: dict[str, Any] = {
        "model": {"name": "worlds:bn_net"},
        "federation": {"clients": 4, "rounds": 6},
        "local": {"steps": 3},
    }
    world = worlds.run(WGSEF, {"k": 0.25, "lam": 20.0, "prox": "server"}, **options)
    strategy = world.parts.strategy
    assert isinstance(strategy, Wgsef)
    assert strategy.plan.active(world.trained) < 8
    assert strategy.plan.active(world.result.model) == 2


def test_regression_data_hold_the_truth_in_their_test_rows() -> None:
    data = sparse_regression(seed=4, n=30)
    truth = data.test.extras["target"][:200]
    assert int((truth.view(50, 4).norm(dim=1) > 0).sum()) == 8
    assert torch.equal(data.test.inputs[:200], torch.eye(200))
    noise = data.train.extras["target"] - data.train.inputs @ truth
    assert float(noise.std() / truth.norm()) == pytest.approx(10**-0.5, rel=0.4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"k": 0.0}, "strategy.k is 0.0"),
        ({"growth": 0.5}, "strategy.growth is 0.5"),
        ({"method": "ridge"}, "strategy.method is 'ridge'"),
        ({"half_space": -0.5}, "strategy.half_space is -0.5"),
        ({"half_space": 0.1, "prox": "server"}, "set strategy.prox=client"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        WgsefParams(**options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prox": "server"}, "set local.steps"),
        ({"method": "oneshot", "finetune": 2}, "leave a round"),
    ],
)
def test_settings_that_need_the_run_are_checked(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        worlds.run(WGSEF, options, model={"name": "worlds:bn_net"})


def test_the_best_lambda_of_group_lasso_counts() -> None:
    runs = {
        arm: Finished(arm, 0, Path(), {"accuracy": a}) for arm, a in (("lasso-0.1", 0.5), ("lasso-0.12", 0.6))
    }
    assert tuned(runs) == {"lasso-0.1": {"chosen:accuracy": 0.0}, "lasso-0.12": {"chosen:accuracy": 0.6}}
    assert tuned({}) == {}
