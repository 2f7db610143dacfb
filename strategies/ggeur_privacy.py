"""Differential privacy of class statistics: clipped embeddings, Gaussian noise, and what it is worth.

One sample with |x| <= R adds (1, x, x x^T) to the moment sums of its class. In units of (1, R, R^2) its norm is at most
sqrt(3), the upper triangle of x x^T / R^2 having norm at most one; so noise of standard deviation z sqrt(3) in those
units is the Gaussian mechanism with noise multiplier z, for neighbours that add or remove one sample. It protects the
statistics alone: neither the labels' presence in training nor the trained heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowerbed.strategies.ggeur_geometry import Moments

SENSITIVITY = math.sqrt(3.0)


def clipped(x: Tensor, bound: float) -> Tensor:
    """Return the rows of ``x`` ``(n, d)`` scaled down to a norm of at most ``bound``."""
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    result: Tensor = x * (bound / norms.clamp(min=bound))
    return result


def noised(moments: Moments, noise: float, bound: float, generator: torch.Generator) -> Moments:
    """Return the moments with Gaussian noise of multiplier ``noise`` (z) for samples of norm at most ``bound`` (R)."""

    def draw(value: Tensor, unit: float) -> Tensor:
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        return value + drawn * (noise * SENSITIVITY * unit)

    return Moments(draw(moments.count, 1.0), draw(moments.sum, bound), draw(moments.outer, bound**2))


def gaussian_delta(epsilon: float, noise: float) -> float:
    """Return the smallest delta of the Gaussian mechanism with multiplier ``noise`` at ``epsilon``.

    Phi(1/(2z) - eps z) - e^eps Phi(-1/(2z) - eps z) (Balle and Wang, ICML 2018, theorem 8).
    """
    half = 0.5 / noise
    below = _log_normal_cdf(-half - epsilon * noise)
    return max(0.0, math.exp(_log_normal_cdf(half - epsilon * noise)) - math.exp(epsilon + below))


def gaussian_epsilon(delta: float, noise: float) -> float:
    """Return the smallest epsilon of one release with multiplier ``noise`` at ``delta``, to 1e-9; infinite without
    noise."""
    if noise == 0:
        return math.inf
    low, high = 0.0, 1.0
    while gaussian_delta(high, noise) > delta:
        high *= 2
    while high - low > 1e-9 * max(1.0, high):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, noise) > delta else (low, middle)
    return high


def _log_normal_cdf(value: float) -> float:
    return float(torch.special.log_ndtr(torch.tensor(value, dtype=torch.float64)))
