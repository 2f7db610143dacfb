"""What the reproduction of DeepZero runs on, and what it measures."""

from __future__ import annotations

from torch import nn

from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.models.base import Net, Shape, classifier
from flowerbed.models.layers import image_shape
from flowerbed.server.callbacks import SERVER


def pooled_mlp(input_shape: Shape, num_classes: int, *, pool: int = 4, hidden: int = 16) -> Net:
    """Return a ReLU network of one hidden layer on images made ``pool`` times smaller: few enough weights."""
    channels, height, width = image_shape("pooled_mlp", input_shape, pool)
    inputs = channels * (height // pool) * (width // pool)
    layers = (nn.AvgPool2d(pool), nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU())
    return classifier(nn.Sequential(*layers), hidden, num_classes)


LAST = 3
"""Evaluations that an accuracy is the mean of; the steps of a constant learning rate are noisy."""


def half_way(run: Finished) -> dict[str, float]:
    """Return the accuracy after half of the rounds, the queries in all, and these in units of 300 (d + 1)."""
    found = [(r.round, float(r.metrics["accuracy"])) for r in run.records if r.phase == SERVER]
    middle = [accuracy for round_, accuracy in found if round_ <= found[-1][0] / 2]
    queries = sum(int(r.metrics["queries"]) for r in run.records if "queries" in r.metrics)
    d = sum(p.numel() for p in run.model.parameters())
    return {
        "half-accuracy": sum(middle[-LAST:]) / len(middle[-LAST:]),
        "queries": queries,
        "budget": queries / (300 * (d + 1)),
    }
