"""What the semi-supervised methods share: the joint loss of a client, and the quality of pseudo-labels.

    L = L_s(labelled) + lambda_u L_u(unlabelled)

L_s is the task's mean loss on the weak view of a labelled batch, L_u the method's own. Every round reports, over
all unlabelled samples that its clients saw (numerators and denominators are added up, not averaged):

    pseudo-coverage       share whose pseudo-label was used
    pseudo-precision      share of the used ones that are right; 0 where none was used
    pseudo-correct-share  coverage times precision
    pseudo-kept-per-class, pseudo-correct-per-class, pseudo-total-per-class
                          the counts themselves, see ``flowerbed.clients.unlabelled``

True labels of unlabelled samples serve these numbers and nothing else.

Equal steps: a client's steps a round follow from *all* its samples, labelled or not. So with the same ``local``
and ``data`` settings ``labels_only`` makes as many optimizer steps as every method here, and as the fully
supervised upper bound, which is ``strategy=fedavg data.labelled=1``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, MetricRecord
from torch import Tensor

from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound
from flowerbed.clients.training import Batches
from flowerbed.clients.unlabelled import (
    CORRECT,
    KEPT,
    STRONG,
    TOTAL,
    TRUTH,
    WEAK,
    joined_batches,
    pseudo_label_counts,
)
from flowerbed.datasets.augment import AUGMENTATIONS
from flowerbed.errors import ConfigError, require
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Classification, Task
from flowerbed.storage import Tensors
from flowerbed.strategies.base import Setting
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams
from flowerbed.strategies.server_side import ServerSide

Aggregated = tuple[ArrayRecord | None, MetricRecord | None]


@dataclass(frozen=True)
class PseudoLabelParams:
    """What every method with pseudo-labels and two views has."""

    tau: float = 0.95
    """Confidence from which a pseudo-label is used; above 1 none is."""
    strong: str = "randaugment_cutout"
    """Augmentation of the strong view, on top of a weak view, which is ``local.augment``."""

    def __post_init__(self) -> None:
        require(self.tau >= 0, f"strategy.tau is {self.tau}; give 0 (use all) or more.")
        AUGMENTATIONS.get(self.strong)


@dataclass(frozen=True)
class JointParams(PseudoLabelParams, FedAvgParams):
    """FedAvg's parameters and those of batches with labelled and unlabelled samples."""

    mu: int = 7
    """Unlabelled samples for each labelled one in a batch."""

    def __post_init__(self) -> None:
        FedAvgParams.__post_init__(self)
        PseudoLabelParams.__post_init__(self)
        require(self.mu >= 1, f"strategy.mu is {self.mu}; give at least 1.")


@dataclass(frozen=True)
class ConsistencyParams(JointParams):
    """Those, and the weight in the sum of two losses."""

    lambda_u: float = 1.0
    """Weight of the unlabelled loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lambda_u >= 0, f"strategy.lambda_u is {self.lambda_u}; give 0 (off) or more.")


class ConsistencyHalf(ClientHalf):
    """Trains on a labelled and an unlabelled batch at every step; a method says what its unlabelled loss is.

    A client that has no labelled, or no unlabelled, samples trains on what it has.
    """

    params: ConsistencyParams

    def batches(self, local: LocalRound) -> Batches:
        return joined_batches(local, self.params.strong, self.params.mu)

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        supervised = supervised_loss(model, batch, task)
        unsupervised, counts = self._unlabelled(model, batch, task)
        value = supervised + self.params.lambda_u * unsupervised
        return value, {"loss-labelled": supervised, "loss-unlabelled": unsupervised, **counts}

    def _unlabelled(self, model: ModelParts, batch: Batch, task: Task) -> tuple[Tensor, Mapping[str, Tensor]]:
        if not len(batch[WEAK]):
            return nothing_unlabelled(batch, task)
        with torch.no_grad():
            weak = model(batch[WEAK])
        confidence, labels = weak.softmax(-1).max(-1)
        kept = confidence >= self.params.tau
        # Over the whole batch, not over the kept part, so that a few confident samples do not rule the step.
        value = (kept * self.unlabelled_loss(weak, model(batch[STRONG]))).mean()
        return value, pseudo_label_counts(labels, kept, batch[TRUTH], classes_of(task))

    def unlabelled_loss(self, weak: Tensor, strong: Tensor) -> Tensor:
        """Return the loss of each unlabelled sample ``(B,)`` from the outputs ``(B, C)`` on its views.

        No gradient flows through ``weak``.
        """
        raise NotImplementedError


class PseudoLabelFedAvg(FedAvg):
    """FedAvg that reports the quality of pseudo-labels."""

    params: JointParams

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        if setting.server is not None:
            check_data(setting.server, self.params.strong)

    def finished(
        self, server_round: int, model: Tensors, metrics: MetricRecord, replies: int
    ) -> tuple[ArrayRecord, MetricRecord]:
        record, metrics = super().finished(server_round, model, metrics, replies)
        metrics.update(pseudo_label_rates(metrics))
        return record, metrics


def check_data(server: ServerSide, strong: str) -> None:
    """Raise ``ConfigError`` if the run's data set has no classes, or no images although the strong view needs them."""
    classes_of(server.task)
    shape = server.dataset.input_shape
    require(
        len(shape) == 3 or strong == "none" or strong not in AUGMENTATIONS,
        f"strategy.strong={strong} is made for images and the inputs have shape {shape}; name an augmentation "
        "of your own (package.module:function), or none.",
    )


def supervised_loss(model: ModelParts, batch: Batch, task: Task) -> Tensor:
    """Return the mean loss of a labelled batch; zero for an empty one."""
    if not len(batch["y"]):
        return batch["x"].new_zeros(())
    return task.loss(model(batch["x"]), batch["y"]).mean()


def nothing_unlabelled(batch: Batch, task: Task) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Return the unlabelled loss and the counts of a batch without unlabelled samples: all zero."""
    nobody = batch[TRUTH]
    counts = pseudo_label_counts(nobody, nobody.bool(), nobody, classes_of(task))
    return batch[WEAK].new_zeros(()), counts


def classes_of(task: Task) -> int:
    """Return the number of classes; raises ``ConfigError`` where there are none to name a sample by."""
    if not isinstance(task, Classification):
        raise ConfigError(
            f"Pseudo-labels need one class for each sample, and the task is {type(task).__name__}; use a "
            "supervised strategy, or a classification data set."
        )
    return task.num_classes


def with_rates(aggregated: Aggregated) -> Aggregated:
    """Return what a strategy aggregated, with coverage, precision and their product among its metrics."""
    _, metrics = aggregated
    if metrics is not None:
        metrics.update(pseudo_label_rates(metrics))
    return aggregated


def pseudo_label_rates(metrics: Mapping[str, object]) -> dict[str, float]:
    """Return coverage, precision and their product from the counts of a round."""
    kept, correct, total = (_sum(metrics[name]) for name in (KEPT, CORRECT, TOTAL))
    return {
        "pseudo-coverage": kept / total if total else 0.0,
        "pseudo-precision": correct / kept if kept else 0.0,
        "pseudo-correct-share": correct / total if total else 0.0,
    }


def _sum(counts: object) -> float:
    return float(sum(counts)) if isinstance(counts, list) else 0.0
