"""Autoencoders in three parts, encoder, latent and decoder, so that latents can be exchanged.

``features`` of the model are what the encoder says, ``head`` turns a code into logits of pixels, and the latent between
them turns the one into the other; it is the module ``head.latent``.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.errors import ConfigError, require
from flowerbed.models.base import Net, Shape
from flowerbed.models.layers import image_shape
from flowerbed.models.quantisers import ScalarCodebooks, VectorCodebook

LATENTS = ("plain", "gaussian", "quantised", "fixed", "vectors")
STYLE_WIDTHS = (32, 64, 128, 256)


class Gaussian(nn.Module):
    """The mean of what an encoder says as means and log variances, ``(N, 2 n)`` to ``(N, n)``."""

    def forward(self, said: Tensor) -> Tensor:
        return said.chunk(2, -1)[0]


class Decoding(nn.Module):
    """A decoder with the latent whose codes it reads: codes ``(N, n)`` to logits ``(N, C, H, W)``.

    A ``critic`` reads the encoder's last layer, and says how real an image looks.
    """

    def __init__(self, latent: nn.Module, decoder: nn.Module, critic: nn.Module | None = None) -> None:
        super().__init__()
        self.latent, self.decoder, self.critic = latent, decoder, critic

    def forward(self, code: Tensor) -> Tensor:
        y: Tensor = self.decoder(code)
        return y


class Autoencoder(Net):
    """Images ``(N, C, H, W)`` to logits of the same shape."""

    body: nn.Sequential
    head: Decoding

    def code(self, x: Tensor) -> Tensor:
        """Return the code ``(N, n)`` of a batch, without noise."""
        code: Tensor = self.head.latent(self.body(x))
        return code

    def value(self, x: Tensor) -> Tensor:
        """Return the critic's value of images, ``(N,)``; raises ``ConfigError`` without a critic."""
        if self.head.critic is None:
            raise ConfigError("This autoencoder judges no images; set model.critic=true.")
        value: Tensor = self.head.critic(self.body[:-1](x)).squeeze(-1)
        return value

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.code(x))
        return y


def autoencoder(
    input_shape: Shape,
    num_classes: int,
    *,
    latent: str = "plain",
    n_z: int = 12,
    levels: int = 10,
    size: int = 64,
    nets: str = "mlp",
    hidden: tuple[int, ...] = (256, 256),
    critic: bool = False,
) -> Autoencoder:
    """Return an autoencoder with ``n_z`` latents.

    ``latent``: plain; gaussian (the encoder says mean and log variance); quantised (a learned codebook of ``levels``
    scalars for each latent); fixed (the same without learning); vectors (one learned codebook of ``levels`` vectors of
    ``size`` numbers for all latents). ``nets``: mlp with layers of ``hidden`` units, mirrored in the decoder; or style,
    the convolutional networks of Hsu et al. 2023, for sides that are multiples of 16 from 32 on. With ``critic`` the
    encoder has a second output, how real an image looks: the networks of an InfoGAN.
    """
    image_shape("autoencoder", input_shape)
    require(latent in LATENTS, f"Option latent='{latent}' must be one of {', '.join(LATENTS)}.")
    require(n_z >= 1, f"Option n_z={n_z} of an autoencoder must be at least 1.")
    if nets == "mlp":
        require(bool(hidden), "Option hidden of an autoencoder must name at least one layer.")
    made: nn.Module = nn.Identity() if latent == "plain" else Gaussian()
    if latent in ("quantised", "fixed"):
        made = ScalarCodebooks(n_z, levels, learned=latent == "quantised")
    elif latent == "vectors":
        made = VectorCodebook(size, levels)
    read = n_z * size if latent == "vectors" else n_z
    said = 2 * n_z if latent == "gaussian" else read
    if nets == "mlp":
        pixels = math.prod(input_shape)
        encoder = nn.Sequential(nn.Flatten(), *_dense((pixels, *hidden, said)))
        decoder: nn.Module = nn.Sequential(
            *_dense((read, *hidden[::-1], pixels)), nn.Unflatten(1, input_shape)
        )
    elif nets == "style":
        encoder, decoder = style_encoder(input_shape, said), StyleDecoder(input_shape, read)
    else:
        raise ConfigError(f"Option nets='{nets}' must be 'mlp' or 'style'.")
    last = encoder[-1]
    assert isinstance(last, nn.Linear)
    judge = nn.Linear(last.in_features, 1) if critic else None
    return Autoencoder(encoder, Decoding(made, decoder, judge), said)


def _dense(widths: tuple[int, ...]) -> list[nn.Module]:
    """Return linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following), nn.ReLU()]
    return layers[:-1]


def style_encoder(input_shape: Shape, outputs: int, widths: tuple[int, ...] = STYLE_WIDTHS) -> nn.Sequential:
    """Return groups of three convolutions, of which the last halves the image, with instance norm, and dense layers."""
    channels, height, width = _halved("style", input_shape, widths)
    layers: list[nn.Module] = []
    for following in widths:
        for kernel, stride in ((3, 1), (3, 1), (4, 2)):
            layers += [
                nn.Conv2d(channels, following, kernel, stride, padding=1),
                nn.InstanceNorm2d(following),
                nn.LeakyReLU(),
            ]
            channels = following
    return nn.Sequential(*layers, nn.Flatten(), *_dense((channels * height * width, 256, 256, outputs)))


class StyleDecoder(nn.Module):
    """A constant map that the code styles: after every layer it sets scale and bias of each channel."""

    constant: Tensor

    def __init__(self, output_shape: Shape, n_z: int, widths: tuple[int, ...] = STYLE_WIDTHS) -> None:
        super().__init__()
        _, height, width = _halved("style", output_shape, widths)
        channels = widths[-1]
        self.register_buffer("constant", torch.full((1, channels, height, width), 0.1), persistent=False)
        self.mapping = nn.Sequential(*_dense((n_z, 256, 256)), nn.ReLU())
        self.layers, self.styles = nn.ModuleList(), nn.ModuleList()
        for following in widths[::-1]:
            for kernel, stride in ((3, 1), (3, 1), (4, 2)):
                self.layers.append(nn.ConvTranspose2d(channels, following, kernel, stride, padding=1))
                self.styles.append(nn.Linear(256, 2 * following))
                channels = following
        self.last = nn.Conv2d(channels, output_shape[0], 3, padding=1)

    def forward(self, code: Tensor) -> Tensor:
        w = self.mapping(code)
        y = self.constant.expand(len(code), -1, -1, -1)
        for layer, style in zip(self.layers, self.styles, strict=True):
            scale, bias = style(w)[:, :, None, None].chunk(2, 1)
            y = F.instance_norm(F.leaky_relu(layer(y))) * (1 + scale) + bias
        logits: Tensor = self.last(y)
        return logits


def _halved(nets: str, shape: Shape, widths: tuple[int, ...]) -> Shape:
    channels, height, width = shape
    factor = 2 ** len(widths)
    if height % factor or width % factor or min(height, width) < 2 * factor:
        raise ConfigError(
            f"Option nets='{nets}' needs sides that are multiples of {factor} from {2 * factor} on, not {height}x"
            f"{width}; choose nets=mlp."
        )
    return channels, height // factor, width // factor
