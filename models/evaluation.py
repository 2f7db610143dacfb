"""Evaluation as counts that add up, over batches, clients and processes, and what follows from them.

Counts are per class and per confidence bin. Everything else is a pure function of their sums, by the
definitions below, so that no figure depends on who computed it or on how the samples were divided. Metrics of
a predictor with a name, such as ``personal``, carry it as a prefix: ``personal-accuracy``.

accuracy           correct over total, over samples (tokens).
balanced-accuracy  the mean recall over the classes that have test samples.
ece                expected calibration error: sum over bins of n_b / n |accuracy_b - confidence_b|, with 15 bins
                   of equal width by the largest softmax probability. Naeini et al., AAAI 2015; binning and
                   formula as in Guo et al., ICML 2017, eq. 3.
accuracy-GROUP-RULE  accuracy over the test samples of a group of classes, which a rule makes from the *training*
                   counts: see ``CLASS_GROUPS``. A group without test samples has none.
accuracy-GROUP-own-RULE  the same with groups that every client makes from its own *test* counts, as a mean over
                   the clients that have samples in the group; by the rule of the share only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowerbed.models.tasks import CONFIDENCE_BINS, Task

BATCH = 512
Metric = int | float | list[int] | list[float]
Groups = dict[str, list[int]]
"""Class indices by the name of the group."""

CLASS_COUNTS = {"correct-per-class": "correct", "total-per-class": "total"}
BIN_COUNTS = {
    "correct-per-bin": "bin_correct",
    "total-per-bin": "bin_total",
    "confidence-per-bin": "bin_confidence",
}
COUNTS = (*CLASS_COUNTS, *BIN_COUNTS)
"""The metrics that are lists of counts; of all others, only ``num-examples`` adds up."""


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


def masked(predictor: Callable[[Tensor], Tensor], absent: Tensor) -> Callable[[Tensor], Tensor]:
    """Return ``predictor`` with outputs of minus infinity for the classes in ``absent``, bool ``(C,)``.

    They get probability zero, so a sample of such a class has an infinite loss.
    """
    return lambda inputs: predictor(inputs).masked_fill(absent, -math.inf)


def metrics(sums: Mapping[str, Tensor], examples: int, num_classes: int) -> dict[str, Metric]:
    """Return ``num-examples``, mean ``loss``, ``accuracy`` and the ``COUNTS``.

    Without any sample all are zero, so that a client that has none weighs nothing.
    """
    if not sums:
        return {
            "num-examples": 0,
            "loss": 0.0,
            "accuracy": 0.0,
            **{name: [0] * num_classes for name in CLASS_COUNTS},
            **{name: [0] * CONFIDENCE_BINS for name in BIN_COUNTS},
            "confidence-per-bin": [0.0] * CONFIDENCE_BINS,
        }
    lists = {name: sums[key].tolist() for name, key in (CLASS_COUNTS | BIN_COUNTS).items()}
    total = sum(lists["total-per-class"])
    return {
        "num-examples": examples,
        "loss": float(sums["loss_sum"]) / total,
        "accuracy": sum(lists["correct-per-class"]) / total,
        **lists,
    }


def scores(summed: Mapping[str, Any]) -> dict[str, float]:
    """Return accuracy, balanced accuracy and calibration error of every predictor in ``summed``.

    Without any sample the accuracy is 0 and the others are left out.
    """
    found: dict[str, float] = {}
    for prefix, correct, total in _per_class(summed):
        samples = sum(total)
        found[f"{prefix}accuracy"] = sum(correct) / samples if samples else 0.0
        if samples:
            found[f"{prefix}balanced-accuracy"] = balanced_accuracy(correct, total)
            if f"{prefix}total-per-bin" in summed:
                found[f"{prefix}ece"] = calibration_error(*(summed[prefix + name] for name in BIN_COUNTS))
    return found


def group_scores(summed: Mapping[str, Any], train_counts: Sequence[int]) -> dict[str, float]:
    """Return the accuracy in every class group of every rule, for every predictor in ``summed``.

    ``train_counts`` are the samples of each class in all clients' training data together.
    """
    found: dict[str, float] = {}
    for prefix, correct, total in _per_class(summed):
        for rule, group in CLASS_GROUPS.items():
            for name, classes in group(train_counts).items():
                samples = sum(total[c] for c in classes)
                if samples:
                    hits = sum(correct[c] for c in classes)
                    found[f"{prefix}accuracy-{name}-{rule}"] = hits / samples
    return found


def own_group_scores(clients: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, float]:
    """Return the mean accuracy in the ``share_groups`` that every client makes from its own test counts.

    ``clients`` are (correct, total) per class. A client without samples in a group is left out of its mean, as in
    FedLoGe's released code, which calls these the local head, middle and tail.
    """
    found: dict[str, list[float]] = {}
    for correct, total in clients:
        for name, classes in share_groups(total).items():
            samples = sum(total[c] for c in classes)
            if samples:
                accuracy = sum(correct[c] for c in classes) / samples
                found.setdefault(f"accuracy-{name}-own-share-75-95", []).append(accuracy)
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


def balanced_accuracy(correct: Sequence[float], total: Sequence[float]) -> float:
    """Return the mean over the classes with samples of correct over total."""
    recalls = [c / n for c, n in zip(correct, total, strict=True) if n]
    return math.fsum(recalls) / len(recalls)


def calibration_error(correct: Sequence[float], total: Sequence[float], confidence: Sequence[float]) -> float:
    """Return the expected calibration error from counts and summed confidences by bin."""
    gaps = (abs(hits - sure) for hits, sure in zip(correct, confidence, strict=True))
    return math.fsum(gaps) / sum(total)


def share_groups(train_counts: Sequence[int]) -> Groups:
    """Return many, medium and few by cumulated share: the rule ``share-75-95``.

    Classes are taken from the largest to the smallest (ties by index). ``many`` is the smallest such set with
    75 % of all samples, ``medium`` goes on up to and including the class that reaches 95 %, ``few`` is the rest.
    The rule of FedLoGe's released code (Xiao et al., ICLR 2024), which says head, middle and tail.
    """
    order = sorted(range(len(train_counts)), key=lambda c: -train_counts[c])
    total, before = sum(train_counts), 0
    groups: Groups = {"many": [], "medium": [], "few": []}
    for c in order:
        reached_many, reached_medium = 100 * before >= 75 * total, 100 * before >= 95 * total
        groups["few" if reached_medium else "medium" if reached_many else "many"].append(c)
        before += train_counts[c]
    return groups


def count_groups(train_counts: Sequence[int]) -> Groups:
    """Return many (> 100 samples), medium (20 to 100) and few (< 20): the rule ``count-100-20``.

    Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019, sec. 4. The samples are those
    of all clients together.
    """
    groups: Groups = {"many": [], "medium": [], "few": []}
    for c, count in enumerate(train_counts):
        groups["many" if count > 100 else "medium" if count >= 20 else "few"].append(c)
    return groups


CLASS_GROUPS: dict[str, Callable[[Sequence[int]], Groups]] = {
    "share-75-95": share_groups,
    "count-100-20": count_groups,
}
"""Rule -> training counts per class to groups of classes."""


def spread(accuracies: Sequence[float]) -> dict[str, float]:
    """Return how a figure spreads over K clients, each of which counts once.

    ``mean``; ``worst``; ``worst-10pct``, the mean of the ceil(K / 10) lowest; ``std`` over the clients (its square
    is the variance that Li et al., ICLR 2020, report as fairness); ``jain``, the index (sum a)^2 / (K sum a^2) of
    Jain et al. 1984, which is 1 where all are equal and 1 / K where one client has everything.
    """
    ordered, count = sorted(accuracies), len(accuracies)
    mean = math.fsum(ordered) / count
    lowest = ordered[: math.ceil(count / 10)]
    squares = math.fsum(a * a for a in ordered)
    return {
        "mean": mean,
        "worst": ordered[0],
        "worst-10pct": math.fsum(lowest) / len(lowest),
        "std": math.sqrt(math.fsum((a - mean) ** 2 for a in ordered) / count),
        "jain": (count * mean) ** 2 / (count * squares) if squares else 1.0,
    }


def _per_class(summed: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[float], Sequence[float]]]:
    """Yield the prefix, the correct and the total counts per class of every predictor."""
    for name, correct in summed.items():
        if name.endswith("correct-per-class"):
            prefix = name.removesuffix("correct-per-class")
            yield prefix, list(correct), list(summed[f"{prefix}total-per-class"])
