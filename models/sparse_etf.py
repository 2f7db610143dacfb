"""SSE-C, the sparse simplex classifier of FedLoGe, and a head that has it beside the trained one.

Reference: Xiao et al., "FedLoGe: Joint Local and Generic Federated Learning under Long-tailed Data", ICLR 2024;
the construction is equation (4) and the released code's. A dense simplex is thinned at random, then the entries
that survive are moved until all columns are as long as asked and all classes as far apart as before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.errors import ConfigError, require
from flowerbed.models.base import Net, Shape
from flowerbed.models.etf import simplex_along

WEIGHT, BIAS = "head.weight", "head.bias"
"""Names of the trained head among the parameters of ``sparse_etf_net``."""
SPARSE, SPARSE_BIAS, DIVISORS = "head.sparse", "head.sparse_bias", "head.divisors"
"""Names of its buffers: the fixed classifier, its bias, and what the trained head's rows were divided by."""

_CLIP = 0.99999
"""Cosines stay within this, where the slope of arccos is finite."""


@dataclass(frozen=True)
class SparseEtf:
    """How a sparse simplex is made."""

    beta: float = 0.6
    """Share of the entries that are zero."""
    gamma: float = 0.1
    """Length of every column."""
    steps: int = 10_000
    """Adam steps."""
    lr: float = 1e-4
    """Adam's learning rate."""


def sparse_simplex(dim: int, num_classes: int, recipe: SparseEtf, generator: torch.Generator) -> Tensor:
    """Return a sparse simplex, float64 ``(dim, num_classes)``, on the CPU.

    Exactly ``floor(beta dim C)`` entries are zero, drawn from the whole matrix. Raises ``ConfigError`` if there
    are more classes than dimensions, fewer than two classes, or a column that the drawing left without entries.
    """
    require(num_classes >= 2, f"A simplex of {num_classes} class has no angles; give at least two classes.")
    require(
        dim >= num_classes,
        f"A simplex of {num_classes} classes needs as many features, the model has {dim}; choose a wider model.",
    )
    frame = simplex_along(torch.rand(dim, num_classes, generator=generator, dtype=torch.float64))
    support = drawn_support(dim, num_classes, recipe.beta, generator)
    return spread(frame * support, support, recipe)


def drawn_support(dim: int, num_classes: int, beta: float, generator: torch.Generator) -> Tensor:
    """Return which entries survive, bool ``(dim, C)``; ``floor(beta dim C)`` do not, whatever their column."""
    kept = torch.ones(dim * num_classes, dtype=torch.bool)
    kept[torch.randperm(len(kept), generator=generator)[: math.floor(beta * len(kept))]] = False
    support = kept.view(dim, num_classes)
    require(
        bool(support.any(dim=0).all()),
        f"beta={beta} left a class of the sparse simplex ({dim} x {num_classes}) without any entry; lower beta or "
        "choose a wider model.",
    )
    return support


def spread(frame: Tensor, support: Tensor, recipe: SparseEtf) -> Tensor:
    """Return ``frame`` ``(dim, C)`` after Adam on ``spread_loss``; what is not in ``support`` stays as it is."""
    moving = frame.clone().requires_grad_()
    optimizer = torch.optim.Adam([moving], lr=recipe.lr)
    for _ in range(recipe.steps):
        (gradient,) = torch.autograd.grad(spread_loss(moving, recipe.gamma), moving)
        # From the first step on, so that Adam's moments of the other entries are zero as well.
        moving.grad = gradient * support
        optimizer.step()
    return moving.detach()


def spread_loss(frame: Tensor, gamma: float) -> Tensor:
    """Return ``sum_c (||m_c|| - gamma)^2 - mean_c arccos max_{j != c} cos(m_c, m_j)`` of the columns of ``frame``."""
    lengths = torch.linalg.vector_norm(frame, dim=0)
    nearest = _cosines(frame).amax(dim=1).clamp(-_CLIP, _CLIP)
    loss: Tensor = ((lengths - gamma) ** 2).sum() - nearest.arccos().mean()
    return loss


def nearest_angles(frame: Tensor) -> Tensor:
    """Return the angle of each column of ``frame`` ``(dim, C)`` to its nearest other, ``(C,)`` in degrees."""
    angles: Tensor = _cosines(frame).amax(dim=1).clamp(-1, 1).arccos().rad2deg()
    return angles


def simplex_angle(num_classes: int) -> float:
    """Return the angle between any two of ``num_classes`` directions of a simplex, in degrees: the largest possible."""
    return math.degrees(math.acos(-1 / (num_classes - 1)))


def _cosines(frame: Tensor) -> Tensor:
    """Return the cosines between columns ``(C, C)``, with less than any cosine on the diagonal."""
    directions = frame / torch.linalg.vector_norm(frame, dim=0)
    diagonal = torch.eye(frame.shape[1], dtype=torch.bool, device=frame.device)
    cosines: Tensor = (directions.T @ directions).masked_fill(diagonal, -2.0)
    return cosines


class SparseEtfHead(nn.Module):
    """A linear head as it was, with a fixed classifier beside it, which is a buffer: nothing trains it.

    ``forward`` uses the trained head alone. Buffers: ``sparse`` ``(C, D)`` and ``sparse_bias`` ``(C,)``, zero until
    somebody constructs them; ``divisors`` ``(C,)``, by which each row of the trained head has been divided, so that
    a head whose rows were rescaled still tells what they were.
    """

    bias: nn.Parameter | None
    sparse: Tensor
    sparse_bias: Tensor
    divisors: Tensor

    def __init__(self, trained: nn.Linear) -> None:
        super().__init__()
        self.weight = trained.weight
        self.register_parameter("bias", trained.bias)
        classes = trained.out_features
        self.register_buffer("sparse", torch.zeros_like(trained.weight))
        self.register_buffer("sparse_bias", torch.zeros(classes))
        self.register_buffer("divisors", torch.ones(classes))

    def forward(self, z: Tensor) -> Tensor:
        return F.linear(z, self.weight, self.bias)


def sparse_etf_net(
    input_shape: Shape, num_classes: int, *, inner: str, options: Mapping[str, Any] | None = None
) -> Net:
    """Return the model called ``inner``, weight for weight, with a fixed classifier beside its head.

    Raises ``ConfigError`` if it has no head of one linear layer, or fewer features than classes.
    """
    # Here, not above: a registered builder may not need the registry it is in.
    from flowerbed.models.zoo import draw_net

    model = draw_net(inner, input_shape, num_classes, **(options or {}))
    if not isinstance(model.head, nn.Linear):
        raise ConfigError(
            f"A fixed classifier is put beside a head of one linear layer, that of '{inner}' is "
            f"{type(model.head).__name__}; choose a model with a linear head."
        )
    require(
        model.feature_dim >= num_classes,
        f"A simplex of {num_classes} classes needs as many features, '{inner}' has {model.feature_dim}; choose a "
        "wider model.",
    )
    return Net(model.body, SparseEtfHead(model.head), model.feature_dim)
