"""Residual networks: CIFAR ResNets, ResNet-18 and wide ResNets, with batch or group norm."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.errors import ConfigError
from flowerbed.models.base import Builder, Net, Shape, classifier
from flowerbed.models.layers import GlobalMean, MaxPool, conv3x3, image_shape, kaiming, norm, sequence


class PadShortcut(nn.Module):
    """Option A of He et al. 2016: every ``stride``-th position, with zeros for the new channels."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.missing = channels_out - channels_in

    def forward(self, x: Tensor) -> Tensor:
        thinned = x[:, :, :: self.stride, :: self.stride]
        return F.pad(thinned, (0, 0, 0, 0, self.missing // 2, self.missing - self.missing // 2))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016): ``relu(shortcut(x) + residual(x))``."""

    def __init__(
        self, channels_in: int, channels_out: int, stride: int, shortcut: str, kind: str, groups: int
    ) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            conv3x3(channels_in, channels_out, stride),
            norm(kind, channels_out, groups),
            nn.ReLU(),
            conv3x3(channels_out, channels_out),
            norm(kind, channels_out, groups),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = (
                PadShortcut(channels_in, channels_out, stride)
                if shortcut == "A"
                else nn.Sequential(
                    nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
                    norm(kind, channels_out, groups),
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.residual(x))


class WideBlock(nn.Module):
    """Pre-activation block of Zagoruyko & Komodakis 2016; a changed shape is projected after the first norm."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, kind: str, groups: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(norm(kind, channels_in, groups), nn.ReLU())
        self.residual = nn.Sequential(
            conv3x3(channels_in, channels_out, stride),
            norm(kind, channels_out, groups),
            nn.ReLU(),
            conv3x3(channels_out, channels_out),
        )
        changed = stride != 1 or channels_in != channels_out
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False) if changed else None

    def forward(self, x: Tensor) -> Tensor:
        entered = self.enter(x)
        passed = x if self.shortcut is None else self.shortcut(entered)
        return passed + self.residual(entered)  # type: ignore[no-any-return]


def cifar_resnet(depth: int) -> Builder:
    """Return the builder of the CIFAR ResNet with ``depth = 6n + 2`` layers (He et al. 2016, section 4.2)."""
    name = f"resnet{depth}"

    def build(
        input_shape: Shape, num_classes: int, *, norm: str = "bn", groups: int = 8, shortcut: str = "A"
    ) -> Net:
        _check_choice(name, "shortcut", shortcut, ("A", "B"))
        channels, *_ = image_shape(name, input_shape, 4)
        stages = [(width, (depth - 2) // 6) for width in (16, 32, 64)]
        body = sequence(
            norm,
            *_cifar_stem(channels, 16, norm, groups),
            *_basic_stages(16, stages, shortcut, norm, groups),
            GlobalMean(),
        )
        kaiming(body)
        return classifier(body, 64, num_classes)

    return build


def resnet18(
    input_shape: Shape, num_classes: int, *, norm: str = "bn", groups: int = 8, stem: str = "cifar"
) -> Net:
    """Return ResNet-18 (He et al. 2016), projection shortcuts.

    ``stem="cifar"`` begins with one 3x3 convolution (11,173,962 parameters for 3 channels, 10 classes),
    ``stem="imagenet"`` with a 7x7 convolution and a pool, which divide the size by 4.
    """
    _check_choice("resnet18", "stem", stem, ("cifar", "imagenet"))
    channels, *_ = image_shape("resnet18", input_shape, 8 if stem == "cifar" else 32)
    make_stem = _cifar_stem if stem == "cifar" else _imagenet_stem
    stages = [(width, 2) for width in (64, 128, 256, 512)]
    body = nn.Sequential(
        *make_stem(channels, 64, norm, groups),
        *_basic_stages(64, stages, "B", norm, groups),
        GlobalMean(),
    )
    kaiming(body)
    return classifier(body, 512, num_classes)


def wide_resnet(depth: int, factor: int) -> Builder:
    """Return the builder of WRN-``depth``-``factor`` without dropout (Zagoruyko & Komodakis 2016)."""
    name = f"wrn{depth}_{factor}"

    def build(input_shape: Shape, num_classes: int, *, norm: str = "bn", groups: int = 8) -> Net:
        channels, *_ = image_shape(name, input_shape, 4)
        layers: list[nn.Module] = [conv3x3(channels, 16)]
        width = 16
        for stage, following in enumerate((16 * factor, 32 * factor, 64 * factor)):
            for index in range((depth - 4) // 6):
                stride = 2 if stage and not index else 1
                layers.append(WideBlock(width, following, stride, norm, groups))
                width = following
        body = nn.Sequential(*layers, *_activated(width, norm, groups), GlobalMean())
        kaiming(body)
        return classifier(body, width, num_classes)

    return build


def _activated(channels: int, kind: str, groups: int) -> tuple[nn.Module, nn.Module]:
    return norm(kind, channels, groups), nn.ReLU()


def _cifar_stem(channels: int, width: int, kind: str, groups: int) -> list[nn.Module]:
    return [conv3x3(channels, width), *_activated(width, kind, groups)]


def _imagenet_stem(channels: int, width: int, kind: str, groups: int) -> list[nn.Module]:
    large = nn.Conv2d(channels, width, 7, 2, padding=3, bias=False)
    return [large, *_activated(width, kind, groups), MaxPool(3, 2, 1)]


def _basic_stages(
    width: int, stages: list[tuple[int, int]], shortcut: str, kind: str, groups: int
) -> list[nn.Module]:
    """Return the blocks of ``stages``, each (channels, blocks); every stage but the first halves the size."""
    layers: list[nn.Module] = []
    for stage, (following, blocks) in enumerate(stages):
        for index in range(blocks):
            stride = 2 if stage and not index else 1
            layers.append(BasicBlock(width, following, stride, shortcut, kind, groups))
            width = following
    return layers


def _check_choice(model: str, option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(
            f"Option {option}={value!r} of model '{model}' must be one of {', '.join(choices)}."
        )
