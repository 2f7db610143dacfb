"""What the reproduction of neural collapse in deep linear networks runs on, and what it measures."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from flowerbed.experiments.measures import Measured
from flowerbed.experiments.papers.nc_deep_linear import DeepLinearParams, Frame, fitted, frame
from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.models.collapse import class_means, distance, variability

EXACT = (
    *(f"{kind}-{m}" for kind in ("balanced", "imbalanced", "steep") for m in (1, 3)),
    "minority",
    "bias-3",
)
"""Arms whose minimiser is known in every number."""


@torch.no_grad()
def geometry(finished: Finished) -> dict[str, float]:
    """Return how the delivered model compares with the minimiser: see the words beside each number."""
    asked = DeepLinearParams(**finished.simulation.strategy.options)
    data, model = finished.dataset, finished.model.double()
    rows = torch.cat([torch.as_tensor(finished.parts.train.indices(c).copy())
                      for c in range(finished.parts.train.num_clients)]).sort().values  # fmt: skip
    x, y = data.prepare(data.train.inputs[rows]), data.train.labels[rows]
    classes = data.num_classes
    z = model.body(x.double() if x.is_floating_point() else x)  # type: ignore[operator]
    layers = list(model.head)  # type: ignore[arg-type]
    weights: list[Tensor] = [layer.weight for layer in layers]
    bias: Tensor | None = layers[-1].bias
    counts = y.bincount(minlength=classes).tolist()
    outputs = model.head(z)  # type: ignore[operator]
    decay = sum(float(w.square().sum()) for w in weights)
    objective = (
        float(fitted(outputs, y, asked.loss))
        + (asked.lambda_w * decay + asked.lambda_h * float(z.square().sum())) / 2
    )
    found = {
        "objective": objective,
        "train-error": float((outputs.argmax(1) != y).double().mean()),
        "balancedness": max(
            [distance(a @ a.T, c.T @ c) for a, c in pairwise(weights)], default=0.0
        ),  # W_j W_j^T against W_(j+1)^T W_(j+1)
    }
    simplex = asked.loss == "ce" or bias is not None
    target = frame(counts, len(weights), asked.lambda_w, asked.lambda_h, simplex)
    flat = frame([1] * classes, len(weights), asked.lambda_w, asked.lambda_h, simplex)
    by_level: dict[str, list[float]] = {}
    for level in range(len(weights)):
        mu = class_means(z, y, classes)
        mu = mu - mu.mean(0) if simplex else mu
        tail = torch.linalg.multi_dot([*reversed(weights[level:]), torch.eye(z.shape[1], dtype=z.dtype)])
        grams = {"means": mu @ mu.T, "classifier": tail @ tail.T, "product": tail @ mu.T}
        expected = dict(zip(grams, target.targets(level), strict=True))
        by_level.setdefault("nc1", []).append(variability(z, y, classes))
        by_level.setdefault("nc3", []).append(distance(grams["product"], expected["product"]))
        for name in ("means", "classifier"):
            by_level.setdefault(f"nc2-{name}", []).append(distance(grams[name], expected[name]))
            # The frame of balanced classes; no metric of ours but the negative control.
            by_level.setdefault(f"nc2-{name}-equal", []).append(distance(grams[name], flat.shape))
        if level == 0:
            found |= _absolute(grams, expected, target, objective)
        z = z @ weights[level].T
    # The worst level counts.
    found |= {name: max(values) for name, values in by_level.items()}
    if bias is not None:
        found["bias-error"] = float((bias - 1 / classes).abs().max())
    return found


def _absolute(
    grams: Mapping[str, Tensor], expected: Mapping[str, Tensor], target: Frame, objective: float
) -> dict[str, float]:
    """Return errors without normalisation; a diagonal's is relative, over the classes that are kept."""
    kept, off = ~target.lost, ~torch.eye(len(target.b), dtype=torch.bool)
    ratios = [(g.diagonal() / expected[n].diagonal() - 1)[kept].abs().max() for n, g in grams.items()]
    squares = grams["means"].diagonal()
    numbers = {f"mean-{k}": float(v) for k, v in enumerate(squares)}
    numbers |= {f"mean-{k}-predicted": float(v) for k, v in enumerate(expected["means"].diagonal())}
    numbers |= {f"row-{k}": float(v) for k, v in enumerate(grams["classifier"].diagonal())}
    numbers |= {f"row-{k}-predicted": float(v) for k, v in enumerate(expected["classifier"].diagonal())}
    return {
        "gap": abs(objective - target.minimum),  # to the minimum of F
        "diagonal": float(torch.stack(ratios).max()),
        "off-diagonal": max(float((g - expected[n])[off].abs().max()) for n, g in grams.items()),
        "lost": float(target.lost.sum()),  # classes that should be zero
        "lost-length": float(squares[target.lost].max()) if target.lost.any() else 0.0,
        **numbers,
    }


def collapse(measured: Measured) -> dict[str, float]:
    """Return NC1 and the distance of the means from an orthogonal frame of equal lengths, for curves over rounds."""
    net, train = measured.model, measured.dataset.train
    with torch.no_grad():
        z = torch.cat([net.body(x).cpu() for x in measured.batches(train)])  # type: ignore[operator]
    mu = class_means(z, train.labels, measured.dataset.num_classes)
    return {
        "variability": variability(z, train.labels, len(mu)),
        "unequal": distance(mu @ mu.T, torch.eye(len(mu))),
    }
