"""Transformers: a small vision transformer and a tiny decoder-only language model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowerbed.errors import ConfigError
from flowerbed.models.base import Net, Shape, classifier, require_at_least_one
from flowerbed.models.layers import image_shape
from flowerbed.models.recurrent import context_length


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017), ``(N, L, D)`` to ``(N, L, D)``.

    Written out: torch's fused attention has neither a second derivative nor a rule for ``vmap`` on a CPU.
    """

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind()
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        if self.causal:
            length = x.shape[1]
            future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        mixed = scores.softmax(-1) @ value
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a GELU network four times as wide."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads, causal))
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.feed_forward(x)  # type: ignore[no-any-return]


class Positions(nn.Module):
    """Add a learned vector to each position of ``(N, L, D)``, L at most ``length``."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(length, width))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > len(self.table):
            raise ConfigError(
                f"The model was built for at most {len(self.table)} positions and got {x.shape[1]}; build it "
                "with a longer input_shape."
            )
        return x + self.table[: x.shape[1]]


class Tokens(nn.Module):
    """Positions in front: ``(N, D, H, W)`` to ``(N, H * W, D)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class TokenMean(nn.Module):
    """Mean over positions: ``(N, L, D)`` to ``(N, D)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def vit_tiny(
    input_shape: Shape, num_classes: int, *, patch: int = 4, width: int = 128, depth: int = 6, heads: int = 4
) -> Net:
    """Return a vision transformer (Dosovitskiy et al. 2021) for small images, without dropout.

    Patches of ``patch`` x ``patch`` pixels; the features are the mean over the patches.
    """
    channels, height, side = image_shape("vit_tiny", input_shape)
    require_at_least_one("vit_tiny", patch=patch)
    if height % patch or side % patch:
        raise ConfigError(
            f"Model 'vit_tiny' cuts images into patches of {patch}x{patch}, which does not divide {height}x"
            f"{side}; set the option patch to a divisor."
        )
    body = nn.Sequential(
        nn.Conv2d(channels, width, patch, patch),
        Tokens(),
        Positions((height // patch) * (side // patch), width),
        *_blocks("vit_tiny", width, depth, heads, causal=False),
        TokenMean(),
    )
    return classifier(body, width, num_classes)


def gpt_tiny(
    input_shape: Shape, num_classes: int, *, width: int = 128, depth: int = 4, heads: int = 4
) -> Net:
    """Return a decoder-only transformer (Radford et al. 2019): int64 ``(N, L)`` to ``(N, L, V)``.

    ``input_shape`` is ``(L,)``, the longest context; V is ``num_classes``. Embedding and output layer are
    not tied, so that the output layer can be a head of its own.
    """
    (length,) = context_length("gpt_tiny", input_shape)
    embedding = nn.Embedding(num_classes, width)
    nn.init.normal_(embedding.weight, std=0.02)
    body = nn.Sequential(
        embedding,
        Positions(length, width),
        *_blocks("gpt_tiny", width, depth, heads, causal=True),
    )
    return classifier(body, width, num_classes)


def _blocks(model: str, width: int, depth: int, heads: int, *, causal: bool) -> list[nn.Module]:
    """Return ``depth`` blocks and the last norm."""
    require_at_least_one(model, width=width, depth=depth, heads=heads)
    if width % heads:
        raise ConfigError(f"Option heads={heads} of model '{model}' must divide width={width}.")
    return [*(Block(width, heads, causal) for _ in range(depth)), nn.LayerNorm(width)]
