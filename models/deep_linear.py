"""Models that end in several linear layers with nothing between them, on a network or on free features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.models.base import Net, Shape, require_at_least_one
from flowerbed.models.layers import image_shape

TABLE = "body.table"
"""Name of the free features among the parameters of ``free_features``: one row a sample."""


class Table(nn.Module):
    """Features that are parameters: sample ids ``(N, 1)`` to rows of a table, ``(N, D)``."""

    def __init__(self, samples: int, dim: int, std: float) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(samples, dim) * std)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids.flatten(), self.table)


def linear_stack(widths: Sequence[int], bias: bool, std: float = 0.0) -> nn.Sequential:
    """Return linear layers from width to width; only the last one has a bias, if any has.

    Weights are drawn from N(0, std^2), or orthogonal with ``std=0``; the bias starts at 0.
    """
    layers = [
        nn.Linear(a, b, bias=bias and i == len(widths) - 2) for i, (a, b) in enumerate(pairwise(widths))
    ]
    for layer in layers:
        nn.init.normal_(layer.weight, std=std) if std else nn.init.orthogonal_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def free_features(
    input_shape: Shape,
    num_classes: int,
    *,
    samples: int = 400,
    dim: int = 32,
    depth: int = 1,
    bias: bool = False,
    std: float = 0.1,
) -> Net:
    """Return one trainable feature vector a sample under ``depth`` linear layers, all N(0, std^2), in float64.

    The inputs are sample ids, below ``samples``.
    """
    require_at_least_one("free_features", samples=samples, dim=dim, depth=depth)
    body = Table(samples, dim, std)
    head = linear_stack([dim] * depth + [num_classes], bias, std)
    return Net(body, head, dim).double()


def deep_linear_mlp(
    input_shape: Shape,
    num_classes: int,
    *,
    hidden: tuple[int, ...] = (256, 256, 256),
    depth: int = 1,
    bias: bool = False,
    pool: int = 1,
) -> Net:
    """Return a ReLU network without biases under ``depth`` linear layers of its last width, all orthogonal.

    ``pool`` > 1 first takes means over squares of that side of an image ``(C, H, W)``.
    """
    require_at_least_one("deep_linear_mlp", hidden=min(hidden, default=0), depth=depth, pool=pool)
    layers: list[nn.Module] = [nn.Flatten()]
    size = math.prod(input_shape)
    if pool > 1:
        channels, height, width = image_shape("deep_linear_mlp", input_shape, pool)
        layers.insert(0, nn.AvgPool2d(pool))
        size = channels * (height // pool) * (width // pool)
    for width, following in pairwise((size, *hidden)):
        layer = nn.Linear(width, following, bias=False)
        nn.init.orthogonal_(layer.weight)
        layers += [layer, nn.ReLU()]
    head = linear_stack([hidden[-1]] * depth + [num_classes], bias)
    return Net(nn.Sequential(*layers), head, hidden[-1])
