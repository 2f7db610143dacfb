"""Batches that are drawn anew at every step: training on a distribution, without epochs and without a finite set."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flowerbed import seeds
from flowerbed.clients.data import Batch
from flowerbed.clients.local_round import LocalRound
from flowerbed.clients.training import Batches

Draw = Callable[[int, torch.Generator], Batch]
"""``draw(count, rng)`` returns a batch of ``count`` new samples; it must have ``y``, whose rows are counted."""


def fresh_batches(local: LocalRound, draw: Draw, purpose: str = "fresh samples") -> Batches:
    """Return batches of ``local.batch_size`` new samples each (with 0, as many as the client's data has rows).

    The stream is a pure function of (run seed, purpose, client, step), so that a resumed run sees the same samples
    and two clients never share any. How many steps a round has must be said in ``local.steps``, or follows from the
    rows of the client's data.
    """
    size = local.local.batch_size or len(local.train_data)

    def batch(step: int) -> Batch:
        return draw(size, seeds.torch_rng(local.seed, purpose, local.client, step, device=local.device.type))

    return batch
