"""Layers of K models at once, forward and backward by hand.

Dense activations are ``(K, B, F)``. Images are ``(B, K * C, H, W)`` in channels-last memory: the K models are
groups of one convolution. A layer hands back, beside its output, what its backward pass needs. Outputs are
fresh tensors unless said otherwise, so the next layer may overwrite what its predecessor has not kept.

The gradients of parameters go to a ``Sink``, which either collects them or moves the parameters at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten
Weights = Mapping[str, Tensor]
"""The stacked parameters by name, ``(K, ...)``."""
Pair = tuple[int, int]


class Sink(Protocol):
    """Where the gradients of the parameters go."""

    @property
    def moving(self) -> frozenset[str]:
        """The parameters whose gradients are wanted."""

    def add(self, name: str, gradient: Tensor) -> None:
        """Take a gradient ``(K, ...)``."""

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        """Take the gradient ``left @ right``, ``(K, O, B) @ (K, B, I)``."""


@dataclass
class Collect:
    """Keeps the gradients."""

    moving: frozenset[str]
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, gradient: Tensor) -> None:
        self.gradients[name] = gradient

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        self.gradients[name] = torch.bmm(left, right)


@dataclass
class Descend:
    """Subtracts the gradients, which hold the learning rate already, from the parameters.

    The gradient of a dense layer never exists: product and update are one operation.
    """

    moving: frozenset[str]
    weights: Weights

    def add(self, name: str, gradient: Tensor) -> None:
        self.weights[name].sub_(gradient)

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        self.weights[name].baddbmm_(left, right, alpha=-1)


class Layer(Protocol):
    """One layer of K models."""

    @property
    def names(self) -> tuple[str, ...]:
        """Its parameters."""

    def forward(self, x: Tensor, weights: Weights, clients: int) -> tuple[Tensor, Any]:
        """Return the output and what the backward pass needs."""

    def backward(self, dy: Tensor, saved: Any, weights: Weights, sink: Sink, need: bool) -> Tensor | None:
        """Return the gradient of the input if it is needed; ``dy`` may be overwritten.

        A parameter's gradient is handed to the sink after the last use of its value.
        """


@dataclass(frozen=True)
class Linear:
    weight: str
    bias: str | None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def forward(self, x: Tensor, weights: Weights, clients: int) -> tuple[Tensor, Any]:
        turned = weights[self.weight].transpose(1, 2)
        if self.bias is None:
            return torch.bmm(x, turned), x
        return torch.baddbmm(weights[self.bias].unsqueeze(1), x, turned), x

    def backward(self, dy: Tensor, saved: Any, weights: Weights, sink: Sink, need: bool) -> Tensor | None:
        dx = self.input_gradient(dy, weights) if need else None
        if self.weight in sink.moving:
            sink.product(self.weight, dy.transpose(1, 2), saved)
        if self.bias is not None and self.bias in sink.moving:
            sink.add(self.bias, dy.sum(1))
        return dx

    def input_gradient(self, dy: Tensor, weights: Weights) -> Tensor:
        return torch.bmm(dy, weights[self.weight])


@dataclass(frozen=True)
class OneDnnLinear(Linear):
    """The same through oneDNN, client by client: faster than MKL for large layers on some processors."""

    def forward(self, x: Tensor, weights: Weights, clients: int) -> tuple[Tensor, Any]:
        w = weights[self.weight]
        bias = None if self.bias is None else weights[self.bias]
        made = [_onednn(x[k], w[k], None if bias is None else bias[k]) for k in range(clients)]
        return torch.stack(made) if clients > 1 else made[0].unsqueeze(0), x

    def input_gradient(self, dy: Tensor, weights: Weights) -> Tensor:
        w = weights[self.weight]
        made = [_onednn(dy[k], w[k].t(), None) for k in range(dy.shape[0])]
        return torch.stack(made) if len(made) > 1 else made[0].unsqueeze(0)


def has_onednn() -> bool:
    """Return whether torch was built with oneDNN's linear layer."""
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


