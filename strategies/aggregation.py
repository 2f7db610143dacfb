"""How replies become one: pure functions over tensors and metrics, in a fixed order, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from flwr.app import MetricRecord
from torch import Tensor

from flowerbed.clients.local_round import Metric
from flowerbed.errors import RunError
from flowerbed.storage import Tensors

COUNTS = ("num-examples", "correct-per-class", "total-per-class")
"""Metrics that add up instead of being averaged."""


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
    """Return the example-weighted mean of scalar metrics and the sum of ``COUNTS``."""
    weights = [float(r["num-examples"]) for r in replies]  # type: ignore[arg-type]
    total = sum(weights) or 1.0
    result: dict[str, Metric] = {}
    for name, first in replies[0].items():
        if name in COUNTS:
            result[name] = _added([r[name] for r in replies])
        elif not isinstance(first, list):
            result[name] = sum(w * float(r[name]) for w, r in zip(weights, replies)) / total  # type: ignore[arg-type]
    return MetricRecord(result)


def summed_evaluation(replies: Sequence[Mapping[str, Metric]]) -> MetricRecord:
    """Return the evaluation of all clients together, and how it spreads over clients.

    ``accuracy`` and ``loss`` are over samples; ``accuracy-mean`` is the mean over the clients that have test
    samples, ``accuracy-worst`` the lowest of them.
    """
    result = dict(mean_metrics(replies))
    correct, total = sum(result["correct-per-class"]), sum(result["total-per-class"])  # type: ignore[arg-type]
    result["accuracy"] = correct / total if total else 0.0
    per_client = [float(r["accuracy"]) for r in replies if r["num-examples"]]  # type: ignore[arg-type]
    if per_client:
        result["accuracy-mean"] = sum(per_client) / len(per_client)
        result["accuracy-worst"] = min(per_client)
    return MetricRecord(result)


def _added(values: Sequence[Metric]) -> Metric:
    if isinstance(values[0], list):
        return [sum(column) for column in zip(*values, strict=True)]  # type: ignore[arg-type]
    return sum(values)  # type: ignore[arg-type]
