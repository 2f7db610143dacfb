"""The picture of QLAE."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flowerbed.datasets.mini_shapes import FACTORS
from flowerbed.experiments.measures import Measured
from flowerbed.experiments.papers.qlae.probes import measured_codes
from flowerbed.experiments.reproduction.engine import Reproduction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("ae", "vae", "tcvae", "bioae", "vqvae", "qlae", "infogan", "qinfogan")


def matrices(made: Reproduction) -> Figure:
    """Return what each latent knows of each factor with the first seed, and modularity over reconstruction."""
    from flowerbed.experiments.reproduction import figures

    shown = [arm for arm in ("ae-0.5", "tcvae-0.5", "qlae-0.5", "qinfogan") if arm in made.arms]
    figure, axes = figures.canvas(len(shown) + 1, 1, 3.6, 3.2)
    for axis, arm in zip(axes, shown):
        run = made.finished(arm, made.seeds[0])
        mec, _ = measured_codes(Measured(run.model, run.dataset, run.seed, torch.device("cpu")))
        axis.imshow(mec.nmi, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        axis.set_yticks(range(len(FACTORS)), FACTORS)
        axis.locator_params(axis="x", integer=True)
        axis.set_title(f"{arm}: InfoM {mec.modularity:.2f}, InfoE {mec.explicitness:.2f}", fontsize=9)
        figures.finish(axis, "active latent", "")
        axis.grid(False)
    for place, method in enumerate(METHODS):
        arms = [arm for arm in made.arms if method in (arm, arm.rpartition("-")[0])]
        means = [
            tuple(sum(v) / max(len(v), 1) for v in (figures.values(made, arm, m) for m in ("psnr", "infom")))
            for arm in arms
        ]
        colour, _ = figures.look(place)
        marker = "-s" if "gan" in method else "-o"
        axes[-1].plot(*zip(*means), marker, color=colour, label=method, linewidth=1)
        for one, (x, y) in zip(arms, means):
            decay = one.removeprefix(method).removeprefix("-")
            axes[-1].annotate(decay, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
    figures.finish(axes[-1], "PSNR (dB)", "InfoM, by decay")
    return figure
