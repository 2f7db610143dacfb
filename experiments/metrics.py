"""What a run's records say in the end: its figures, by one rule for every method, and its cost.

Cost is a result. Bytes are the payloads that were sent and received; steps are all the optimizer steps of
the clients whose replies were used; seconds are those of this machine. FLOPs are computed: ``step_flops`` times the
steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flowerbed.clients.app import OPTIMIZER_STEPS
from flowerbed.clients.params import LocalParams
from flowerbed.datasets.dataset import Dataset
from flowerbed.datasets.partitions import Partition
from flowerbed.models import evaluation
from flowerbed.models.base import ModelSpec
from flowerbed.models.tasks import task_for
from flowerbed.server.callbacks import CLIENTS, SERVER, Record

FLOPS_COUNTED = (
    "matrix products, convolutions and attention (a multiply-add is 2) of one forward and backward pass of the "
    "task's loss for each optimizer step, at the clients' mean batch size; without element-wise work, "
    "normalisation, the optimizer, further passes that a method makes, evaluation, and clients whose replies were "
    "not used"
)


def evaluations(records: Sequence[Record], phase: str) -> list[Record]:
    """Return the evaluations of ``phase`` that follow training; that of the initial model if there is no other."""
    found = [r for r in records if r.phase == phase]
    return [r for r in found if r.round > 0] or found


def final(records: Sequence[Record], phase: str) -> dict[str, float]:
    """Return the scalars of the last evaluation; {} if there was none."""
    found = evaluations(records, phase)
    return scalars(found[-1].metrics) if found else {}


def mean_of_last(records: Sequence[Record], phase: str, last: int) -> dict[str, float]:
    """Return the means over the last ``last`` evaluations (or all, if there are fewer), never the best one.

    What one of them lacks is left out.
    """
    rows = [scalars(r.metrics) for r in evaluations(records, phase)[-last:]]
    names = [name for name in rows[0] if all(name in row for row in rows)] if rows else []
    return {name: math.fsum(row[name] for row in rows) / len(rows) for name in names}


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that are one number."""
    return {name: value for name, value in metrics.items() if not isinstance(value, list)}


def train_counts(labels: Tensor, train: Partition, num_classes: int) -> list[int]:
    """Return the samples (next-token: tokens) of each class in all clients' training data together."""
    held: list[int] = torch.bincount(
        labels[torch.from_numpy(np.array(train.samples))].flatten(), minlength=num_classes
    ).tolist()
    return held


def group_scores(
    labels: Tensor, train: Partition, num_classes: int
) -> Callable[[Mapping[str, Any]], dict[str, float]]:
    """Return what adds the accuracy of many, medium and few to an evaluation, under every rule."""
    held = train_counts(labels, train, num_classes)
    return lambda summed: evaluation.group_scores(summed, held)


def cost(records: Sequence[Record], flops_per_step: float | None) -> dict[str, Any]:
    """Return bytes, seconds, client steps and FLOPs of training, and the first two of evaluation.

    Statistics rounds count as training. Steps are None where a strategy reports none, FLOPs also where
    ``flops_per_step`` is None.
    """
    judging = [r for r in records if r.phase in (SERVER, CLIENTS)]
    training = [r for r in records if r.phase not in (SERVER, CLIENTS)]
    reported = [r.metrics[OPTIMIZER_STEPS] for r in training if OPTIMIZER_STEPS in r.metrics]
    steps = sum(reported) if reported else None
    return {
        "train": {
            **_traffic(training),
            "client_steps": steps,
            "flops": None if steps is None or flops_per_step is None else steps * flops_per_step,
        },
        "evaluate": _traffic(judging),
        "flops_per_step": flops_per_step,
        "flops_counted": FLOPS_COUNTED,
    }


def step_flops(
    model: ModelSpec, dataset: Dataset, local: LocalParams, sizes: npt.NDArray[np.int64]
) -> float | None:
    """Return the FLOPs of a client's mean optimizer step; see ``FLOPS_COUNTED``. None if they cannot be counted.

    One batch of the largest size that occurs is run on torch's meta device, which computes nothing, and scaled
    to the mean batch. ``sizes`` are the clients' numbers of samples.
    """
    batch = int(min(local.batch_size or sizes.max(), sizes.max()))
    task = task_for(dataset.task, dataset.num_classes)
    split, module = dataset.train, model.build(0)
    try:
        module.to("meta").train()
        inputs = dataset.prepare(split.inputs[:1]).expand(batch, *dataset.input_shape).to("meta")
        labels = split.labels[:1].expand(batch, *split.labels.shape[1:]).to("meta")
        with FlopCounterMode(display=False) as counter:
            task.loss(module(inputs), labels).mean().backward()  # type: ignore[no-untyped-call]
    except Exception:  # noqa: BLE001
        # A model whose Python looks at values, or an operation without a meta kernel: what it costs is then
        # unknown, which is no reason to end a run.
        return None
    return float(counter.get_total_flops()) / batch * mean_batch(local, sizes)


def mean_batch(local: LocalParams, sizes: npt.NDArray[np.int64]) -> float:
    """Return the mean number of samples in a step, over the steps of a round of all clients."""
    samples, steps = 0.0, 0
    # Clients of one size count together: there may be a million of them.
    for n, clients in zip(*(found.tolist() for found in np.unique(sizes, return_counts=True)), strict=True):
        own, batches = local.steps_per_round(n), local.batches_per_epoch(n)
        # An epoch visits every sample once, unless its last batch is dropped.
        visits = batches * min(local.batch_size or n, n) if local.drop_last else n
        if local.replacement:
            visits = batches * (local.batch_size or n)
        samples += clients * own * visits / batches
        steps += clients * own
    return samples / steps


def _traffic(records: Sequence[Record]) -> dict[str, float]:
    return {
        "bytes_down": sum(r.bytes_down for r in records),
        "bytes_up": sum(r.bytes_up for r in records),
        "seconds": round(math.fsum(r.seconds for r in records), 3),
    }
