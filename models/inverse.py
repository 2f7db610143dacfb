"""Measurements of images: an operator H with its adjoint H^T and its pseudo-inverse H^+.

y = H(x) + noise. Each has ``size``, the numbers measured of one image; y may be stored in more (an inpainting mask
keeps the shape of the image, zeros where nothing is seen). Linear operators satisfy <H x, y> = <x, H^T y> and
H H^+ H = H; of a nonlinear one the adjoint is that of its derivative, which autograd makes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from flowerbed.errors import require


class Operator(Protocol):
    """How an image ``(B, C, H, W)`` is measured."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return H(x)."""

    def inverse(self, y: Tensor) -> Tensor:
        """Return H^+ y, an image."""

    def adjoint(self, y: Tensor) -> Tensor:
        """Return H^T y, an image."""

    def size(self, x: Tensor) -> Tensor:
        """Return how many numbers are measured of each image, ``(B, 1, 1, 1)``."""

    def hidden(self, x: Tensor) -> Tensor:
        """Return which pixels are not measured as they are, bool, in the shape of ``x``."""


@dataclass(frozen=True, eq=False)
class Mask:
    """Inpainting: some pixels are seen, the others are 0."""

    seen: Tensor
    """bool ``(B, C, H, W)``, or anything that broadcasts to it."""

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.seen

    def inverse(self, y: Tensor) -> Tensor:
        return y * self.seen

    adjoint = inverse

    def size(self, x: Tensor) -> Tensor:
        return self.seen.expand_as(x).sum((1, 2, 3), keepdim=True).clamp(min=1)

    def hidden(self, x: Tensor) -> Tensor:
        return ~self.seen.expand_as(x)


@dataclass(frozen=True)
class BlockMean:
    """Super-resolution: the means of square blocks are seen."""

    factor: int

    def __call__(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.factor)

    def inverse(self, y: Tensor) -> Tensor:
        return y.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.inverse(y) / self.factor**2

    def size(self, x: Tensor) -> Tensor:
        return torch.full((len(x), 1, 1, 1), x[0].numel() // self.factor**2, device=x.device)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.ones_like(x, dtype=torch.bool)


@dataclass(frozen=True, eq=False)
class Blur:
    """Convolution with a kernel over the borders (circular), a product in Fourier space."""

    kernel: Tensor
    """``(h, w)``, its middle at ``(h // 2, w // 2)``."""
    least: float = 0.05
    """Frequencies that the kernel damps to less are given up by H^+."""

    def __call__(self, x: Tensor) -> Tensor:
        return self._filtered(x, self._response(x))

    def inverse(self, y: Tensor) -> Tensor:
        response = self._response(y)
        kept = response.abs() >= self.least
        return self._filtered(y, torch.where(kept, 1 / torch.where(kept, response, 1), 0))

    def adjoint(self, y: Tensor) -> Tensor:
        return self._filtered(y, self._response(y).conj())

    def size(self, x: Tensor) -> Tensor:
        return torch.full((len(x), 1, 1, 1), x[0].numel(), device=x.device)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.ones_like(x, dtype=torch.bool)

    def _response(self, x: Tensor) -> Tensor:
        height, width = self.kernel.shape
        require(
            height <= x.shape[-2] and width <= x.shape[-1],
            f"A blur of {height}x{width} needs images at least as large.",
        )
        whole = F.pad(self.kernel.to(x), (0, x.shape[-1] - width, 0, x.shape[-2] - height))
        response: Tensor = torch.fft.rfft2(torch.roll(whole, (-(height // 2), -(width // 2)), (-2, -1)))
        return response

    @staticmethod
    def _filtered(x: Tensor, response: Tensor) -> Tensor:
        filtered: Tensor = torch.fft.irfft2(torch.fft.rfft2(x) * response, s=x.shape[-2:])
        return filtered


@dataclass(frozen=True)
class Clamp:
    """High dynamic range: twice the image, cut off at -1 and 1. Not linear; H^+ is only right inside."""

    def __call__(self, x: Tensor) -> Tensor:
        return (2 * x).clamp(-1, 1)

    def inverse(self, y: Tensor) -> Tensor:
        return y / 2

    def adjoint(self, y: Tensor) -> Tensor:
        return 2 * y

    def size(self, x: Tensor) -> Tensor:
        return torch.full((len(x), 1, 1, 1), x[0].numel(), device=x.device)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.ones_like(x, dtype=torch.bool)


def random_mask(shape: torch.Size | tuple[int, ...], share: float, generator: torch.Generator) -> Mask:
    """Return a mask that sees a share of the pixels, ``round(share H W)`` of each image, all channels alike."""
    count, _, height, width = shape
    order = torch.rand(count, height * width, generator=generator, device=generator.device).argsort(1)
    seen = torch.zeros(count, height * width, dtype=torch.bool, device=generator.device)
    seen.scatter_(1, order[:, : round(share * height * width)], True)
    return Mask(seen.view(count, 1, height, width))


def box_mask(shape: torch.Size | tuple[int, ...], side: int, device: torch.device | str = "cpu") -> Mask:
    """Return a mask that hides a square in the middle."""
    _, _, height, width = shape
    require(side <= min(height, width), f"A box of side {side} does not fit into {height}x{width}.")
    seen = torch.ones(1, 1, height, width, dtype=torch.bool, device=device)
    top, left = (height - side) // 2, (width - side) // 2
    seen[..., top : top + side, left : left + side] = False
    return Mask(seen)


def psnr(found: Tensor, truth: Tensor, where: Tensor | None = None, span: float = 2.0) -> Tensor:
    """Return the peak signal to noise ratio of every image in dB, ``(B,)``, over the pixels ``where``.

    ``span`` is the range of pixel values. Exact pixels are taken as wrong by 1e-10 of it.
    """
    where = torch.ones_like(truth, dtype=torch.bool) if where is None else where
    squares = ((found - truth) ** 2 * where).flatten(1).sum(1) / where.flatten(1).sum(1).clamp(min=1)
    return 10 * torch.log10(span**2 / squares.clamp(min=(1e-10 * span) ** 2))
