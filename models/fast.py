"""Layers that round differently from torch's own and take less time: for training that may differ in the last bits.

On a CPU, for float32. A large dense layer goes through oneDNN where that is the faster way on this processor
(``Route``), and its weight may be moved within the backward pass, so that its gradient never exists. Dropout draws
one byte an element instead of one random number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Route:
    """Which products of a dense layer go through oneDNN instead of torch's default."""

    output: bool = False
    """``x @ w.T + b``."""
    input_gradient: bool = False
    """``g @ w``."""


class Descent:
    """Plain gradient descent within the backward pass of dense layers."""

    def __init__(self) -> None:
        self.lr: float | None = None
        """The learning rate while a backward pass is one of a training step, else None."""
        self.uses: dict[int, int] = {}
        """How often each weight was used since ``begin``, by id: one that is used twice cannot be moved in between."""

    def begin(self) -> None:
        """Start a step."""
        self.uses.clear()

    @contextmanager
    def along(self, lr: float) -> Iterator[None]:
        """Let the backward pass inside move weights by ``-lr`` times their gradient."""
        self.lr = lr
        try:
            yield
        finally:
            self.lr = None


class DenseFunction(torch.autograd.Function):
    """``x @ w.T + b`` for ``x`` (N, I), ``w`` (O, I)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, route: Route, descent: Descent) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.route, ctx.descent, ctx.biased = route, descent, b is not None
        descent.uses[id(w)] = descent.uses.get(id(w), 0) + 1
        ctx.weight = id(w)
        return onednn_linear(x, w, b) if route.output else F.linear(x, w, b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        needs_x, needs_w, needs_b, *_ = ctx.needs_input_grad
        gx = gw = None
        descent: Descent = ctx.descent
        if needs_x:
            gx = onednn_linear(g, w.t(), None) if ctx.route.input_gradient else g @ w
        if needs_w and descent.lr is not None and descent.uses[ctx.weight] == 1:
            w.addmm_(g.t(), x, alpha=-descent.lr)
        elif needs_w:
            gw = g.t() @ x
        return gx, gw, g.sum(0) if needs_b else None, None, None


def onednn_linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Return ``x @ w.T + b`` computed by oneDNN; not differentiable."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")
    return y


def dense(layer: nn.Linear, route: Route, descent: Descent) -> Forward:
    """Return what computes ``layer`` through ``DenseFunction`` where its input is a batch of rows."""

    def forward(x: Tensor) -> Tensor:
        if x.dim() != 2:
            return F.linear(x, layer.weight, layer.bias)
        # Autocast would copy the whole weight to bfloat16, which costs more than it saves for a few rows.
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = DenseFunction.apply(  # type: ignore[no-untyped-call]
                x.float(), layer.weight, layer.bias, route, descent
            )
        return y

    return forward


def dropout(layer: nn.Dropout) -> Forward:
    """Return what computes ``layer`` with masks from bytes; its probability is a multiple of 1/256 below one."""
    threshold, scale = round(layer.p * 256), 1 / (1 - layer.p)

    def forward(x: Tensor) -> Tensor:
        if not layer.training:
            return x
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        mask = words.view(torch.uint8)[: x.numel()].ge(threshold).to(x.dtype).mul_(scale)
        if x.dim() == 4 and x.stride(1) == 1:
            # In the memory order of channels-last images, so that both are read in one sweep.
            batch, channels, height, width = x.shape
            return x * mask.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return x * mask.view(x.shape)

    return forward
