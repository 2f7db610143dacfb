"""The momentum model follows, is kept, and is left alone by what is computed with it."""

from __future__ import annotations

import pytest
import torch
import worlds
from torch import nn

from flowerbed.clients.momentum import MomentumModel, cosine_tau
from flowerbed.clients.params import LocalParams
from flowerbed.models.base import Net
from flowerbed.models.parts import ModelParts


def net() -> Net:
    torch.manual_seed(0)
    return Net(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), nn.Linear(3, 2), 3)


def test_it_is_the_exponential_mean_of_the_weights() -> None:
    model = net()
    parts = ModelParts.resident(model)
    mine = MomentumModel({n: v.clone() for n, v in model.state_dict().items()})
    expected = model.body[0].weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            model.body[0].weight += step + 1
        mine.follow(parts, 0.75)
        expected = 0.75 * expected + 0.25 * model.body[0].weight.detach()
    torch.testing.assert_close(mine.tensors["body.0.weight"], expected)


def test_buffers_are_copied_and_no_forward_pass_writes_into_either_model() -> None:
    model = net().train()
    parts = ModelParts.resident(model)
    mine = MomentumModel({n: v.clone() for n, v in model.state_dict().items()})
    before = {n: v.clone() for n, v in model.state_dict().items()}
    x = torch.randn(8, 4)
    torch.testing.assert_close(mine.view(parts).features(x), parts.module.body(x))
    changed = {n: v.clone() for n, v in model.state_dict().items()}
    assert not worlds.equal(changed, before)
    assert worlds.equal(mine.tensors, before)
    mine.view(parts)(torch.randn(8, 4))
    assert worlds.equal(dict(model.state_dict()), changed)
    mine.follow(parts, 0.9)
    assert torch.equal(mine.tensors["body.1.running_mean"], changed["body.1.running_mean"])
    assert int(mine.tensors["body.1.num_batches_tracked"]) == 1


def test_it_survives_the_round_at_the_client() -> None:
    local = worlds.open_round(LocalParams())
    first = MomentumModel.open(local, "slow")
    assert worlds.equal(first.tensors, dict(local.model.state_dict()))
    first.tensors[next(iter(first.tensors))].add_(1)
    first.keep(local.state, "slow")
    assert worlds.equal(MomentumModel.open(local, "slow").tensors, first.tensors)
    assert not worlds.equal(MomentumModel.open(local, "other").tensors, first.tensors)
    given = {n: torch.zeros_like(v) for n, v in first.tensors.items()}
    assert worlds.equal(MomentumModel.open(local, "third", given).tensors, given)


def test_tau_rises_to_one() -> None:
    assert cosine_tau(0.9, 0, 100) == pytest.approx(0.9)
    assert cosine_tau(0.9, 50, 100) == pytest.approx(0.95)
    assert cosine_tau(0.9, 100, 100) == pytest.approx(1.0)
