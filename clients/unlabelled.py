"""Labelled and unlabelled samples of one client: their batches, their views, and what pseudo-labels are worth.

A client's samples are labelled where the extra ``labelled`` says so (all of them where there is no such extra).
The *weak* view of a sample is ``local.augment``, the same that supervised training uses; the *strong* view is a
second weak view, drawn apart, under a further augmentation. All views are drawn anew at every step.

The labelled batches depend on the labelled samples alone: their order and their views are those of supervised
training on these samples, whatever happens to the unlabelled ones.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flowerbed.clients.data import CLEAN, LABELLED, Batch, ClientData
from flowerbed.clients.local_round import LocalRound
from flowerbed.clients.params import LocalParams
from flowerbed.clients.training import Batches, batches_of, view_of

WEAK = "weak"
"""Weak view of the unlabelled samples, in a batch that holds both kinds."""
STRONG = "strong"
"""Strong view of the unlabelled samples."""
TRUTH = "unlabelled-clean"
"""Their true labels, for measuring pseudo-labels and for nothing else."""

KEPT = "pseudo-kept-per-class"
"""Pseudo-labels used, by the class that they name."""
CORRECT = "pseudo-correct-per-class"
"""Those of them that are right."""
TOTAL = "pseudo-total-per-class"
"""Unlabelled samples seen, by their true class."""


def labelled(data: ClientData) -> ClientData:
    """Return the samples whose label the client sees."""
    return data.take(data.extras[LABELLED]) if LABELLED in data.extras else data


def unlabelled(data: ClientData) -> ClientData:
    """Return the other samples."""
    if LABELLED in data.extras:
        return data.take(~data.extras[LABELLED])
    return data.take(torch.zeros_like(data.y, dtype=torch.bool))


def labelled_batches(local: LocalRound, params: LocalParams) -> Batches:
    """Return batches of the labelled samples; empty ones where there are none."""
    return _batches(local, params, labelled(local.train_data), "")


def unlabelled_batches(local: LocalRound, params: LocalParams, strong: str, ratio: int = 1) -> Batches:
    """Return batches of ``ratio`` times ``batch_size`` unlabelled samples: ``x`` is weak, ``strong`` strong.

    ``y`` is ``UNLABELLED`` throughout and ``clean`` the true label. Both views are of the same samples in the
    same order. Batches are empty where there are no unlabelled samples.
    """
    return views(
        local, replace(params, batch_size=ratio * params.batch_size), unlabelled(local.train_data), strong
    )


def views(local: LocalRound, params: LocalParams, data: ClientData, strong: str) -> Batches:
    """Return batches of ``data`` with a weak view ``x`` and a strong view ``strong`` of the same samples."""
    plain = _batches(local, replace(params, augment="none"), data, " unlabelled")

    def batch(step: int) -> Batch:
        found = plain(step)
        if not len(found["y"]):
            return {**found, STRONG: found["x"]}

        def view(x: Tensor, augmentation: str, purpose: str) -> Tensor:
            return view_of(local, x, data.scale, augmentation, purpose, step)

        weak = view(found["x"], params.augment, "augment unlabelled")
        other = view(found["x"], params.augment, "augment strong")
        return {**found, "x": weak, STRONG: view(other, strong, "strong")}

    return batch


def joined_batches(local: LocalRound, strong: str, ratio: int) -> Batches:
    """Return batches that hold a labelled batch and, under ``WEAK``, ``STRONG`` and ``TRUTH``, an unlabelled one."""
    known = labelled_batches(local, local.local)
    unknown = unlabelled_batches(local, local.local, strong, ratio)

    def batch(step: int) -> Batch:
        other = unknown(step)
        found = {WEAK: other["x"], STRONG: other[STRONG], TRUTH: other.get(CLEAN, other["y"])}
        return {**known(step), **found}

    return batch


def pseudo_label_counts(labels: Tensor, kept: Tensor, truth: Tensor, num_classes: int) -> dict[str, Tensor]:
    """Return how many pseudo-labels were kept and right, as counts per class (int64) that add up.

    ``labels`` and ``truth`` are int64 ``(B,)``, ``kept`` is bool ``(B,)``. Coverage is the sum of ``KEPT`` over
    the sum of ``TOTAL``, precision that of ``CORRECT`` over that of ``KEPT``. Where nobody knows the truth, which reads
    -1 on a real device, a sample is in neither ``TOTAL`` nor ``CORRECT``.
    """

    def by_class(classes: Tensor, counted: Tensor) -> Tensor:
        zeros = torch.zeros(num_classes, dtype=torch.int64, device=classes.device)
        return zeros.scatter_add(0, classes, counted.long())

    return {
        KEPT: by_class(labels, kept),
        CORRECT: by_class(labels, kept & (labels == truth)),
        TOTAL: by_class(truth.clamp_min(0), truth >= 0),
    }


def _batches(local: LocalRound, params: LocalParams, data: ClientData, stream: str) -> Batches:
    if len(data):
        return batches_of(local, params, data, stream)
    return lambda step: data.batch(slice(0, 0))
