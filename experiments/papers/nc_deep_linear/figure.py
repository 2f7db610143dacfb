"""The picture of neural collapse in deep linear networks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flowerbed.experiments.papers.nc_deep_linear.probes import EXACT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flowerbed.experiments.reproduction.engine import Reproduction


def lengths(made: Reproduction) -> Figure:
    """Return the lengths that were found over those of the closed form; NC1 over rounds; the network by class size."""
    from flowerbed.experiments.reproduction import figures

    drawn, (left, middle, right) = figures.canvas(3)
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_yscale("log")
    found = {}
    for place, arm in enumerate(EXACT):
        colour, _ = figures.look(place)
        for kind, marker in (("mean", "o"), ("row", "^")):
            pairs = [
                (sum(figures.values(made, arm, f"{kind}-{k}-predicted")) / len(made.seeds), value)
                for k in range(4)
                for value in figures.values(made, arm, f"{kind}-{k}")
            ]
            found[arm, kind] = [(x, y) for x, y in pairs if x > 0]
            if found[arm, kind]:
                label = arm if kind == "mean" else None
                face = "none" if place < len(EXACT) - 1 else colour
                left.plot(*zip(*found[arm, kind], strict=True), marker, color=colour, label=label, mfc=face)
        curves = [dict(o.curves.get("variability", ())) for o in made.of(arm)]
        rounds = sorted(set.intersection(*(set(curve) for curve in curves)))
        figures.line(middle, rounds, [[max(c[r], 1e-32) for c in curves] for r in rounds], arm, place)
    ends = [x for points in found.values() for x, _ in points]
    if ends:
        left.plot([min(ends), max(ends)], [min(ends), max(ends)], color="grey", linewidth=0.8)
    middle.set_yscale("log")
    outcomes = [o.values for o in made.of("network")]
    sizes = made.scale.arms["network"].settings["dataset"]["sizes"]
    for place, (kind, label) in enumerate((("mean", "mean feature"), ("row", "classifier row"))):
        by_size: dict[int, list[float]] = {size: [] for size in sizes}
        predicted: dict[int, float] = {}
        for k, size in enumerate(sizes):
            by_size[size] += [v[f"{kind}-{k}"] for v in outcomes if f"{kind}-{k}" in v]
            for found_values in outcomes[:1]:
                predicted[size] = found_values.get(f"{kind}-{k}-predicted", math.nan)
        figures.line(right, list(by_size), list(by_size.values()), label, place)
        colour, _ = figures.look(place)
        right.plot(
            list(predicted), list(predicted.values()), ":", color=colour, label=f"{label}, closed form"
        )
    figures.finish(left, "squared length in the closed form", "found (circles means, triangles rows)")
    figures.finish(middle, "round", "NC1 of the features")
    figures.finish(right, "samples of the class (network)", "squared length")
    return drawn
