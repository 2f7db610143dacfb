"""One step of gradient descent and linear attention: closed forms against slow twins and against sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import worlds
from torch import Tensor

from flowerbed.datasets.prompts import Prompts, prompts
from flowerbed.errors import ConfigError
from flowerbed.experiments.measures import Measured
from flowerbed.experiments.papers.one_step_gd_icl import (
    LinearAttention,
    linear_attention,
    moments,
    optimum,
    population_loss,
)
from flowerbed.experiments.papers.one_step_gd_icl.probes import judged
from flowerbed.seeds import torch_rng

PAPER = "flowerbed.experiments.papers.one_step_gd_icl"
CPU = torch.device("cpu")


def table(**options: Any) -> Prompts:
    train = prompts(**options).train
    return Prompts.of(train.inputs, train.extras)


def layer(d: int = 3, seed: int = 0, layers: int = 1) -> LinearAttention:
    torch.manual_seed(seed)
    return linear_attention((5, d + 1), 1, layers=layers).double()


def exact(d: int, a: Tensor, n: int) -> LinearAttention:
    """Return the theorem's representative: w = e_{d+1}, M = [[n A, 0], [0, 0]]."""
    model = linear_attention((n + 1, d + 1), 1).to(a.dtype)
    w, m = torch.zeros(d + 1, dtype=a.dtype), torch.zeros(d + 1, d + 1, dtype=a.dtype)
    w[-1], m[:d, :d] = 1.0, n * a
    eye = torch.eye(d + 1, dtype=a.dtype)
    parts = {"layers.0.k": eye, "layers.0.q": m, "layers.0.v": eye, "h": w}
    model.load_state_dict(parts)
    return model


def drawn(count: int, **options: Any) -> tuple[Tensor, Tensor]:
    tokens, y, _ = table(**options).draw(count, torch.Generator().manual_seed(1))
    return tokens.double(), y.double()


def test_the_layer_is_the_papers_sum_over_the_context() -> None:
    """h^T W_V (sum u u^T) W_K^T W_Q q, written with loops; the query is no part of the sum."""
    model, (tokens, _) = layer(), drawn(4, d=3, n=4)
    block = model.layers[0]
    for prompt, said in zip(tokens, model(tokens), strict=True):
        gram = sum((torch.outer(u, u) for u in prompt[:-1]), torch.zeros(4, 4, dtype=torch.float64)) / 4
        by_hand = model.h @ (block.v @ (gram @ (block.k.T @ (block.q @ prompt[-1]))))
        torch.testing.assert_close(said, by_hand)


def test_a_and_the_leftover_terms_are_all_that_the_layer_does() -> None:
    """pred = sum_i y_i x_i^T A x_q + the terms without y and with y squared; A has two terms."""
    model, (tokens, _) = layer(seed=2), drawn(6, d=3, n=4)
    x, y, query = tokens[:, :-1, :3], tokens[:, :-1, 3], tokens[:, -1, :3]
    a, without, squared = model.effective()
    n = x.shape[1]
    rebuilt = (
        torch.einsum("bi,bid,de,be->b", y, x, a, query)
        + torch.einsum("bia,bic,acd,bd->b", x, x, without, query)
        + torch.einsum("bi,bi,d,bd->b", y, y, squared, query)
    ) / n
    torch.testing.assert_close(rebuilt, model(tokens))


