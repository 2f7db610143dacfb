"""The picture of RED-diff."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from flowerbed.experiments.papers.red_diff import RESTORED, TASKS
from flowerbed.experiments.reproduction.engine import Reproduction

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SHOWN = ("start", "red", "dps", "pigdm", "tv", "truth")


def pictures(made: Reproduction) -> Figure:
    """Return restored images of the first seed, and the PSNR of every weight."""
    from flowerbed.experiments.reproduction import figures

    figure, (left, right) = figures.canvas(2, 1, 6.0, 4.4)
    rows = []
    for task in TASKS:
        kept = {m: made.finished(f"exact-{m}-{task}", made.seeds[0]).client()[RESTORED] for m in SHOWN[1:-1]}
        for i in range(2):
            one = kept["red"]
            images = [one["start"][i], *(kept[m]["images"][i] for m in SHOWN[1:-1]), one["truth"][i]]
            rows.append(torch.cat([F.pad(image.mean(0), (0, 1, 0, 1), value=1.0) for image in images], 1))
    left.imshow(torch.cat(rows).clamp(-1, 1), cmap="gray", interpolation="nearest", aspect="auto")
    height, width = rows[0].shape[0], rows[0].shape[1] / len(SHOWN)
    left.set_xticks([width * (i + 0.5) for i in range(len(SHOWN))], ["H⁺ y", *SHOWN[1:]], fontsize=8)
    left.set_yticks([height * (2 * i + 1) for i in range(len(TASKS))], TASKS, fontsize=8)
    for place, name in enumerate(("const", "sqrt", "log", "clip", "power23", "linear", "square")):
        arm = "exact-red-random" if name == "linear" else f"exact-weight-{name}"
        scores = figures.values(made, arm, "train:psnr")
        right.plot([place] * len(scores), scores, "o", color=figures.look(0)[0], markersize=5)
    right.set_xticks(range(7), ("const", "sqrt", "log", "clip", "2/3", "linear", "square"))
    figures.finish(right, "weight of the prior, a function of s / a", "PSNR of hidden pixels (dB)")
    return figure
