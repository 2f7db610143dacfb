"""Random views of images for self-supervised learning: crops of any size, mirrored, relit, with noise.

Importing this module makes the augmentation ``ssl`` known.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from flowerbed.datasets.augment import AUGMENTATIONS, PIXELS, Scale
from flowerbed.errors import ConfigError

ASPECT = 4 / 3
"""The sides of a crop differ at most by this factor."""


@AUGMENTATIONS.register("ssl")
def ssl_view(
    inputs: Tensor,
    generator: torch.Generator,
    *,
    area: float = 0.3,
    light: float = 0.4,
    noise: float = 0.05,
    scale: Scale = PIXELS,
) -> Tensor:
    """Return ``resized_crops``, each mirrored with probability 1/2, ``relit``, and with normal noise on the pixels.

    ``area`` is the smallest share that a crop has, ``light`` the range of brightness and contrast, ``noise`` a standard
    deviation. Pixels stay in [0, 1]. Raises ``ConfigError`` for what is no batch of float images.
    """
    if inputs.dim() != 4 or not inputs.is_floating_point():
        raise ConfigError(
            f"ssl needs a batch of float images (B, C, H, W), not {inputs.dtype} of shape {tuple(inputs.shape)}."
        )
    pixels = relit(resized_crops(scale.pixels(inputs), generator, area), generator, light)
    drawn = torch.randn(pixels.shape, generator=generator, device=generator.device, dtype=pixels.dtype)
    return scale.values((pixels + noise * drawn.to(pixels.device)).clamp(0, 1))


def resized_crops(pixels: Tensor, generator: torch.Generator, area: float, flip: bool = True) -> Tensor:
    """Return a random part of each image ``(B, C, H, W)``, stretched to the old size, and mirrored half of the time.

    The part's area is uniform in [``area``, 1], the logarithm of its aspect uniform within ``ASPECT``, its place
    uniform inside the image; a side that would be longer than the image's is the image's.
    """
    share, aspect, down, across, coin = _uniform(5, pixels, generator)
    share, aspect = area + (1 - area) * share, ((2 * aspect - 1) * math.log(ASPECT)).exp()
    tall, wide = ((share * a).sqrt().clamp(max=1) for a in (1 / aspect, aspect))
    # In the coordinates of affine_grid the image reaches from -1 to 1.
    y, x = (2 * down - 1) * (1 - tall), (2 * across - 1) * (1 - wide)
    mirrored = torch.where(coin < 0.5, -wide, wide) if flip else wide
    zero = torch.zeros_like(x)
    rows = [torch.stack([mirrored, zero, x], 1), torch.stack([zero, tall, y], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def relit(pixels: Tensor, generator: torch.Generator, light: float) -> Tensor:
    """Return images with brightness and contrast times factors in [1 - ``light``, 1 + ``light``], clamped to [0, 1]."""
    bright, contrast = (1 + light * (2 * u - 1) for u in _uniform(2, pixels, generator))
    pixels = pixels * bright[:, None, None, None]
    mean = pixels.mean((1, 2, 3), keepdim=True)
    return ((pixels - mean) * contrast[:, None, None, None] + mean).clamp(0, 1)


def _uniform(count: int, like: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Return ``count`` uniform draws in [0, 1) for each image, ``(B,)``."""
    drawn = torch.rand(count, len(like), generator=generator, device=generator.device, dtype=like.dtype)
    return list(drawn.to(like.device))
