"""Single layers and models against independent, slow or hand-written references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.models.layers import MaxPool
from flowerbed.models.resnet import BasicBlock, WideBlock
from flowerbed.models.transformer import Attention
from flowerbed.models.zoo import build_model


def plain_convolution(x: Tensor, layer: nn.Module, stride: int) -> Tensor:
    """3x3 convolution with one ring of zeros, as sums over windows."""
    assert isinstance(layer, nn.Conv2d)
    weight = layer.weight
    n, _, height, width = x.shape
    ringed = torch.zeros(n, x.shape[1], height + 2, width + 2, dtype=x.dtype)
    ringed[:, :, 1:-1, 1:-1] = x
    rows, columns = range(0, height, stride), range(0, width, stride)
    out = torch.empty(n, len(weight), len(rows), len(columns), dtype=x.dtype)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            window = ringed[:, :, row : row + 3, column : column + 3]
            out[:, :, i, j] = (window[:, None] * weight[None]).sum((2, 3, 4))
    return out


def plain_batch_norm(x: Tensor, layer: nn.Module) -> Tensor:
    """Batch norm of a training step: the batch's own mean and biased variance per channel."""
    assert isinstance(layer, nn.BatchNorm2d)
    columns = [
        (c - c.mean()) / (((c - c.mean()) ** 2).mean() + layer.eps).sqrt() * scale + shift
        for c, scale, shift in zip(x.unbind(1), layer.weight, layer.bias, strict=True)
    ]
    return torch.stack(columns, 1)


def randomised(module: nn.Module) -> nn.Module:
    """The module in double precision with every parameter drawn, so that no scale of one hides a mistake."""
    generator = torch.Generator().manual_seed(0)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def test_basic_block_with_shortcut_a() -> None:
    block = randomised(BasicBlock(2, 5, 2, "A", "bn", 1))
    assert isinstance(block, BasicBlock)
    conv1, bn1, _, conv2, bn2 = block.residual
    x = torch.randn(3, 2, 4, 6, dtype=torch.float64)
    inner = plain_batch_norm(plain_convolution(x, conv1, 2), bn1).clamp(min=0)
    residual = plain_batch_norm(plain_convolution(inner, conv2, 1), bn2)
    shortcut = torch.zeros(3, 5, 2, 3, dtype=torch.float64)
    # Three new channels: one of zeros before the old two, two after.
    shortcut[:, 1:3] = x[:, :, [0, 2]][:, :, :, [0, 2, 4]]
    torch.testing.assert_close(block(x), (shortcut + residual).clamp(min=0))


def test_basic_block_with_shortcut_b_and_an_identity() -> None:
    projected = randomised(BasicBlock(2, 4, 2, "B", "bn", 1))
    identity = randomised(BasicBlock(4, 4, 1, "B", "bn", 1))
    assert isinstance(projected, BasicBlock)
    assert isinstance(identity, BasicBlock)
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    shortcut = projected.shortcut
    assert isinstance(shortcut, nn.Sequential)
    mixed = torch.einsum("nchw,oc->nohw", x[:, :, ::2, ::2], shortcut.get_parameter("0.weight")[:, :, 0, 0])
    y = (plain_batch_norm(mixed, shortcut[1]) + projected.residual(x)).clamp(min=0)
    torch.testing.assert_close(projected(x), y)
    torch.testing.assert_close(identity(y), (y + identity.residual(y)).clamp(min=0))


def test_wide_block() -> None:
    block = randomised(WideBlock(2, 4, 2, "bn", 1))
    assert isinstance(block, WideBlock)
    assert block.shortcut is not None
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    entered = plain_batch_norm(x, block.enter[0]).clamp(min=0)
    conv1, bn, _, conv2 = block.residual
    inner = plain_batch_norm(plain_convolution(entered, conv1, 2), bn).clamp(min=0)
    mixed = torch.einsum("nchw,oc->nohw", entered[:, :, ::2, ::2], block.shortcut.weight[:, :, 0, 0])
    torch.testing.assert_close(block(x), mixed + plain_convolution(inner, conv2, 1))


