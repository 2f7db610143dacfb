"""What the reproduction of the group sparse envelope runs on, and what it measures."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from flowerbed import seeds
from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.experiments.measures import Measured
from flowerbed.experiments.papers.wgsef import BLOCK, TARGET
from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.models.base import Net, Shape, classifier
from flowerbed.models.groups import by_layer, norms, output_units
from flowerbed.models.info import ModelInfo
from flowerbed.models.layers import conv3x3, image_shape

LASSO = ("lasso-0.1", "lasso-0.12", "lasso-0.14")
"""The arms of the grid of group lasso."""


def conv_net(input_shape: Shape, num_classes: int, *, widths: tuple[int, ...] = (32, 64, 64, 128)) -> Net:
    """Return three strided convolutions and a hidden layer, each with batch norm, of ``widths`` channels and units."""
    channels, height, width = image_shape("conv_net", input_shape, 8)
    layers: list[nn.Module] = []
    for following in widths[:3]:
        layers += [conv3x3(channels, following, 2), nn.BatchNorm2d(following), nn.ReLU()]
        channels, height, width = following, -(-height // 2), -(-width // 2)
    hidden = nn.Linear(channels * height * width, widths[3], bias=False)
    return classifier(
        nn.Sequential(*layers, nn.Flatten(), hidden, nn.BatchNorm1d(widths[3]), nn.ReLU()),
        widths[3],
        num_classes,
    )


def linear_map(input_shape: Shape, num_classes: int) -> Net:
    """Return one output, linear in the inputs, from weights of zero."""
    head = nn.Linear(input_shape[0], 1, bias=False)
    nn.init.zeros_(head.weight)
    return Net(nn.Identity(), head, input_shape[0])


def sparse_regression(
    *, seed: int = 0, n: int = 200, groups: int = 50, active: int = 8, snr: float = 10.0
) -> Dataset:
    """Return n samples of a linear map of which few groups of four inputs matter, with noise.

    Inputs and the weights of active groups are standard normal; the noise has 1 / snr of the signal's variance. The
    extra ``target`` is what to predict. The test inputs begin with the unit vectors, whose targets are the weights; n
    further samples follow.
    """
    rng, width = seeds.torch_rng(seed, "sparse regression"), groups * BLOCK
    w = torch.randn(groups, BLOCK, generator=rng)
    w[torch.randperm(groups, generator=rng)[active:]] = 0
    x = torch.randn(2 * n, width, generator=rng)
    y = x @ w.flatten() + w.norm() / snr**0.5 * torch.randn(2 * n, generator=rng)
    return Dataset(
        "sparse regression",
        Split(x[:n], torch.zeros(n, dtype=torch.int64), {TARGET: y[:n]}),
        Split(
            torch.cat([torch.eye(width), x[n:]]),
            torch.zeros(width + n, dtype=torch.int64),
            {TARGET: torch.cat([w.flatten(), y[n:]])},
        ),
        ("none",),
        (0.0,),
        (1.0,),
        task="measured",
    )


def left(measured: Measured) -> dict[str, float]:
    """Return how many groups of filters and units are not exactly zero, and how many the emptiest layer has."""
    groups, state = output_units(ModelInfo.of(measured.model)), measured.model.state_dict()
    alive = norms(groups, state) > 0
    return {
        "groups": float(alive.sum()),
        "share-of-groups": float(alive.double().mean()),
        "emptiest-layer-groups": float(min(int(own.sum()) for own in by_layer(groups, alive))),
    }


def recovery(measured: Measured) -> dict[str, float]:
    """Return the relative error of the weights ``||w - w*|| / ||w*||``, groups, F1 of the support, held-out error."""
    target, width = measured.dataset.test.extras[TARGET].double(), measured.dataset.input_shape[0]
    outputs = measured.outputs()[0].flatten().double()
    w, truth = outputs[:width], target[:width]
    found, true = (v.view(-1, BLOCK).norm(dim=1) > 0 for v in (w, truth))
    return {
        "relative-error": float((w - truth).norm() / truth.norm()),
        "support-f1": 2 * float((found & true).sum()) / max(1.0, float(found.sum() + true.sum())),
        "groups": float(found.sum()),
        "held-out-error": float((outputs[width:] - target[width:]).square().mean()),
    }


def along_the_path(run: Finished) -> Mapping[str, float]:
    """Return the figures of regression, cut to k, at the lambda of the path that predicts held-out samples best."""
    seen = [r.metrics for r in run.records if r.phase == "evaluate-server" and "held-out-error" in r.metrics]
    if not seen:
        return {}
    best = min(seen, key=lambda metrics: metrics["held-out-error"])
    return {f"held-out:{name}": best[name] for name in ("relative-error", "support-f1")}


def tuned(runs: Mapping[str, Finished]) -> Mapping[str, Mapping[str, float]]:
    """Return the accuracy of group lasso with k groups at the best lambda of its grid, 0 at the others."""
    found = {arm: runs[arm].values["accuracy"] for arm in LASSO if arm in runs}
    best = max(found, key=lambda arm: found[arm], default="")
    return {arm: {"chosen:accuracy": value if arm == best else 0.0} for arm, value in found.items()}
