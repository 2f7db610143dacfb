"""Dynamical stability of SGD: the moment map by enumeration, closed forms, what N clients are."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import worlds
from torch import Tensor

from flowerbed import seeds
from flowerbed.datasets.regression import TARGET
from flowerbed.errors import ConfigError
from flowerbed.experiments.papers.sgd_dynamical_stability import (
    Stability,
    StabilityParams,
    coordinates,
    critical_rate,
    next_moment,
    pulled,
    trace_of,
)
from flowerbed.experiments.papers.sgd_dynamical_stability.central import central
from flowerbed.experiments.papers.sgd_dynamical_stability.probes import Diagonal, diagonal, two_layer
from flowerbed.models.curvature import gram, output_gradients
from flowerbed.strategies.base import Phase

MODULE = "flowerbed.experiments.papers.sgd_dynamical_stability"
DATA = {"name": "flowerbed.datasets.regression:sparse_linear", "d": 6, "n": 12, "test": 4}


def rows_of(n: int = 5, p: int = 8) -> Tensor:
    return torch.randn(n, p, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def moment_of(r: int, seed: int = 4) -> Tensor:
    half = torch.randn(r, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return half @ half.T


def run(options: dict[str, Any], **sections: Any) -> worlds.World:
    base: dict[str, Any] = {
        "dataset": DATA,
        "model": {"name": f"{MODULE}.probes:diagonal"},
        "partition": {"name": "iid"},
        "local": {"batch_size": 1, "replacement": True, "lr": 0.05, "steps": 1},
        "evaluation": {"measures": [f"{MODULE}.probes:sharpness"]},
    }
    return worlds.run(
        f"{MODULE}:Stability",
        options,
        **{n: {**base.get(n, {}), **sections.get(n, {})} for n in {*base, *sections}},
    )


def test_t_is_the_mean_over_every_sample_that_a_step_may_draw() -> None:
    rows, moment, eta = rows_of(), moment_of(8), 0.1
    eye = torch.eye(8, dtype=torch.float64)
    steps = [eye - eta * torch.outer(g, g) for g in rows]
    expected = sum(a @ moment @ a for a in steps) / len(steps)
    torch.testing.assert_close(next_moment(rows, moment, eta), expected)


def test_t_of_the_projector_and_the_trace_bound() -> None:
    """<P, T(P)> = tr P - 2 eta tr G + eta^2 mean |g_i|^4, and Jensen."""
    rows, eta = coordinates(gram(rows_of())), 0.2
    p = torch.eye(rows.shape[1], dtype=torch.float64)
    squares = rows.square().sum(1)
    expected = rows.shape[1] - 2 * eta * squares.mean() + eta**2 * squares.square().mean()
    torch.testing.assert_close(next_moment(rows, p, eta).trace(), expected)
    assert critical_rate(gram(rows_of())) <= 2 / float(squares.mean())


def test_the_projector_gives_the_bound_for_several_samples_a_step() -> None:
    """By enumeration of all pairs: (1 - 1/B) tr G^2 + (1/B) mean |g|^4 stands where B = 1 has mean |g|^4."""
    rows, eta, b = rows_of(4, 4), 0.2, 2
    eye = torch.eye(4, dtype=torch.float64)
    found = []
    for drawn in itertools.product(rows, repeat=b):
        step = eye - eta * sum(torch.outer(g, g) for g in drawn) / b
        found.append((step @ step).trace())
    g = rows.T @ rows / 4
    quartic = rows.square().sum(1).square().mean()
    expected = 4 - 2 * eta * g.trace() + eta**2 * ((1 - 1 / b) * (g @ g).trace() + quartic / b)
    torch.testing.assert_close(torch.stack(found).mean(), expected)


def test_t_is_self_adjoint_and_keeps_moments_positive() -> None:
    rows, one, other = rows_of(), moment_of(8, 1), moment_of(8, 2)
    left, right = (next_moment(rows, one, 0.3) * other).sum(), (one * next_moment(rows, other, 0.3)).sum()
    torch.testing.assert_close(left, right)
    assert float(torch.linalg.eigvalsh(next_moment(rows, one, 0.3))[0]) >= -1e-12


def test_the_coordinates_carry_all_inner_products() -> None:
    rows = rows_of()
    found = coordinates(gram(rows))
    torch.testing.assert_close(found @ found.T, rows @ rows.T)
    g = found.T @ found / len(rows)
    torch.testing.assert_close(g, torch.diag(g.diagonal()))
    # Two equal samples span one direction less.
    assert coordinates(gram(torch.cat([rows, rows[:1]]))).shape == (6, 5)


def test_the_critical_rate_is_where_the_spectral_radius_of_t_is_one() -> None:
    """Against the whole matrix of T, n^2 by n^2."""
    rows = coordinates(gram(rows_of()))
    r = rows.shape[1]
    basis = torch.eye(r * r, dtype=torch.float64).view(-1, r, r)

    def radius(eta: float) -> float:
        matrix = torch.stack([next_moment(rows, e, eta).flatten() for e in basis])
        return float(torch.linalg.eigvals(matrix).abs().max())

    eta = critical_rate(gram(rows_of()))
    assert radius(eta) == pytest.approx(1, abs=1e-6)
    assert radius(0.98 * eta) < 1 < radius(1.02 * eta)


def test_critical_rates_by_hand() -> None:
    """One sample: |1 - eta g^2| <= 1. Orthogonal samples: each for itself, the longest decides."""
    one = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert critical_rate(gram(one)) == pytest.approx(2 / 25)
    even = torch.eye(3, dtype=torch.float64) * 2
    assert critical_rate(gram(even)) == pytest.approx(2 / 4)
    uneven = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert critical_rate(gram(uneven)) == pytest.approx(2 / 9, rel=1e-4)
    assert pulled(uneven, torch.eye(3, dtype=torch.float64))[2, 2] == pytest.approx(81 / 3)


def test_linearised_sgd_shrinks_below_the_critical_rate_and_grows_above() -> None:
    """In mean square, by the moment map itself, from the identity."""
    rows, eta = coordinates(gram(rows_of())), critical_rate(gram(rows_of()))
    for c, grows in ((0.95, False), (1.05, True)):
        moment = torch.eye(rows.shape[1], dtype=torch.float64)
        for _ in range(400):
            moment = next_moment(rows, moment, c * eta)
        assert (float(moment.trace()) > rows.shape[1]) == grows


def test_the_trace_of_a_diagonal_network_in_closed_form() -> None:
    torch.manual_seed(0)
    net = diagonal((6,), 1, double=True)
    x = torch.rand(9, 6, dtype=torch.float64) * 2 - 1
    moments = x.square().mean(0)
    net.requires_grad_(False)
    closed = float(((net.a.square() + net.b.square()) * moments).sum())
    assert trace_of(net, x) == pytest.approx(closed, rel=1e-10)
    assert closed >= 2 * float(((net.a * net.b).abs() * moments).sum())
    size, r = net.norm()
    assert float(2 * size * r) == pytest.approx(float((net.a.square() + net.b.square()).sum()))


def test_the_trace_of_two_layers_is_the_closed_form_on_the_sphere() -> None:
    torch.manual_seed(0)
    d = 4
    net = two_layer((d,), 1, m=3)
    x = torch.randn(40_000, d)
    x = x * 2 / torch.linalg.vector_norm(x, dim=1, keepdim=True)
    net.requires_grad_(False)
    path, imbalance = (float(v) for v in net.norm())
    closed = 0.5 * float((net.w.square().sum(1) + d * net.a.square()).sum())
    assert float(output_gradients(net, x, 4096).square().sum(1).mean()) == pytest.approx(closed, rel=0.02)
    assert closed == pytest.approx(d**0.5 * path * imbalance, rel=1e-5)
    assert imbalance >= 1


def test_the_start_has_the_imbalance_that_is_asked_for() -> None:
    torch.manual_seed(0)
    for r0 in (1.0, 8.0):
        assert float(diagonal((500,), 1, r0=r0).requires_grad_(False).norm()[1]) == pytest.approx(
            r0, rel=1e-4
        )


def test_a_round_of_one_step_of_n_clients_is_a_step_on_n_samples() -> None:
    world = run({}, federation={"clients": 4, "rounds": 1})
    parts = world.parts
    net = parts.spec.model.build(3)
    assert isinstance(net, Diagonal)
    rows = []
    for client in range(4):
        own = torch.from_numpy(parts.train.indices(client).copy())
        drawn = seeds.numpy_rng(3, "data order", client, 0).integers(len(own), size=len(own))
        rows.append(int(own[drawn[0]]))
    x, y = parts.dataset.train.inputs[rows], parts.dataset.train.extras[TARGET][rows].float()
    loss = 0.5 * (net(x) - y).square().mean()
    for name, g in zip("ab", torch.autograd.grad(loss, [net.a, net.b]), strict=True):
        expected = getattr(net, name).detach() - 0.05 * g
        torch.testing.assert_close(world.result.model[name], expected)


def test_the_clients_own_traces_average_to_that_of_all_data() -> None:
    world = run({"report": True}, federation={"clients": 5, "rounds": 1})
    said = next(r.metrics["own-trace"] for r in world.result.history if "own-trace" in r.metrics)
    net = world.parts.spec.model.build(3)
    assert said == pytest.approx(trace_of(net, world.parts.dataset.train.inputs), rel=1e-5)


def test_the_rate_in_units_of_the_bound_is_that_of_the_initial_model() -> None:
    """In every round, however far training has gone."""
    one = run({"c": 0.5}, federation={"clients": 1, "rounds": 3})
    net, x = one.parts.spec.model.build(3), one.parts.dataset.train.inputs
    lr = 0.5 * 2 / trace_of(net, x)
    other = run({}, federation={"clients": 1, "rounds": 3}, local={"lr": lr})
    worlds.close(one.result.model, other.result.model)


def test_the_displacement_has_its_length_and_is_made_once() -> None:
    one = run({"perturbation": 0.5}, federation={"clients": 1, "rounds": 2}, local={"lr": 0.0})
    start = one.parts.spec.model.build(3).state_dict()
    away = torch.cat([one.result.model[n] - start[n] for n in start])
    assert float(torch.linalg.vector_norm(away)) == pytest.approx(0.5, rel=1e-5)
    still = Stability(StabilityParams())
    assert still.start_phase(Phase("train", 1), dict(start)) is not None
    assert all(torch.equal(v, start[n]) for n, v in still.start_phase(Phase("train", 1), dict(start)).items())


def test_wrong_parameters_are_refused() -> None:
    for options, sentence in (({"c": -1.0}, "strategy.c"), ({"perturbation": -1.0}, "strategy.perturbation")):
        with pytest.raises(ConfigError, match=sentence):
            StabilityParams(**options)
    with pytest.raises(ConfigError, match=r"model.r0 is 0\.5"):
        diagonal((3,), 1, r0=0.5)


def test_one_client_is_a_plain_loop_where_clipping_binds_too() -> None:
    for batch in (1, 5):
        local = {"clip_norm": 0.05, "persist": True, "steps": 7, "batch_size": batch}
        world = run({}, federation={"clients": 1, "rounds": 3}, local=local)
        assert worlds.equal(world.result.model, central(world.parts.simulation))
        free = run({}, federation={"clients": 1, "rounds": 3}, local={**local, "clip_norm": 0.0})
        assert not worlds.equal(world.result.model, free.result.model)
