"""The image operations of strong augmentation, each for a whole batch at once.

Every function takes pixels, float images ``(B, C, H, W)`` with values in [0, 1], and one strength per image
(float ``(B,)``), and returns new pixels. Definitions are those of Pillow's ``ImageOps`` and ``ImageEnhance``,
on real numbers instead of 256 levels; where the two differ by more than rounding, the function says so.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a grey image (ITU-R BT.601)."""
LEVELS = 256


def autocontrast(pixels: Tensor) -> Tensor:
    """Stretch each channel of each image so that it spans 0 to 1; a constant channel stays as it is."""
    low, high = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
    flat = high == low
    return torch.where(flat, pixels, (pixels - low) / torch.where(flat, torch.ones_like(high), high - low))


def equalize(pixels: Tensor) -> Tensor:
    """Replace each value by the share of the channel's pixels that lie below it, over 256 levels.

    The share is of the pixels outside the brightest level, so the result spans 0 to 1. Pillow counts in whole
    steps of 255 pixels and therefore leaves images of fewer than 256 pixels alone; this does not.
    """
    levels = (pixels * (LEVELS - 1)).round().long().flatten(2)
    counts = torch.zeros((*levels.shape[:2], LEVELS), dtype=pixels.dtype, device=pixels.device)
    counts.scatter_add_(2, levels, torch.ones_like(levels, dtype=pixels.dtype))
    below = counts.cumsum(2) - counts
    brightest = levels.amax(2, keepdim=True)
    span = below.gather(2, brightest)
    shares = below.gather(2, levels) / span.clamp(min=1)
    return torch.where(span > 0, shares, pixels.flatten(2)).view_as(pixels)


def posterize(pixels: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest ``bits`` (1 to 8) of each value's 8 bits."""
    step = _each(2.0 ** (8 - bits.round()))
    levels = (pixels * (LEVELS - 1)).round()
    return (levels / step).floor() * step / (LEVELS - 1)


def solarize(pixels: Tensor, threshold: Tensor) -> Tensor:
    """Invert the values at and above ``threshold``."""
    return torch.where(pixels < _each(threshold), pixels, 1 - pixels)


def brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Mix with black: factor 0 is black, 1 the image."""
    return _mix(torch.zeros_like(pixels), pixels, factor)


def color(pixels: Tensor, factor: Tensor) -> Tensor:
    """Mix with the grey image: factor 0 is grey, 1 the image. Images without three channels stay as they are."""
    return _mix(grey(pixels).expand_as(pixels), pixels, factor) if pixels.shape[1] == len(LUMA) else pixels


def contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """Mix with the mean of the grey image: factor 0 is that one value everywhere, 1 the image."""
    return _mix(grey(pixels).mean((2, 3), keepdim=True).expand_as(pixels), pixels, factor)


def sharpness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Mix with a smoothed image: factor 0 is smooth, 1 the image. The outermost pixels are not smoothed."""
    channels, height, width = pixels.shape[1:]
    if min(height, width) < 3:
        return pixels
    kernel = torch.ones(3, 3, dtype=pixels.dtype, device=pixels.device)
    kernel[1, 1] = 5
    kernel = (kernel / kernel.sum()).expand(channels, 1, 3, 3)
    smooth = pixels.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(pixels, kernel, groups=channels)
    return _mix(smooth, pixels, factor)


def rotate(pixels: Tensor, degrees: Tensor) -> Tensor:
    """Turn each image about its centre, counter-clockwise for positive ``degrees``."""
    angle = torch.deg2rad(degrees)
    # Rows point down, so turning the picture one way turns the sampling grid the same way in (x, y).
    return _sample(pixels, xx=angle.cos(), xy=-angle.sin(), yx=angle.sin(), yy=angle.cos())


def shear_x(pixels: Tensor, slope: Tensor) -> Tensor:
    """Shift each row by ``slope`` times its distance from the middle row (Pillow: from the top)."""
    return _sample(pixels, xy=slope)


def shear_y(pixels: Tensor, slope: Tensor) -> Tensor:
    """Shift each column by ``slope`` times its distance from the middle column (Pillow: from the left)."""
    return _sample(pixels, yx=slope)


def translate_x(pixels: Tensor, share: Tensor) -> Tensor:
    """Shift each image to the left by the ``share`` of its width, in whole pixels."""
    return _sample(pixels, x=(share * pixels.shape[3]).trunc())


def translate_y(pixels: Tensor, share: Tensor) -> Tensor:
    """Shift each image up by the ``share`` of its height, in whole pixels."""
    return _sample(pixels, y=(share * pixels.shape[2]).trunc())


def grey(pixels: Tensor) -> Tensor:
    """Return the grey images ``(B, 1, H, W)``: luma for three channels, else the channels' mean."""
    if pixels.shape[1] != len(LUMA):
        return pixels.mean(1, keepdim=True)
    weights = torch.tensor(LUMA, dtype=pixels.dtype, device=pixels.device)
    return (pixels * weights.view(1, -1, 1, 1)).sum(1, keepdim=True)


def erase(images: Tensor, top: Tensor, left: Tensor, side: int, value: Tensor) -> Tensor:
    """Put ``value`` into the square of ``side`` pixels at row ``top`` and column ``left`` (int ``(B,)``).

    What sticks out of the image is left away. The images may hold any numbers.
    """
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device) - top[:, None]
    columns = torch.arange(width, device=images.device) - left[:, None]
    inside = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None, :]
    return torch.where(inside[:, None], value, images)


def _mix(other: Tensor, pixels: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other, pixels, _each(factor)).clamp(0, 1)


def _each(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _sample(
    pixels: Tensor,
    *,
    xx: Tensor | float = 1.0,
    xy: Tensor | float = 0.0,
    x: Tensor | float = 0.0,
    yx: Tensor | float = 0.0,
    yy: Tensor | float = 1.0,
    y: Tensor | float = 0.0,
) -> Tensor:
    """Read each output pixel (u, v), in pixels from the centre, at (xx u + xy v + x, yx u + yy v + y).

    Bilinear between pixels (Pillow's default is the nearest one); black outside.
    """
    count, _, height, width = pixels.shape

    def matrix_column(value: Tensor | float) -> Tensor:
        return torch.as_tensor(value, dtype=pixels.dtype, device=pixels.device).expand(count)

    # grid_sample's coordinates run from -1 to 1 over the image, so that one pixel is 2 / width or 2 / height.
    rows = [
        [xx, _scaled(xy, height / width), _scaled(x, 2 / width)],
        [_scaled(yx, width / height), yy, _scaled(y, 2 / height)],
    ]
    matrix = torch.stack([torch.stack([matrix_column(v) for v in row], 1) for row in rows], 1)
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _scaled(value: Tensor | float, factor: float) -> Tensor | float:
    return value * factor
