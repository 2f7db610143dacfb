"""A paper of four arms that takes a second: a method, a baseline, one that starts from it, one that diverges."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from flowerbed.experiments.measures import Measured
from flowerbed.experiments.reproduction.claims import Claim, metric
from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.experiments.reproduction.paper import Paper
from flowerbed.models.base import Net


def one_layer(input_shape: tuple[int, ...], num_classes: int) -> Net:
    """Return logistic regression on 8x8 images."""
    return Net(nn.Flatten(), nn.Linear(64, num_classes), 64)


def largest_weight(measured: Measured) -> dict[str, float]:
    """Return the largest absolute weight."""
    return {"largest-weight": max(float(p.detach().abs().max()) for p in measured.model.parameters())}


def rounds_seen(run: Finished) -> Mapping[str, float]:
    """Return how many rounds the run has evaluated."""
    return {"evaluations": float(sum(r.phase == "evaluate-server" for r in run.records))}


def compared(runs: Mapping[str, Finished]) -> Mapping[str, Mapping[str, float]]:
    """Return by how much every arm is better than the slow one."""
    return {
        arm: {"gain": run.values["accuracy"] - runs["slow"].values["accuracy"]} for arm, run in runs.items()
    }


accuracy = metric("accuracy")
CLAIMS = (
    Claim(
        "faster", "A larger learning rate learns more.", accuracy["fast"] >= accuracy["slow"] + 0.02, seeds=2
    ),
    Claim("further", "Going on helps, a lot.", accuracy["longer"] >= accuracy["fast"] + 0.5, seeds=2),
)
PAPER = Paper("toy", CLAIMS, measure=rounds_seen, protocol=Path(__file__).with_name("toy_paper.yaml"))
ANALYSED = Paper(
    "toy-analysed", CLAIMS, analyse=compared, protocol=Path(__file__).with_name("toy_paper.yaml")
)
WRONG_METRIC = Paper(
    "toy-wrong",
    (Claim("none", "There is no such figure.", metric("accurracy")["fast"] >= 0.5),),
    protocol=Path(__file__).with_name("toy_paper.yaml"),
)
WRONG_ARM = Paper(
    "toy-arm",
    (Claim("none", "There is no such arm.", accuracy["fasst"] >= 0.5),),
    protocol=Path(__file__).with_name("toy_paper.yaml"),
)
BROKEN = Paper(
    "toy-broken",
    (Claim("steady", "It does not diverge.", accuracy["wild"] >= 0.5, seeds=1),),
    protocol=Path(__file__).with_name("toy_broken.yaml"),
)
