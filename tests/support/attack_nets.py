"""Nets and texts that only tests of attacks need, named by import path."""

from __future__ import annotations

import torch
from torch import nn

from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.models.base import Net, Shape, classifier


def leaky_without_bias(
    input_shape: Shape, num_classes: int, *, activation: str = "leaky", stride: int = 2
) -> Net:
    """Return the kind of net that R-GAP was made for: convolutions and a head, no bias anywhere."""
    channels, side, _ = input_shape
    act = nn.LeakyReLU(0.2) if activation == "leaky" else nn.ReLU()
    body = nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1, bias=False),
        act,
        nn.Conv2d(8, 8, 3, stride=stride, padding=1, bias=False),
        act,
        nn.Flatten(),
    )
    features = 8 * (side // stride) ** 2
    return Net(body, nn.Linear(features, num_classes, bias=False), features)


def wide_stride(input_shape: Shape, num_classes: int) -> Net:
    """Return a net whose first layer sees fewer numbers than it takes: its input is not determined."""
    body = nn.Sequential(nn.Conv2d(input_shape[0], 1, 4, stride=4), nn.Sigmoid(), nn.Flatten())
    return classifier(body, (input_shape[1] // 4) ** 2, num_classes)


VOCABULARY = "abcdefgh"


def tiny_text(length: int = 6) -> Dataset:
    """Return sequences over eight letters in which one letter mostly follows another."""
    rng = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        tokens = torch.randint(8, (count, length + 1), generator=rng)
        for place in range(1, length + 1):
            follow = torch.rand(count, generator=rng) < 0.7
            tokens[:, place] = torch.where(follow, (tokens[:, place - 1] + 1) % 8, tokens[:, place])
        return Split(tokens[:, :-1].clone(), tokens[:, 1:].clone())

    return Dataset("tiny text", split(80), split(40), tuple(VOCABULARY), (0.0,), (1.0,), task="next-token")
