"""The picture of compressed features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flowerbed.experiments.papers.compress_features import TARGET
from flowerbed.experiments.papers.compress_features.probes import weight_of
from flowerbed.experiments.reproduction.engine import Reproduction
from flowerbed.models.base import Net
from flowerbed.models.feature_masks import correct_by_channels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.no_grad()
def pictures(made: Reproduction) -> Figure:
    """Return accuracy by channels used, by what was memorised, and the toy."""
    from flowerbed.experiments.compare_report import INK
    from flowerbed.experiments.reproduction import figures

    figure, (cuts, fits, toy) = figures.canvas(3)
    shown: list[str] = [arm for arm in ("ce", "dropout-0.7", "nested-10") if arm in made.arms]
    for place, arm in enumerate(shown):
        curves = []
        for seed in made.seeds:
            run = made.finished(arm, seed)
            model, test = run.model, run.dataset.test
            assert isinstance(model, Net)
            z = model.features(run.dataset.prepare(test.inputs[:2000]))
            right = correct_by_channels([(z, weight_of(model))], test.labels[:2000])
            curves.append((right.double() / len(z)).tolist())
        # About ten points a decade, and the whole.
        whole = len(curves[0])
        x = sorted({k for n in range(40) if (k := round(10 ** (n / 10))) < whole} | {whole})
        figures.line(cuts, x, [[c[k - 1] for c in curves] for k in x], arm, place)
    cuts.set_xscale("log")
    figures.finish(cuts, "channels used, K", "test accuracy")
    for place, arm in enumerate(a for a in made.arms if not a.startswith("toy") and not a.endswith("second")):
        colour, _ = figures.look(place)
        known, reached = figures.values(made, arm, "fits-noisy"), figures.values(made, arm, "accuracy")
        fits.plot(known, reached, "os^D"[place // 6 % 4], color=colour, label=arm, markersize=5, mew=0)
    figures.finish(fits, "noisy training labels that it gives", "test accuracy")
    for place, arm in enumerate(a for a in made.arms if a.startswith("toy")):
        run = made.finished(arm, made.seeds[0])
        train, line = run.dataset.train, run.dataset.test
        if not place:
            toy.plot(
                train.inputs[:, 0],
                train.extras[TARGET],
                ".",
                color=INK,
                alpha=0.4,
                markersize=4,
                label="data",
            )
            toy.plot((0, 10), (0, 10), "--", color=INK, linewidth=1, label="y = x")
        said = run.model(run.dataset.prepare(line.inputs))
        toy.plot(line.inputs[:, 0], said[:, 0], color=figures.look(place)[0], linewidth=1.6, label=arm)
    figures.finish(toy, "x", "y")
    return figure
