"""How replies become one: pure functions over tensors and metrics, in a fixed order, in float64.

What an algorithm takes as weighted means of whole streams it declares (``FederatedStrategy.pooled``) and does
not compute here: see ``flowerbed.pooling``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from flwr.app import MetricRecord
from torch import Tensor

from flowerbed import pooling
from flowerbed.clients.local_round import Metric
from flowerbed.models import evaluation
from flowerbed.pooling import Tally
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
    pooling.require_weight(total)
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
    tally = Tally()
    for metrics in replies:
        tally.add(metrics)
    return tallied(tally, frozenset.intersection(*(frozenset(r) for r in replies)))


def tallied(tally: Tally, names: frozenset[str]) -> MetricRecord:
    """Return the example-weighted mean of scalar metrics and the sum of the ``SUMMED``, of those in ``names``."""
    result: dict[str, Metric] = {}
    for name in tally.names:
        if name in names and name.endswith(SUMMED):
            result[name] = tally.sum_of(name)
        elif name in names and name in tally.plain:
            result[name] = tally.mean_of(name)
    return MetricRecord(result)


def summed_evaluation(replies: Sequence[Mapping[str, Metric]]) -> MetricRecord:
    """Return the evaluation of all clients together, and how it spreads over clients.

    ``accuracy``, ``loss`` and the other ``evaluation.scores`` are over all clients' samples. ``accuracy-mean``,
    ``accuracy-worst`` and the rest of ``evaluation.spread`` are over the clients that have test samples, and so are
    the ``evaluation.own_group_scores``. The same for every predictor, under its prefix.
    """
    summed = dict(mean_metrics(replies))
    result: dict[str, Metric] = {**summed, **evaluation.scores(summed)}
    for name in summed:
        if name.endswith("correct-per-class"):
            prefix = name.removesuffix("correct-per-class")
            accuracy, tested = f"{prefix}accuracy", [r for r in replies if r["num-examples"]]
            if tested:
                spread = evaluation.spread([scalar(r[accuracy]) for r in tested])
                result.update({f"{accuracy}-{kind}": value for kind, value in spread.items()})
                counts = [(_counts(r[name]), _counts(r[f"{prefix}total-per-class"])) for r in tested]
                own = evaluation.own_group_scores(counts)
                result.update({prefix + kind: value for kind, value in own.items()})
    return MetricRecord(result)


def scalar(metric: Metric) -> float:
    """Return a metric that must be one number; raises ``RunError`` for a list."""
    return float(pooling.number(metric))


def _counts(metric: Metric) -> list[int]:
    return [int(count) for count in metric] if isinstance(metric, list) else [int(metric)]
