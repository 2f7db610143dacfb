"""The picture of StableMax and perpGrad."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flowerbed.experiments.reproduction.engine import Reproduction


def curves(made: Reproduction) -> Figure:
    """Return test accuracy on addition, collapse by precision, and both on parity, over epochs."""
    from flowerbed.experiments.reproduction import figures

    drawn, axes = figures.canvas(4)
    addition = ("plain", "decay", "perp", "perp-sgd", "stablemax")
    onset = ("onset-float16", "onset-float32", "onset-float64")
    parity = ("parity-ce", "parity-stablemax", "parity-perp")
    for axis, arms, name, title in (
        (axes[0], addition, "accuracy", "test accuracy, addition"),
        (axes[1], onset, "train:collapsed", "collapsed training samples, addition"),
        (axes[2], parity, "accuracy", "test accuracy, parity"),
        (axes[3], parity, "train:collapsed", "collapsed training samples, parity"),
    ):
        for place, arm in enumerate(arms):
            found = [dict(o.curves.get(name, ())) for o in made.of(arm)]
            rounds = sorted(set.intersection(*(set(curve) for curve in found)))
            each = made.scale.arms[arm].settings["local"]["steps"]
            figures.line(
                axis, [r * each for r in rounds], [[c[r] for c in found] for r in rounds], arm, place
            )
        figures.finish(axis, "epochs", title)
    return drawn