def test_factors_may_move_without_anything_changing() -> None:
    one, other = layer(seed=3), layer(seed=3)
    with torch.no_grad():
        other.h.mul_(-2.0)
        other.layers[0].q.mul_(-0.5)
    for mine, theirs in zip(one.effective(), other.effective(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_optimal_layer_is_one_step_of_gradient_descent() -> None:
    """Autograd's gradient of 1/2 sum (w . x - y)^2 at 0, times -eta, applied to the query."""
    options: dict[str, Any] = {"d": 3, "n": 4, "noise": 0.5}
    a, _ = optimum(table(**options))
    tokens, _ = drawn(5, **options)
    said = exact(3, a, 4)(tokens)
    for prompt, guess in zip(tokens, said, strict=True):
        w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        loss = 0.5 * (prompt[:-1, :3] @ w - prompt[:-1, 3]).square().sum()
        (gradient,) = torch.autograd.grad(loss, w)
        eta = 1 / (4 + 3 + 1 + 0.25)
        torch.testing.assert_close(guess, -eta * gradient @ prompt[-1, :3])


def test_closed_forms() -> None:
    """d = 1 by hand, the linear case, and the best loss."""
    for d, n, noise in ((1, 1, 0.0), (1, 7, 2.0), (5, 20, 0.5), (20, 10, 0.5)):
        one = table(d=d, n=n, noise=noise)
        a, step = optimum(one)
        eta = 1 / (n + d + 1 + noise**2)
        torch.testing.assert_close(a, eta * torch.eye(d, dtype=torch.float64), rtol=1e-6, atol=1e-9)
        assert step == pytest.approx(eta, rel=1e-6)
        best = noise**2 + d * (d + 1 + noise**2) / (n + d + 1 + noise**2)
        assert population_loss(one, a) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"d": 3, "n": 4, "noise": 0.5},
        {"d": 3, "n": 4, "noise": 0.5, "function": "relu"},
        {"d": 3, "n": 4, "noise": 0.5, "spectra": [[0.2, 1.0, 3.0]]},
        {"d": 3, "n": 4, "noise": 1.0, "spectra": [[0.2, 1.0, 3.0], [1.0, 1.0, 0.5]]},
    ],
)
def test_the_optimum_is_that_of_least_squares_on_many_prompts(options: dict[str, Any]) -> None:
    """pred is linear in A, so the best A on a sample is a least-squares fit of y on s x_q^T."""
    tokens, y = drawn(400_000, **options)
    s = torch.einsum("bi,bid->bd", tokens[:, :-1, -1], tokens[:, :-1, :-1])
    features = torch.einsum("bd,be->bde", s, tokens[:, -1, :-1]).flatten(1)
    fitted = torch.linalg.solve(features.T @ features, features.T @ y).view(3, 3)
    a, step = optimum(table(**options))
    assert float((fitted - a).norm() / a.norm()) < 0.05
    assert float((y - features @ a.flatten()).square().mean()) == pytest.approx(
        population_loss(table(**options), a), rel=0.02
    )
    scalar = features @ torch.eye(3, dtype=torch.float64).flatten()
    assert step == pytest.approx(float((scalar @ y) / (scalar @ scalar)), rel=0.03)


def test_the_optimum_is_stationary() -> None:
    one = table(d=3, n=4, spectra=[[0.2, 1.0, 3.0], [1.0, 1.0, 0.5]])
    a, step = optimum(one)
    rng = torch.Generator().manual_seed(0)
    for _ in range(5):
        direction = 1e-4 * torch.randn(3, 3, generator=rng, dtype=torch.float64)
        up, down = population_loss(one, a + direction), population_loss(one, a - direction)
        assert up > population_loss(one, a)
        assert up == pytest.approx(down, rel=1e-9)
    eye = torch.eye(3, dtype=torch.float64)
    losses = [population_loss(one, f * step * eye) for f in (0.99, 1.0, 1.01)]
    assert min(losses) == losses[1] > population_loss(one, a)


def test_a_task_for_each_client_weighs_large_spectra_more() -> None:
    """The compromise is no average of the clients' own optima."""
    spectra = [[0.5, 1.0], [2.0, 1.0]]
    a, _ = optimum(table(d=2, n=4, spectra=spectra))
    eta = 1 / (4 + 2 + 1 + 0.25)
    assert a.diagonal().tolist() == pytest.approx([eta * 2.5 / 4.25, eta])
    g, kappa = moments(table(d=2, n=4, spectra=spectra))
    assert (g / kappa).tolist() == pytest.approx([eta, eta])


