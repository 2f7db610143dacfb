"""Generators that can be opened between their layers, and the discriminators that train them.

A *layered* generator is a chain G_N o ... o G_0: h_0 is the latent code, h_{k+1} = G_k(h_k; c), and the last result is
an image. ``part`` runs any stretch of it, so that running on from any h_k gives the very image of the whole. The
condition c is computed once, from labels, and given to every part.
"""

from __future__ import annotations

import itertools
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from flowerbed.errors import ConfigError
from flowerbed.models.base import Shape, require_at_least_one
from flowerbed.models.layers import image_shape

BLOCKS = 3
"""Doublings of the side, from 4."""
SIDE = 4 * 2**BLOCKS
"""Of the images that are made."""


class Layered(Protocol):
    """What an attack needs of a generator."""

    @property
    def layers(self) -> int:
        """Number of parts; ``part(h, c, 0, layers)`` is the whole generator."""

    @property
    def latent(self) -> Shape:
        """Shape of h_0, one sample."""

    def condition(self, labels: Tensor) -> Tensor:
        """Return c ``(B, ...)`` for labels ``(B,)``."""

    def part(self, h: Tensor, condition: Tensor, first: int, last: int) -> Tensor:
        """Return h_last for h_first; images ``(B, C, H, W)`` of pixels in [0, 1] if ``last`` is ``layers``."""


class ConditionalNorm(nn.Module):
    """Batch norm whose gain and bias are a linear function of the condition."""

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.affine = nn.Linear(condition, 2 * channels)
        nn.init.zeros_(self.affine.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return (1 + gain) * normalised + bias."""
        gain, bias = self.affine(condition)[..., None, None].chunk(2, 1)
        y: Tensor = self.norm(x) * (1 + gain) + bias
        return y


class Block(nn.Module):
    """Conditional norm, ReLU, nearest doubling of the side, 3x3 convolution."""

    def __init__(self, before: int, after: int, condition: int) -> None:
        super().__init__()
        self.norm = ConditionalNorm(before, condition)
        self.conv = nn.Conv2d(before, after, 3, padding=1)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """Return the next feature map, of twice the side."""
        y = self.norm(h, condition).relu()
        y = nn.functional.interpolate(y, scale_factor=2.0, mode="nearest")
        z: Tensor = self.conv(y)
        return z


class Generator(nn.Module):
    """A class-conditional generator of 32x32 images: a linear layer, three blocks, a convolution.

    Cut points: z, then maps of 4, 8 and 16 pixels; the last part makes the image. 159,441 parameters with the default
    sizes and one channel.
    """

    layers = BLOCKS + 1
    side = SIDE

    def __init__(
        self, channels: int, num_classes: int, latent: int = 64, embedding: int = 32, width: int = 16
    ) -> None:
        super().__init__()
        widths = (4 * width, 3 * width, 2 * width, 3 * width // 2)
        self.latent: Shape = (latent,)
        self.embedding = nn.Embedding(num_classes, embedding)
        self.stem = nn.Linear(latent + embedding, widths[0] * 16)
        self.blocks = nn.ModuleList(
            Block(before, after, embedding) for before, after in itertools.pairwise(widths)
        )
        self.norm = ConditionalNorm(widths[-1], embedding)
        self.out = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def condition(self, labels: Tensor) -> Tensor:
        """Return the embeddings of labels, ``(B, embedding)``."""
        c: Tensor = self.embedding(labels)
        return c

    def part(self, h: Tensor, condition: Tensor, first: int, last: int) -> Tensor:
        """Return h_last for h_first."""
        for k in range(first, last):
            if k == 0:
                h = self.stem(torch.cat([h, condition], -1)).unflatten(-1, (-1, 4, 4))
            elif k < BLOCKS:
                h = self.blocks[k - 1](h, condition)
            else:
                h = self.blocks[k - 1](h, condition)
                h = (self.out(self.norm(h, condition).relu()).tanh() + 1) / 2
        return h

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Return images ``(B, C, 32, 32)`` of pixels in [0, 1]."""
        return self.part(z, self.condition(labels), 0, self.layers)


class Discriminator(nn.Module):
    """A projection discriminator (Miyato and Koyama 2018): 4x4 convolutions of stride 2 with spectral norms."""

    def __init__(self, channels: int, num_classes: int, width: int = 24) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((channels, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [spectral_norm(nn.Conv2d(before, after, 4, 2, padding=1)), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers)
        self.score = nn.Linear(4 * width, 1)
        self.classes = nn.Embedding(num_classes, 4 * width)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return how real images of pixels in [0, 1] look for their labels, ``(B,)``."""
        features = self.body(2 * x - 1).sum((2, 3))
        found: Tensor = self.score(features)[:, 0] + (self.classes(labels) * features).sum(1)
        return found


class Gan(nn.Module):
    """Generator, discriminator, and the running average of the generator, as one model.

    Called like a classifier it says how real an image looks as each of the classes.
    """

    def __init__(self, channels: int, num_classes: int, latent: int, embedding: int, width: int) -> None:
        super().__init__()
        self.classes = num_classes
        self.generator = Generator(channels, num_classes, latent, embedding, width)
        self.discriminator = Discriminator(channels, num_classes, 3 * width // 2)
        self.average = Generator(channels, num_classes, latent, embedding, width)
        self.average.load_state_dict(self.generator.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        """Return scores ``(B, C)`` of 32x32 images of pixels in [0, 1]."""
        scores = [
            self.discriminator(x, torch.full((len(x),), c, device=x.device)) for c in range(self.classes)
        ]
        return torch.stack(scores, 1)


def gan32(
    input_shape: Shape, num_classes: int, latent: int = 64, embedding: int = 32, width: int = 16
) -> Gan:
    """Return a small class-conditional GAN of 32x32 images; smaller ones are centred in black.

    ``width`` 16 gives 159,441 parameters of the generator and 93,769 of the discriminator for one channel and ten
    classes.
    """
    channels, *sides = image_shape("gan32", input_shape)
    if max(sides) > SIDE:
        raise ConfigError(f"Model 'gan32' makes images of {SIDE}x{SIDE}, not {sides[0]}x{sides[1]}.")
    require_at_least_one("gan32", latent=latent, embedding=embedding, width=width)
    return Gan(channels, num_classes, latent, embedding, width)


def gan32_wide(input_shape: Shape, num_classes: int) -> Gan:
    """Return ``gan32`` with 128 latent values and four times the width, for a GPU: 1.5 million generator parameters."""
    return gan32(input_shape, num_classes, latent=128, width=64)
