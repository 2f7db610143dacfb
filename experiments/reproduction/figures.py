"""Pictures of a reproduction: curves with bands, arms with intervals; and the pieces that papers' own are made of.

Drawn with matplotlib's Agg canvas directly, so neither a display nor pyplot's global state is touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from flowerbed.experiments import paired
from flowerbed.experiments.compare_report import BAD, COLOURS, INK, LINES, STYLES
from flowerbed.experiments.reproduction.engine import Reproduction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_METRICS = 6


def canvas(columns: int, rows: int = 1, width: float = 5.2, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """Return a figure and its axes, row by row; sizes are inches of one axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    return figure, [axis for row in grid for axis in row]


def look(place: int) -> tuple[str, str]:
    """Return colour and line style of the arm at that place."""
    return COLOURS[place % len(COLOURS)], STYLES[place // len(COLOURS) % len(STYLES)]


def line(axis: Axes, x: Sequence[float], values: Sequence[Sequence[float]], label: str, place: int) -> None:
    """Draw the mean over seeds at each x, with the range of the seeds as a band; points without values are left out."""
    colour, style = look(place)
    points = [(at, sorted(found)) for at, found in sorted(zip(x, values, strict=True)) if found]
    if points:
        places = [at for at, _ in points]
        axis.plot(places, [math.fsum(v) / len(v) for _, v in points], style, color=colour, label=label, marker="o",
                  markersize=3, linewidth=1.6)  # fmt: skip
        axis.fill_between(
            places,
            [v[0] for _, v in points],
            [v[-1] for _, v in points],
            color=colour,
            alpha=0.15,
            linewidth=0,
        )


def values(made: Reproduction, arm: str, metric: str) -> list[float]:
    """Return an arm's figures by seed; [] unless every seed has one, so that no mean leaves out a broken run."""
    found = [o.values[metric] for o in made.of(arm) if metric in o.values]
    return found if len(found) == len(made.seeds) else []


def finish(axis: Axes, x: str, y: str) -> None:
    """Give an axis its labels, its legend and the house style."""
    from matplotlib.ticker import NullFormatter

    axis.set_xlabel(x, color=INK, fontsize=9)
    axis.set_ylabel(y, color=INK, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(True, color=LINES, linewidth=0.7)
    axis.set_axisbelow(True)
    if axis.get_xscale() == "log":
        # Those of the decades are enough; between them they overlap.
        axis.xaxis.set_minor_formatter(NullFormatter())
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=7, ncols=1 + len(axis.get_legend_handles_labels()[0]) // 9)


def claimed_metrics(made: Reproduction) -> list[str]:
    """Return the metrics that the claims speak of, at most ``MOST_METRICS``, in their order."""
    names = (term[1] for c in made.scale.paper.claims for one in c.conditions for term in one.gap.terms)
    return list(dict.fromkeys(names))[:MOST_METRICS]


def arms_figure(made: Reproduction) -> Figure:
    """Return, for every metric of the claims, the arms with mean, 95 % interval over seeds, and each seed."""
    metrics = claimed_metrics(made)
    figure, axes = canvas(len(metrics), 1, 4.0, max(2.2, 0.9 + 0.26 * len(made.arms)))
    for axis, metric in zip(axes, metrics, strict=True):
        for place, arm in enumerate(made.arms):
            # More arms than colours are told apart by their place alone.
            colour = COLOURS[place if len(made.arms) <= len(COLOURS) else 0]
            found = [o.values.get(metric) for o in made.of(arm)]
            known = [v for v in found if v is not None]
            axis.plot(known, [place + 0.22] * len(known), "o", color=colour, alpha=0.6, markersize=3, mew=0)
            interval = paired.t_interval(found)
            if interval is not None:
                if interval.low is not None and interval.high is not None:
                    axis.plot((interval.low, interval.high), (place, place), "-", color=colour, linewidth=2)
                axis.plot(interval.mean, place, "o", color=colour, markersize=6)
            elif any(o.status in ("failed", "diverged") for o in made.of(arm)):
                said = next(o.status for o in made.of(arm) if o.status in ("failed", "diverged"))
                axis.annotate(said, (0.98, place), xycoords=("axes fraction", "data"), ha="right", va="center",
                              fontsize=7, color=BAD)  # fmt: skip
        axis.set_yticks(range(len(made.arms)), made.arms if axis is axes[0] else [""] * len(made.arms))
        axis.set_ylim(len(made.arms) - 0.4, -0.6)
        finish(axis, metric, "")
    return figure


def curves_figure(made: Reproduction) -> Figure | None:
    """Return the claims' metrics by round, mean and range of the seeds; None if no run was evaluated twice."""
    drawn = []
    for metric in (*claimed_metrics(made), "train:loss"):
        arms = {arm: [dict(o.curves.get(metric, ())) for o in made.of(arm)] for arm in made.arms}
        if any(len(curve) > 1 for found in arms.values() for curve in found):
            drawn.append((metric, arms))
    if not drawn:
        return None
    figure, axes = canvas(len(drawn), 1)
    for axis, (metric, arms) in zip(axes, drawn, strict=True):
        for place, (arm, found) in enumerate(arms.items()):
            rounds = sorted(set.intersection(*(set(curve) for curve in found)))
            line(axis, rounds, [[c[r] for c in found if math.isfinite(c[r])] for r in rounds], arm, place)
        finish(axis, "round", metric)
    return figure


def arms_by_place(axis: Axes, made: Reproduction, metric: str, arms: Mapping[str, str]) -> None:
    """Draw one metric of some arms, one below the other: mean over seeds, and each seed.

    ``arms`` are arms by the name that they have in the picture; one that was not run, or broke, stays empty.
    """
    for place, arm in enumerate(arms.values()):
        found = values(made, arm, metric) if arm in made.arms else []
        if found:
            colour = COLOURS[0]
            axis.plot(found, [place + 0.2] * len(found), "o", color=colour, alpha=0.5, markersize=3, mew=0)
            axis.plot(math.fsum(found) / len(found), place, "o", color=colour, markersize=6)
    axis.set_yticks(range(len(arms)), list(arms))
    axis.set_ylim(len(arms) - 0.4, -0.6)


def curve(axis: Axes, made: Reproduction, arm: str, metric: str, label: str, place: int) -> None:
    """Draw a metric of one arm by round, mean and range of the seeds; an arm that has no such metric is left out."""
    found = [dict(o.curves.get(metric, ())) for o in made.of(arm)]
    rounds = sorted(set.intersection(*(set(one) for one in found)))
    if rounds:
        line(axis, rounds, [[one[r] for one in found if math.isfinite(one[r])] for r in rounds], label, place)
