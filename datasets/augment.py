"""Batch augmentation in plain torch; every random number comes from the generator that is passed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowerbed.errors import ConfigError
from flowerbed.registry import Registry

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
"""A function of a batch ``(B, C, H, W)`` and a generator on the batch's device or the CPU."""

AUGMENTATIONS: Registry[Augmentation] = Registry("augmentation")


@AUGMENTATIONS.register("none")
def no_augmentation(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``inputs`` itself; draws nothing."""
    return inputs


@AUGMENTATIONS.register("flip_crop")
def flip_crop(inputs: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Mirror each image left to right with probability 1/2, then cut it from a random place of its padding.

    The protocol of ResNet on CIFAR (He et al. 2016, sec. 4.2): ``padding`` **zeros** on every side and a
    uniformly random crop of the old size. Zero is black in a raw uint8 batch and the mean colour in a
    normalised one, which is where the protocol pads; so for exact replication augment after ``prepare``.
    ``inputs`` is ``(B, C, H, W)`` of any type; the result is new and has its shape and type.

    Draws, in this order, B flips, B vertical and B horizontal offsets in ``0..2 padding``.
    """
    if inputs.dim() != 4:
        raise ConfigError(f"flip_crop needs a batch of images (B, C, H, W), not shape {tuple(inputs.shape)}.")
    count, _, height, width = inputs.shape

    def draw(high: int) -> Tensor:
        numbers = torch.randint(high, (count,), generator=generator, device=generator.device)
        return numbers.to(inputs.device)

    flip, top, left = draw(2), draw(2 * padding + 1), draw(2 * padding + 1)
    padded = torch.nn.functional.pad(inputs, (padding,) * 4)
    rows = top[:, None] + torch.arange(height, device=inputs.device)
    columns = torch.arange(width, device=inputs.device).expand(count, width)
    # A crop of the mirrored image at column `left` reads the unmirrored padding from the other end.
    ahead = left[:, None] + columns
    columns = torch.where(flip[:, None].bool(), width + 2 * padding - 1 - ahead, ahead)
    batch = torch.arange(count, device=inputs.device)
    # Indexing puts the channel last: (B, H, W, C).
    return (
        padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        .permute(0, 3, 1, 2)
        .contiguous()
    )
