"""The picture of Weight Compander."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flowerbed.experiments.comparison import FINISHED
from flowerbed.experiments.papers.weight_compander import CURVES, psi
from flowerbed.experiments.papers.weight_compander.probes import STANDARD
from flowerbed.experiments.reproduction.engine import Reproduction
from flowerbed.models.info import ModelInfo
from flowerbed.models.reparametrised import fold
from flowerbed.models.sparsity import prunable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def weights_and_curve(made: Reproduction) -> Figure:
    """Return the curve against the identity, histograms of one seed's weights, and the likelihood by learning rate."""
    from flowerbed.experiments.reproduction import figures

    figure, (left, middle, right) = figures.canvas(3, 1, 4.2)
    v = torch.linspace(-12, 12, 241)
    one = torch.tensor(1.0)
    left.plot(v, v, "--", color="0.6", linewidth=1, label="w = v")
    for place, shape in enumerate(CURVES):
        colour, style = figures.look(place)
        left.plot(v, psi(shape, v, 3 * one, 2 * one), style, color=colour, linewidth=1.6, label=shape)
    left.set_ylim(-7, 7)
    figures.finish(left, "v / s", "w / s")
    edges = torch.linspace(-0.8, 0.8, 81).tolist()
    for place, method in enumerate(("plain", "wc")):
        arm, (colour, style) = f"{method}-{STANDARD}", figures.look(place)
        if made.of(arm)[0].status in FINISHED:
            model = fold(made.finished(arm, made.seeds[0]).model)
            state = model.state_dict()
            w = torch.cat([state[n].flatten() for n in prunable(ModelInfo.of(model))])
            middle.hist(
                w.clamp(-0.8, 0.8).tolist(), edges, histtype="step", color=colour, label=arm, linewidth=1.4
            )
        arms = [name for name in made.arms if name.startswith(f"{method}-") and name[-1].isdigit()]
        rates = [float(name.rpartition("-")[2]) for name in arms]
        figures.line(right, rates, [figures.values(made, name, "loss") for name in arms], method, place)
    middle.set_yscale("log")
    figures.finish(middle, "weight (those beyond 0.8 at the edge)", "weights")
    figures.finish(right, "learning rate", "test loss")
    return figure
