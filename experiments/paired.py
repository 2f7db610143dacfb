"""The statistics of a comparison over seeds, as pure functions of numbers.

Runs with one seed share data, split, sampled clients and (where the model is the same) the initial weights, so
methods are compared seed by seed. ``None`` among the values is a run that failed: it ranks last in its seed, and
no mean, interval or test is made from what is left.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
FEWEST_FOR_SIGN_FLIP, MOST_FOR_SIGN_FLIP = 6, 16
"""With fewer pairs the smallest possible p is above 0.05; with more than that, all flips take too long."""

Values = Sequence[float | None]


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided 95 % confidence interval by Student's t; no interval for a single value."""

    mean: float
    low: float | None
    high: float | None


def t_interval(values: Values) -> Interval | None:
    """Return mean -+ t_{0.975, n-1} s / sqrt(n); None where a value is missing, or there is none."""
    known = _complete(values)
    if not known:
        return None
    mean = math.fsum(known) / len(known)
    if len(known) == 1:
        return Interval(mean, None, None)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in known) / (len(known) - 1))
    half = float(stats.t.ppf(0.5 + LEVEL / 2, len(known) - 1)) * spread / math.sqrt(len(known))
    return Interval(mean, mean - half, mean + half)


def mean_ranks(values: Mapping[str, Values], lower_is_better: bool = False) -> dict[str, float]:
    """Return each method's rank, 1 being best, averaged over the seeds; ties share the mean of their ranks."""
    sign = 1.0 if lower_is_better else -1.0
    columns = zip(*values.values(), strict=True)
    ranks = [
        stats.rankdata([math.inf if v is None else sign * v for v in column], method="average")
        for column in columns
    ]
    return {name: float(np.mean([row[i] for row in ranks])) for i, name in enumerate(values)}


def differences(values: Values, reference: Values) -> list[float] | None:
    """Return value - reference seed by seed; None where one is missing."""
    mine, theirs = _complete(values), _complete(reference)
    if mine is None or theirs is None:
        return None
    return [a - b for a, b in zip(mine, theirs, strict=True)]


def paired_t(differences: Sequence[float]) -> float | None:
    """Return the two-sided p of the paired t-test (mean difference 0); None for fewer than two pairs.

    Pairs that are all equal give 1.
    """
    if len(differences) < 2:
        return None
    if not any(differences):
        return 1.0
    if len(set(differences)) == 1:
        return 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def sign_flip(differences: Sequence[float]) -> float | None:
    """Return the exact two-sided p of the sign-flip permutation test of the mean difference.

    The share of the 2^n ways to swap methods within seeds whose mean difference is at least as large. None
    outside 6 to 16 pairs.
    """
    count = len(differences)
    if not FEWEST_FOR_SIGN_FLIP <= count <= MOST_FOR_SIGN_FLIP:
        return None
    flips = np.array(list(itertools.product((1.0, -1.0), repeat=count)))
    sums = np.abs(flips @ np.asarray(differences))
    # The allowance keeps sums that differ only by rounding on the same side.
    return float(np.mean(sums >= abs(math.fsum(differences)) - 1e-9 * np.abs(differences).sum()))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return the p-values corrected for their number by Holm 1979; None is no test and stays None."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for place, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p))
        corrected[i] = largest
    return corrected


def _complete(values: Values) -> list[float] | None:
    known = [v for v in values if v is not None]
    return known if len(known) == len(values) else None
