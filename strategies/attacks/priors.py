"""What is known of images before any gradient: terms that are added to an objective.

A prior is a pure function of a candidate batch ``(B, C, H, W)`` in the model's input space and of the model; it works
under ``torch.func.vmap``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowerbed.errors import require

TINY = 1e-12


@dataclass(frozen=True)
class TotalVariation:
    """weight * (mean |dx|^p + mean |dy|^p)^(q), the differences of neighbouring pixels; a constant image costs 0.

    p = 1, q = 1 as in Geiping et al. 2020 (there 0.1 of sums over the two means).
    """

    weight: float
    p: float = 1.0
    q: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """Return the term for a batch."""
        rows = (x[..., 1:, :] - x[..., :-1, :]).abs()
        columns = (x[..., :, 1:] - x[..., :, :-1]).abs()
        if self.p == 1:
            value = rows.mean() + columns.mean()
        else:
            value = (rows + TINY).pow(self.p).mean() + (columns + TINY).pow(self.p).mean()
        return self.weight * (value if self.q == 1 else (value + TINY).pow(self.q))


@dataclass(frozen=True)
class Norm:
    """weight * |x|_2, over the whole batch."""

    weight: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return the term for a batch."""
        return self.weight * (x.square().sum() + TINY).sqrt()


@dataclass(frozen=True)
class BatchStatistics:
    """weight * sum over batch norms of |mean - running mean| + |var - running var| (Yin et al. 2021).

    The statistics are those of the candidate batch at the layer's input, the running ones were sent with the model.
    The first layer counts ``first`` times.
    """

    weight: float
    first: float = 1.0

    def of(self, layers: list[tuple[nn.Module, Tensor]]) -> Tensor:
        """Return the term, given every batch norm with its input, in the order of the forward pass."""
        total = torch.zeros(())
        for place, (layer, z) in enumerate(layers):
            axes = [0, *range(2, z.ndim)]
            mean, variance = z.mean(axes), z.var(axes, unbiased=False)
            assert isinstance(layer.running_mean, Tensor)
            assert isinstance(layer.running_var, Tensor)
            gap = (mean - layer.running_mean).square().sum().add(TINY).sqrt()
            gap = gap + (variance - layer.running_var).square().sum().add(TINY).sqrt()
            total = total + gap * (self.first if place == 0 else 1.0)
        return self.weight * total


@dataclass(frozen=True)
class SameSamples:
    """weight * mean over pairs of epochs of |g(X_e) - g(X_f)|_2^2 / |X|, g blind to order (Dimitrov et al. 2022).

    Every epoch of local training went through the same samples, each in an order of its own. g is the mean over the
    samples, or the largest value of every input.
    """

    weight: float
    aggregate: str = "mean"

    def __post_init__(self) -> None:
        require(
            self.aggregate in ("mean", "max"),
            f"Epochs are compared by '{self.aggregate}'; choose from mean, max.",
        )

    def __call__(self, x: Tensor, epochs: int) -> Tensor:
        """Return the term for ``(epochs * N, ...)``."""
        apart = x.view(epochs, len(x) // epochs, -1)
        g = apart.mean(1) if self.aggregate == "mean" else apart.amax(1)
        # Over ordered pairs, the distance of equal ones being 0: twice the variance over epochs.
        term: Tensor = self.weight * 2 * (g - g.mean(0)).square().mean()
        return term


def group_gap(x: Tensor, weight: float) -> Tensor:
    """Return weight * sum over restarts of |x_r - mean over restarts|, for ``(V, R, B, ...)`` (Yin et al. 2021).

    The mean is that of the pixels as they are: no registration of the restarts is made.
    """
    gap = x - x.mean(1, keepdim=True)
    return weight * (gap.flatten(2).square().sum(2) + TINY).sqrt().sum()
