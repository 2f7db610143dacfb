"""A matrix as files: JSON, a Markdown table, a heat map, and leakage against utility."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowerbed.experiments.figures import BLUE, GREY, INK, ORANGE
from flowerbed.experiments.leakage.matrix import ADAPTIVE, Cell, worst_attack
from flowerbed.experiments.leakage.scoring import Summary
from flowerbed.experiments.run_directory import git_commit, versions
from flowerbed.storage import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NULL = "null: class mean"
SHOWN = ("psnr", "ssim", "labels", "top-1", "hit")


def write(cells: Sequence[Cell], folder: Path) -> list[Path]:
    """Write matrix.json, matrix.md, heatmap.png and leakage_utility.png; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("matrix.json", "matrix.md", "heatmap.png", "leakage_utility.png")]
    atomic_write(files[0], (json.dumps(plain(cells), indent=1) + "\n").encode())
    atomic_write(files[1], markdown(cells).encode())
    heat_map(cells).savefig(files[2])
    leakage_utility(cells).savefig(files[3])
    return files


def plain(cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the matrix as plain values."""
    return {"cells": [asdict(cell) for cell in cells], "git_commit": git_commit(), "versions": versions()}


def markdown(cells: Sequence[Cell]) -> str:
    """Return one row for every cell, and for every defence the attack that it must be judged by."""
    head = [
        "defence",
        "round",
        "attack",
        "attacker",
        *SHOWN,
        "worst PSNR",
        "null PSNR",
        "accuracy",
        "gradients",
        "s",
    ]
    lines = ["# Leakage", "", f"| {' | '.join(head)} |", f"|{'---|' * 4}{'---:|' * (len(head) - 4)}"]
    for c in cells:
        shown = [_told(c.summary[name]) for name in SHOWN]
        accuracy = "-" if c.utility is None else f"{c.utility:.4g}"
        ends = [f"{c.summary['psnr'].worst:.1f}", f"{c.summary[NULL].mean:.1f}", accuracy]
        row = [
            c.defence,
            str(c.round),
            c.attack,
            c.knows,
            *shown,
            *ends,
            f"{c.evaluations:,}",
            f"{c.seconds:.0f}",
        ]
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", "What leaks most from each, by mean PSNR:", ""]
    for defence in dict.fromkeys(c.defence for c in cells):
        for round_ in dict.fromkeys(c.round for c in cells):
            top = worst_attack(cells, defence, round_)
            gap = top.summary["psnr"].mean - top.summary[NULL].mean
            lines.append(
                f"- {defence}, round {round_}: {top.attack} ({top.knows}), {top.summary['psnr'].mean:.1f} dB, "
                f"{gap:+.1f} dB against the class mean"
            )
    return "\n".join(lines) + "\n"


def _told(value: Summary) -> str:
    return f"{value.mean:.3g} ({value.low:.3g} to {value.high:.3g})"


def heat_map(cells: Sequence[Cell]) -> Figure:
    """Return mean PSNR by defence and attack, a panel a state; a row of the null model is drawn beside."""
    figure, axes = _canvas(cells, width=1.1)
    rounds = list(dict.fromkeys(c.round for c in cells))
    defences = list(dict.fromkeys(c.defence for c in cells))
    columns = list(dict.fromkeys((c.attack, c.knows) for c in cells))
    values = [c.summary["psnr"].mean for c in cells]
    for axis, round_ in zip(axes, rounds, strict=True):
        found = {(c.defence, c.attack, c.knows): c for c in cells if c.round == round_}
        table = [
            [found[d, *key].summary["psnr"].mean if (d, *key) in found else math.nan for key in columns]
            + [next(c for c in found.values() if c.defence == d).summary[NULL].mean]
            for d in defences
        ]
        axis.imshow(table, cmap="Blues", vmin=min(values) - 3, vmax=max(values) + 3, aspect="auto")
        labels = [f"{a}\n{k}" if k == ADAPTIVE else a for a, k in columns] + ["null:\nclass mean"]
        axis.set_xticks(range(len(labels)), labels, fontsize=8)
        axis.set_yticks(range(len(defences)), defences, fontsize=8)
        middle = (min(values) + max(values)) / 2
        for y, row in enumerate(table):
            for x, value in enumerate(row):
                text = "-" if math.isnan(value) else f"{value:.1f}"
                axis.text(
                    x,
                    y,
                    text,
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if value > middle + 2 else INK,
                )
        axis.set_title(f"model of round {round_}: mean PSNR in dB", fontsize=9)
    return figure


def leakage_utility(cells: Sequence[Cell]) -> Figure:
    """Return the worst attack's PSNR over the accuracy of each defence, a panel a state, the null model as a line."""
    figure, axes = _canvas(cells, width=0.0)
    defences = list(dict.fromkeys(c.defence for c in cells))
    for axis, round_ in zip(axes, dict.fromkeys(c.round for c in cells), strict=True):
        nulls = [c.summary[NULL].mean for c in cells if c.round == round_]
        axis.axhline(
            sum(nulls) / len(nulls), color=GREY, linestyle="--", linewidth=1, label="class mean, no gradient"
        )
        for defence in defences:
            top = worst_attack(cells, defence, round_)
            if top.utility is None:
                continue
            psnr = top.summary["psnr"]
            spread = [[psnr.mean - psnr.low], [psnr.high - psnr.mean]]
            colour = ORANGE if defence == "none" else BLUE
            axis.errorbar([top.utility], [psnr.mean], yerr=spread, fmt="o", color=colour, capsize=3)
            axis.annotate(
                defence, (top.utility, psnr.mean), xytext=(5, 4), textcoords="offset points", fontsize=8
            )
        axis.margins(0.25)
        axis.tick_params(labelsize=8)
        axis.locator_params(nbins=5)
        axis.set_xlabel("accuracy of the run", fontsize=8)
        axis.set_ylabel("PSNR of the worst attack, dB", fontsize=8)
        axis.set_title(f"model of round {round_}", fontsize=9)
        axis.legend(fontsize=7, frameon=False, loc="lower right")
    return figure


def _canvas(cells: Sequence[Cell], width: float) -> tuple[Figure, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = len({c.round for c in cells})
    columns = len({(c.attack, c.knows) for c in cells}) + 1
    rows = len({c.defence for c in cells})
    size = (max(4.5, 1.5 + width * columns) * panels, max(3.0, 1.2 + 0.5 * rows))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])
