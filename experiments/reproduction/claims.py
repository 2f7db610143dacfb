"""A sentence of a paper as an inequality with a margin, and what the runs say about it.

Claims are written as they are read::

    ece, nll = metric("ece"), metric("loss")
    Claim("calibration", "PS-KD is far better calibrated than CE", ece["ps-kd"] <= 0.6 * ece["ce"])

Every inequality becomes a *gap* for each seed, which is negative where the claim does not hold. The verdict goes by
the mean gap over the seeds: ``reproduced`` if that of every inequality is at least 0; ``direction only`` if the
effect has the right sign but not the claimed size (the inequality without its factors and margins); ``mechanism
only`` if just the claim's weaker statement about the mechanism holds; else ``not reproduced``. Beside it stands the
95 % interval of the mean gap by Student's t. No seed is ever left out: a run that diverged makes what needs a number
of it not reproduced, and a run that failed leaves it not evaluated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flowerbed.errors import ConfigError, require, unknown_name
from flowerbed.experiments import paired

REPRODUCED, DIRECTION, MECHANISM = "reproduced", "direction only", "mechanism only"
NOT_REPRODUCED, NOT_EVALUATED = "not reproduced", "not evaluated"
DIVERGED = "diverged"
"""Metric that every run has: 1 if it left the finite numbers, else 0."""


@dataclass(frozen=True)
class Linear:
    """A weighted sum of arms' metrics, plus a constant."""

    terms: tuple[tuple[float, str, str], ...] = ()
    """(weight, metric, arm)."""
    constant: float = 0.0

    def __add__(self, other: Linear | float) -> Linear:
        other = _linear(other)
        return Linear(self.terms + other.terms, self.constant + other.constant)

    def __sub__(self, other: Linear | float) -> Linear:
        return self + -1.0 * _linear(other)

    def __mul__(self, factor: float) -> Linear:
        return Linear(tuple((factor * w, m, a) for w, m, a in self.terms), factor * self.constant)

    def __le__(self, other: Linear | float) -> Inequality:
        return Inequality(self, "<=", _linear(other))

    def __ge__(self, other: Linear | float) -> Inequality:
        return Inequality(self, ">=", _linear(other))

    __radd__, __rmul__ = __add__, __mul__

    def __str__(self) -> str:
        parts = [
            f"{metric}[{arm}]" if w == 1 else f"{w:.6g} {metric}[{arm}]" for w, metric, arm in self.terms
        ]
        if self.constant or not parts:
            parts.append(f"{self.constant:.6g}")
        return " + ".join(parts).replace("+ -", "- ")

    def value(self, values: Mapping[tuple[str, str], float]) -> float:
        """Return the number, given those of (metric, arm)."""
        return sum(w * values[metric, arm] for w, metric, arm in self.terms) + self.constant

    def bare(self) -> Linear | None:
        """Return the weighted mean of the terms, without factor and constant; None if there is no such mean."""
        whole = sum(w for w, _, _ in self.terms)
        return Linear(tuple((w / whole, m, a) for w, m, a in self.terms)) if whole > 0 else None


@dataclass(frozen=True)
class Inequality:
    """``left <= right`` or ``left >= right``."""

    left: Linear
    relation: str
    right: Linear

    def __str__(self) -> str:
        return f"{self.left} {self.relation} {self.right}"

    @property
    def gap(self) -> Linear:
        """What is at least 0 where the inequality holds."""
        return self.right - self.left if self.relation == "<=" else self.left - self.right

    def bare(self) -> Inequality | None:
        """Return the comparison without factors and margins; None if a side is but a number."""
        left, right = self.left.bare(), self.right.bare()
        return None if left is None or right is None else Inequality(left, self.relation, right)

    def __bool__(self) -> bool:
        raise TypeError(
            "An inequality of a claim is a value, not a condition; write two instead of a <= b <= c."
        )


@dataclass(frozen=True)
class Named:
    """A metric; ``metric("loss")["ce"]`` is that of the arm ``ce``."""

    name: str

    def __getitem__(self, arm: str) -> Linear:
        return Linear(((1.0, self.name, arm),))


def metric(name: str) -> Named:
    """Name a metric of the runs.

    ``accuracy`` is one of the server's evaluation, ``clients:...`` of the clients' evaluation, ``train:...`` of
    training, ``cost:...`` of what it took; measures of the paper go by their own names.
    """
    return Named(name)


