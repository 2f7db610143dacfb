"""What a model is trained for: a loss per sample, and counts that add up over batches and clients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from flowerbed.errors import ConfigError, unknown_name

CONFIDENCE_BINS = 15
"""Bins of the calibration counts: equal widths over (0, 1], the m-th is ((m - 1) / 15, m / 15]."""


class Task(Protocol):
    """Pure functions of a batch of outputs and labels; both work under ``torch.func.vmap``."""

    @property
    def classes(self) -> int:
        """How many values a label may take: classes (C) or tokens (V)."""

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return one loss per sample, ``(N,)``."""

    def mean_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean of ``loss``, a scalar, and take less time for it."""

    def counts(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return sums over the batch that may be added to those of any other batch.

        ``loss_sum`` is a float64 scalar; ``correct`` and ``total`` are int64 ``(C,)``, by true class.
        ``bin_correct`` and ``bin_total`` (int64) and ``bin_confidence`` (float64, a sum) are
        ``(CONFIDENCE_BINS,)``, by the confidence of the prediction: its softmax probability.
        """


@dataclass(frozen=True)
class Classification:
    """One label per sample: outputs ``(N, C)``, labels int64 ``(N,)``; the loss is the cross entropy."""

    num_classes: int

    @property
    def classes(self) -> int:
        return self.num_classes

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels, reduction="none")

    def mean_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels)

    def counts(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hits = (outputs.argmax(-1) == labels).long()
        ones = torch.ones_like(labels)
        confidence = outputs.softmax(-1).amax(-1)
        # Clamped: a probability that rounds to zero or is not a number has a bin as well.
        bins = (confidence * CONFIDENCE_BINS).ceil().long().clamp(1, CONFIDENCE_BINS) - 1
        per_class = torch.zeros(self.num_classes, dtype=torch.int64, device=labels.device)
        per_bin = torch.zeros(CONFIDENCE_BINS, dtype=torch.int64, device=labels.device)
        return {
            "loss_sum": self.loss(outputs, labels).sum(dtype=torch.float64),
            "correct": per_class.scatter_add(0, labels, hits),
            "total": per_class.scatter_add(0, labels, ones),
            "bin_correct": per_bin.scatter_add(0, bins, hits),
            "bin_total": per_bin.scatter_add(0, bins, ones),
            "bin_confidence": per_bin.double().scatter_add(0, bins, confidence.double()),
        }


@dataclass(frozen=True)
class NextToken:
    """One label per position: outputs ``(N, L, V)``, labels int64 ``(N, L)``.

    The loss of a sample is its mean cross entropy over the L positions. Counts are of tokens, so that
    ``loss_sum`` over the sum of ``total`` is the mean loss of a token.
    """

    vocab: int

    @property
    def classes(self) -> int:
        return self.vocab

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs.transpose(1, 2), labels, reduction="none").mean(1)

    def mean_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return self.loss(outputs, labels).mean()

    def counts(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return Classification(self.vocab).counts(outputs.flatten(0, 1), labels.flatten())


@dataclass(frozen=True)
class MeasuredTask:
    """Data without labels to predict (reconstruction, generation, regression on extras).

    The strategy brings its own loss, and a model is judged by ``evaluation.measures`` alone.
    """

    num_classes: int

    @property
    def classes(self) -> int:
        return self.num_classes

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        raise ConfigError(
            "This data set has no labels to predict, hence no loss of its own; choose a strategy that brings one."
        )

    def mean_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return self.loss(outputs, labels)

    def counts(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        raise ConfigError(
            "This data set has no labels to predict, so nothing can be counted; name evaluation.measures, and set "
            "evaluation.clients_every=0."
        )


def task_for(name: str, num_classes: int) -> Task:
    """Return the task called ``classification``, ``next-token`` or ``measured``, over that many classes or tokens."""
    if name == "classification":
        return Classification(num_classes)
    if name == "next-token":
        return NextToken(num_classes)
    if name == "measured":
        return MeasuredTask(num_classes)
    raise ConfigError(unknown_name("task", name, ("classification", "next-token", "measured")))
