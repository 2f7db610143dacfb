"""Measurement operators: adjoints, pseudo-inverses and what they hide."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowerbed.errors import ConfigError
from flowerbed.models.inverse import BlockMean, Blur, Clamp, Mask, Operator, box_mask, psnr, random_mask

SHAPE = (3, 2, 8, 6)


def images(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LINEAR: dict[str, Operator] = {
    "mask": random_mask(SHAPE, 0.5, torch.Generator().manual_seed(1)),
    "box": box_mask(SHAPE, 3),
    "mean": BlockMean(2),
    "blur": Blur(torch.tensor([[0.0, 0.1, 0.0], [0.2, 0.5, 0.1], [0.0, 0.1, 0.0]])),
}


@pytest.mark.parametrize("name", LINEAR)
def test_adjoint_and_pseudo_inverse(name: str) -> None:
    h, x = LINEAR[name], images()
    y = torch.randn(h(x).shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert float((h(x) * y).sum()) == pytest.approx(float((x * h.adjoint(y)).sum()), rel=1e-6)
    # The four conditions of Penrose.
    torch.testing.assert_close(h(h.inverse(h(x))), h(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(h.inverse(h(h.inverse(y))), h.inverse(y), rtol=1e-6, atol=1e-6)
    other = images(3)
    assert float((h.inverse(h(x)) * other).sum()) == pytest.approx(
        float((x * h.inverse(h(other))).sum()), rel=1e-6
    )


def test_the_derivative_of_a_linear_operator_is_its_adjoint() -> None:
    for h in LINEAR.values():
        x = images().requires_grad_()
        y = h(x)
        (found,) = torch.autograd.grad(y, x, torch.ones_like(y))
        torch.testing.assert_close(found, h.adjoint(torch.ones_like(y)).to(found), rtol=1e-6, atol=1e-6)


def test_sizes_and_hidden_pixels() -> None:
    x = images()
    mask = LINEAR["mask"]
    assert mask.size(x).flatten().tolist() == [48, 48, 48]
    assert mask.hidden(x).sum((1, 2, 3)).tolist() == [48, 48, 48]
    assert torch.equal(mask(x)[~mask.hidden(x)], x[~mask.hidden(x)])
    assert LINEAR["box"].hidden(x).sum((1, 2, 3)).tolist() == [18, 18, 18]
    assert BlockMean(2).size(x).flatten().tolist() == [24, 24, 24]
    assert BlockMean(2).hidden(x).all()


def test_block_means_by_hand() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert BlockMean(2)(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert BlockMean(2).inverse(BlockMean(2)(x))[0, 0, 0].tolist() == [2.5, 2.5, 4.5, 4.5]


def test_the_blur_is_a_circular_convolution() -> None:
    kernel = torch.tensor([[1.0, 2.0, 3.0]]) / 6
    x = torch.zeros(1, 1, 3, 5)
    x[0, 0, 1, 0] = 6.0
    # The middle stays, the left of the kernel moves to the left, over the border.
    torch.testing.assert_close(Blur(kernel)(x)[0, 0, 1], torch.tensor([2.0, 3.0, 0.0, 0.0, 1.0]))
    with pytest.raises(ConfigError, match="at least as large"):
        Blur(torch.ones(4, 4))(x)


def test_clamping_loses_what_is_outside() -> None:
    x = torch.tensor([[[[-0.9, 0.2]]]])
    assert Clamp()(x).flatten().tolist() == pytest.approx([-1, 0.4])
    assert Clamp().inverse(Clamp()(x)).flatten().tolist() == pytest.approx([-0.5, 0.2])


def test_psnr_by_hand() -> None:
    truth = torch.zeros(2, 1, 1, 2)
    found = truth.clone()
    found[0, 0, 0, 0] = 0.2
    assert psnr(found, truth).tolist() == pytest.approx([10 * math.log10(4 / 0.02), 200], abs=1e-3)
    hidden = torch.tensor([[[[True, False]]]]).expand(2, 1, 1, 2)
    assert psnr(found, truth, hidden)[0] == pytest.approx(20, abs=1e-4)


def test_a_box_must_fit() -> None:
    with pytest.raises(ConfigError, match="does not fit"):
        box_mask(SHAPE, 7)
    assert isinstance(box_mask(SHAPE, 6), Mask)
