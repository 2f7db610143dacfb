"""Batch norm's statistics computed anew, against the formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flowerbed.models.batchnorm import fixed_statistics, recompute_statistics


def net() -> nn.Sequential:
    layers = nn.Sequential(nn.BatchNorm1d(3, momentum=0.3), nn.Dropout(0.5), nn.BatchNorm1d(3, affine=False))
    return layers.double()


def test_statistics_are_the_plain_means_over_batches() -> None:
    model = net()
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)).double() * 2 + 1
    model(x[:2])  # what was there before must not matter
    model.train()
    recompute_statistics(model, x.split(4))  # type: ignore[no-untyped-call]
    batches = x.reshape(3, 4, 3)
    first, last = model[0], model[2]
    torch.testing.assert_close(first.running_mean, batches.mean(1).mean(0))
    torch.testing.assert_close(first.running_var, batches.var(1).mean(0))
    # The second layer sees normalised batches (dropout is off): mean 0, variance n/(n-1) times almost 1.
    torch.testing.assert_close(last.running_mean, torch.zeros(3).double(), atol=1e-12, rtol=0)
    spread = (batches.var(1, unbiased=False) / (batches.var(1, unbiased=False) + first.eps)).mean(0) * 4 / 3
    torch.testing.assert_close(last.running_var, spread)
    assert first.num_batches_tracked == 3
    assert first.momentum == pytest.approx(0.3)
    assert all(module.training for module in model.modules())


def test_nothing_else_changes() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    before = {n: v.clone() for n, v in model.state_dict().items()}

    recompute_statistics(model, [torch.ones(2, 3)])
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    with_norm = net()
    with_norm.eval()
    weight = with_norm[0].weight.clone()
    recompute_statistics(with_norm, [torch.randn(4, 3).double()])
    assert torch.equal(with_norm[0].weight, weight)
    assert not any(module.training for module in with_norm.modules())


def test_fixed_statistics_are_used_and_do_not_move() -> None:
    model = net().train()
    model[2].eval()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    x = torch.randn(5, 3).double() + 4
    with fixed_statistics(model):
        torch.testing.assert_close(model[0](x), x / (1 + model[0].eps) ** 0.5)
        assert model[1].training
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert model[0].training
    assert not model[2].training