@settings(max_examples=30, deadline=None)
@given(
    channels=st.integers(1, 4),
    height=st.integers(2, 9),
    width=st.integers(2, 9),
    geometry=st.sampled_from([(2, 2, 0), (3, 2, 1)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_max_pool_and_relu_commute_bit_for_bit(
    channels: int, height: int, width: int, geometry: tuple[int, int, int], seed: int
) -> None:
    x = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(seed))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a = F.relu(MaxPool(*geometry)(ours))
    b = F.max_pool2d(F.relu(theirs), *geometry)
    assert torch.equal(a, b)
    (our_gradient,) = torch.autograd.grad(a.square().sum(), ours)
    (their_gradient,) = torch.autograd.grad(b.square().sum(), theirs)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-6, atol=0)


def test_lenet_centres_small_images() -> None:
    small, large = (build_model("lenet5", (1, side, side), 10) for side in (28, 32))
    large.load_state_dict(small.state_dict())
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(small(x), large(F.pad(x, (2, 2, 2, 2))))


@pytest.mark.parametrize("name", ["small_cnn", "resnet8", "resnet18", "wrn16_2", "mobilenet_tiny"])
def test_group_norm_keeps_samples_apart(name: str) -> None:
    options: dict[str, Any] = {} if name == "small_cnn" else {"norm": "gn"}
    model = build_model(name, (3, 8, 8), 4, **options)
    assert not list(model.buffers())
    x = torch.randn(4, 3, 8, 8)
    others = x.clone()
    others[1:] = 7 * torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(model(others)[0], model(x)[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(x[:1])[0], model(x)[0], rtol=1e-4, atol=1e-5)


def test_batch_norm_does_not() -> None:
    model = build_model("resnet8", (3, 8, 8), 4, norm="bn")
    x = torch.randn(4, 3, 8, 8)
    others = torch.cat([x[:1], 7 * torch.randn(3, 3, 8, 8)])
    assert (model(others)[0] - model(x)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_the_library_s(causal: bool) -> None:
    layer = randomised(Attention(6, 3, causal))
    assert isinstance(layer, Attention)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    theirs = nn.MultiheadAttention(6, 3, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(layer.qkv.weight)
        theirs.in_proj_bias.copy_(layer.qkv.bias)
        theirs.out_proj.weight.copy_(layer.out.weight)
        theirs.out_proj.bias.copy_(layer.out.bias)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64) if causal else None
    expected, _ = theirs(x, x, x, attn_mask=mask)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("name", ["gpt_tiny", "char_lstm", "char_gru"])
@pytest.mark.parametrize("cut", [1, 4, 7])
def test_the_future_does_not_change_the_past(name: str, cut: int) -> None:
    model = build_model(name, (8,), 9).eval()
    tokens = torch.randint(9, (2, 8), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, cut:] = (tokens[:, cut:] + 1) % 9
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :cut], before[:, :cut], rtol=1e-6, atol=1e-6)
    assert ((after[:, cut:] - before[:, cut:]).abs().amax(-1) > 1e-4).all()


def test_gpt_knows_positions() -> None:
    model = build_model("gpt_tiny", (4,), 9).eval()
    outputs = model(torch.zeros(1, 4, dtype=torch.int64))[0]
    assert (outputs[1:] - outputs[:-1]).abs().max() > 1e-4


def test_vit_patches_are_pixels_in_place() -> None:
    """Without positions a permutation of the patches changes nothing; with them it does."""
    model = build_model("vit_tiny", (3, 8, 8), 4).eval()
    x = torch.randn(2, 3, 8, 8)
    swapped = torch.cat([x[..., 4:], x[..., :4]], -1)
    assert (model(swapped) - model(x)).abs().max() > 1e-4
    with torch.no_grad():
        model.get_parameter("body.2.table").zero_()
    torch.testing.assert_close(model(swapped), model(x), rtol=1e-4, atol=1e-5)


def test_char_lstm_step_by_step() -> None:
    model = build_model("char_lstm", (3,), 5, hidden=4, depth=1).double()
    state = model.state_dict()
    tokens = torch.tensor([[0, 3, 1]])
    hidden = cell = torch.zeros(4, dtype=torch.float64)
    expected = []
    for token in tokens[0]:
        gates = (
            state["body.cell.weight_ih_l0"] @ state["body.embedding.weight"][token]
            + state["body.cell.bias_ih_l0"]
            + state["body.cell.weight_hh_l0"] @ hidden
            + state["body.cell.bias_hh_l0"]
        )
        enter, forget, new, leave = gates.chunk(4)
        cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
        hidden = leave.sigmoid() * cell.tanh()
        expected.append(state["head.weight"] @ hidden + state["head.bias"])
    torch.testing.assert_close(model(tokens)[0], torch.stack(expected))
