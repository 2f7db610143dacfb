"""Distances of images by the features of a network: LPIPS from a user's weights, and one that needs none.

Both are sums over layers of the mean over places of sum_c w_c (f_c / |f| - f'_c / |f'|)^2, f being a place's features
(Zhang et al. 2018).

=========  ============================================================================================================
``lpips``  AlexNet's features and the published w: two files that the user has. Comparable with published numbers
``rfd``    random feature distance: three convolutions of fixed random weights, each of half the side, w = 1 / C
=========  ============================================================================================================

``rfd`` grows with blur, noise, shifts and missing parts, and counts structure for more than brightness, since the
length of the features does not matter. Its network has seen nothing: it cannot tell what people find alike, knows no
objects, and its numbers compare with ``rfd`` alone, not with LPIPS of any paper.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from flowerbed.errors import ConfigError, require

TINY = 1e-10
SEED, CHANNELS, LEVELS = 2018, 32, 3
SMALLEST = 32
"""Side below which AlexNet's features do not exist; smaller images are made larger."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of inputs in [-1, 1], as LPIPS was made."""
ALEXNET = (
    ("features.0", 4, 2),
    ("features.3", 1, 2),
    ("features.6", 1, 1),
    ("features.8", 1, 1),
    ("features.10", 1, 1),
)
"""Convolutions with stride and padding; a pooling stands before the second and the third."""


@dataclass(frozen=True, eq=False)
class FeatureDistance:
    """A distance of images of pixels in [0, 1]."""

    features: Callable[[Tensor], Sequence[Tensor]]
    """Maps ``(N, 3, H, W)`` to a feature map a layer."""
    weights: Sequence[Tensor]
    """w ``(C,)`` of every layer."""

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distances of images ``(N, C, H, W)``, C being 1 or 3, ``(N,)``."""
        total = torch.zeros(len(a))
        for f, g, weight in zip(
            self.features(_colour(a)), self.features(_colour(b)), self.weights, strict=True
        ):
            gap = (_unit(f) - _unit(g)).square()
            total = total + torch.einsum("nchw,c->nhw", gap, weight).mean((1, 2))
        return total


def distances(files: Collection[Path] = ()) -> dict[str, FeatureDistance]:
    """Return ``rfd``, and ``lpips`` where the two ``files`` of that function are given."""
    found = {"rfd": random_features()}
    if files:
        require(len(files) == 2, "LPIPS needs two files: AlexNet's features, and the linear heads.")
        found["lpips"] = lpips(*files)
    return found


def random_features() -> FeatureDistance:
    """Return ``rfd``; the same one everywhere."""
    rng = torch.Generator().manual_seed(SEED)
    kernels = []
    for level in range(LEVELS):
        before = CHANNELS if level else 3
        kernel = torch.randn(CHANNELS, before, 3, 3, generator=rng)
        # Filters that answer to change, not to brightness.
        kernel -= kernel.mean((2, 3), keepdim=True)
        kernels.append(kernel / kernel.flatten(1).norm(dim=1)[:, None, None, None])

    def features(x: Tensor) -> list[Tensor]:
        found = []
        for kernel in kernels:
            # A constant beside: where nothing changes, all features are small, and their direction is not chance.
            x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel).relu()
            found.append(torch.cat([x, torch.full_like(x[:, :1], 0.1)], 1))
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return found

    return FeatureDistance(features, [torch.full((CHANNELS + 1,), 1 / CHANNELS)] * LEVELS)


def lpips(alexnet: Path, heads: Path) -> FeatureDistance:
    """Return LPIPS (version 0.1, AlexNet) from the user's files.

    ``alexnet``: torchvision's state dict. ``heads``: the linear layers that the package ``lpips`` ships. Raises
    ``ConfigError`` for files that hold something else.
    """
    body, linear = _read(alexnet), _read(heads)
    for path, state, names in (
        (alexnet, body, [f"{name}.{part}" for name, _, _ in ALEXNET for part in ("weight", "bias")]),
        (heads, linear, [f"lin{i}.model.1.weight" for i in range(len(ALEXNET))]),
    ):
        missing = [name for name in names if name not in state]
        if missing:
            raise ConfigError(f"{path} is no part of LPIPS with AlexNet: it lacks '{missing[0]}'.")
    shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in (SHIFT, SCALE))

    def features(x: Tensor) -> list[Tensor]:
        if min(x.shape[2:]) < SMALLEST:
            x = F.interpolate(x, size=(SMALLEST, SMALLEST), mode="bilinear", align_corners=False)
        x, found = (2 * x - 1 - shift) / scale, []
        for place, (name, stride, padding) in enumerate(ALEXNET):
            if place in (1, 2):
                x = F.max_pool2d(x, 3, 2)
            x = F.conv2d(x, body[f"{name}.weight"], body[f"{name}.bias"], stride, padding).relu()
            found.append(x)
        return found

    return FeatureDistance(
        features, [linear[f"lin{i}.model.1.weight"].flatten() for i in range(len(ALEXNET))]
    )


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        given: Any = torch.load(path, map_location="cpu", weights_only=True)
        return {str(name): value for name, value in given.items()}
    except (OSError, SafetensorError, RuntimeError, AttributeError) as error:
        raise ConfigError(f"The weights {path} cannot be read: {error}.") from error


def _colour(x: Tensor) -> Tensor:
    return x.float() if x.shape[1] == 3 else x.float().expand(-1, 3, -1, -1)


def _unit(f: Tensor) -> Tensor:
    return f / (f.square().sum(1, keepdim=True).sqrt() + TINY)
