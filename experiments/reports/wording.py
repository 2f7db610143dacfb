"""Numbers as they are read in a report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flowerbed.experiments.comparison import Metric
from flowerbed.experiments.reports.page import Cell


def finite(value: Any) -> float | None:
    """Return a finite number, or None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def is_share(metric: str) -> bool:
    """Return whether a metric is a share that is read in per cent."""
    return Metric(metric).percent


def heading(metric: str) -> str:
    """Return a metric's name as a heading: clients:accuracy-mean is Accuracy-mean (clients)."""
    known = Metric(metric)
    return known.key[:1].upper() + known.key[1:] + (" (clients)" if known.key != metric else "")


def number(value: Any, percent: bool = False) -> str:
    """Return a number in four digits, or in per cent; what is none as it is, None as a dash."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if percent:
        return f"{100 * value:.2f} %"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e6):
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{value:.4g}"


def cell(value: Any, percent: bool = False, tone: str = "") -> Cell:
    """Return a cell that is sorted by its number."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    sort = finite(value) if numeric else None if value is None else str(value)
    return Cell(number(value, percent), sort, tone)


def size(count: float) -> str:
    """Return bytes with a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def seconds(value: float | None) -> str:
    """Return a time: milliseconds, seconds, or m:ss and h:mm:ss."""
    if value is None or not math.isfinite(value):
        return "–"
    if value < 1:
        return f"{1000 * value:.3g} ms"
    if value < 60:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def interval(mean: float | None, low: float | None, high: float | None, percent: bool = False) -> str:
    """Return a mean with its interval."""
    if mean is None:
        return "–"
    text = number(mean, percent)
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return text
    if percent:
        return f"{text} ({100 * low:.2f} to {100 * high:.2f})"
    return f"{text} ({low:.4g} to {high:.4g})"


def counted(count: int, one: str, many: str = "") -> str:
    """Return a count with its noun."""
    return f"{number(count)} {one if count == 1 else many or one + 's'}"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found
