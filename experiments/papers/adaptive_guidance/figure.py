"""The picture of adaptive guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowerbed.experiments.papers.adaptive_guidance import COSINES, SPACES
from flowerbed.experiments.reproduction.engine import Reproduction

if TYPE_CHECKING:
    from matplotlib.figure import Figure


PRIORS = ("exact", "unet")


def pictures(made: Reproduction) -> Figure:
    """Return the cosine by step, and the distance to full guidance over the calls, for both models."""
    from matplotlib.ticker import MaxNLocator

    from flowerbed.experiments.reproduction import figures

    policies = list(dict.fromkeys(arm.partition("-")[2] for arm in made.arms if "-" in arm))
    figure, axes = figures.canvas(2, 2)
    for row, prior in enumerate(PRIORS):
        left, right = axes[2 * row], axes[2 * row + 1]
        kept = [made.finished(f"{prior}-cfg", seed).client()[COSINES] for seed in made.seeds]
        for place, space in enumerate(SPACES):
            steps = range(len(kept[0][space]))
            gamma = [[float(one[space][t]) for one in kept] for t in steps]
            figures.line(left, [t + 1 for t in steps], gamma, f"of {space}, {prior} model", place)
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        figures.finish(left, "step", "cosine of the two predictions")
        for place, policy in enumerate(policies):
            arm, colour = f"{prior}-{policy}", figures.look(place)[0]
            if policy == "cfg" or arm not in made.arms:
                continue
            for x, y, marker, name in (
                ("train:nfe", "mse", "osD^"[place // 7], policy),
                ("control-nfe", "control-mse", "x", "as many guided steps" if policy == "ag" else ""),
            ):
                calls, far = figures.values(made, arm, x), figures.values(made, arm, y)
                if calls and far and name:
                    colour = "black" if marker == "x" else colour
                    right.plot(
                        calls, [max(v, 1e-9) for v in far], marker, color=colour, markersize=5, label=name
                    )
        right.set_yscale("log")
        figures.finish(right, f"calls for an image, {prior} model", "distance to full guidance (MSE)")
        right.tick_params(which="minor", labelsize=6)
    return figure