def mean(values: Iterable[Linear]) -> Linear:
    """Return the mean of several."""
    found = list(values)
    return sum(found, Linear()) * (1 / len(found))


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper, falsifiable."""

    name: str
    text: str
    """The sentence."""
    holds: Inequality | Sequence[Inequality]
    """What must hold, all of it, in the mean over the seeds."""
    mechanism: Inequality | Sequence[Inequality] = ()
    """A weaker statement, on why the method works, that may hold where the claim does not."""
    seeds: int = 3
    """Seeds that it needs at least."""

    def __post_init__(self) -> None:
        require(bool(self.conditions), f"The claim '{self.name}' states nothing.")

    @property
    def conditions(self) -> tuple[Inequality, ...]:
        """The inequalities of ``holds``."""
        return _several(self.holds)

    @property
    def weaker(self) -> tuple[Inequality, ...]:
        """The inequalities of ``mechanism``."""
        return _several(self.mechanism)

    def needs(self) -> set[tuple[str, str]]:
        """Return every (metric, arm) that it speaks of."""
        stated = (*self.conditions, *self.weaker)
        return {(m, a) for one in stated for side in (one.left, one.right) for _, m, a in side.terms}


@dataclass(frozen=True)
class Observed:
    """What one run of an arm says: its figures, or why there are none."""

    status: str
    """completed, stopped, diverged or failed."""
    values: Mapping[str, float]
    reason: str = ""


Observations = Mapping[tuple[str, int], Observed]
"""By arm and seed."""


@dataclass(frozen=True)
class Judged:
    """An inequality with its numbers."""

    text: str
    gaps: tuple[float, ...]
    """By seed."""
    mean: float
    low: float | None
    """Of the 95 % interval of the mean gap; None for one seed."""
    high: float | None


@dataclass(frozen=True)
class Verdict:
    """What the runs say about a claim."""

    claim: str
    text: str
    verdict: str
    reason: str = ""
    conditions: tuple[Judged, ...] = ()
    mechanism: tuple[Judged, ...] = ()

    @property
    def clear(self) -> bool:
        """Whether the intervals of all gaps lie above 0."""
        return bool(self.conditions) and all(c.low is not None and c.low > 0 for c in self.conditions)


def judge(claim: Claim, observations: Observations, seeds: Sequence[int]) -> Verdict:
    """Return the verdict on a claim; raises ``ConfigError`` if an arm that ran lacks a metric of the claim."""
    said = Verdict(claim.name, claim.text, NOT_EVALUATED)
    needed = claim.needs()
    runs = {(arm, seed): observations[arm, seed] for _, arm in sorted(needed) for seed in seeds}
    for (arm, seed), run in runs.items():
        if run.status == "failed":
            return _with(said, NOT_EVALUATED, f"{arm}, seed {seed} failed: {run.reason}")
    for wanted, arm in sorted(needed):
        for seed in seeds:
            check_metric(runs[arm, seed], wanted, f"claim '{claim.name}': arm '{arm}', seed {seed}")
    if len(seeds) < claim.seeds:
        return _with(said, NOT_EVALUATED, f"it needs {claim.seeds} seeds and has {len(seeds)}")
    for (arm, seed), run in runs.items():
        missing = [m for m, a in sorted(needed) if a == arm and m not in run.values]
        if missing:
            return _with(
                said, NOT_REPRODUCED, f"{arm} diverged with seed {seed}, so '{missing[0]}' has no number"
            )
    values = [{(m, a): runs[a, seed].values[m] for m, a in needed} for seed in seeds]
    conditions = tuple(_judged(one, values) for one in claim.conditions)
    weaker = tuple(_judged(one, values) for one in claim.weaker)
    verdict = NOT_REPRODUCED
    if all(c.mean >= 0 for c in conditions):
        verdict = REPRODUCED
    elif all(b is not None and _judged(b, values).mean > 0 for b in (c.bare() for c in claim.conditions)):
        verdict = DIRECTION
    elif weaker and all(w.mean >= 0 for w in weaker):
        verdict = MECHANISM
    return Verdict(claim.name, claim.text, verdict, "", conditions, weaker)


def check_metric(run: Observed, name: str, where: str) -> None:
    """Raise ``ConfigError`` if a run that has figures lacks this one."""
    if run.status in ("completed", "stopped") and name not in run.values:
        raise ConfigError(f"{where}: {unknown_name('metric', name, run.values)}")


def _judged(inequality: Inequality, values: Sequence[Mapping[tuple[str, str], float]]) -> Judged:
    gaps = tuple(inequality.gap.value(one) for one in values)
    interval = paired.t_interval(gaps)
    assert interval is not None
    return Judged(str(inequality), gaps, interval.mean, interval.low, interval.high)


def _with(verdict: Verdict, how: str, reason: str) -> Verdict:
    return Verdict(verdict.claim, verdict.text, how, reason)


def _linear(value: Linear | float) -> Linear:
    return value if isinstance(value, Linear) else Linear(constant=float(value))


def _several(stated: Inequality | Sequence[Inequality]) -> tuple[Inequality, ...]:
    return (stated,) if isinstance(stated, Inequality) else tuple(stated)
