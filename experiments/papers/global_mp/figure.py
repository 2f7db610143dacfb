"""The picture of global magnitude pruning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowerbed.experiments.reproduction.engine import Reproduction

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def by_sparsity(made: Reproduction) -> Figure:
    """Return accuracy over the weights left, a line a method, and over the multiply-adds left."""
    from flowerbed.experiments.reproduction import figures

    made_figure, (left, right) = figures.canvas(2)
    for place, method in enumerate(("magnitude", "uniform", "erk", "snip", "taylor", "random")):
        arms = [arm for arm in made.arms if arm.rpartition("-")[0] == method]
        kept = [1 - float(arm.rpartition("-")[2]) for arm in arms]
        figures.line(left, kept, [figures.values(made, arm, "accuracy") for arm in arms], method, place)
        work = [figures.values(made, arm, "multiply-adds-left") for arm in arms]
        known = [sum(w) / len(w) for w in work if w]
        if len(known) == len(arms):
            figures.line(right, known, [figures.values(made, arm, "accuracy") for arm in arms], method, place)
    for axis, name in ((left, "weights left"), (right, "multiply-adds left")):
        axis.set_xscale("log")
        figures.finish(axis, name, "test accuracy")
    return made_figure
