"""The picture of dynamical stability of SGD."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowerbed.experiments.papers.sgd_dynamical_stability.probes import GD_RATES, RATES
from flowerbed.experiments.reproduction.engine import Reproduction

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def by_rate(made: Reproduction) -> Figure:
    """Return trace and test error over the rate for SGD and GD, and where an escape from a minimum ends."""
    from flowerbed.experiments.reproduction import figures

    figure, (left, middle, right) = figures.canvas(3)
    for place, (method, rates) in enumerate((("sgd", RATES), ("gd", GD_RATES))):
        for axis, name in ((left, "trace"), (middle, "test-error")):
            found = [figures.values(made, f"{method}-{rate}", name) for rate in rates]
            figures.line(axis, rates, found, method.upper(), place)
        multiples = [
            float(arm.rpartition("-")[2]) for arm in made.arms if arm.startswith(f"escape-{method}-")
        ]
        ends = [figures.values(made, f"escape-{method}-{c}", "distance") for c in multiples]
        figures.line(right, multiples, ends, method.upper(), place)
    edge = sorted({*RATES, *GD_RATES})
    left.plot(edge, [2 / rate for rate in edge], "--", color="black", linewidth=1, label="2 / learning rate")
    right.axvline(1.0, linestyle="--", color="black", linewidth=1, label="2 / tr G")
    for axis in (left, middle):
        axis.set_xscale("log")
    for axis in (left, middle, right):
        axis.set_yscale("log")
    figures.finish(left, "learning rate", "tr G at the end")
    figures.finish(middle, "learning rate", "relative test error")
    figures.finish(
        right, "learning rate in units of 2 / tr G (no point: diverged)", "distance from the minimum"
    )
    return figure
