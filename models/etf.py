"""A head whose class directions are a fixed simplex, put on any model that is a body and a head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.errors import require
from flowerbed.models.base import Net, Shape

PROTOTYPES = "head.prototypes"
"""Name of the simplex among the parameters of ``etf_net``."""


def simplex(dim: int, num_classes: int) -> Tensor:
    """Return a random simplex equiangular tight frame, float32 ``(dim, num_classes)``.

    Its columns have length one and pairwise cosine ``-1 / (C - 1)``; drawn from torch's default generator.
    Raises ``ConfigError`` if there are more classes than dimensions, or fewer than two.
    """
    require(num_classes >= 2, f"A simplex of {num_classes} class has no angles; give at least two classes.")
    require(
        dim >= num_classes, f"{num_classes} classes need as many dimensions, got {dim}; raise strategy.d."
    )
    return simplex_along(torch.randn(dim, num_classes, dtype=torch.float64)).float()


def simplex_along(columns: Tensor) -> Tensor:
    """Return the simplex frame ``sqrt(C / (C - 1)) P (I - 11^T / C)``, P being the Q of ``columns`` ``(dim, C)``.

    ``columns`` has full rank and at least as many rows as columns, of which there are two or more.
    """
    num_classes = columns.shape[1]
    basis, _ = torch.linalg.qr(columns)
    centred = basis - basis.mean(dim=1, keepdim=True)
    frame: Tensor = centred * math.sqrt(num_classes / (num_classes - 1))
    return frame


class EtfHead(nn.Module):
    """Cosines between the projected features and the prototypes, times a learned scale.

    Features ``(N, D)`` to logits ``scale normalise(P z) M``, ``(N, C)``, with P ``(d, D)`` and a bias, M ``(d, C)``.
    Whoever trains the model freezes the prototypes.
    """

    def __init__(self, feature_dim: int, dim: int, num_classes: int) -> None:
        super().__init__()
        self.projection = nn.Linear(feature_dim, dim)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.prototypes = nn.Parameter(simplex(dim, num_classes))

    def forward(self, z: Tensor) -> Tensor:
        logits: Tensor = self.scale * F.normalize(self.projection(z), dim=-1) @ self.prototypes
        return logits


def etf_net(
    input_shape: Shape,
    num_classes: int,
    *,
    inner: str,
    dim: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Net:
    """Return the model called ``inner`` with its head replaced by an ``EtfHead`` of ``dim`` (0: as classes)."""
    # Here, not above: a registered builder may not need the registry it is in.
    from flowerbed.models.zoo import draw_net

    model = draw_net(inner, input_shape, num_classes, **(options or {}))
    return Net(model.body, EtfHead(model.feature_dim, dim or num_classes, num_classes), model.feature_dim)
