"""Batch augmentation in plain torch; every random number comes from the generator that is passed.

Weak: ``flip_crop``, ``shift``, ``flip_shift``. Strong: ``randaugment``, ``cutout``, ``randaugment_cutout``; these
know colours, so they are told how the values of the batch relate to pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from flowerbed.datasets import image_ops
from flowerbed.errors import ConfigError
from flowerbed.registry import Registry


@dataclass(frozen=True)
class Scale:
    """How values relate to pixels in [0, 1]: value = (pixel - mean) / std, one entry or one per channel."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def pixels(self, values: Tensor) -> Tensor:
        """Return the pixels ``(B, C, H, W)`` that the values stand for, clamped to [0, 1]."""
        return (values * self._by_channel(self.std, values) + self._by_channel(self.mean, values)).clamp(0, 1)

    def values(self, pixels: Tensor) -> Tensor:
        """Return the values that stand for the pixels."""
        return (pixels - self._by_channel(self.mean, pixels)) / self._by_channel(self.std, pixels)

    @staticmethod
    def _by_channel(entries: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(entries, dtype=like.dtype, device=like.device).view(-1, 1, 1)


PIXELS = Scale()
"""The scale of a batch that holds pixels in [0, 1] themselves."""


class Augmentation(Protocol):
    """A function of a batch ``(B, C, H, W)`` and a generator on the batch's device or the CPU."""

    def __call__(self, inputs: Tensor, generator: torch.Generator, /, *, scale: Scale = PIXELS) -> Tensor:
        """Return the augmented batch, a new one unless nothing changes."""


AUGMENTATIONS: Registry[Augmentation] = Registry("augmentation")


@AUGMENTATIONS.register("none")
def no_augmentation(inputs: Tensor, generator: torch.Generator, *, scale: Scale = PIXELS) -> Tensor:
    """Return ``inputs`` itself; draws nothing."""
    return inputs


@AUGMENTATIONS.register("flip_crop")
def flip_crop(
    inputs: Tensor, generator: torch.Generator, padding: int = 4, *, scale: Scale = PIXELS
) -> Tensor:
    """Mirror each image left to right with probability 1/2, then cut it from a random place of its padding.

    The protocol of ResNet on CIFAR (He et al. 2016, sec. 4.2): ``padding`` **zeros** on every side and a
    uniformly random crop of the old size. Zero is black in a raw uint8 batch and the mean colour in a
    normalised one, which is where the protocol pads; so for exact replication augment after ``prepare``.
    ``inputs`` is ``(B, C, H, W)`` of any type; the result is new and has its shape and type.

    Draws, in this order, B flips, B vertical and B horizontal offsets in ``0..2 padding``.
    """
    _require_images("flip_crop", inputs)
    draw = _draws(inputs, generator)
    flip, top, left = draw(2), draw(2 * padding + 1), draw(2 * padding + 1)
    return _crops(F.pad(inputs, (padding,) * 4), flip, top, left, padding, padding)


@AUGMENTATIONS.register("shift")
def shift(inputs: Tensor, generator: torch.Generator, *, scale: Scale = PIXELS) -> Tensor:
    """Move each image by up to an eighth of its side (4 of 32 pixels), mirrored at the edge.

    FixMatch's weak view where mirror images are other classes (digits). Draws B vertical, then B horizontal
    offsets. Raises ``ConfigError`` for what is no batch of images.
    """
    _require_images("shift", inputs)
    return _shifted(inputs, generator, torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device))


@AUGMENTATIONS.register("flip_shift")
def flip_shift(inputs: Tensor, generator: torch.Generator, *, scale: Scale = PIXELS) -> Tensor:
    """Mirror each image left to right with probability 1/2, then ``shift`` it: FixMatch's weak view.

    Draws B flips, then what ``shift`` draws.
    """
    _require_images("flip_shift", inputs)
    return _shifted(inputs, generator, _draws(inputs, generator)(2))


def _shifted(inputs: Tensor, generator: torch.Generator, flip: Tensor) -> Tensor:
    vertical, horizontal = (round(side / 8) for side in inputs.shape[2:])
    draw = _draws(inputs, generator)
    top, left = draw(2 * vertical + 1), draw(2 * horizontal + 1)
    padded = F.pad(inputs, (horizontal, horizontal, vertical, vertical), mode="reflect")
    return _crops(padded, flip, top, left, vertical, horizontal)


