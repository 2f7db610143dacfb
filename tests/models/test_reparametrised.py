"""Weights as functions of what is trained: names, folding, copies."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from flowerbed.models.info import ModelInfo
from flowerbed.models.reparametrised import (
    effective_state_dict,
    fold,
    part_name,
    raw_name,
    raw_names,
    reparametrise,
)
from flowerbed.models.zoo import build_model


class Cubed(nn.Module):
    """w = c v^3."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.tensor(2.0))

    def forward(self, v: Tensor) -> Tensor:
        return self.c * v**3

    def right_inverse(self, w: Tensor) -> Tensor:
        return (w / self.c).abs().pow(1 / 3) * w.sign()


def network() -> nn.Module:
    return build_model("lenet5", (1, 28, 28), 10, 3).eval()


def test_it_starts_as_the_plain_network_and_folds_back_to_it() -> None:
    plain, x = network(), torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    model = reparametrise(network(), Cubed)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    before = model(x)
    state = effective_state_dict(model)
    plain.load_state_dict(state)
    assert torch.equal(plain(x), before)
    folded = fold(model)
    assert [type(m) for m in folded.modules()] == [type(m) for m in plain.modules()]
    assert torch.equal(folded(x), before)


def test_a_folded_copy_leaves_the_original_as_it_is() -> None:
    model, x = reparametrise(network(), Cubed), torch.randn(2, 1, 28, 28)
    before, names = model(x), list(model.state_dict())
    fold(copy.deepcopy(model))
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == names


def test_kernels_alone_are_reparametrised_and_found_by_name() -> None:
    plain, model = network(), reparametrise(network(), Cubed)
    kernels = [n for n, p in plain.named_parameters() if p.ndim > 1]
    assert raw_names(model.state_dict()) == [raw_name(n) for n in kernels]
    state = model.state_dict()
    for name in kernels:
        assert state[part_name(raw_name(name), "c")] == 2
        assert torch.equal(model.get_parameter(raw_name(name)), state[raw_name(name)])
    info = ModelInfo.of(model)
    assert {raw_name(n) for n in kernels} < info.parameters
    assert info.roles[raw_name("head.weight")] == "head"


def test_chosen_weights_and_a_layer_without_a_path() -> None:
    layer = reparametrise(nn.Linear(3, 2), Cubed, ["weight"])
    assert raw_names(layer.state_dict()) == [raw_name("weight")] == ["parametrizations.weight.original"]
    assert set(effective_state_dict(layer)) == {"weight", "bias"}
