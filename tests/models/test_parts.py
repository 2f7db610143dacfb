"""A loss must not notice whether the weights are in the module or handed in."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from flowerbed.errors import ConfigError
from flowerbed.models.parts import ModelParts
from flowerbed.models.zoo import build_model, list_models

NAMES = [name for name in list_models() if ":" not in name]
TEXT = {"char_lstm", "char_gru", "gpt_tiny"}
NO_VMAP = {"char_lstm", "char_gru"}
CLASSES = 4


def example(name: str) -> tuple[nn.Module, Tensor]:
    """A model in evaluation mode (no dropout) and a batch of two for it."""
    generator = torch.Generator().manual_seed(3)
    if name in TEXT:
        x = torch.randint(CLASSES, (2, 5), generator=generator)
    else:
        x = torch.randn(2, 3, 8, 8, generator=generator)
    return build_model(name, tuple(x.shape[1:]), CLASSES).eval(), x


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in tensors.items()}


def loss_of(parts: ModelParts, x: Tensor) -> Tensor:
    """A loss that uses the outputs, the features and the weights."""
    z = parts.features(x)
    weights = sum(p.square().sum() for p in parts.parameters.values())
    return parts.head(z).logsumexp(-1).mean() + 0.1 * z.square().mean() + 0.01 * weights + parts(x).mean()


def gradients(parts: ModelParts, loss: Tensor, *, create_graph: bool = False) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(parts.parameters.values()), create_graph=create_graph))


@pytest.mark.parametrize("name", NAMES)
def test_both_constructors_give_the_same_bits(name: str) -> None:
    module, x = example(name)
    resident = ModelParts.resident(module)
    functional = ModelParts.functional(
        build_model(name, tuple(x.shape[1:]), CLASSES, seed=1).eval(),
        copies(resident.parameters),
        copies(resident.buffers),
    )
    assert torch.equal(functional(x), resident(x))
    assert torch.equal(functional.features(x), resident.features(x))
    assert torch.equal(resident.head(resident.features(x)), module(x))
    losses = [loss_of(parts, x) for parts in (resident, functional)]
    assert torch.equal(*losses)
    for a, b in zip(*(gradients(p, v) for p, v in zip((resident, functional), losses)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"wrn28_10"}))
def test_double_backward_is_a_hessian_vector_product(name: str) -> None:
    """With g(w) the gradient and v a direction: grad(g . v) = (g(w + e v) - g(w - e v)) / 2e, in float64."""
    module, x = example(name)
    module.double()
    x = x if name in TEXT else x.double()
    parts = ModelParts.resident(module)
    generator = torch.Generator().manual_seed(4)
    parameters = list(parts.parameters.values())
    with torch.no_grad():  # Biases that start at zero leave dead units exactly on the kink of the ReLU.
        for p in (p for p in parameters if p.ndim == 1):
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    first = gradients(parts, loss_of(parts, x), create_graph=True)
    inner = torch.stack([(g * v).sum() for g, v in zip(first, direction, strict=True)]).sum()
    product = gradients(parts, inner)
    epsilon = 1e-7

    def shifted(sign: float) -> list[Tensor]:
        moved = [(p + sign * epsilon * v).detach().requires_grad_() for p, v in zip(parameters, direction)]
        there = ModelParts.functional(module, dict(zip(parts.parameters, moved)), parts.buffers)
        return gradients(there, loss_of(there, x))

    for hv, up, down in zip(product, shifted(1.0), shifted(-1.0), strict=True):
        torch.testing.assert_close(hv, (up - down) / (2 * epsilon), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_double_backward_in_single_precision(name: str) -> None:
    module, x = example(name)
    parts = ModelParts.resident(module)
    first = gradients(parts, loss_of(parts, x), create_graph=True)
    for second in gradients(parts, torch.stack([g.square().sum() for g in first]).sum()):
        assert torch.isfinite(second).all()


@pytest.mark.parametrize("name", sorted(set(NAMES) - NO_VMAP - {"wrn28_10"}))
def test_losses_of_two_clients_in_one_vmap(name: str) -> None:
    module, x = example(name)
    own = ModelParts.resident(module)
    other = ModelParts.resident(build_model(name, tuple(x.shape[1:]), CLASSES, seed=1))
    stacked = {
        key: torch.stack([p.detach(), other.parameters[key].detach()]) for key, p in own.parameters.items()
    }
    xs = torch.stack([x, x.flip(0)])

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss_of(ModelParts.functional(module, parameters, own.buffers), x)

    together = vmap(grad(loss))(stacked, xs)
    for client in range(2):
        alone = grad(loss)({key: values[client] for key, values in stacked.items()}, xs[client])
        for key, value in alone.items():
            torch.testing.assert_close(together[key][client], value, rtol=1e-3, atol=1e-4, msg=key)


def test_resident_follows_changes_in_place() -> None:
    module, x = example("mlp")
    parts = ModelParts.resident(module)
    with torch.no_grad():
        for parameter in parts.parameters.values():
            parameter.zero_()
    assert torch.equal(parts(x), torch.zeros(2, CLASSES))


def test_functional_leaves_the_module_alone_in_training() -> None:
    module, x = example("resnet8")
    module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    parts = ModelParts.functional(
        module, copies(dict(module.named_parameters())), copies(dict(module.named_buffers()))
    )
    parts(x)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    changed = {name for name, value in parts.buffers.items() if not torch.equal(value, before[name])}
    assert changed == set(parts.buffers)


def test_a_module_without_parts_says_so() -> None:
    parts = ModelParts.resident(nn.Linear(2, 3))
    assert parts(torch.zeros(1, 2)).shape == (1, 3)
    with pytest.raises(ConfigError, match=r"Linear has no separate features and head; .*Net\(body, head"):
        parts.features(torch.zeros(1, 2))


def test_a_model_of_several_inputs() -> None:
    """A diffusion model takes time and label beside the image."""
    net = nn.Bilinear(2, 3, 1)
    x, t = torch.randn(4, 2), torch.randn(4, 3)
    resident = ModelParts.resident(net)
    assert torch.equal(resident(x, t), net(x, t))
    doubled = {name: 2 * p.detach() for name, p in net.named_parameters()}
    torch.testing.assert_close(ModelParts.functional(net, doubled, {})(x, t), 2 * net(x, t))
