"""The picture of self-tuning networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowerbed.datasets.rated_augment import STRENGTHS
from flowerbed.experiments.papers.stn import LAMBDAS
from flowerbed.experiments.reproduction.engine import Reproduction

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def learning_to_regularise(made: Reproduction) -> Figure:
    """Return the rates by epoch, the validation loss of STN and the grid, and ridge's hypergradient by sigma."""
    from flowerbed.experiments.reproduction import figures

    figure, (rates, losses, exact) = figures.canvas(3)
    found = [dict(outcome.curves.items()) for outcome in made.of("stn")]
    names = [n for n in found[0] if n.startswith(("dropout-", *STRENGTHS))] if found else []
    for place, name in enumerate(names):
        curves = [dict(curve[name]) for curve in found]
        rounds = sorted(set.intersection(*(set(curve) for curve in curves)))
        figures.line(rates, rounds, [[curve[r] for curve in curves] for r in rounds], name, place)
    figures.finish(rates, "epoch", "hyperparameter of STN")
    lowest = []
    for place, arm in enumerate(a for a in made.arms if not a.startswith("ridge")):
        curves = [dict(outcome.curves.get("train:validation-loss", ())) for outcome in made.of(arm)]
        rounds = sorted(set.intersection(*(set(curve) for curve in curves)))
        figures.line(losses, rounds, [[curve[r] for curve in curves] for r in rounds], arm, place)
        lowest += [min(curve.values()) for curve in curves if curve]
    if lowest:
        # Where the arms differ: the first epochs and the worst overfitting lie above.
        losses.set_ylim(0.95 * min(lowest), 2 * min(lowest))
    figures.finish(losses, "epoch", "validation loss")
    arms = [arm for arm in made.arms if arm.startswith("ridge")]
    for place, arm in enumerate(arms):
        ratios = [figures.values(made, arm, f"ratio-{at}") for at in LAMBDAS]
        figures.line(exact, LAMBDAS, ratios, arm.replace("ridge-", "sigma "), place)
    figures.finish(exact, "log penalty of ridge regression", "hypergradient / exact one")
    return figure
