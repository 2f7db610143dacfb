"""Small parts that the image models share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.errors import ConfigError
from flowerbed.models.base import Shape


def image_shape(model: str, input_shape: Shape, smallest: int = 1) -> Shape:
    """Return ``(C, H, W)``; raises ``ConfigError`` if the input is no image or a side is below ``smallest``."""
    if len(input_shape) != 3:
        raise ConfigError(
            f"Model '{model}' takes images (channels, height, width), not samples of shape {input_shape}; "
            "use mlp or linear."
        )
    side = min(input_shape[1:])
    if side < smallest:
        raise ConfigError(
            f"Model '{model}' needs images of at least {smallest}x{smallest}, not {input_shape[1]}x"
            f"{input_shape[2]}; enlarge them, or use small_cnn or mlp."
        )
    return input_shape


def norm(kind: str, channels: int, groups: int) -> nn.Module:
    """Return the normalisation layer ``kind``: ``bn`` (batch) or ``gn`` (``groups`` groups of channels).

    Batch norm couples the samples of a batch and carries running statistics, which clients with different
    data disagree on; group norm does neither.
    """
    if kind == "bn":
        return nn.BatchNorm2d(channels)
    if kind != "gn":
        raise ConfigError(f"Option norm={kind!r} must be 'bn' (batch norm) or 'gn' (group norm).")
    if groups < 1 or channels % groups:
        raise ConfigError(f"Option groups={groups} must divide the {channels} channels of every layer.")
    return nn.GroupNorm(groups, channels)


def conv3x3(channels_in: int, channels_out: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps the size (divided by ``stride``), to be followed by a norm."""
    return nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, groups=groups, bias=False)


def channels_last(x: Tensor) -> Tensor:
    """Return a batch of images ``(N, C, H, W)`` with the channels innermost in memory; on a GPU as it is.

    On a CPU, convolutions take about a fifth less time in this layout and max pooling a twentieth. A layer whose
    input has it keeps it, also where there is one channel and a plain tensor could be either.
    """
    if x.device.type != "cpu":
        return x
    if x.shape[1] == 1:
        return x.squeeze(1).contiguous().unsqueeze(-1).permute(0, 3, 1, 2)
    # Not contiguous(memory_format=torch.channels_last), which torch.func.vmap refuses.
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


class ChannelsLast(nn.Sequential):
    """Layers on images, one after another, from the channels-last layout on."""

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(x)
        for layer in self:
            x = layer(x)
        return x


def sequence(kind: str, *layers: nn.Module) -> nn.Sequential:
    """Return the layers in the layout that suits the norm ``kind``: group norm's backward pass likes channels first."""
    return ChannelsLast(*layers) if kind == "bn" else nn.Sequential(*layers)


class MaxPool(nn.Module):
    """Max pooling, on a CPU in the channels-last layout.

    Values are those of ``nn.MaxPool2d``; among equal maxima of a window the gradient may go to another.
    """

    def __init__(self, size: int = 2, stride: int = 2, padding: int = 0) -> None:
        super().__init__()
        self.size, self.stride, self.padding = size, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(channels_last(x), self.size, self.stride, self.padding)
        if y.requires_grad:
            # From flattened features the gradient comes in the other layout, on which the backward pass is slow.
            y.register_hook(channels_last)  # type: ignore[no-untyped-call]
        return y


class GlobalMean(nn.Module):
    """Mean over all positions: ``(N, C, H, W)`` to ``(N, C)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


@torch.no_grad()
def kaiming(model: nn.Module) -> None:
    """Draw every convolution from N(0, 2 / fan_out) (He et al. 2015), as the residual networks do."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
