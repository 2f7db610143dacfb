"""The channels-last layout of image models: the same function, kept from the first layer to the last image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from flowerbed.models.base import ModelSpec
from flowerbed.models.layers import ChannelsLast, channels_last

MODELS = {
    "lenet5": {},
    "leaf_cnn": {},
    "pfl_cnn": {},
    "resnet8": {"norm": "bn"},
    "mobilenet_tiny": {"norm": "bn"},
}


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_values_stay_and_channels_are_innermost(channels: int) -> None:
    whole = torch.randn(6, channels, 5, 7)
    for x in (whole, whole[1:3], whole.flip(2)[:, :, ::2], whole.to(memory_format=torch.channels_last)):
        found = channels_last(x)
        assert torch.equal(found, x)
        assert found.stride()[1] == 1 or channels > 1
        assert torch.empty_like(found).is_contiguous(memory_format=torch.channels_last)
        # What follows sees the layout, also of one channel.
        kernel = torch.randn(4, channels, 3, 3)
        assert nn.functional.conv2d(found, kernel).stride(1) == 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_a_model_computes_what_its_layers_do_in_the_plain_layout(model: str, channels: int) -> None:
    """In float64, with gradients: the sequence of the same layers, without the change of layout."""
    net = ModelSpec(model, (channels, 16, 16), 5, MODELS[model]).build(0).double().eval()
    assert type(net.body) is ChannelsLast
    plain = nn.Sequential(*net.body, net.head)  # type: ignore[misc, arg-type]
    x = torch.randn(3, channels, 16, 16, dtype=torch.float64, requires_grad=True)
    parameters = [x, *net.parameters()]
    found, wanted = (torch.autograd.grad(f(x).square().sum(), parameters) for f in (net, plain))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("channels", [1, 3])
def test_many_models_at_once(channels: int) -> None:
    net = ModelSpec("leaf_cnn", (channels, 8, 8), 3).build(0)
    x = torch.randn(2, 4, channels, 8, 8)
    weights = {n: torch.stack([p.detach(), 2 * p.detach()]) for n, p in net.named_parameters()}

    def one(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = functional_call(net, weights, (x,))
        return y

    found = vmap(one)(weights, x)
    for k in range(2):
        alone = one({n: w[k] for n, w in weights.items()}, x[k])
        torch.testing.assert_close(found[k], alone, rtol=1e-4, atol=1e-4)
