"""The picture of the group sparse envelope."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowerbed.experiments.papers.wgsef import UNCUT
from flowerbed.experiments.reproduction.engine import Reproduction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def sparsity_and_price(made: Reproduction) -> Figure:
    """Return active groups by round, accuracy before and after the cut, and the error of regression by round."""
    from flowerbed.experiments.reproduction import figures

    figure, (left_axis, middle, right) = figures.canvas(3, 1, 4.4)
    nets = [arm for arm in made.arms if not arm.startswith("regression")]
    for place, arm in enumerate(nets):
        _curve(left_axis, made, arm, "train:active-groups", arm, place)
        colour, _ = figures.look(place)
        for shift, name, fill in ((-0.12, f"{UNCUT}-accuracy", "none"), (0.12, "accuracy", colour)):
            found = figures.values(made, arm, name)
            middle.plot([place + shift] * len(found), found, "o", color=colour, mfc=fill, markersize=5)
    middle.set_xticks(range(len(nets)), nets, rotation=30)
    figures.finish(left_axis, "round", "groups left")
    figures.finish(middle, "hollow: before the cut to k", "test accuracy")
    for place, arm in enumerate(a for a in made.arms if a.startswith("regression")):
        _curve(right, made, arm, "relative-error", arm.removeprefix("regression-"), place)
    figures.finish(right, "round (lambda grows)", "relative error, cut to k")
    return figure


def _curve(axis: Axes, made: Reproduction, arm: str, name: str, label: str, place: int) -> None:
    from flowerbed.experiments.reproduction import figures

    curves = [dict(o.curves.get(name, ())) for o in made.of(arm)]
    rounds = sorted(set.intersection(*(set(curve) for curve in curves)))
    figures.line(axis, rounds, [[curve[r] for curve in curves] for r in rounds], label, place)
