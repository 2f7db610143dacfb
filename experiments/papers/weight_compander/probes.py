"""What the reproduction of Weight Compander runs on, and what it measures."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from flowerbed.experiments.measures import Measured
from flowerbed.experiments.papers.weight_compander import curve
from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.models.base import Net, Shape, classifier
from flowerbed.models.info import ModelInfo
from flowerbed.models.layers import GlobalMean, conv3x3, image_shape
from flowerbed.models.reparametrised import fold, raw_names
from flowerbed.models.sparsity import prunable

STANDARD, RATES = "0.05", ("0.02", "0.05", "0.1")
"""Learning rates of the grid, as the arms are named by them."""


def conv3(input_shape: Shape, num_classes: int) -> Net:
    """Return three strided convolutions (16, 32, 64 channels) with batch norm and a mean over positions."""
    channels, *_ = image_shape("conv3", input_shape, 8)
    layers: list[nn.Module] = []
    for following in (16, 32, 64):
        layers += [conv3x3(channels, following, 2), nn.BatchNorm2d(following), nn.ReLU()]
        channels = following
    return classifier(nn.Sequential(*layers, GlobalMean()), 64, num_classes)


@torch.no_grad()
def companding(measured: Measured) -> dict[str, float]:
    """Return what the curve does to the weights, all kernels together, and how exactly it folds.

    ``largest-weight``; ``near-zero``, the share of |w| < 0.01; ``kurtosis`` (3 for a normal distribution);
    ``saturated``, the share of |v| > 5 b; ``steepest``, the largest a / b (1 for plain weights); and ``fold-gap``, the
    largest difference that folding makes to the outputs of 256 test samples.
    """
    plain = fold(copy.deepcopy(measured.model))
    state, raw = plain.state_dict(), measured.model.state_dict()
    w = torch.cat([state[name].flatten().double() for name in prunable(ModelInfo.of(plain))])
    curves = {name: curve(raw, name) for name in raw_names(raw)}
    x = measured.dataset.prepare(measured.dataset.test.inputs[:256].to(measured.device))
    return {
        "largest-weight": float(w.abs().max()),
        "near-zero": float((w.abs() < 0.01).double().mean()),
        "kurtosis": float((w - w.mean()).pow(4).mean() / w.var(correction=0) ** 2),
        "saturated": sum(float((raw[n].abs() > 5 * b).sum()) for n, (_, b) in curves.items()) / len(w),
        "steepest": max((float(a / b) for a, b in curves.values()), default=1.0),
        "fold-gap": float((plain(x) - measured.model(x)).abs().max()),
    }


def at_the_best_rate(runs: Mapping[str, Finished]) -> Mapping[str, Mapping[str, float]]:
    """Return loss and accuracy of both methods at the rate at which plain training is most accurate, 0 at the others.

    Their sum over the rates is the figure at the best one, and names every arm that has to have been run.
    """
    rates = [rate for rate in RATES if runs.keys() >= {f"plain-{rate}", f"wc-{rate}"}]
    best = max(rates, key=lambda rate: runs[f"plain-{rate}"].values["accuracy"], default="")
    return {
        f"{method}-{rate}": {
            f"best-rate:{name}": runs[f"{method}-{rate}"].values[name] if rate == best else 0.0
            for name in ("loss", "accuracy")
        }
        for method in ("plain", "wc")
        for rate in rates
    }
