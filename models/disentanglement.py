"""How well latents and known factors of variation match: mutual information, and InfoMEC (Hsu et al. 2023).

Everything is in nats. Factors (sources) are whole numbers. Latents are either whole numbers (codes), whose mutual
information is that of the counted table, or numbers, whose mutual information is estimated from nearest neighbours. The
two estimators are biased differently, so figures of the one should not be compared with those of the other without
saying so; ``binned`` turns numbers into codes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Numbers = npt.NDArray[np.float64]
Whole = npt.NDArray[np.integer]
NEIGHBOURS = 10
DEAD = 1 / 20
"""A latent whose range is at most this share of the largest one is not active."""


@dataclass(frozen=True)
class InfoMec:
    """Modularity, explicitness and compactness, each at most 1; modularity and compactness are 0 by chance."""

    modularity: float
    """How exclusively each latent knows one factor."""
    explicitness: float
    """How well a linear classifier reads the factors from all latents."""
    compactness: float
    """How few latents know each factor."""
    nmi: Numbers
    """I(s_i; z_j) / H(s_i), ``(factors, active latents)``."""
    active: npt.NDArray[np.bool_]
    """Which latents are active, ``(latents,)``."""


def infomec(latents: Numbers | Whole, factors: Whole) -> InfoMec:
    """Return InfoMEC of latents ``(N, n_z)``, codes if their type is whole, and factors ``(N, n_s)``.

    Latents that are not active are left out. Where a latent or a factor shares no information with anything, its
    part is that of chance; with fewer than two active latents compactness is 0.
    """
    active = active_latents(latents)
    kept = latents[:, active]
    nmi = normalised_information(kept, factors)
    return InfoMec(
        modularity=_exclusive(nmi.T),
        explicitness=explicitness(one_hot(kept) if counted(kept) else standardised(kept), factors),
        compactness=_exclusive(nmi),
        nmi=nmi,
        active=active,
    )


def counted(latents: Numbers | Whole) -> bool:
    """Return whether latents are codes."""
    return bool(np.issubdtype(latents.dtype, np.integer))


def _exclusive(rows: Numbers) -> float:
    """Return the mean over rows of largest over sum, scaled so that a uniform row counts 0."""
    width = rows.shape[1]
    if not len(rows) or width < 2:
        return 0.0
    sums = rows.sum(1)
    shares = np.where(sums > 0, rows.max(1) / np.where(sums > 0, sums, 1), 1 / width)
    return float((shares.mean() - 1 / width) / (1 - 1 / width))


def active_latents(latents: Numbers | Whole) -> npt.NDArray[np.bool_]:
    """Return which latents vary ``(n_z,)``: codes at all, numbers over more than a twentieth of the largest range."""
    ranges = latents.max(0) - latents.min(0)
    active: npt.NDArray[np.bool_]
    active = ranges > (0 if counted(latents) else DEAD * ranges.max(initial=0.0))
    return active


def normalised_information(latents: Numbers | Whole, factors: Whole) -> Numbers:
    """Return I(s_i; z_j) / H(s_i) for every factor and latent, ``(n_s, n_z)``; 0 for a factor that does not vary."""
    codes = counted(latents)
    columns = latents if codes else standardised(latents)
    found = np.zeros((factors.shape[1], columns.shape[1]))
    for i, source in enumerate(factors.T):
        entropy = counted_information(source, source)
        for j, latent in enumerate(columns.T if entropy > 0 else ()):
            known = counted_information(latent, source) if codes else neighbour_information(latent, source)
            found[i, j] = known / entropy
    return found


def counted_information(a: Numbers | Whole, b: Whole) -> float:
    """Return the mutual information of two columns of whole numbers from their table; with itself: the entropy."""
    _, a = np.unique(a, return_inverse=True)
    _, b = np.unique(b, return_inverse=True)
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1 / len(a))
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log(joint[there] / product[there])).sum())


def neighbour_information(z: Numbers | Whole, source: Whole, neighbours: int = NEIGHBOURS) -> float:
    """Return the mutual information of a continuous column and a discrete one (Ross, PLoS ONE 2014), at least 0.

    The k-th neighbour among the samples of the same class sets a radius, within which all samples are counted.
    Samples that are the only one of their class are left out.
    """
    order = np.argsort(z, kind="stable")
    z, source = z[order], source[order]
    radius, k, count = np.zeros(len(z)), np.zeros(len(z)), np.zeros(len(z))
    for value in np.unique(source):
        rows = np.flatnonzero(source == value)
        k[rows], count[rows] = min(neighbours, len(rows) - 1), len(rows)
        if len(rows) > 1:
            radius[rows] = _nearest_in_line(z[rows], min(neighbours, len(rows) - 1))
    kept = count > 1
    # A little below the radius, so that the k-th neighbour is not counted, whatever z + radius rounds to; z itself is.
    radius, k, count, z = radius[kept] * (1 - 1e-9), k[kept], count[kept], z[kept]
    within = np.searchsorted(z, z + radius, "right") - np.searchsorted(z, z - radius, "left")
    means = [_digamma(values).mean() for values in (k, count, within)]
    return max(0.0, float(_digamma(np.array([len(z)]))[0] + means[0] - means[1] - means[2]))


def _nearest_in_line(z: Numbers | Whole, k: int) -> Numbers:
    """Return the distance from each of the sorted numbers to its k-th nearest other."""
    padded = np.concatenate([np.full(k, -np.inf), z, np.full(k, np.inf)])
    starts = [padded[first : first + len(z)] for first in range(k + 1)]
    ends = [padded[first + k : first + k + len(z)] for first in range(k + 1)]
    # One of the windows of k + 1 neighbours in order that hold the number is the set of its nearest.
    reach = [np.maximum(z - start, end - z) for start, end in zip(starts, ends, strict=True)]
    distance: Numbers = np.min(reach, axis=0)
    return distance


def _digamma(values: npt.NDArray[np.floating] | Whole) -> Numbers:
    found: Numbers = torch.special.digamma(torch.from_numpy(values.astype(np.float64))).numpy()
    return found


def explicitness(columns: Numbers, factors: Whole) -> float:
    """Return the mean over factors of the share of uncertainty that a linear classifier removes.

    ``columns`` is ``(N, d)``. The uncertainty is the cross entropy of an unpenalised multinomial logistic regression
    with balanced classes, 100 iterations at most, on the very samples that it was fitted to; before, with a constant
    input. Needs scikit-learn.
    """
    shares = []
    for source in factors.T:
        if len(np.unique(source)) < 2:
            continue
        before = _uncertainty(np.zeros((len(source), 1)), source)
        after = _uncertainty(columns, source) if columns.shape[1] else before
        shares.append((before - after) / before)
    return float(np.mean(shares)) if shares else 0.0


def _uncertainty(columns: Numbers, source: Whole) -> float:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    classes, index = np.unique(source, return_inverse=True)
    with warnings.catch_warnings():
        # The number of iterations is a part of the definition: with separable data the weights run away.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = LogisticRegression(C=np.inf, class_weight="balanced", max_iter=100).fit(columns, index)
    p = fitted.predict_proba(columns)[np.arange(len(index)), index]
    assert len(classes) == len(fitted.classes_)
    return float(-np.log(np.clip(p, np.finfo(np.float64).eps, 1)).mean())


def standardised(columns: Numbers | Whole) -> Numbers:
    """Return columns ``(N, d)`` with mean 0 and standard deviation 1; one that does not vary becomes 0."""
    spread = columns.std(0)
    result: Numbers = (columns - columns.mean(0)) / np.where(spread > 0, spread, 1)
    return result


def one_hot(codes: Numbers | Whole) -> Numbers:
    """Return a column of zeros and ones for every value that occurs in each column of codes, ``(N, ...)``."""
    found = [column[:, None] == np.unique(column) for column in codes.T]
    return np.concatenate(found, 1).astype(np.float64) if found else np.zeros((len(codes), 0))


def binned(columns: Numbers, bins: int = 10) -> Whole:
    """Return codes: which of ``bins`` equal parts of its column's range each number lies in."""
    low, high = columns.min(0), columns.max(0)
    width = np.where(high > low, high - low, 1)
    codes: Whole = np.minimum((columns - low) / width * bins, bins - 1).astype(np.int64)
    return codes
