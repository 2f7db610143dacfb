"""Curvature against what can be written down: explicit Jacobians, full Hessians, small matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from flowerbed.errors import ConfigError
from flowerbed.models import curvature


def net(outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)]
    return nn.Sequential(*layers, *([nn.Flatten(0)] if outputs == 1 else [])).double()


def inputs(count: int = 7) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("chunk", [None, 3])
def test_gradients_of_single_samples_are_those_of_one_backward_pass_each(chunk: int | None) -> None:
    model, x = net(), inputs()
    rows = []
    for sample in x:
        found = torch.autograd.grad(model(sample[None])[0], list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]))
    torch.testing.assert_close(curvature.output_gradients(model, x, chunk), torch.stack(rows))


def test_several_outputs_have_a_gradient_each_and_batch_norm_does_not_mix_samples() -> None:
    model = nn.Sequential(net(3), nn.BatchNorm1d(3).double()).train()
    x = inputs()
    found = curvature.output_gradients(model, x)
    assert model.training
    assert found.shape == (7, 3, sum(p.numel() for p in model.parameters()))
    model.eval()
    expected = torch.autograd.grad(model(x)[2, 1], list(model.parameters()))
    torch.testing.assert_close(found[2, 1], torch.cat([g.flatten() for g in expected]))


def test_the_small_matrix_has_the_sizes_of_the_large_one() -> None:
    rows = curvature.output_gradients(net(), inputs())
    large = rows.T @ rows / len(rows)
    found = curvature.sizes(curvature.gram(rows))
    assert found.trace == pytest.approx(float(large.trace()))
    assert found.trace == pytest.approx(float(rows.square().sum(1).mean()))
    assert found.frobenius == pytest.approx(float(large.square().sum().sqrt()))
    assert found.largest == pytest.approx(float(torch.linalg.eigvalsh(large)[-1]))
    assert found.largest <= found.frobenius <= found.trace


def test_hessian_products_are_those_of_the_full_hessian() -> None:
    model, x = net(), inputs()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    y = torch.randn(7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return (functional_call(model, tensors, (x,)) - y).square().mean() / 2

    start = curvature.flat(parameters)
    full = torch.autograd.functional.hessian(lambda v: loss(curvature.like(v, parameters)), start)
    product = curvature.hessian(loss, parameters)
    for seed in range(3):
        v = torch.randn(len(start), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        torch.testing.assert_close(product(v), full @ v)
    value, vector = curvature.power_iteration(product, v, tolerance=1e-13)
    spectrum = torch.linalg.eigvalsh(full)
    assert value == pytest.approx(float(spectrum[spectrum.abs().argmax()]))
    torch.testing.assert_close(product(vector), value * vector, rtol=1e-4, atol=1e-5)


def test_where_every_residual_is_zero_the_hessian_is_the_gauss_newton_matrix() -> None:
    """And nowhere else: with residuals their second derivatives come on top."""
    model, x = net(), inputs()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    fitted = model(x).detach()
    rows = curvature.output_gradients(model, x)
    v = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gauss_newton = rows.T @ (rows @ v) / len(rows)
    for off, same in ((0.0, True), (0.5, False)):
        product = curvature.hessian(
            lambda t, off=off: (functional_call(model, t, (x,)) - fitted - off).square().mean() / 2,
            parameters,
        )
        assert torch.allclose(product(v), gauss_newton) == same


def test_a_loss_that_is_linear_has_no_curvature() -> None:
    product = curvature.hessian(lambda t: 3 * t["a"].sum(), {"a": torch.ones(2), "unused": torch.ones(3)})
    assert torch.equal(product(torch.ones(5)), torch.zeros(5))
    assert curvature.power_iteration(product, torch.ones(5))[0] == 0


def test_power_iteration_by_hand_finds_the_largest_in_size_with_its_sign() -> None:
    matrix = torch.diag(torch.tensor([1.0, -3.0, 2.0], dtype=torch.float64))
    value, vector = curvature.power_iteration(matrix.mv, torch.ones(3, dtype=torch.float64))
    assert value == pytest.approx(-3)
    torch.testing.assert_close(
        vector.abs(), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-4
    )
    with pytest.raises(ConfigError, match="did not settle within 3 products"):
        curvature.power_iteration(matrix.mv, torch.ones(3, dtype=torch.float64), most=3)


def test_flattening_and_back() -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(7.0)}
    vector = curvature.flat(tensors)
    assert vector.tolist() == [0, 1, 2, 3, 4, 5, 7]
    back = curvature.like(vector, tensors)
    assert list(back) == ["b", "a"]
    assert all(torch.equal(back[n], t) for n, t in tensors.items())
