"""Quantisers: the nearest of a few values, with a gradient that passes as if nothing had been rounded.

A codebook of scalars holds one row of values for each latent dimension, ``(n, L)``; one of vectors holds L vectors of
dimension d, ``(L, d)``. Where two are equally near, the first wins.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowerbed.errors import require


def nearest(z: Tensor, values: Tensor) -> Tensor:
    """Return which of its dimension's ``values`` ``(n, L)`` is nearest to each scalar of ``z``, int64 ``(..., n)``."""
    return (z.unsqueeze(-1) - values).abs().argmin(-1)


def looked_up(index: Tensor, values: Tensor) -> Tensor:
    """Return the values ``(..., n)`` that ``index`` ``(..., n)`` names; differentiable with respect to ``values``."""
    return values[torch.arange(values.shape[0], device=values.device), index]


def nearest_vector(z: Tensor, codebook: Tensor) -> Tensor:
    """Return which vector of ``codebook`` ``(L, d)`` is nearest to each of ``z`` ``(..., d)``: int64 ``(...)``."""
    distances = codebook.square().sum(1) - 2 * z @ codebook.T
    return distances.argmin(-1)


def split(z: Tensor, size: int) -> Tensor:
    """Return ``(..., n * size)`` as n vectors, ``(..., n, size)``."""
    return z.reshape(*z.shape[:-1], -1, size)


def straight_through(z: Tensor, z_q: Tensor) -> Tensor:
    """Return ``z_q`` with the gradient of ``z``: the identity's towards ``z``, none towards ``z_q``."""
    return z + (z_q - z).detach()


def pulls(z: Tensor, z_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return two scalars of equal value, the mean squared distance: one moves ``z_q`` alone, the other ``z`` alone.

    The quantisation and the commitment loss of van den Oord et al. 2017.
    """
    return (z_q - z.detach()).square().mean(), (z - z_q.detach()).square().mean()


class Codebooks(nn.Module):
    """Snaps what an encoder says to the nearest of ``values``."""

    values: Tensor

    def codes(self, z: Tensor) -> Tensor:
        """Return which values are the nearest, int64, one for each latent."""
        raise NotImplementedError

    def quantised(self, z: Tensor) -> Tensor:
        """Return the nearest values in place of ``z``, differentiable with respect to the values."""
        raise NotImplementedError

    def forward(self, z: Tensor) -> Tensor:
        return straight_through(z, self.quantised(z))

    def _take(self, values: Tensor, learned: bool) -> None:
        if learned:
            self.values = nn.Parameter(values)
        else:
            self.register_buffer("values", values)


class ScalarCodebooks(Codebooks):
    """Snaps every latent dimension to its own small codebook, whose values begin evenly in [-1/2, 1/2]."""

    def __init__(self, dimensions: int, levels: int, learned: bool = True) -> None:
        """With ``learned=False`` the values stay where they are and are the same for every dimension."""
        super().__init__()
        require(
            dimensions >= 1 and levels >= 2,
            f"{dimensions} codebooks of {levels} values quantise nothing; give at least 1 of 2.",
        )
        self._take(torch.linspace(-0.5, 0.5, levels).repeat(dimensions, 1), learned)

    def codes(self, z: Tensor) -> Tensor:
        """Return the index of each scalar's value, int64 like ``z`` ``(..., n)``."""
        return nearest(z, self.values)

    def quantised(self, z: Tensor) -> Tensor:
        """Return the nearest values, like ``z`` ``(..., n)``."""
        return looked_up(self.codes(z), self.values)


class VectorCodebook(Codebooks):
    """Snaps every latent, a vector of ``size`` numbers, to one of a codebook that all share (van den Oord et al. 2017).

    The values begin uniformly within plus or minus sqrt(3 / size), so that vectors have norm 1 in the root mean square.
    """

    def __init__(self, size: int, levels: int) -> None:
        super().__init__()
        require(
            size >= 1 and levels >= 2,
            f"A codebook of {levels} vectors of {size} numbers quantises nothing; give at least 2 of 1.",
        )
        self._take((torch.rand(levels, size) * 2 - 1) * (3 / size) ** 0.5, learned=True)

    def codes(self, z: Tensor) -> Tensor:
        """Return the index of each vector, int64 ``(..., n)``, of ``z`` ``(..., n * size)``."""
        return nearest_vector(split(z, self.values.shape[1]), self.values)

    def quantised(self, z: Tensor) -> Tensor:
        """Return the nearest vectors one after the other, like ``z`` ``(..., n * size)``."""
        return self.values[self.codes(z)].flatten(-2)
