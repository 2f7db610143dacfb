"""Finite differences against backpropagation, slow twins, and the law of random directions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from flowerbed import seeds
from flowerbed.errors import ConfigError
from flowerbed.models.zeroth_order import Value, coordinate_wise, random_directions

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randint(3, (20,), generator=torch.Generator().manual_seed(2))


def net(*further: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), *further, nn.Tanh(), nn.Linear(5, 3)).double().train()


def loss_of(model: nn.Module) -> tuple[Value, dict[str, Tensor]]:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return lambda tensors: F.cross_entropy(functional_call(model, tensors, (X,)), Y), parameters


def exact(model: nn.Module) -> Tensor:
    return torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(F.cross_entropy(model(X), Y), [p for p in model.parameters()])
        ]
    )


def joined(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


def test_coordinates_give_the_gradient_and_count_their_losses() -> None:
    model = net()
    value, parameters = loss_of(model)
    found, queries = coordinate_wise(value, parameters, 1e-4, value({}), chunk=7)
    assert queries == len(exact(model))
    assert float(F.cosine_similarity(joined(found), exact(model), 0)) >= 0.9999
    _, twice = coordinate_wise(value, parameters, 1e-4)
    assert twice == 2 * queries


def test_the_error_falls_with_the_step_and_with_its_square_for_central_differences() -> None:
    model = net()
    value, parameters = loss_of(model)
    for base, order in ((value({}), 1), (None, 2)):
        errors = []
        for mu in (1e-2, 1e-3):
            found, _ = coordinate_wise(value, parameters, mu, base)
            errors.append(float(torch.linalg.vector_norm(joined(found) - exact(model))))
        assert math.log10(errors[0] / errors[1]) == pytest.approx(order, abs=0.05)


def test_central_differences_are_exact_for_a_linear_model_with_the_square_loss() -> None:
    w = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, _ = coordinate_wise(lambda t: (X @ t["w"] - Y).square().mean() / 2, {"w": w}, 0.5)
    torch.testing.assert_close(found["w"], X.T @ (X @ w - Y) / 20)


def test_the_result_is_that_of_one_coordinate_after_another() -> None:
    """The slow twin moves each entry of the module itself, saves it and puts it back; nothing is reused there."""
    model = net()
    value, parameters = loss_of(model)
    base = value({})
    found, _ = coordinate_wise(value, parameters, 5e-3, base)
    with torch.no_grad():
        for name, p in model.named_parameters():
            flat = p.view(-1)
            for i in range(len(flat)):
                old = flat[i].clone()
                flat[i] += 5e-3
                slope = (F.cross_entropy(model(X), Y) - base) / 5e-3
                flat[i] = old
                assert float(found[name].view(-1)[i]) == pytest.approx(float(slope), abs=1e-9)


def test_only_active_entries_are_estimated_and_all_active_is_dense() -> None:
    value, parameters = loss_of(net())
    base = value({})
    dense, whole = coordinate_wise(value, parameters, 1e-3, base)
    everything = {n: torch.arange(p.numel()) for n, p in parameters.items()}
    same, _ = coordinate_wise(value, parameters, 1e-3, base, active=everything)
    assert all(torch.equal(g, dense[n]) for n, g in same.items())
    some = {"0.weight": torch.tensor([0, 3, 29]), "2.bias": torch.tensor([1])}
    found, queries = coordinate_wise(value, parameters, 1e-3, base, active=some)
    assert queries == 4 < whole
    for name, g in found.items():
        support = set(g.flatten().nonzero().flatten().tolist())
        assert support == set(some.get(name, torch.empty(0)).tolist())
        assert torch.equal(g.flatten()[list(support)], dense[name].flatten()[list(support)])


def test_batch_norm_sees_the_batch_and_its_running_statistics_stay() -> None:
    model = net(nn.BatchNorm1d(5))
    value, parameters = loss_of(model)
    buffers = dict(model.named_buffers())
    base, expected = value({}), exact(model)
    before = {n: b.clone() for n, b in buffers.items()}
    found, _ = coordinate_wise(value, parameters, 1e-5, base, scratch=buffers)
    assert all(torch.equal(b, before[n]) for n, b in buffers.items())
    torch.testing.assert_close(joined(found), expected, rtol=1e-3, atol=1e-4)


def test_dropout_with_frozen_draws_is_one_network() -> None:
    model = net(nn.Dropout(0.5))
    value, parameters = loss_of(model)
    before = seeds.torch_states(torch.device("cpu"))

    def frozen(tensors: dict[str, Tensor]) -> Tensor:
        seeds.set_torch_states(before, torch.device("cpu"))
        return value(tensors)

    base = frozen({})
    seeds.set_torch_states(before, torch.device("cpu"))
    expected = exact(model)
    found, _ = coordinate_wise(frozen, parameters, 1e-5, base, chunk=4)
    torch.testing.assert_close(joined(found), expected, rtol=1e-3, atol=1e-4)


def test_a_step_that_rounding_eats_is_useless_in_float32() -> None:
    """The pitfall: 5e-3 is fine, 1e-6 is noise."""
    model = net().float()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    cosines = {}
    for mu in (5e-3, 1e-6):

        def value(t: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(functional_call(model, t, (X.float(),)), Y)

        found, _ = coordinate_wise(value, parameters, mu, value({}))
        cosines[mu] = float(F.cosine_similarity(joined(found).double(), exact(net()), 0))
    assert cosines[5e-3] > 0.999
    assert cosines[1e-6] < 0.99


@pytest.mark.parametrize("q", [40, 400, 1200])
def test_the_cosine_law_of_random_directions(q: int) -> None:
    """E cos^2 = q / (q + d + 1) about, here for a linear function of d = 400 numbers."""
    slope = torch.randn(400, generator=torch.Generator().manual_seed(100), dtype=torch.float64)
    found = []
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        g, queries = random_directions(
            lambda t: t["x"] @ slope, {"x": torch.zeros_like(slope)}, 1e-3, q, torch.zeros(()), rng
        )
        assert queries == q
        found.append(float(F.cosine_similarity(g["x"], slope, 0)) ** 2)
    assert sum(found) / len(found) == pytest.approx(q / (q + 401), rel=0.1)


def test_random_directions_are_unbiased_and_unit_ones_are_scaled_by_tensor() -> None:
    value, parameters = loss_of(net())
    base, expected = value({}), exact(net())
    rng = torch.Generator().manual_seed(0)
    found, _ = random_directions(value, parameters, 1e-4, 20_000, base, rng, chunk=2000)
    assert float(torch.linalg.vector_norm(joined(found) - expected)) < 0.1 * float(
        torch.linalg.vector_norm(expected)
    )
    scaled, _ = random_directions(value, parameters, 1e-4, 20_000, base, rng, unit=True, chunk=2000)
    for name, p in parameters.items():
        # E u u^T is the identity over the size of the tensor.
        ratio = float((scaled[name] * found[name]).sum() / found[name].square().sum())
        assert ratio == pytest.approx(1 / p.numel(), rel=0.15)


def test_steps_and_numbers_that_cannot_be_are_refused() -> None:
    value, parameters = loss_of(net())
    with pytest.raises(ConfigError, match="finite difference is 0"):
        coordinate_wise(value, parameters, 0)
    with pytest.raises(ConfigError, match="random directions is 0"):
        random_directions(value, parameters, 1e-3, 0, value({}), torch.Generator())
