"""The picture of MSBReg."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flowerbed.experiments.measures import Measured
from flowerbed.experiments.papers.msbreg.probes import TESTED, embedded
from flowerbed.experiments.reproduction.engine import Reproduction

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def clouds(made: Reproduction) -> Figure:
    """Return the singular values of the embeddings with the first seed, and probe accuracy over spread."""
    from flowerbed.experiments.reproduction import figures

    figure, (left, right) = figures.canvas(2)
    for place, arm in enumerate(made.arms):
        colour, style = figures.look(place)
        run = made.finished(arm, made.seeds[0])
        _, z, _ = embedded(Measured(run.model, run.dataset, run.seed, torch.device("cpu")), TESTED, test=True)
        sigma = torch.linalg.svdvals(z - z.mean(0)) * (z.shape[1] / len(z)) ** 0.5
        left.plot(range(1, len(sigma) + 1), sigma.tolist(), style, color=colour, label=arm, linewidth=1.4)
        x, y = (figures.values(made, arm, name) for name in ("spread", "probe"))
        right.plot(x, y, "o" if style == "-" else "s", color=colour, markersize=4, alpha=0.7)
        if x and y:
            middle = (sum(x) / len(x), sum(y) / len(y))
            right.annotate(arm, middle, fontsize=7, color=colour, xytext=(5, 4), textcoords="offset points")
    left.axhline(1.0, color="0.6", linewidth=0.8, linestyle=":")
    left.set_yscale("log")
    left.set_ylim(bottom=1e-3)
    right.margins(0.12)
    figures.finish(left, "k", "singular value of the embeddings (1: isotropic)")
    figures.finish(right, "spread of the embeddings", "accuracy of the ridge probe")
    return figure