@AUGMENTATIONS.register("cutout")
def cutout(
    inputs: Tensor, generator: torch.Generator, share: float = 0.5, *, scale: Scale = PIXELS
) -> Tensor:
    """Paint a grey (0.5) square over each image; its side is ``share`` of the image's shorter one.

    DeVries and Taylor 2017: the centre is uniform in the image, so the square may stick out. FixMatch paints
    16 of 32 pixels. Draws B rows, then B columns.
    """
    _require_images("cutout", inputs)
    side = round(share * min(inputs.shape[2:]))
    draw = _draws(inputs, generator)
    top, left = (draw(length) - side // 2 for length in inputs.shape[2:])
    grey = scale.values(torch.full_like(inputs[:1, :, :1, :1], 0.5))
    return image_ops.erase(inputs, top, left, side, grey)


@dataclass(frozen=True)
class Operation:
    """One entry of RandAugment's pool; the strength is ``start + s span`` at level s in (0, 1]."""

    apply: Callable[[Tensor, Tensor], Tensor]
    start: float = 0.0
    span: float = 0.0
    signed: bool = False
    """Whether the strength is negative half of the time."""


POOL = (
    Operation(lambda pixels, _: pixels),
    Operation(lambda pixels, _: image_ops.autocontrast(pixels)),
    Operation(lambda pixels, _: image_ops.equalize(pixels)),
    Operation(image_ops.brightness, 0.05, 0.9),
    Operation(image_ops.color, 0.05, 0.9),
    Operation(image_ops.contrast, 0.05, 0.9),
    Operation(image_ops.sharpness, 0.05, 0.9),
    Operation(lambda pixels, bits: image_ops.posterize(pixels, bits.floor()), 4.0, 4.0),
    Operation(image_ops.solarize, 1.0, -1.0),
    Operation(image_ops.rotate, 0.0, 30.0, signed=True),
    Operation(image_ops.shear_x, 0.0, 0.3, signed=True),
    Operation(image_ops.shear_y, 0.0, 0.3, signed=True),
    Operation(image_ops.translate_x, 0.0, 0.3, signed=True),
    Operation(image_ops.translate_y, 0.0, 0.3, signed=True),
)
"""FixMatch's operations and ranges (Sohn et al. 2020, appendix D). Lengths are relative, so that they suit images
of any size; ranges made for 224 pixels would blank one of 32."""
LEVELS = 10


@AUGMENTATIONS.register("randaugment")
def randaugment(
    inputs: Tensor, generator: torch.Generator, n: int = 2, m: int = LEVELS, *, scale: Scale = PIXELS
) -> Tensor:
    """Apply ``n`` random operations of ``POOL`` to each image, each with probability 1/2.

    RandAugment (Cubuk et al. 2020) in the form of FixMatch: every time an operation and a level 1..``m`` out of 10
    are drawn anew for each image. ``inputs`` are float images ``(B, C, H, W)`` whose values ``scale`` explains.
    Colours stay within [0, 1], new area is black.

    Draws for each of the n rounds, in this order, B operations, levels, signs and coins.
    """
    _require_images("randaugment", inputs)
    if not inputs.is_floating_point():
        raise ConfigError(f"randaugment needs float images, not {inputs.dtype}; prepare them first.")
    draw = _draws(inputs, generator)
    pixels = scale.pixels(inputs)
    for _ in range(n):
        chosen, levels, signs, coins = draw(len(POOL)), draw(m) + 1, 2 * draw(2) - 1, draw(2)
        pixels = _applied(pixels, torch.where(coins.bool(), chosen, 0), levels / LEVELS, signs)
    return scale.values(pixels)


@AUGMENTATIONS.register("randaugment_cutout")
def randaugment_cutout(inputs: Tensor, generator: torch.Generator, *, scale: Scale = PIXELS) -> Tensor:
    """Apply ``randaugment``, then ``cutout``: with a weak view before them, FixMatch's strong view."""
    return cutout(randaugment(inputs, generator, scale=scale), generator, scale=scale)


def _applied(pixels: Tensor, chosen: Tensor, levels: Tensor, signs: Tensor) -> Tensor:
    """Return each image after the operation of the pool that was chosen for it."""
    result = pixels.clone()
    for index, operation in enumerate(POOL):
        rows = (chosen == index).nonzero()[:, 0]
        if len(rows):
            strength = operation.start + levels[rows] * operation.span
            if operation.signed:
                strength = strength * signs[rows]
            result[rows] = operation.apply(pixels[rows], strength.to(pixels.dtype)).clamp(0, 1)
    return result


def _require_images(name: str, inputs: Tensor) -> None:
    if inputs.dim() != 4:
        raise ConfigError(f"{name} needs a batch of images (B, C, H, W), not shape {tuple(inputs.shape)}.")


def _draws(inputs: Tensor, generator: torch.Generator) -> Callable[[int], Tensor]:
    """Return a function that draws one whole number below its argument for each input."""

    def draw(high: int) -> Tensor:
        numbers = torch.randint(high, (len(inputs),), generator=generator, device=generator.device)
        return numbers.to(inputs.device)

    return draw


def _crops(padded: Tensor, flip: Tensor, top: Tensor, left: Tensor, vertical: int, horizontal: int) -> Tensor:
    """Return, of each padded image (mirrored where ``flip``), the part of the unpadded size at (top, left)."""
    count, width = len(padded), padded.shape[3] - 2 * horizontal
    height = padded.shape[2] - 2 * vertical
    rows = top[:, None] + torch.arange(height, device=padded.device)
    columns = torch.arange(width, device=padded.device).expand(count, width)
    # A crop of the mirrored image at column `left` reads the unmirrored padding from the other end.
    ahead = left[:, None] + columns
    columns = torch.where(flip[:, None].bool(), padded.shape[3] - 1 - ahead, ahead)
    batch = torch.arange(count, device=padded.device)
    # Indexing puts the channel last: (B, H, W, C).
    return (
        padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        .permute(0, 3, 1, 2)
        .contiguous()
    )
