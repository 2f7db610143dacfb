"""A small network of inverted residuals."""

from __future__ import annotations

from torch import Tensor, nn

from flowerbed.models.base import Net, Shape, classifier
from flowerbed.models.layers import GlobalMean, conv3x3, image_shape, kaiming, norm, sequence

STAGES = ((1, 16, 1, 1), (4, 24, 2, 2), (4, 40, 2, 2), (4, 80, 2, 2))
"""Expansion, channels, blocks and first stride of each stage."""


class InvertedResidual(nn.Module):
    """Expand with 1x1, filter each channel with 3x3, project with 1x1 (Sandler et al. 2018, MobileNetV2)."""

    def __init__(
        self, channels_in: int, channels_out: int, stride: int, expansion: int, kind: str, groups: int
    ) -> None:
        super().__init__()
        inner = channels_in * expansion
        expand = [] if expansion == 1 else _pointwise(channels_in, inner, kind, groups)
        self.block = nn.Sequential(
            *expand,
            conv3x3(inner, inner, stride, groups=inner),
            norm(kind, inner, groups),
            nn.ReLU6(),
            nn.Conv2d(inner, channels_out, 1, bias=False),
            norm(kind, channels_out, groups),
        )
        self.residual = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return x + y if self.residual else y


def mobilenet_tiny(input_shape: Shape, num_classes: int, *, norm: str = "bn", groups: int = 8) -> Net:
    """Return a MobileNetV2 for images of CIFAR's size, 0.14 million parameters; it divides the size by 8."""
    channels, *_ = image_shape("mobilenet_tiny", input_shape, 8)
    layers: list[nn.Module] = [conv3x3(channels, 16), *_activated(16, norm, groups)]
    width = 16
    for expansion, following, blocks, first_stride in STAGES:
        for index in range(blocks):
            stride = 1 if index else first_stride
            layers.append(InvertedResidual(width, following, stride, expansion, norm, groups))
            width = following
    body = sequence(norm, *layers, *_pointwise(width, 320, norm, groups), GlobalMean())
    kaiming(body)
    return classifier(body, 320, num_classes)


def _activated(channels: int, kind: str, groups: int) -> list[nn.Module]:
    return [norm(kind, channels, groups), nn.ReLU6()]


def _pointwise(channels_in: int, channels_out: int, kind: str, groups: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, 1, bias=False), *_activated(channels_out, kind, groups)]
