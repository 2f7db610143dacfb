"""Small tasks whose rule is known: arithmetic modulo a prime, parity of a few bits. Made from a seed, never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.errors import require
from flowerbed.seeds import numpy_rng

OPERATIONS = ("add", "subtract", "product")


def modular(p: int = 113, operation: str = "add", train_share: float = 0.4, seed: int = 0) -> Dataset:
    """Return all pairs (a, b) below ``p`` as two one-hot vectors, float32 ``(p^2, 2p)``, labelled a o b mod p.

    A random ``train_share`` of them is the training split, the rest the test split.
    """
    require(p >= 2, f"dataset.p is {p}; give at least 2.")
    require(
        operation in OPERATIONS, f"dataset.operation is '{operation}'; choose from {', '.join(OPERATIONS)}."
    )
    a, b = torch.arange(p).repeat_interleave(p), torch.arange(p).repeat(p)
    result = {"add": a + b, "subtract": a - b, "product": a * b}[operation] % p
    inputs = torch.zeros(p * p, 2 * p)
    rows = torch.arange(p * p)
    inputs[rows, a] = 1
    inputs[rows, p + b] = 1
    return _divided(f"modular-{operation}-{p}", inputs, result, train_share, seed, p)


def parity(
    relevant: int = 3, noise: int = 40, samples: int = 2000, train_share: float = 0.5, seed: int = 0
) -> Dataset:
    """Return distinct random bit vectors, float32 ``(samples, relevant + noise)`` of 0 and 1, two classes.

    The label is the parity of the first ``relevant`` bits. Raises ``ConfigError`` if there are not that many vectors.
    """
    bits = relevant + noise
    require(relevant >= 1 and noise >= 0, "dataset.relevant must be at least 1, dataset.noise at least 0.")
    require(bits <= 62, f"dataset.relevant + dataset.noise is {bits}; give at most 62 bits.")
    require(
        2 <= samples <= 2 ** (bits - 1),
        f"dataset.samples is {samples}; give at least 2, at most half of the vectors that there are.",
    )
    rng = numpy_rng(seed, "datasets.parity")
    # As integers, each once, in the order in which they were drawn.
    drawn: dict[int, None] = {}
    while len(drawn) < samples:
        drawn.update(dict.fromkeys(rng.integers(2**bits, size=samples).tolist()))
    codes = torch.tensor(list(drawn)[:samples])
    inputs = (codes[:, None] >> torch.arange(bits)) & 1
    labels = inputs[:, :relevant].sum(1) % 2
    return _divided(f"parity-{relevant}-of-{bits}", inputs.float(), labels, train_share, seed, 2)


def _divided(name: str, inputs: Tensor, labels: Tensor, share: float, seed: int, classes: int) -> Dataset:
    count = round(share * len(labels))
    require(
        0 < count < len(labels),
        f"dataset.train_share is {share}; give a share that leaves samples on both sides.",
    )
    order = torch.from_numpy(numpy_rng(seed, "datasets.algorithmic.split").permutation(len(labels)))
    train, test = (Split(inputs[rows], labels[rows]) for rows in (order[:count], order[count:]))
    return Dataset(name, train, test, tuple(map(str, range(classes))), (0.0,), (1.0,))
