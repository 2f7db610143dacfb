"""Layers whose weights are a function of hyperparameters, against the formula written out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.errors import ConfigError
from flowerbed.models.base import ModelSpec
from flowerbed.models.gated import (
    Condition,
    Conditioned,
    GatedConv2d,
    GatedLinear,
    Knob,
    RatedDropout,
    dropout,
    inverse_softplus,
)
from flowerbed.models.gated_nets import ALEXNET

NETS = "flowerbed.models.gated_nets"
KNOBS = (Knob("a", 0.1, 0.0, 1.0), Knob("b", 2.0, 0.0), Knob("c", -3.0), Knob("d", 2.5, 0.0, 4.0, whole=True))


class Toy(Conditioned):
    """One gated layer, without regularisation."""

    def __init__(self, centred: bool = False) -> None:
        super().__init__(KNOBS, 1.0, centred)
        self.layer = GatedLinear(3, 2, len(KNOBS), self.condition)

    def compute(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


def opened(layer: GatedLinear | GatedConv2d) -> None:
    """Let the gates respond."""
    nn.init.normal_(layer.gates.weight)


def toy(centred: bool = False) -> Toy:
    torch.manual_seed(0)
    made = Toy(centred).double()
    opened(made.layer)
    return made


def test_a_knob_maps_onto_its_range_and_back() -> None:
    for knob, value in zip(KNOBS, (0.1, 2.0, -3.0, 2.0), strict=True):
        assert float(knob.value(torch.tensor(knob.raw, dtype=torch.float64))) == pytest.approx(value)
    far = torch.tensor([-30.0, 30.0])
    assert KNOBS[0].value(far).tolist() == pytest.approx([0.0, 1.0], abs=1e-6)
    assert KNOBS[1].value(far).tolist() == pytest.approx([0.0, 30.0], abs=1e-6)
    assert KNOBS[3].value(far).tolist()[0] == 0.0
    assert math.log1p(math.exp(inverse_softplus(0.3))) == pytest.approx(0.3)


def test_a_gated_layer_is_the_papers_weights_for_each_sample() -> None:
    """W_hat(lambda) = W + diag(V lambda) U and b_hat = b + diag(C lambda) c, one sample after another."""
    net = toy()
    x, raw = torch.randn(5, 3).double(), torch.randn(5, len(KNOBS)).double()
    with net.at(raw):
        said = net(x)
    layer = net.layer
    v, c = layer.gates.weight[:2], layer.gates.weight[2:]
    for sample, lambda_, y in zip(x, raw, said, strict=True):
        w = layer.plain.weight + torch.diag(v @ lambda_) @ layer.response.weight
        b = layer.plain.bias + torch.diag(c @ lambda_) @ layer.response.bias
        torch.testing.assert_close(y, w @ sample + b)


def test_a_gated_convolution_is_a_convolution_with_each_samples_filters() -> None:
    torch.manual_seed(0)
    condition = Condition()
    layer = GatedConv2d(2, 3, 3, 4, condition, stride=2, padding=1).double()
    opened(layer)
    x, condition.gates = torch.randn(4, 2, 6, 6).double(), torch.randn(4, 4).double()
    said = layer(x)
    v, c = layer.gates.weight[:3], layer.gates.weight[3:]
    for sample, lambda_, y in zip(x, condition.gates, said, strict=True):
        w = layer.plain.weight + (v @ lambda_)[:, None, None, None] * layer.response.weight
        b = layer.plain.bias + (c @ lambda_) * layer.response.bias
        torch.testing.assert_close(y, F.conv2d(sample[None], w, b, stride=2, padding=1)[0])


def test_without_gates_it_is_the_ordinary_network() -> None:
    """V and C start at 0, so that the response needs a training step before lambda has a gradient."""
    torch.manual_seed(0)
    net = Toy()
    x = torch.randn(5, 3)
    assert torch.equal(net(x), net.layer.plain(x))
    (gradient,) = torch.autograd.grad(net(x).sum(), net.hyper)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_the_slope_in_lambda_is_that_of_finite_differences() -> None:
    net, x = toy(), torch.randn(5, 3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(net(x).square().mean(), net.hyper)
    for i in range(len(KNOBS)):
        found = []
        for sign in (1, -1):
            moved = copy.deepcopy(net)
            with torch.no_grad():
                moved.hyper[i] += sign * 1e-6
            found.append(float(moved(x).square().mean().detach()))
        assert float(gradient[i]) == pytest.approx((found[0] - found[1]) / 2e-6, rel=1e-5)


def test_centred_gates_see_how_far_lambda_is_from_the_current_one() -> None:
    net, x = toy(centred=True), torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(net(x), net.layer.plain(x))
    # The value is the plain network's, the gradient still that of the response.
    (gradient,) = torch.autograd.grad(net(x).sum(), net.hyper)
    assert bool((gradient != 0).any())


def test_a_pass_leaves_nothing_behind() -> None:
    net, x = toy(), torch.randn(2, 3).double()
    with net.at(torch.randn(2, len(KNOBS)).double()):
        away = net(x)
    assert net.condition.gates is None
    assert not torch.equal(net(x), away)
    copied = copy.deepcopy(net)
    assert copied.condition is copied.layer.condition is not net.condition
    torch.testing.assert_close(copied(x), net(x))


def test_dropout_has_a_rate_for_each_sample_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    rate = torch.tensor([0.0, 0.3, 0.9], requires_grad=True)
    x = torch.ones(3, 40, 500)
    found = dropout(x, rate)
    assert not found.requires_grad
    assert (found == 0).float().mean((1, 2)).tolist() == pytest.approx([0.0, 0.3, 0.9], abs=0.01)
    assert found.mean((1, 2)).tolist() == pytest.approx([1.0, 1.0, 1.0], abs=0.03)
    for row, p in zip(found, (0.0, 0.3, 0.9), strict=True):
        assert float(row.max()) == pytest.approx(1 / (1 - p), rel=1e-5)


def test_dropout_acts_in_training_only() -> None:
    condition = Condition(values={"p": torch.tensor([0.5, 0.5])})
    layer, x = RatedDropout("p", condition), torch.ones(2, 100)
    assert not torch.equal(layer(x), x)
    assert torch.equal(layer.eval()(x), x)


def test_the_papers_network_has_15_hyperparameters_and_gates_everywhere() -> None:
    net = ModelSpec(f"{NETS}:alexnet", (3, 32, 32), 10, {"dense": 32}).build(0)
    assert isinstance(net, Conditioned)
    assert [knob.name for knob in net.knobs] == [name for name, *_ in ALEXNET]
    assert len(net.knobs) == 15
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    plain = ModelSpec(f"{NETS}:alexnet", (3, 32, 32), 10, {"dense": 32, "gated": False}).build(0)
    gated = sum(isinstance(m, GatedLinear | GatedConv2d) for m in net.modules())
    assert gated == sum(isinstance(m, nn.Linear | nn.Conv2d) for m in plain.modules()) == 8
    assert plain.train()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("dropout_mlp", {"rates": [0.1]}, "one rate for each"),
        ("dropout_mlp", {"rates": [0.1, 0.2, 0.96]}, "'dropout-hidden-2' starts at 0.96"),
        ("dropout_mlp", {"spread": 0.0}, "spread=0.0"),
        ("alexnet", {"starts": [0.1]}, "15 numbers, not 1"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        ModelSpec(f"{NETS}:{name}", (3, 32, 32), 10, options).build(0)


def test_a_knob_with_an_upper_end_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="upper end only"):
        Knob("p", 0.0, high=1.0)
