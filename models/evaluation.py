"""Evaluation of a model as counts that add up: over batches, clients and processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowerbed.models.tasks import Task

BATCH = 512


def _as_is(inputs: Tensor) -> Tensor:
    return inputs


@torch.no_grad()
def counts(
    predictor: Callable[[Tensor], Tensor],
    task: Task,
    inputs: Tensor,
    labels: Tensor,
    prepare: Callable[[Tensor], Tensor] = _as_is,
) -> dict[str, Tensor]:
    """Return the task's additive counts of ``predictor`` (inputs to outputs) over all samples.

    ``inputs`` (N, ...) are prepared batch by batch with ``prepare``. A module must be in evaluation
    mode already.
    """
    sums: dict[str, Tensor] = {}
    for start in range(0, len(labels), BATCH):
        rows = slice(start, start + BATCH)
        outputs = predictor(prepare(inputs[rows]))
        for name, value in task.counts(outputs, labels[rows].to(outputs.device)).items():
            sums[name] = sums[name] + value if name in sums else value
    return sums


def metrics(
    sums: dict[str, Tensor], examples: int, num_classes: int
) -> dict[str, int | float | list[int] | list[float]]:
    """Return ``num-examples``, mean ``loss``, ``accuracy`` and the counts per class.

    Without any sample all are zero, so that a client that has none weighs nothing.
    """
    if not sums:
        zeros = [0] * num_classes
        return {
            "num-examples": 0,
            "loss": 0.0,
            "accuracy": 0.0,
            "correct-per-class": zeros,
            "total-per-class": list(zeros),
        }
    correct, total = sums["correct"].tolist(), sums["total"].tolist()
    return {
        "num-examples": examples,
        "loss": float(sums["loss_sum"]) / sum(total),
        "accuracy": sum(correct) / sum(total),
        "correct-per-class": correct,
        "total-per-class": total,
    }
