"""Networks with tuned dropout rates and augmentations, made of gated layers; or of ordinary ones, for comparison."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.errors import require
from flowerbed.models.base import Shape, require_at_least_one
from flowerbed.models.gated import Conditioned, GatedConv2d, GatedLinear, Knob, RatedDropout
from flowerbed.models.layers import image_shape


class Mlp(Conditioned):
    """ReLU layers with a tuned dropout before each."""

    def __init__(
        self, widths: tuple[int, ...], knobs: list[Knob], gated: bool, spread: float, centred: bool
    ) -> None:
        super().__init__(knobs, spread, centred)
        self.layers = nn.ModuleList(
            GatedLinear(i, o, len(knobs), self.condition) if gated else nn.Linear(i, o)
            for i, o in pairwise(widths)
        )
        self.drops = nn.ModuleList(RatedDropout(knob.name, self.condition) for knob in knobs)

    def compute(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for place, (drop, layer) in enumerate(zip(self.drops, self.layers, strict=True)):
            x = layer(drop(x.relu() if place else x))
        return x


def dropout_mlp(
    input_shape: Shape,
    num_classes: int,
    *,
    hidden: tuple[int, ...] = (128, 128),
    rates: tuple[float, ...] = (0.05, 0.05, 0.05),
    top: float = 0.95,
    gated: bool = True,
    spread: float = 1.0,
    centred: bool = False,
) -> Mlp:
    """Return a ReLU network with a dropout rate in (0, ``top``) for the input and each hidden layer.

    ``rates`` are where they start, ``spread`` is the initial sigma; not ``gated`` is an ordinary network.
    """
    require_at_least_one("dropout_mlp", hidden=min(hidden, default=0))
    names = ["input", *(f"hidden-{i}" for i in range(1, len(hidden) + 1))]
    require(len(rates) == len(names), f"Option rates={list(rates)} needs one rate for each of {names}.")
    knobs = [Knob(f"dropout-{n}", r, 0.0, top) for n, r in zip(names, rates, strict=True)]
    return Mlp((math.prod(input_shape), *hidden, num_classes), knobs, gated, spread, centred)


CHANNELS = (64, 192, 384, 256, 256)
ALEXNET = (
    *(
        ("dropout-" + name, 0.0, 0.9, False)
        for name in ("input", *(f"conv-{i}" for i in range(1, 6)), "fc-1", "fc-2")
    ),
    ("hue", 0.0, 0.5, False),
    *((name, 0.0, 1.0, False) for name in ("saturation", "brightness", "contrast")),
    ("scaling", 0.0, 0.3, False),
    ("holes", 0.0, 4.0, True),
    ("length", 0.0, 24.0, True),
)
"""The 15 hyperparameters: name, range, whether whole."""


class AlexNet(Conditioned):
    """Five convolutions and three dense layers, all gated, with a tuned dropout before each."""

    def __init__(
        self,
        shape: Shape,
        classes: int,
        knobs: list[Knob],
        dense: int,
        gated: bool,
        spread: float,
        centred: bool,
    ) -> None:
        super().__init__(knobs, spread, centred)
        channels, height, width = shape
        n, layers = len(knobs), []
        for place, following in enumerate(CHANNELS):
            stride = 1 if place else 2
            layers.append(
                GatedConv2d(channels, following, 3, n, self.condition, stride, 1)
                if gated
                else nn.Conv2d(channels, following, 3, stride, 1)
            )
            channels = following
        size = channels * (-(-height // 2) // 8) * (-(-width // 2) // 8)
        self.convolutions = nn.ModuleList(layers)
        self.dense = nn.ModuleList(
            GatedLinear(i, o, n, self.condition) if gated else nn.Linear(i, o)
            for i, o in ((size, dense), (dense, dense), (dense, classes))
        )
        self.drops = nn.ModuleList(RatedDropout(k.name, self.condition) for k in knobs if "dropout" in k.name)

    def compute(self, x: Tensor) -> Tensor:
        drops = iter(self.drops)
        for place, layer in enumerate(self.convolutions):
            x = layer(next(drops)(x)).relu()
            if place in (0, 1, 4):
                x = F.max_pool2d(x, 2)
        x = x.flatten(1)
        for place, layer in enumerate(self.dense):
            x = layer(next(drops)(x.relu() if place else x))
        return x


def alexnet(
    input_shape: Shape,
    num_classes: int,
    *,
    starts: tuple[float, ...] = (*(0.05,) * 13, 1.0, 4.0),
    dense: int = 4096,
    gated: bool = True,
    spread: float = 0.5,
    centred: bool = False,
) -> AlexNet:
    """Return the paper's network for images and its 15 hyperparameters, ``starts`` being where they start."""
    shape = image_shape("alexnet", input_shape, 16)
    require(len(starts) == len(ALEXNET), f"Option starts needs {len(ALEXNET)} numbers, not {len(starts)}.")
    knobs = [
        Knob(name, start, low, high, whole)
        for (name, low, high, whole), start in zip(ALEXNET, starts, strict=True)
    ]
    return AlexNet(shape, num_classes, knobs, dense, gated, spread, centred)
