"""StyleGAN2 and BigGAN-deep, opened between their blocks, from a user's file of weights.

Nothing is downloaded. Known are the state dicts of two public PyTorch ports: StyleGAN2's of ``rosinality`` (a
checkpoint with ``g_ema``, or that alone) and BigGAN-deep's of ``pytorch-pretrained-biggan``. Sizes are read from the
tensors.

Beside the feature map these generators need more on every level than one map: StyleGAN2 a style and a noise map for
each convolution and the picture that earlier blocks have painted (the skip), BigGAN the latent code. So h_k, k at least
1, is one flat vector of *all* that the rest of the generator depends on; cutting there loses nothing, and the picture
does not jump. What an attack moves is that vector.

=============  ======================================================================  ============================
generator      h_0                                                                     h_k
=============  ======================================================================  ============================
``StyleGAN2``  e for W+, and the noise maps, all ~ N(0, 1)                             features, skip, W+, noise
``BigGAN``     z ~ N(0, 1)                                                             features, z
=============  ======================================================================  ============================

W+ = LeakyReLU_0.2(mean + std e), mean and std being those of what the mapping network makes of random codes, before its
last activation (PULSE, Menon et al. 2020; GIFD starts so).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.errors import ConfigError
from flowerbed.models.base import Shape

SLOPE = 0.2
SAMPLES = 4096
"""Codes sent through StyleGAN2's mapping network to see where its styles lie."""
GAIN = math.sqrt(2)
MAPPING_RATE = 0.01
"""By which the mapping network's weights were scaled down in training, and are here."""
NORM_EPS = 1e-4
BLUR = (1.0, 3.0, 3.0, 1.0)


class _Opened(nn.Module):
    """Weights by their published names, and what is alike in all generators."""

    layers: int
    """Number of parts."""

    def __init__(self, state: Mapping[str, Tensor], side: int) -> None:
        super().__init__()
        self.weights = nn.ParameterDict(
            {_key(name): nn.Parameter(value.float()) for name, value in state.items()}
        )
        self.side = side

    def condition(self, labels: Tensor) -> Tensor:
        """Return c ``(B, ...)`` for labels ``(B,)``."""
        raise NotImplementedError

    def part(self, h: Tensor, condition: Tensor, first: int, last: int) -> Tensor:
        """Return h_last for h_first; pixels ``(B, 3, side, side)`` if ``last`` is the number of layers."""
        raise NotImplementedError

    def forward(self, h: Tensor, labels: Tensor) -> Tensor:
        """Return pixels ``(B, 3, side, side)`` for h_0."""
        return self.part(h, self.condition(labels), 0, self.layers)

    def _of(self, name: str) -> Tensor:
        found: Tensor = self.weights[_key(name)]
        return found

    def _image(self, values: Tensor) -> Tensor:
        """Return pixels ``(B, 3, side, side)`` of values in about [-1, 1], made smaller by means over areas."""
        return F.interpolate((values + 1) / 2, size=(self.side, self.side), mode="area")