@dataclass(frozen=True)
class Conv:
    """A convolution without groups of its own."""

    weight: str
    bias: str | None
    stride: Pair
    padding: Pair
    dilation: Pair

    @property
    def names(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def forward(self, x: Tensor, weights: Weights, clients: int) -> tuple[Tensor, Any]:
        kernel = weights[self.weight].flatten(0, 1).to(x.dtype)
        bias = None if self.bias is None else weights[self.bias].flatten().to(x.dtype)
        y = F.conv2d(x, kernel, bias, self.stride, self.padding, self.dilation, clients)
        return y, (x, kernel, clients)

    def backward(self, dy: Tensor, saved: Any, weights: Weights, sink: Sink, need: bool) -> Tensor | None:
        x, kernel, clients = saved
        wanted = [need, self.weight in sink.moving, self.bias is not None and self.bias in sink.moving]
        dx, dw, db = aten.convolution_backward(
            dy,
            x,
            kernel,
            [len(kernel)],
            self.stride,
            self.padding,
            self.dilation,
            False,
            (0, 0),
            clients,
            wanted,
        )
        if wanted[1]:
            sink.add(self.weight, dw.unflatten(0, (clients, -1)))
        if self.bias is not None and wanted[2]:
            sink.add(self.bias, db.unflatten(0, (clients, -1)))
        return dx if need else None


@dataclass(frozen=True)
class GroupNorm:
    weight: str
    bias: str
    groups: int
    eps: float

    @property
    def names(self) -> tuple[str, ...]:
        return (self.weight, self.bias)

    def forward(self, x: Tensor, weights: Weights, clients: int) -> tuple[Tensor, Any]:
        batch, channels, height, width = x.shape
        gamma, beta = (weights[n].flatten().to(x.dtype) for n in self.names)
        sizes = (batch, channels, height * width, clients * self.groups)
        y, mean, rstd = aten.native_group_norm(x, gamma, beta, *sizes, self.eps)
        return y, (x, gamma, mean, rstd, sizes, clients)

    def backward(self, dy: Tensor, saved: Any, weights: Weights, sink: Sink, need: bool) -> Tensor | None:
        x, gamma, mean, rstd, sizes, clients = saved
        wanted = [need, *(n in sink.moving for n in self.names)]
        dx, *found = aten.native_group_norm_backward(dy, x, mean, rstd, gamma, *sizes, wanted)
        for name, gradient, want in zip(self.names, found, wanted[1:], strict=True):
            if want:
                sink.add(name, gradient.unflatten(0, (clients, -1)))
        return dx if need else None


@dataclass(frozen=True)
class Plain:
    """Base of layers without parameters."""

    @property
    def names(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class ReLU(Plain):
    """Overwrites its input, which no layer keeps as its output."""

    def forward(self, x: Tensor, weights: Weights, clients: int) -> tuple[Tensor, Any]:
        y = x.relu_()
        return y, y

    def backward(self, dy: Tensor, saved: Any, weights: Weights, sink: Sink, need: bool) -> Tensor | None:
        dx: Tensor = aten.threshold_backward(dy, saved, 0)
        return dx


@dataclass(frozen=True)
class Multiply(Plain):
    """Dropout by a given mask, ``(K, B, F)`` or ``(B, K * C, H, W)``."""

    noise: Tensor

    def forward(self, x: Tensor, weights: Weights, clients: int) -> tuple[Tensor, Any]:
        return x * self.noise, None

    def backward(self, dy: Tensor, saved: Any, weights: Weights, sink: Sink, need: bool) -> Tensor | None:
        return dy * self.noise


@dataclass(frozen=True)
class MaxPool(Plain):
    size: Pair
    stride: Pair
    padding: Pair

    def forward(self, x: Tensor, weights: Weights, clients: int) -> tuple[Tensor, Any]:
        y, index = aten.max_pool2d_with_indices(x, self.size, self.stride, self.padding)
        return y, (x, index)

    def backward(self, dy: Tensor, saved: Any, weights: Weights, sink: Sink, need: bool) -> Tensor | None:
        x, index = saved
        dx: Tensor = aten.max_pool2d_with_indices_backward(
            dy, x, self.size, self.stride, self.padding, (1, 1), False, index
        )
        return dx


@dataclass(frozen=True)
class AvgPool(Plain):
    size: Pair
    stride: Pair
    padding: Pair

    def forward(self, x: Tensor, weights: Weights, clients: int) -> tuple[Tensor, Any]:
        return F.avg_pool2d(x, self.size, self.stride, self.padding), x

    def backward(self, dy: Tensor, saved: Any, weights: Weights, sink: Sink, need: bool) -> Tensor | None:
        dx: Tensor = aten.avg_pool2d_backward(
            dy, saved, self.size, self.stride, self.padding, False, True, None
        )
        return dx


@dataclass(frozen=True)
class ZeroPad(Plain):
    """Left, right, top, bottom."""

    margins: tuple[int, int, int, int]

    def forward(self, x: Tensor, weights: Weights, clients: int) -> tuple[Tensor, Any]:
        return F.pad(x, self.margins), x.shape

    def backward(self, dy: Tensor, saved: Any, weights: Weights, sink: Sink, need: bool) -> Tensor | None:
        left, _, top, _ = self.margins
        inner = dy[:, :, top : top + saved[2], left : left + saved[3]]
        return inner.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class GlobalMean(Plain):
    """Mean over all positions: ``(B, K * C, H, W)`` to ``(K, B, C)``, in the type of the dense layers."""

    dtype: torch.dtype | None = None

    def forward(self, x: Tensor, weights: Weights, clients: int) -> tuple[Tensor, Any]:
        mean = x.mean((2, 3)).view(len(x), clients, -1)
        return mean.transpose(0, 1).to(self.dtype or x.dtype).contiguous(), (x.shape, x.dtype)

    def backward(self, dy: Tensor, saved: Any, weights: Weights, sink: Sink, need: bool) -> Tensor | None:
        shape, dtype = saved
        batch, channels, height, width = shape
        spread = dy.transpose(0, 1).to(dtype).reshape(batch, channels, 1, 1) / (height * width)
        dx: Tensor = spread.expand(shape).contiguous(memory_format=torch.channels_last)
        return dx


@dataclass(frozen=True)
class Enter(Plain):
    """Samples ``(K, B, C, H, W)`` to images; always the first layer."""

    dtype: torch.dtype | None = None

    def forward(self, x: Tensor, weights: Weights, clients: int) -> tuple[Tensor, Any]:
        images = x.permute(1, 3, 4, 0, 2).to(self.dtype or x.dtype)
        return images.reshape(*images.shape[:3], -1).permute(0, 3, 1, 2), None

    def backward(self, dy: Tensor, saved: Any, weights: Weights, sink: Sink, need: bool) -> Tensor | None:
        return None


@dataclass(frozen=True)
class FlattenSamples(Plain):
    """Samples ``(K, B, ...)`` to ``(K, B, F)``; only as the first layer."""

    def forward(self, x: Tensor, weights: Weights, clients: int) -> tuple[Tensor, Any]:
        return x.flatten(2), None

    def backward(self, dy: Tensor, saved: Any, weights: Weights, sink: Sink, need: bool) -> Tensor | None:
        return None


@dataclass(frozen=True)
class FlattenImages(Plain):
    """Images to ``(K, B, C * H * W)`` in torch's order, and to the type of the dense layers."""

    dtype: torch.dtype | None = None

    def forward(self, x: Tensor, weights: Weights, clients: int) -> tuple[Tensor, Any]:
        apart = x.view(len(x), clients, -1, *x.shape[2:]).transpose(0, 1)
        return apart.to(self.dtype or x.dtype).flatten(2), (x.shape, x.dtype)

    def backward(self, dy: Tensor, saved: Any, weights: Weights, sink: Sink, need: bool) -> Tensor | None:
        shape, dtype = saved
        clients, (batch, channels, height, width) = len(dy), shape
        apart = dy.view(clients, batch, channels // clients, height, width).permute(1, 3, 4, 0, 2)
        return apart.to(dtype).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