def test_whitening_changes_nothing() -> None:
    """The same draws: anisotropic prompts under A Sigma^-1 are isotropic ones under A."""
    spectrum = [0.1, 1.0, 9.0]
    plain, _ = drawn(50, d=3, n=4)
    scaled, _ = drawn(50, d=3, n=4, spectra=[spectrum])
    torch.testing.assert_close(scaled[..., -1], plain[..., -1], rtol=1e-4, atol=1e-4)
    one, _ = optimum(table(d=3, n=4))
    other, _ = optimum(table(d=3, n=4, spectra=[spectrum]))
    torch.testing.assert_close(exact(3, one, 4)(plain), exact(3, other, 4)(scaled), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", ["linear", "relu"])
def test_judged_finds_nothing_wrong_with_the_exact_layer(function: str) -> None:
    options: dict[str, Any] = {"d": 3, "n": 8, "function": function, "judged": 30_000}
    data = prompts(**options)
    a, _ = optimum(table(**options))
    found = judged(Measured(exact(3, a.float(), 8), data, 0, CPU))
    for name in ("matrix-error", "leftover", "eta-error", "off-diagonal"):
        assert found[name] == pytest.approx(0, abs=1e-5), name
    assert found["loss"] == pytest.approx(found["gd-loss"], rel=1e-5)
    assert found["loss"] == pytest.approx(found["best-loss"], rel=0.05)
    off = judged(Measured(exact(3, 1.1 * a.float(), 8), data, 0, CPU))
    assert off["matrix-error"] == pytest.approx(0.1, rel=1e-3)
    assert off["eta-error"] == pytest.approx(0.1, rel=1e-3)
    assert off["gd-loss"] == found["gd-loss"] < off["loss"]


def test_ridge_is_bayes_on_linear_functions() -> None:
    """Its error is the same under every spectrum, and below what any one step reaches."""
    found = [
        judged(Measured(layer().float(), prompts(d=3, n=4, judged=20_000, spectra=s), 0, CPU))
        for s in ([], [[0.1, 1.0, 9.0]])
    ]
    assert found[0]["ridge-loss"] == pytest.approx(found[1]["ridge-loss"], rel=1e-3)
    assert found[0]["ridge-loss"] < 0.8 * found[0]["gd-loss"]
    assert found[1]["plain-gd-loss"] > 1.2 * found[1]["gd-loss"]


def test_two_layers_can_make_two_steps() -> None:
    """The first layer subtracts what w_1 = eta sum y x explains from each y; the second steps on what is left."""
    d, n, eta = 3, 8, 0.1
    tokens, _ = drawn(5, d=d, n=n)
    model = linear_attention((n + 1, d + 1), 1, layers=2).double()
    reads = torch.zeros(d + 1, d + 1, dtype=torch.float64)
    reads[-1, -1] = 1.0
    sees = torch.zeros_like(reads)
    sees[:d, :d] = -n * eta * torch.eye(d, dtype=torch.float64)
    block = {"k": torch.eye(d + 1, dtype=torch.float64), "q": sees, "v": reads}
    state = {f"layers.{i}.{name}": value for i in (0, 1) for name, value in block.items()}
    model.load_state_dict({**state, "h": reads[-1]})
    for prompt, said in zip(tokens, model(tokens), strict=True):
        x, y, w = prompt[:-1, :d], prompt[:-1, d], torch.zeros(d, dtype=torch.float64)
        for _ in range(2):
            w = w + eta * x.T @ (y - x @ w)
        # The query's y starts as 0 and loses what is predicted, so the read-out has the other sign.
        torch.testing.assert_close(-said, w @ prompt[-1, :d])


def test_a_client_each_is_the_pooled_step() -> None:
    """Two clients with a plain momentum step a round: the average of their models is the step on both gradients."""
    spectra = [[0.5, 2.0], [2.0, 0.5]]
    world = worlds.run(
        f"{PAPER}:OneStep",
        dataset={"name": "flowerbed.datasets.prompts:prompts", "d": 2, "n": 4, "spectra": spectra},
        model={"name": f"{PAPER}:linear_attention"},
        partition={"name": "iid"},
        federation={"clients": 2, "rounds": 5},
        local={"steps": 1, "batch_size": 16, "lr": 0.05, "momentum": 0.9, "persist": True},
        evaluation={"measures": [f"{PAPER}.probes:judged"]},
    )
    net = world.parts.spec.model.build(3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for step in range(5):
        optimizer.zero_grad()
        for client in range(2):
            (row,) = world.parts.train.indices(client)
            own = table(d=2, n=4, spectra=[spectra[row]])
            tokens, y, _ = own.draw(16, torch_rng(3, "prompts", client, step))
            (0.5 * (net(tokens) - y).square().mean()).backward()
        optimizer.step()
    worlds.close(dict(world.result.model), dict(net.state_dict()))


def test_a_model_needs_a_layer() -> None:
    with pytest.raises(ConfigError, match="layers=0"):
        linear_attention((5, 4), 1, layers=0)
