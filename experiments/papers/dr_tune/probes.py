"""What the reproduction of DR-Tune runs on, and what it measures."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from flowerbed.experiments.measures import Measured
from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.models.base import Net, Shape
from flowerbed.models.layers import ChannelsLast, GlobalMean, image_shape
from flowerbed.models.zoo import draw_net


def backbone(input_shape: Shape, num_classes: int, *, of: str = "") -> Net:
    """Return a network ``of`` any kind, or three strided convolutions (24, 48, 96), with w_c ~ N(0, 0.01^2)."""
    net = draw_net(of, input_shape, num_classes) if of else _conv3(input_shape)
    head = nn.Linear(net.feature_dim, num_classes)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return Net(net.body, head, net.feature_dim)


def _conv3(input_shape: Shape) -> Net:
    channels, *_ = image_shape("backbone", input_shape, 8)
    layers: list[nn.Module] = []
    for following in (24, 48, 96):
        layers += [
            nn.Conv2d(channels, following, 3, 2, padding=1, bias=False),
            nn.BatchNorm2d(following),
            nn.ReLU(),
        ]
        channels = following
    return Net(nn.Sequential(ChannelsLast(*layers), GlobalMean()), nn.Identity(), channels)


def validated(measured: Measured) -> dict[str, float]:
    """Return the accuracy on the validation samples, where there are some."""
    split = measured.dataset.validation
    if split is None:
        return {}
    outputs, labels = measured.outputs(split)
    return {"validation": float((outputs.argmax(-1) == labels).double().mean())}


@torch.no_grad()
def on_raw_features(run: Finished) -> dict[str, float]:
    """Return how often the final head is right about features that the network had before, of test images."""
    start, final, dataset = run.parts.spec.model.build(run.seed).eval(), run.model, run.dataset
    assert isinstance(start, Net)
    assert isinstance(final, Net)
    right = 0
    for rows in torch.split(torch.arange(len(dataset.test)), 500):
        x = dataset.prepare(dataset.test.inputs[rows])
        right += int((final.head(start.features(x)).argmax(1) == dataset.test.labels[rows]).sum())
    return {"raw-accuracy": right / len(dataset.test)}


FAMILIES = ("l2-sp", "dr", "translation", "full")
"""Methods with a weight to choose; their arms are called NAME-WEIGHT."""


def choose(runs: Mapping[str, Finished]) -> Mapping[str, Mapping[str, float]]:
    """Return, for every arm of a family, the accuracy of its arm that validates best (the first of equals)."""
    found: dict[str, dict[str, float]] = {}
    for family in FAMILIES:
        arms = [arm for arm in runs if arm.rpartition("-")[0] == family]
        if arms:
            best = max(arms, key=lambda arm: runs[arm].values["validation"])
            found |= {arm: {"chosen": runs[best].values["accuracy"]} for arm in arms}
    return found
