"""Embeddings in the place of images: every sample encoded once by a frozen encoder, and kept.

What comes out is an ordinary data set of vectors, so partitions, clients, evaluation and all algorithms use it as it
is. A device encodes its own images this way; a simulation those of all clients at once, which gives the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from flowerbed.datasets import cache
from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.models.encoders import encode


def embedded(dataset: Dataset, make: Callable[[], nn.Module], device: torch.device, folder: Path) -> Dataset:
    """Return the data set whose inputs are the embeddings ``(N, d)``, neither normalised nor scaled.

    Labels, extras and classes are those of ``dataset``. ``folder`` keeps the embeddings: where it has them whole, no
    encoder is made and nothing is encoded; its name must say everything that they depend on.
    """
    kept = cache.load(folder)
    if kept is None:
        encoder = make()
        made = replace(
            dataset,
            train=_split(dataset.train, encoder, device),
            test=_split(dataset.test, encoder, device),
            mean=(0.0,),
            std=(1.0,),
        )
        kept = cache.store(folder, made)
    # A label may have been hidden since the embeddings were kept; these do not depend on it.
    train = Split(kept.train.inputs, dataset.train.labels, dataset.train.extras)
    test = Split(kept.test.inputs, dataset.test.labels, dataset.test.extras)
    return replace(kept, train=train, test=test)


def _split(split: Split, encoder: nn.Module, device: torch.device) -> Split:
    return Split(encode(encoder, split.inputs, device), split.labels, split.extras)
