"""The picture of DR-Tune."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowerbed.experiments.papers.dr_tune.probes import FAMILIES
from flowerbed.experiments.reproduction.engine import Reproduction

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def pictures(made: Reproduction) -> Figure:
    """Return accuracy by weight, the head on raw features, and what calibration does to the two clouds."""
    from flowerbed.experiments.compare_report import INK
    from flowerbed.experiments.reproduction import figures

    figure, (by_weight, raw, apart) = figures.canvas(3)
    for place, family in enumerate(FAMILIES[1:]):
        arms = [arm for arm in made.arms if arm.rpartition("-")[0] == family]
        weights = [float(arm.rpartition("-")[2]) for arm in arms]
        figures.line(
            by_weight, weights, [figures.values(made, arm, "accuracy") for arm in arms], family, place
        )
    for place, arm in enumerate(("fine-tune", "probe"), start=3):
        found = figures.values(made, arm, "accuracy") if arm in made.arms else []
        if found:
            colour, _ = figures.look(place)
            by_weight.axhline(sum(found) / len(found), color=colour, linestyle="--", linewidth=1.2, label=arm)
    by_weight.set_xscale("log")
    figures.finish(by_weight, "weight of R_DR", "test accuracy")
    shown = [a for a in made.arms if a.startswith("many-")]
    for place, arm in enumerate(shown):
        colour, _ = figures.look(place)
        own, kept = figures.values(made, arm, "accuracy"), figures.values(made, arm, "raw-accuracy")
        raw.plot(kept, own, "o", color=colour, label=arm.removeprefix("many-"), markersize=5, mew=0)
    figures.finish(raw, "head on pretrained test features", "test accuracy (100 images a class)")
    for place, arm in enumerate(("dr-1.0", "translation-1.0", "full-1.0")):
        for name, style in (("centres-before", "--"), ("centres-after", "-")):
            outcomes = made.of(arm) if arm in made.arms else []
            curves = [dict(o.curves.get(f"train:{name}", ())) for o in outcomes]
            rounds = sorted(set.intersection(*(set(c) for c in curves))) if curves else []
            if rounds:
                means = [sum(c[r] for c in curves) / len(curves) for r in rounds]
                label = arm if name.endswith("before") else f"{arm}, calibrated"
                apart.plot(
                    rounds, means, style, color=figures.look(place)[0], label=label, linewidth=2.6 - place
                )
    apart.axhline(0, color=INK, linewidth=0.6)
    figures.finish(apart, "epoch", "distance of class centres")
    return figure
