"""Collapse under linear layers: the closed form against brute force, autograd and training; the normalisation by N."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import worlds
from torch import Tensor

from flowerbed.errors import ConfigError
from flowerbed.experiments.papers.nc_deep_linear import DeepLinearParams, Frame, frame, root, threshold
from flowerbed.models.deep_linear import TABLE

STRATEGY = "flowerbed.experiments.papers.nc_deep_linear:DeepLinear"
IMBALANCED = (200, 100, 50, 50)


def minimiser(counts: tuple[int, ...], found: Frame, dim: int = 7) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return features as rows, the layers, first one first, and labels at the closed form, along random directions."""
    rng = torch.Generator().manual_seed(2)
    k = len(counts)
    bases = [
        torch.linalg.qr(torch.randn(dim, k, generator=rng, dtype=torch.float64))[0]
        for _ in range(found.depth)
    ]
    each = found.sigma ** (1 / found.depth)
    ends = [*bases[1:], torch.eye(k, dtype=torch.float64)]
    layers = [end @ torch.diag(each) @ found.shape @ base.T for base, end in zip(bases, ends, strict=True)]
    labels = torch.arange(k).repeat_interleave(torch.tensor(counts))
    means = torch.diag(found.sigma / (found.sigma**2 + found.noise)) @ found.shape @ bases[0].T
    return means[labels], layers, labels


def objective(h: Tensor, layers: list[Tensor], y: Tensor, lambda_w: float, lambda_h: float) -> Tensor:
    """F as in the paper, by loops over matrices."""
    out = h.T
    for w in layers:
        out = w @ out
    one_hot = torch.eye(layers[-1].shape[0], dtype=torch.float64)[y].T
    value = ((out - one_hot) ** 2).sum() / (2 * len(y)) + lambda_h / 2 * (h**2).sum()
    return value + sum(lambda_w / 2 * (w**2).sum() for w in layers)


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_x_is_the_argmin_of_g(depth: int) -> None:
    grid = torch.linspace(0, 30, 600_001, dtype=torch.float64)
    for share in (0.05, 0.5, 0.97, 1.03, 3.0):
        b = share * threshold(depth)
        g = 1 / (grid**depth + 1) + b * grid
        assert root(b, depth) == pytest.approx(float(grid[g.argmin()]), abs=1e-4), (depth, share)
        assert (root(b, depth) == 0) == (share > 1)


def test_at_the_threshold_both_minima_are_equal() -> None:
    """Between it and the largest b that has a root, the largest root is no minimum: what the released code takes."""
    for depth in (2, 3, 5):
        b = threshold(depth)
        x = root(b, depth)
        assert 1 / (x**depth + 1) + b * x == pytest.approx(1, abs=1e-12)
        # The maximum of M x^(M-1) / (x^M + 1)^2, where the roots end.
        top = ((depth - 1) / (depth + 1)) ** (1 / depth)
        assert depth * top ** (depth - 1) / (top**depth + 1) ** 2 > b * 1.01


def test_two_classes_under_one_layer_by_hand() -> None:
    """K=2, n=1 each, lambda_W = lambda_H = 1/8: b = N/n N lambda_W lambda_H = 1/16, x = 3, sigma^2 = N lambda_H x."""
    found = frame((1, 1), 1, 1 / 8, 1 / 8)
    assert found.b.tolist() == [1 / 16, 1 / 16]
    assert (found.sigma**2).tolist() == pytest.approx([3 / 4, 3 / 4])
    means, layers, product = found.targets()
    assert means.diagonal().tolist() == pytest.approx([0.75, 0.75])
    assert product.diagonal().tolist() == pytest.approx([0.75, 0.75])
    assert layers.diagonal().tolist() == pytest.approx([0.75, 0.75])
    # Twice n/2N times g, and g is a quarter plus three sixteenths.
    assert found.minimum == pytest.approx(7 / 32)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_closed_form_is_stationary_and_a_minimum(depth: int) -> None:
    lambdas = (5e-4, 2e-3)
    found = frame(IMBALANCED, depth, *lambdas)
    h, layers, y = minimiser(IMBALANCED, found)
    tensors = [t.requires_grad_() for t in (h, *layers)]
    value = objective(h, layers, y, *lambdas)
    assert value.item() == pytest.approx(found.minimum, rel=1e-12)
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(value, tensors))
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        moved = [
            t.detach() + 0.05 * torch.randn(t.shape, generator=rng, dtype=torch.float64) for t in tensors
        ]
        assert float(objective(moved[0], moved[1:], y, *lambdas)) > found.minimum


def test_with_a_bias_the_frame_is_a_simplex_and_costs_one_class_less() -> None:
    counts, lambdas = (5, 5, 5), (1e-3, 2e-3)
    found = frame(counts, 2, *lambdas, bias=True)
    h, layers, y = minimiser(counts, found)
    bias = torch.full((3,), 1 / 3, dtype=torch.float64, requires_grad=True)
    tensors = [t.requires_grad_() for t in (h, *layers)]
    out = h @ layers[0].T @ layers[1].T + bias
    value = ((out - torch.eye(3, dtype=torch.float64)[y]) ** 2).sum() / 30
    value = value + lambdas[1] / 2 * (h**2).sum() + lambdas[0] / 2 * sum((w**2).sum() for w in layers)
    assert value.item() == pytest.approx(found.minimum, rel=1e-12)
    assert found.minimum == pytest.approx(2 / 3 * frame(counts, 2, *lambdas).minimum)
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(value, [*tensors, bias]))