class StyleGAN2(_Opened):
    """The generator of Karras et al. 2020; it knows no classes."""

    mean: Tensor
    std: Tensor

    def __init__(self, state: Mapping[str, Tensor], side: int) -> None:
        """``side``: of the images that are wanted. Raises ``ConfigError`` for a state dict that lacks tensors."""
        super().__init__(state, side)
        blocks = 1 + len({name.split(".")[1] for name in state if name.startswith("to_rgbs.")})
        self.layers = blocks
        self._styles = 2 * blocks
        self._width = int(state["conv1.conv.modulation.weight"].shape[1])
        self._base = int(state["input.input"].shape[-1])
        _complete(state, self._names(blocks), "StyleGAN2")
        with torch.no_grad():
            mean, std = self._where_styles_lie()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def _names(self, blocks: int) -> list[str]:
        convs = ["conv1", *(f"convs.{i}" for i in range(2 * (blocks - 1)))]
        pictures = ["to_rgb1", *(f"to_rgbs.{i}" for i in range(blocks - 1))]
        own = [f"{layer}.conv.{part}" for layer in (*convs, *pictures) for part in _MODULATED]
        noise = [f"{layer}.{part}" for layer in convs for part in ("noise.weight", "activate.bias")]
        return ["input.input", *own, *noise, *(f"{layer}.bias" for layer in pictures)]

    @property
    def latent(self) -> Shape:
        return (self._styles * self._width + sum(self._noise_sizes()),)

    def _noise_sizes(self) -> list[int]:
        sides = [self._base * 2**block for block in range(self.layers)]
        return [sides[0] ** 2, *(side**2 for side in sides[1:] for _ in range(2))]

    def _where_styles_lie(self) -> tuple[Tensor, Tensor]:
        rng = torch.Generator().manual_seed(0)
        z = torch.randn(SAMPLES, self._width, generator=rng)
        w = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        count = len({k for k in self.weights if k.startswith("style/") and k.endswith("weight")})
        for layer in range(1, count + 1):
            weight = self._of(f"style.{layer}.weight")
            w = F.linear(w, weight * (MAPPING_RATE / math.sqrt(weight.shape[1])))
            w = _activated(w + self._of(f"style.{layer}.bias") * MAPPING_RATE)
        before = torch.where(w < 0, w / SLOPE, w)
        return before.mean(0), before.std(0)

    def condition(self, labels: Tensor) -> Tensor:
        """Return nothing, ``(B, 0)``."""
        return torch.zeros(len(labels), 0, device=labels.device)

    def part(self, h: Tensor, condition: Tensor, first: int, last: int) -> Tensor:
        """Return h_last for h_first; pixels ``(B, 3, side, side)`` if ``last`` is the number of layers."""
        for block in range(first, last):
            h = self._first(h) if block == 0 else self._further(h, block)
        if first < last == self.layers:
            h = self._image(self._unpacked(h, self.layers)[1])
        return h

    def _first(self, h: Tensor) -> Tensor:
        size = self._styles * self._width
        code, noise = h[:, :size].view(-1, self._styles, self._width), h[:, size:]
        styles = F.leaky_relu(self.mean + self.std * code, SLOPE)
        x = self._of("input.input").expand(len(h), -1, -1, -1)
        x = self._styled(x, "conv1", styles[:, 0], noise[:, : self._base**2])
        skip = self._painted(x, "to_rgb1", styles[:, 1])
        return torch.cat([x.flatten(1), skip.flatten(1), styles.flatten(1), noise], 1)

    def _further(self, h: Tensor, block: int) -> Tensor:
        x, skip, styles, noise = self._unpacked(h, block)
        sizes = self._noise_sizes()
        at = sum(sizes[: 2 * block - 1])
        size = sizes[2 * block - 1]
        maps = noise[:, at : at + size], noise[:, at + size : at + 2 * size]
        x = self._styled(x, f"convs.{2 * block - 2}", styles[:, 2 * block - 1], maps[0], doubled=True)
        x = self._styled(x, f"convs.{2 * block - 1}", styles[:, 2 * block], maps[1])
        skip = _doubled(skip) + self._painted(x, f"to_rgbs.{block - 1}", styles[:, 2 * block + 1])
        return torch.cat([x.flatten(1), skip.flatten(1), styles.flatten(1), noise], 1)

    def _unpacked(self, h: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return features, skip, styles and noise of h_block."""
        side = self._base * 2 ** (block - 1)
        layer = "conv1" if block == 1 else f"convs.{2 * block - 3}"
        channels = self._of(f"{layer}.activate.bias").numel()
        rest = [self._styles * self._width, sum(self._noise_sizes())]
        x, skip, styles, noise = torch.split(h, [channels * side**2, 3 * side**2, *rest], 1)
        return (
            x.view(-1, channels, side, side),
            skip.view(-1, 3, side, side),
            styles.view(-1, self._styles, self._width),
            noise,
        )

    def _styled(
        self, x: Tensor, layer: str, style: Tensor, noise: Tensor, *, doubled: bool = False
    ) -> Tensor:
        x = self._modulated(x, f"{layer}.conv", style, doubled=doubled, demodulated=True)
        x = x + self._of(f"{layer}.noise.weight") * noise.view(-1, 1, *x.shape[2:])
        return _activated(x + self._of(f"{layer}.activate.bias").view(1, -1, 1, 1))

    def _painted(self, x: Tensor, layer: str, style: Tensor) -> Tensor:
        found = self._modulated(x, f"{layer}.conv", style, doubled=False, demodulated=False)
        return found + self._of(f"{layer}.bias")

    def _modulated(self, x: Tensor, layer: str, style: Tensor, *, doubled: bool, demodulated: bool) -> Tensor:
        """Return the convolution with weights scaled by the style: the inputs are scaled, then the outputs."""
        weight = self._of(f"{layer}.weight")[0]
        weight = weight / math.sqrt(weight[0].numel())
        modulation = self._of(f"{layer}.modulation.weight")
        scale = F.linear(
            style, modulation / math.sqrt(modulation.shape[1]), self._of(f"{layer}.modulation.bias")
        )
        x = x * scale[:, :, None, None]
        if doubled:
            x = _blurred(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), (1, 1))
        else:
            x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        if demodulated:
            squares = (scale.square() @ weight.square().sum((2, 3)).T) + 1e-8
            x = x * squares.rsqrt()[:, :, None, None]
        return x


_MODULATED = ("weight", "modulation.weight", "modulation.bias")


class BigGAN(_Opened):
    """The class-conditional generator of Brock et al. 2019 in its deep form, without truncation."""

    def __init__(self, state: Mapping[str, Tensor], side: int) -> None:
        """``side``: of the images that are wanted. Raises ``ConfigError`` for a state dict that lacks tensors."""
        super().__init__(_without_spectral_norm(state), side)
        numbers = {int(n.split(".")[2]) for n in state if n.startswith("generator.layers.")}
        self._blocks = len(numbers)
        self.layers = self._blocks + 1
        size, self.classes = state["embeddings.weight"].shape
        self.latent: Shape = (int(size),)
        _complete(
            {n.replace("/", "."): v for n, v in self.weights.items()},
            ["generator.gen_z.weight", "generator.bn.weight", "generator.conv_to_rgb.weight"],
            "BigGAN",
        )
        self._attention = {i for i in numbers if _key(f"generator.layers.{i}.gamma") in self.weights}
        self._doubling = self._doubling_blocks()

    def _doubling_blocks(self) -> set[int]:
        """Return which blocks double the side: in pairs of blocks the second one, as in all published sizes."""
        blocks = [i for i in range(self._blocks) if i not in self._attention]
        return set(blocks[1::2])

    def condition(self, labels: Tensor) -> Tensor:
        """Return the embeddings of labels, ``(B, D)``."""
        return self._of("embeddings.weight").T[labels]

    def part(self, h: Tensor, condition: Tensor, first: int, last: int) -> Tensor:
        """Return h_last for h_first; pixels ``(B, 3, side, side)`` if ``last`` is the number of layers."""
        for k in range(first, last):
            if k == 0:
                z = h
                x = F.linear(
                    torch.cat([z, condition], 1),
                    self._of("generator.gen_z.weight"),
                    self._of("generator.gen_z.bias"),
                )
                x = x.view(len(h), 4, 4, -1).permute(0, 3, 1, 2)
            else:
                x, z = self._unpacked(h, k)
                x = self._block(x, torch.cat([z, condition], 1), k - 1)
            h = torch.cat([x.flatten(1), z], 1)
        if first < last == self.layers:
            h = self._rgb(self._unpacked(h, self.layers)[0])
        return h

    def _unpacked(self, h: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return features and latent code of h_k."""
        side = 4 * 2 ** sum(block < k - 1 for block in self._doubling)
        features, z = h[:, : -self.latent[0]], h[:, -self.latent[0] :]
        return features.view(len(h), -1, side, side), z

    def _block(self, x: Tensor, condition: Tensor, block: int) -> Tensor:
        name = f"generator.layers.{block}"
        if block in self._attention:
            return self._attended(x, name)
        y = x
        for i, padding in enumerate((0, 1, 1, 0)):
            y = self._normalised(y, f"{name}.bn_{i}", condition).relu()
            if i == 1 and block in self._doubling:
                y = F.interpolate(y, scale_factor=2.0, mode="nearest")
            y = F.conv2d(
                y, self._of(f"{name}.conv_{i}.weight"), self._of(f"{name}.conv_{i}.bias"), padding=padding
            )
        x = x[:, : y.shape[1]]
        if block in self._doubling:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x + y

    def _normalised(self, x: Tensor, name: str, condition: Tensor) -> Tensor:
        # The last row of the statistics is that of codes which are not truncated.
        mean, variance = (
            self._of(f"{name}.running_{what}")[-1].view(1, -1, 1, 1) for what in ("means", "vars")
        )
        gain = 1 + F.linear(condition, self._of(f"{name}.scale.weight"))[:, :, None, None]
        offset = F.linear(condition, self._of(f"{name}.offset.weight"))[:, :, None, None]
        return (x - mean) / (variance + NORM_EPS).sqrt() * gain + offset

    def _attended(self, x: Tensor, name: str) -> Tensor:
        theta, phi, g = (
            F.conv2d(x, self._of(f"{name}.snconv1x1_{what}.weight")) for what in ("theta", "phi", "g")
        )
        phi, g = F.max_pool2d(phi, 2), F.max_pool2d(g, 2)
        weights = (theta.flatten(2).transpose(1, 2) @ phi.flatten(2)).softmax(-1)
        mixed = (g.flatten(2) @ weights.transpose(1, 2)).view(len(x), -1, *x.shape[2:])
        mixed = F.conv2d(mixed, self._of(f"{name}.snconv1x1_o_conv.weight"))
        return x + self._of(f"{name}.gamma") * mixed

    def _rgb(self, x: Tensor) -> Tensor:
        name = "generator.bn"
        mean, variance, gain, offset = (
            value.view(1, -1, 1, 1)
            for value in (
                self._of(f"{name}.running_means")[-1],
                self._of(f"{name}.running_vars")[-1],
                self._of(f"{name}.weight"),
                self._of(f"{name}.bias"),
            )
        )
        x = ((x - mean) / (variance + NORM_EPS).sqrt() * gain + offset).relu()
        to = "generator.conv_to_rgb"
        x = F.conv2d(x, self._of(f"{to}.weight"), self._of(f"{to}.bias"), padding=1)
        return self._image(x[:, :3].tanh())


def published(state: Mapping[str, object], shape: Shape) -> StyleGAN2 | BigGAN | None:
    """Return the generator of a state dict in one of the known layouts, for images of ``shape``; None for others.

    Raises ``ConfigError`` where tensors are missing, or images are not in colour.
    """
    inner = state.get("g_ema", state)
    assert isinstance(inner, Mapping)
    tensors = {str(n): v for n, v in inner.items() if isinstance(v, Tensor) and v.is_floating_point()}
    kind: type[StyleGAN2 | BigGAN]
    if "input.input" in tensors:
        kind = StyleGAN2
    elif any(name.startswith("generator.gen_z.") for name in tensors):
        kind = BigGAN
    else:
        return None
    if shape[0] != 3:
        raise ConfigError(
            f"{kind.__name__} makes images in colour, and the attacked model takes {shape[0]} channel."
        )
    return kind(tensors, max(shape[1:]))


def _key(name: str) -> str:
    # A dot would be a module's.
    return name.replace(".", "/")


def _complete(state: Mapping[str, Tensor], names: Sequence[str], kind: str) -> None:
    missing = [name for name in names if name not in state]
    if missing:
        raise ConfigError(f"These weights are no {kind}: they lack '{missing[0]}'.")


def _without_spectral_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights as they act: W / (u^T W v), with the vectors that training left."""
    found = {}
    for name, value in state.items():
        stem, _, part = name.rpartition(".")
        if part == "weight_orig":
            flat = value.flatten(1)
            found[f"{stem}.weight"] = value / (state[f"{stem}.weight_u"] @ flat @ state[f"{stem}.weight_v"])
        elif part not in ("weight_u", "weight_v"):
            found[name] = value
    return found


def _activated(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE) * GAIN


def _blurred(x: Tensor, padding: tuple[int, int]) -> Tensor:
    """Return x under the 4x4 kernel of the row 1 3 3 1, twice, times 4: what a doubling of the side is smoothed by."""
    row = x.new_tensor(BLUR) / sum(BLUR) * 2
    kernel = (row[:, None] * row).expand(x.shape[1], 1, 4, 4)
    before, after = padding
    return F.conv2d(F.pad(x, (before, after, before, after)), kernel, groups=x.shape[1])


def _doubled(x: Tensor) -> Tensor:
    """Return a picture of twice the side: zeros between the pixels, then the blur."""
    wide = x.new_zeros(*x.shape[:2], x.shape[2], 2, x.shape[3], 2)
    wide = torch.cat([x[:, :, :, None, :, None], wide[:, :, :, 1:, :, :1]], 3)
    wide = torch.cat([wide, torch.zeros_like(wide)], 5)
    return _blurred(wide.flatten(4).flatten(2, 3), (2, 1))
