"""Losses in a precision of their own: against torch, closed forms and finite differences; where a softmax collapses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flowerbed.errors import ConfigError
from flowerbed.models.softmax import (
    collapsed,
    cross_entropy,
    dtype_of,
    growth,
    stablemax_cross_entropy,
)


def draws(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(9, 5, generator=rng, dtype=dtype)
    return logits.requires_grad_(), torch.randint(5, (9,), generator=rng)


def test_cross_entropy_is_torchs_with_its_gradient() -> None:
    for dtype in (torch.float32, torch.float64):
        logits, y = draws(dtype)
        mine, theirs = cross_entropy(logits, y, dtype), F.cross_entropy(logits, y)
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(
            torch.autograd.grad(mine, logits)[0], torch.autograd.grad(theirs, logits)[0]
        )


def test_stablemax_is_a_softmax_of_a_logarithm() -> None:
    logits, y = draws()
    mine = stablemax_cross_entropy(logits, y, torch.float64)
    theirs = F.cross_entropy(logits.sign() * (1 + logits.abs()).log(), y)
    torch.testing.assert_close(mine, theirs)
    assert torch.autograd.gradcheck(lambda z: stablemax_cross_entropy(z, y, torch.float64), logits)


def test_growth_has_a_slope_everywhere() -> None:
    """Also at 1, the pole of the other branch, and at 0, where the branches meet with slope 1."""
    z = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0], requires_grad=True)
    torch.testing.assert_close(growth(z), torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0]))
    (slope,) = torch.autograd.grad(growth(z).sum(), z)
    torch.testing.assert_close(slope, torch.tensor([1 / 16, 1 / 4, 1.0, 1.0, 1.0]))


@pytest.mark.parametrize(("name", "bits"), [("float16", 11), ("float32", 24), ("float64", 53)])
def test_where_a_softmax_collapses(name: str, bits: int) -> None:
    """1 + exp(-L) rounds to 1 from L = bits ln 2 on (ties go to even); the gradient is then exactly 0."""
    dtype, edge = dtype_of(name), bits * math.log(2)
    y = torch.zeros(1, dtype=torch.int64)
    for gap, gone in ((0.97 * edge, False), (1.03 * edge, True)):
        logits = torch.tensor([[gap, 0.0]], dtype=torch.float64, requires_grad=True)
        assert collapsed(logits, dtype).tolist() == [gone]
        value = cross_entropy(logits, y, dtype)
        (gradient,) = torch.autograd.grad(value, logits)
        assert (float(gradient[0, 0]) == 0) == gone
        assert (float(value.detach()) == 0) == gone


def test_a_wider_precision_hides_the_collapse() -> None:
    logits = torch.tensor([[20.0, 0.0]])
    assert collapsed(logits, torch.float32).item()
    assert not collapsed(logits, torch.float64).item()


@pytest.mark.parametrize("size", [17.0, 1e3, 1e6])
def test_stablemax_never_collapses(size: float) -> None:
    logits = torch.tensor([[size, 0.0]], requires_grad=True)
    value = stablemax_cross_entropy(logits, torch.zeros(1, dtype=torch.int64), torch.float64)
    (gradient,) = torch.autograd.grad(value, logits)
    # -log(s / (s + 1)) with s = L + 1
    assert float(value.detach()) == pytest.approx(math.log1p(1 / (size + 1)))
    assert float(gradient[0, 0]) == pytest.approx(-1 / ((size + 1) * (size + 2)), rel=1e-5)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="bfloat8"):
        dtype_of("bfloat8")