def test_larger_classes_have_longer_rows_and_shorter_means() -> None:
    means, layers, _ = (t.diagonal() for t in frame((300, 100, 20, 10), 3, 5e-4, 5e-4).targets())
    assert (layers.diff() < 0).all()
    assert (means.diff() > 0).all()


def test_small_classes_are_lost_exactly_beyond_the_bound() -> None:
    """M=1: n_k < N^2 lambda_W lambda_H, here 64."""
    found = frame((200, 100, 63, 37), 1, 2e-2, 2e-2)
    assert found.lost.tolist() == [False, False, True, True]
    assert found.b.tolist() == pytest.approx([64 / 200, 64 / 100, 64 / 63, 64 / 37])
    assert frame((200, 100, 65, 35), 1, 2e-2, 2e-2).lost.tolist() == [False, False, False, True]


def test_a_mean_over_samples_and_classes_is_another_pair_of_lambdas() -> None:
    """F with mean((P h - y)^2) / 2 over N K numbers is F / K with K times the lambdas."""
    rng = torch.Generator().manual_seed(1)
    h = torch.randn(12, 5, generator=rng, dtype=torch.float64)
    w = torch.randn(4, 5, generator=rng, dtype=torch.float64)
    y = torch.arange(4).repeat(3)
    square = ((h @ w.T - torch.eye(4, dtype=torch.float64)[y]) ** 2).mean() / 2
    theirs = square + 0.01 / 2 * (w**2).sum() + 0.02 / 2 * (h**2).sum()
    assert float(theirs) == pytest.approx(float(objective(h, [w], y, 0.04, 0.08)) / 4)


def test_with_a_bias_classes_must_be_equal() -> None:
    with pytest.raises(ConfigError, match="equal class sizes"):
        frame(IMBALANCED, 1, 1e-3, 1e-3, bias=True)


def free(clients: int, **local: Any) -> worlds.World:
    return worlds.run(
        STRATEGY,
        {"lambda_w": 0.01, "lambda_h": 0.02},
        dataset={"name": "flowerbed.datasets.class_sizes:numbered", "sizes": [9, 5, 3]},
        model={"name": "flowerbed.models.deep_linear:free_features", "samples": 17, "dim": 4, "depth": 2},
        federation={"clients": clients, "rounds": 2},
        local={"batch_size": 0, "lr": 0.3, **local},
    )


def test_one_step_at_three_clients_is_one_step_on_f() -> None:
    """Sizes differ and classes are skewed; without N and n_c / N the lambdas would be others."""
    world = free(3)
    assert len(set(world.parts.train.sizes)) > 1
    net = world.parts.spec.model.build(3)
    tensors = {n: v.detach().clone().requires_grad_() for n, v in net.state_dict().items()}
    y = world.parts.dataset.train.labels
    for _ in range(2):
        value = objective(tensors[TABLE], [tensors["head.0.weight"], tensors["head.1.weight"]], y, 0.01, 0.02)
        steps = torch.autograd.grad(value, list(tensors.values()))
        with torch.no_grad():
            for tensor, step in zip(tensors.values(), steps, strict=True):
                tensor -= 0.3 * step
    worlds.close(world.trained, {n: t.detach() for n, t in tensors.items()})


def test_one_client_on_batches_descends_the_same_f_in_the_mean() -> None:
    """The penalty of the features is N times a mean, so an epoch of small steps is a step of the sum."""
    world = free(1, batch_size=1, lr=1e-7, epochs=1)
    net = world.parts.spec.model.build(3)
    tensors = {n: v.detach().clone().requires_grad_() for n, v in net.state_dict().items()}
    y = world.parts.dataset.train.labels
    layers = [tensors["head.0.weight"], tensors["head.1.weight"]]
    steps = torch.autograd.grad(objective(tensors[TABLE], layers, y, 0.01, 0.02), list(tensors.values()))
    for (name, start), step in zip(tensors.items(), steps, strict=True):
        moved = (start.detach() - world.trained[name]) / (1e-7 * 2 * 17)
        torch.testing.assert_close(moved, step, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize(("depth", "simplex_is_best"), [(1, True), (3, False)])
def test_under_several_layers_the_cross_entropy_prefers_low_rank(depth: int, simplex_is_best: bool) -> None:
    """Four classes of 100: the least penalty of logits Z on K means is (M+1)/2 c sum_i tau_i(Z)^(2/(M+1))."""
    c = ((5e-4) ** (depth + 1) * 100) ** (1 / (depth + 1))
    square = torch.tensor([[1.0, 0, -1, 0], [0, 1, 0, -1], [-1, 0, 1, 0], [0, -1, 0, 1]], dtype=torch.float64)
    least = []
    for layout in (torch.eye(4, dtype=torch.float64) - 1 / 4, square):
        tau = torch.linalg.svdvals(layout)
        tau = tau[tau > 1e-12]
        costs = []
        for scale in torch.logspace(-1, 2, 400):
            fit = torch.nn.functional.cross_entropy(scale * layout, torch.arange(4))
            costs.append(float(fit + (depth + 1) / 2 * c * (scale * tau).pow(2 / (depth + 1)).sum()))
        least.append(min(costs))
    assert (least[0] < least[1]) == simplex_is_best


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lambda_w": 0.0}, "strategy.lambda_w is 0.0"),
        ({"lambda_h": -1.0}, "strategy.lambda_h is -1.0"),
        ({"loss": "hinge"}, "strategy.loss is 'hinge'"),
        ({"server_lr": 0.5}, "strategy.server_lr is 0.5"),
    ],
)
def test_wrong_parameters_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        DeepLinearParams(**options)
