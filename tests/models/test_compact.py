"""Channels of zeros taken out: the same outputs from what is left, and nothing taken that still counts."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flowerbed.datasets.sources import load_dataset
from flowerbed.errors import ConfigError
from flowerbed.experiments.measures import Measured, latency
from flowerbed.experiments.papers.wgsef.probes import conv_net
from flowerbed.models.base import classifier
from flowerbed.models.compact import compacted
from flowerbed.models.groups import by_layer, output_units, scaled
from flowerbed.models.info import ModelInfo
from flowerbed.models.zoo import build_model

pytest.importorskip("torch_pruning", reason="needs flowerbed[sparsity]")


def numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def trained(model: nn.Module) -> nn.Module:
    """Return the model with parameters and statistics of which none is zero by chance."""
    torch.manual_seed(1)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.randn_like(value) if value.ndim > 1 else torch.rand_like(value) + 0.1)
    return model.eval()


def without(model: nn.Module, keep: list[list[bool]]) -> nn.Module:
    groups = output_units(ModelInfo.of(model))
    state = model.state_dict()
    factors = torch.tensor([one for layer in keep for one in layer], dtype=torch.float64)
    assert [len(layer) for layer in keep] == [len(own) for own in by_layer(groups, factors)]
    model.load_state_dict({**state, **scaled(groups, state, factors)})
    return model


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_what_is_left_is_the_narrower_network(data: st.DataObject) -> None:
    widths = (3, 4, 2, 5)
    keep = [data.draw(st.lists(st.booleans(), min_size=w, max_size=w)) for w in widths]
    model = without(trained(conv_net((1, 12, 12), 3, widths=widths)), keep)
    x = torch.randn(6, 1, 12, 12)
    small = compacted(model, x)
    narrow = tuple(max(1, sum(layer)) for layer in keep)
    expected = {
        name: value.shape for name, value in conv_net((1, 12, 12), 3, widths=narrow).named_parameters()
    }
    assert {name: value.shape for name, value in small.named_parameters()} == expected
    assert torch.allclose(small(x), model(x), atol=1e-5)
    assert numbers(model) == numbers(conv_net((1, 12, 12), 3, widths=widths))


def test_a_channel_of_a_residual_sum_goes_when_every_summand_is_zero() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.one(x) + self.other(x)).flatten(1)

    model = trained(classifier(Sum(), 3 * 4, 2))
    x = torch.randn(5, 2, 2, 2)
    state = model.state_dict()
    for name in ("body.one.weight", "body.one.bias"):
        state[name][:2] = 0
    assert numbers(compacted(model, x)) == numbers(model)
    for name in ("body.other.weight", "body.other.bias"):
        state[name][1:] = 0
    small = compacted(model, x)
    # Channel 1 of three, with its column of the head for each of four places.
    assert numbers(model) - numbers(small) == 2 * (2 + 1) + 4 * 2
    assert torch.allclose(small(x), model(x), atol=1e-5)


def test_residual_networks_of_the_zoo_compute_the_same() -> None:
    model = trained(build_model("wrn16_2", (3, 16, 16), 10, 0))
    layers = output_units(ModelInfo.of(model))
    keep = [[j % 2 == 0 for j in range(layer.count)] for layer in layers]
    x = torch.randn(4, 3, 16, 16)
    whole = numbers(model)
    small = compacted(without(model, keep), x)
    assert torch.allclose(small(x), model(x), atol=1e-4, rtol=1e-3)
    assert numbers(small) < 0.3 * whole


def test_a_filter_of_zeros_with_a_shift_emits_it_and_stays() -> None:
    model = trained(conv_net((1, 12, 12), 3, widths=(3, 4, 2, 5)))
    model.state_dict()["body.0.weight"][1] = 0
    assert numbers(compacted(model, torch.randn(4, 1, 12, 12))) == numbers(model)


def test_the_head_keeps_its_outputs_even_if_they_are_zero() -> None:
    model = trained(conv_net((1, 12, 12), 3, widths=(3, 4, 2, 5)))
    for value in (model.state_dict()["head.weight"], model.state_dict()["head.bias"]):
        value[0] = 0
    assert compacted(model, torch.randn(4, 1, 12, 12))(torch.randn(2, 1, 12, 12)).shape == (2, 3)


@pytest.mark.parametrize("layer", [nn.Sigmoid(), nn.GroupNorm(2, 4)], ids=lambda layer: type(layer).__name__)
def test_what_makes_something_of_a_zero_channel_is_refused(layer: nn.Module) -> None:
    body = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), layer, nn.Flatten())
    model = trained(classifier(body, 4 * 4, 2))
    if isinstance(layer, nn.GroupNorm):
        for name in ("body.1.weight", "body.1.bias"):
            model.state_dict()[name][:2] = 0
    model.state_dict()["body.0.weight"][:2] = 0
    with pytest.raises(ConfigError, match=r"Net.*Take the model whole\."):
        compacted(model, torch.randn(3, 1, 4, 4))


def test_without_the_library_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ConfigError, match=r"pip install 'flowerbed\[sparsity\]'"):
        compacted(build_model("mlp", (4,), 2, 0), torch.randn(2, 4))


def test_the_measure_times_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowerbed.experiments.measures.TIMED", 0.001)
    data = load_dataset("digits")
    model = trained(conv_net(data.input_shape, data.num_classes, widths=(4, 4, 4, 4)))
    found = latency(Measured(without(model, [[True, True, False, False]] * 4), data, 0, torch.device("cpu")))
    left = numbers(conv_net(data.input_shape, data.num_classes, widths=(2, 2, 2, 2))) / numbers(model)
    assert found["parameters-left"] == pytest.approx(left)
    assert found["latency-ms"] > 0
    assert found["compact-latency-ms"] > 0
