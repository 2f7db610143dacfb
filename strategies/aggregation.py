"""How replies become one: pure functions over tensors and metrics, in a fixed order, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from flwr.app import MetricRecord
from torch import Tensor

from flowerbed.clients.local_round import Metric
from flowerbed.errors import RunError
from flowerbed.models import evaluation
from flowerbed.storage import Tensors

SUMMED = ("num-examples", "steps", "kept-per-class", *evaluation.COUNTS)
"""Metrics that add up instead of being averaged, under whatever prefix."""


def weighted_mean(models: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> Tensors:
    """Return the weighted mean of each tensor, ``sum_k w_k x_k / sum_k w_k``.

    Floating tensors accumulate in float64 (complex in complex128) in the given order and keep their type:
    the mean of equal models is that model bit for bit. Integer buffers (BatchNorm's batch counters) keep
    their type by taking the largest value. Raises ``RunError`` if the weights sum to zero.
    """
    total = float(sum(weights))
    if not total > 0:
        raise RunError(
            "All replies weigh nothing (zero examples); give the clients data, or use uniform weighting."
        )
    mean: Tensors = {}
    for name, first in models[0].items():
        if not (first.is_floating_point() or first.is_complex()):
            mean[name] = torch.stack([model[name] for model in models]).amax(dim=0)
            continue
        wide = torch.complex128 if first.is_complex() else torch.float64
        accumulated = torch.zeros(first.shape, dtype=wide, device=first.device)
        for model, weight in zip(models, weights, strict=True):
            accumulated.add_(model[name], alpha=weight)
        mean[name] = accumulated.div_(total).to(first.dtype)
    return mean


def mean_metrics(replies: Sequence[Mapping[str, Metric]]) -> MetricRecord:
    """Return the example-weighted mean of scalar metrics and the sum of the ``SUMMED``."""
    weights = [scalar(r["num-examples"]) for r in replies]
    total = sum(weights) or 1.0
    result: dict[str, Metric] = {}
    for name, first in replies[0].items():
        if name.endswith(SUMMED):
            result[name] = _added([r[name] for r in replies])
        elif not isinstance(first, list):
            weighted = [w * scalar(r[name]) for w, r in zip(weights, replies, strict=True)]
            result[name] = sum(weighted) / total
    return MetricRecord(result)


def summed_evaluation(replies: Sequence[Mapping[str, Metric]]) -> MetricRecord:
    """Return the evaluation of all clients together, and how it spreads over clients.

    ``accuracy``, ``loss`` and the other ``evaluation.scores`` are over all clients' samples. ``accuracy-mean``,
    ``accuracy-worst`` and the rest of ``evaluation.spread`` are over the clients that have test samples. The same
    for every predictor, under its prefix.
    """
    summed = dict(mean_metrics(replies))
    result: dict[str, Metric] = {**summed, **evaluation.scores(summed)}
    for name in summed:
        if name.endswith("correct-per-class"):
            accuracy = f"{name.removesuffix('correct-per-class')}accuracy"
            per_client = [scalar(r[accuracy]) for r in replies if r["num-examples"]]
            if per_client:
                spread = evaluation.spread(per_client)
                result.update({f"{accuracy}-{kind}": value for kind, value in spread.items()})
    return MetricRecord(result)


def scalar(metric: Metric) -> float:
    """Return a metric that must be one number; raises ``RunError`` for a list."""
    if isinstance(metric, list):
        raise RunError(f"Expected one number, got a list of {len(metric)}.")
    return float(metric)


def _entries(metric: Metric) -> list[float]:
    return list(metric) if isinstance(metric, list) else [metric]


def _added(values: Sequence[Metric]) -> Metric:
    if isinstance(values[0], list):
        columns = zip(*(_entries(v) for v in values), strict=True)
        return [sum(column) for column in columns]
    return sum(v for v in values if not isinstance(v, list))
