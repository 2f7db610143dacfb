"""The picture of DeepZero."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowerbed.experiments.reproduction.engine import Reproduction

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def by_queries(made: Reproduction) -> Figure:
    """Return test accuracy over the queries, mean and range of the seeds; random directions at their best rates."""
    from flowerbed.experiments.reproduction import figures

    def reached(arm: str) -> float:
        found = figures.values(made, arm, "accuracy")
        return sum(found) / len(found) if found else 0.0

    best = [
        max((a for a in made.arms if a.startswith(kind)), key=reached) for kind in ("rge-many", "rge-few")
    ]
    figure, (axis,) = figures.canvas(1, width=6.4, height=4.2)
    for place, arm in enumerate(("cge", "sparse", "uniform", "pruned", *best)):
        curves = [dict(o.curves.get("accuracy", ())) for o in made.of(arm)]
        spent = figures.values(made, arm, "queries")
        rounds = sorted(set.intersection(*(set(curve) for curve in curves)))
        if spent and rounds:
            x = [sum(spent) / len(spent) * r / rounds[-1] for r in rounds]
            figures.line(axis, x, [[curve[r] for curve in curves] for r in rounds], arm, place)
    axis.axhline(reached("backprop"), linestyle="--", color="black", linewidth=1, label="backpropagation")
    figures.finish(axis, "losses computed", "test accuracy")
    return figure
