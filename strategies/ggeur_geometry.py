"""Class statistics that add up over clients, and the shapes that are made of them.

For the embeddings x ``(d,)`` of one class, the moment sums (n, sum x, sum x x^T) of any split into clients add up to
those of the whole; with 1/n, not 1/(n - 1), mean and covariance follow exactly:

    mu = sum x / n,   Sigma = sum x x^T / n - mu mu^T
       = (1/N) [ sum_k n_k Sigma_k + sum_k n_k (mu_k - mu)(mu_k - mu)^T ]               (GGEUR, eq. 4)

The *shape* of a class is Sigma's eigenvalues, largest first, and eigenvectors. Everything is in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowerbed.storage import Tensors

PSD_TOLERANCE = 1e-9
"""Negative eigenvalue that rounding may leave, over the mean squared norm of the class."""


@dataclass(frozen=True)
class Moments:
    """Moment sums of every class; ``outer`` is the upper triangle of sum x x^T, row by row."""

    count: Tensor
    """float64 ``(C,)``."""
    sum: Tensor
    """float64 ``(C, d)``."""
    outer: Tensor
    """float64 ``(C, d (d + 1) / 2)``."""

    @classmethod
    def of(cls, x: Tensor, y: Tensor, classes: int) -> Moments:
        """Return the moments of samples ``x`` ``(n, d)`` with labels ``y`` ``(n,)`` in 0 ... ``classes`` - 1."""
        x, d = x.double(), x.shape[1]
        row, column = torch.triu_indices(d, d)
        sums, outer = x.new_zeros(classes, d), x.new_zeros(classes, len(row))
        for c in torch.unique(y).tolist():
            own = x[y == c]
            sums[c] = own.sum(0)
            outer[c] = (own.T @ own)[row, column]
        return cls(torch.bincount(y, minlength=classes).double(), sums, outer)

    @classmethod
    def read(cls, stream: Mapping[str, Tensor]) -> Moments:
        """Return what ``tensors`` wrote."""
        return cls(stream["count"].double(), stream["sum"].double(), stream["outer"].double())

    def tensors(self) -> Tensors:
        """Return the three sums by name."""
        return {"count": self.count, "sum": self.sum, "outer": self.outer}

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.sum + other.sum, self.outer + other.outer)

    def times(self, factor: float | Tensor) -> Moments:
        """Return all sums multiplied by a number, or those of every class by an entry of a tensor ``(C,)``."""
        by_class = factor[:, None] if isinstance(factor, Tensor) else factor
        return Moments(self.count * factor, self.sum * by_class, self.outer * by_class)

    @property
    def mean(self) -> Tensor:
        """The means ``(C, d)``; zero for a class without samples."""
        return self.sum / self._divisor[:, None]

    @property
    def covariance(self) -> Tensor:
        """The biased covariances ``(C, d, d)``; zero for a class without samples."""
        second = full_matrix(self.outer / self._divisor[:, None], self.sum.shape[1])
        mean = self.mean
        return second - mean[:, :, None] * mean[:, None, :]

    @property
    def _divisor(self) -> Tensor:
        return self.count.where(self.count > 0, 1.0)


def full_matrix(upper: Tensor, d: int) -> Tensor:
    """Return the symmetric matrices ``(C, d, d)`` of upper triangles ``(C, d (d + 1) / 2)``."""
    row, column = torch.triu_indices(d, d)
    matrix = upper.new_zeros(len(upper), d, d)
    matrix[:, row, column] = upper
    matrix[:, column, row] = upper
    return matrix


def total(parts: Sequence[Moments]) -> Moments:
    """Return the sum of the moments, in order."""
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result


def fault(moments: Moments) -> tuple[int, str] | None:
    """Return the first class whose moments no set of samples has, and what is wrong with it; None if there is none."""
    for c, n in enumerate(moments.count.tolist()):
        if n < 0 or n != round(n):
            return c, f"its count is {n}"
        if n == 0 and (bool(moments.sum[c].any()) or bool(moments.outer[c].any())):
            return c, "it has sums without samples"
    covariance = moments.covariance
    power = covariance.diagonal(dim1=1, dim2=2).sum(1) + moments.mean.square().sum(1)
    slack = (PSD_TOLERANCE * power).clamp(min=torch.finfo(torch.float64).tiny)
    identity = torch.eye(covariance.shape[1], dtype=torch.float64)
    # Far cheaper than eigenvalues: a Cholesky factor exists just where all of them are above minus the slack.
    _, failed = torch.linalg.cholesky_ex(covariance + slack[:, None, None] * identity)
    bad = torch.nonzero(failed).flatten().tolist()
    return (bad[0], "its covariance is not positive semi-definite") if bad else None


def guiding(counts: Tensor, fraction: float) -> Tensor:
    """Return which clients shape each class, bool ``(K, C)``, from their ``counts`` ``(K, C)``.

    The fewest clients, largest first, that hold at least ``fraction`` of the class between them (the released code
    has 0.8; the paper's eq. 4 takes all).
    """
    order = counts.argsort(dim=0, descending=True, stable=True)
    ordered = counts.gather(0, order)
    before = ordered.cumsum(0) - ordered
    # The tiny allowance is for a fraction that rounds up.
    wanted = (before < (fraction - 1e-9) * counts.sum(0)) & (ordered > 0)
    return torch.zeros_like(wanted).scatter(0, order, wanted)


# Few numbers for every class: a client's own leading eigenpairs in place of its moments.


def low_rank(moments: Moments, rank: int) -> Tensors:
    """Return ``count``, ``mean`` and ``factors`` ``(C, rank, d)``, whose rows are sqrt(lambda_m) xi_m of Sigma_k.

    That is 1 + (rank + 1) d numbers a class instead of about d^2 / 2.
    Exact where ``rank`` is at least the rank of Sigma_k, which is below n_k.
    """
    values, vectors = shapes(moments.covariance, rank)
    return {"count": moments.count, "mean": moments.mean, "factors": values.sqrt()[:, :, None] * vectors}


def from_low_rank(stream: Mapping[str, Tensor]) -> Moments:
    """Return the moments that belong to ``low_rank`` statistics."""
    count, mean, factors = (stream[name].double() for name in ("count", "mean", "factors"))
    row, column = torch.triu_indices(mean.shape[1], mean.shape[1])
    second = factors.transpose(1, 2) @ factors + mean[:, :, None] * mean[:, None, :]
    return Moments(count, count[:, None] * mean, count[:, None] * second[:, row, column])


# Shapes.


def shapes(covariance: Tensor, rank: int = 0) -> tuple[Tensor, Tensor]:
    """Return the ``rank`` leading eigenvalues ``(C, r)``, largest first, and eigenvectors ``(C, r, d)`` as rows.

    ``rank`` 0 means all d. Negative eigenvalues are rounding, or noise, and become zero. Every vector's entry of
    largest size is positive, so that equal matrices have equal shapes.
    """
    values, columns = torch.linalg.eigh(covariance)
    keep = rank or covariance.shape[-1]
    values = values.flip(-1)[:, :keep].clamp(min=0)
    vectors = columns.flip(-1).transpose(1, 2)[:, :keep]
    largest = vectors.gather(2, vectors.abs().argmax(2, keepdim=True))
    return values, vectors * torch.where(largest < 0, -1.0, 1.0)


def stretched(values: Tensor, how: str, count: int = 10) -> Tensor:
    """Return eigenvalues ``(C, r)``, largest first, ``count`` of them multiplied by 5 ... 1 in equal steps.

    ``none``; ``top``: the largest; ``bottom``: the smallest, which is what the released code does, its eigenvalues
    being in ascending order: there the very smallest gets the 5.
    """
    count = min(count, values.shape[1])
    factors = torch.linspace(5, 1, count, dtype=values.dtype)
    result = values.clone()
    if how == "top":
        result[:, :count] *= factors
    if how == "bottom":
        result[:, values.shape[1] - count :] *= factors.flip(0)
    return result


def similarity(vectors: Tensor, others: Tensor) -> float:
    """Return S = sum_m |<xi_m, xi'_m>| over the rows of two sets of leading eigenvectors ``(r, d)`` (eq. 3)."""
    return float((vectors * others).sum(1).abs().sum())
