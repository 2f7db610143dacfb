"""Augmentations whose strengths are numbers of each sample: to be searched, tuned or drawn.

A strength of 0 changes nothing. Random numbers come from torch's default generator, which training seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from flowerbed.datasets import image_ops
from flowerbed.datasets.augment import Scale
from flowerbed.errors import require

FACTORS = {
    "brightness": image_ops.brightness,
    "contrast": image_ops.contrast,
    "saturation": image_ops.color,
}
"""Changes by a factor from [max(0, 1 - s), 1 + s] at strength s."""
HUE, SCALING, HOLES, LENGTH = "hue", "scaling", "holes", "length"
STRENGTHS = (*FACTORS, HUE, SCALING, HOLES, LENGTH)


def jitter(inputs: Tensor, strengths: Mapping[str, Tensor], scale: Scale) -> Tensor:
    """Return the images ``(N, C, H, W)``, changed by each of the strengths ``(N,)`` that are there.

    brightness, contrast, saturation: by a factor; hue: turned by up to that share of the circle; holes: how many grey
    squares are painted, each ``length`` pixels wide; scaling: all values times a factor from [1 - s, 1 + s].
    """
    pixels = scale.pixels(inputs)
    for name, change in FACTORS.items():
        if name in strengths:
            s = strengths[name]
            low, high = (1 - s).clamp(min=0), 1 + s
            pixels = change(pixels, low + (high - low) * torch.rand_like(s))
    if HUE in strengths and pixels.shape[1] == 3:
        pixels = turned(pixels, strengths[HUE] * (2 * torch.rand_like(strengths[HUE]) - 1))
    if HOLES in strengths:
        require(LENGTH in strengths, "Holes need a length; give both strengths.")
        pixels = pierced(pixels, strengths[HOLES], strengths[LENGTH])
    values = scale.values(pixels)
    if SCALING in strengths:
        s = strengths[SCALING]
        values = values * (1 + s * (2 * torch.rand_like(s) - 1)).view(-1, 1, 1, 1)
    return values


def turned(pixels: Tensor, share: Tensor) -> Tensor:
    """Return RGB images with the hue turned by ``share`` ``(N,)`` of the circle: a rotation about the grey axis.

    Grey stays grey, and the sum of the channels stays; the result is clamped to [0, 1].
    """
    angle = 2 * math.pi * share
    cos, sin = angle.cos(), angle.sin() / math.sqrt(3)
    # Rodrigues' formula about (1, 1, 1) / sqrt(3).
    same, after, before = (1 + 2 * cos) / 3, (1 - cos) / 3 - sin, (1 - cos) / 3 + sin
    rows = [
        torch.stack(row, -1) for row in ((same, after, before), (before, same, after), (after, before, same))
    ]
    return torch.einsum("nab,nbhw->nahw", torch.stack(rows, 1), pixels).clamp(0, 1)


def pierced(pixels: Tensor, holes: Tensor, length: Tensor) -> Tensor:
    """Return the images with ``holes`` (N,) grey squares each, ``length`` (N,) wide, cut off at the edges.

    Both are rounded down. The squares' centres are uniform over the image.
    """
    count, _, height, width = pixels.shape
    covered = torch.zeros(count, height, width, dtype=torch.bool, device=pixels.device)
    rows, columns = (torch.arange(size, device=pixels.device) for size in (height, width))
    side = length.floor()
    for hole in range(int(holes.floor().max())):
        edges = []
        for size, places in ((height, rows), (width, columns)):
            start = (torch.rand(count, device=pixels.device) * size).floor() - (side / 2).floor()
            edges.append((places >= start[:, None]) & (places < (start + side)[:, None]))
        square = edges[0][:, :, None] & edges[1][:, None, :]
        covered |= square & (holes.floor() > hole)[:, None, None]
    return pixels.masked_fill(covered[:, None], 0.5)
