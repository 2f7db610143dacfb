"""How close found sequences of tokens come to what the client had, beside what one gets without any gradient.

Sequences are matched one to one, so that as many tokens as possible are in place. Figures of a sequence of L tokens:

==============  ================================================================================================
``tokens``      share of places that hold the right token
``bag``         share of tokens found, whatever their place: overlap of the two multisets over L
``rouge-1``     F1 of single tokens, counted with repeats; of sequences of one length it is ``bag``
``rouge-2``     F1 of pairs of neighbours (Lin 2004)
``rouge-l``     F1 of the longest common subsequence: 2 LCS / (L + L')
``hit``         whether every token is right
==============  ================================================================================================

Null models: the most frequent token everywhere, tokens drawn by their frequency, another training sequence, and the
nearest of ``POOL`` others, an oracle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flowerbed import seeds
from flowerbed.errors import require
from flowerbed.experiments.leakage.scoring import Score, label_accuracy
from flowerbed.experiments.leakage.truth import Truth
from flowerbed.strategies.attacks.observation import Reconstruction

POOL = 2000


def figures(found: Tensor, true: Tensor) -> dict[str, float]:
    """Return all figures of a found sequence ``(L',)`` against the true one ``(L,)``."""
    require(
        len(found) == len(true), f"A sequence of {len(found)} tokens cannot be compared with {len(true)}."
    )
    a, b = found.tolist(), true.tolist()
    return {
        "tokens": sum(x == y for x, y in zip(a, b, strict=True)) / len(b),
        "bag": _overlap(a, b) / len(b),
        "rouge-1": rouge(a, b, 1),
        "rouge-2": rouge(a, b, 2),
        "rouge-l": 2 * common_subsequence(a, b) / (len(a) + len(b)),
        "hit": float(a == b),
    }


def rouge(a: Sequence[int], b: Sequence[int], n: int) -> float:
    """Return the F1 of runs of n tokens; 0 where there are none."""
    runs = [[tuple(s[i : i + n]) for i in range(len(s) - n + 1)] for s in (a, b)]
    total = len(runs[0]) + len(runs[1])
    return 2 * _overlap(*runs) / total if total else 0.0


def common_subsequence(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common subsequence."""
    before = [0] * (len(b) + 1)
    for x in a:
        row = [0]
        for place, y in enumerate(b):
            row.append(before[place] + 1 if x == y else max(before[place + 1], row[-1]))
        before = row
    return before[-1]


def score(found: Reconstruction, truth: Truth) -> Score:
    """Compare found sequences with the true ones; the label figure is that of the tokens to be predicted."""
    from scipy.optimize import linear_sum_assignment

    require(
        found.x.shape == truth.x.shape,
        f"A reconstruction of shape {tuple(found.x.shape)} cannot be compared with {tuple(truth.x.shape)}.",
    )
    right = (truth.x[:, None] == found.x[None]).double().mean(2)
    _, columns = linear_sum_assignment(-right.numpy())
    order = tuple(int(column) for column in columns)
    marks = [figures(found.x[j], one) for j, one in zip(order, truth.x, strict=True)]
    return Score(marks, order, label_accuracy(found.labels.flatten(), truth.y.flatten()))


def nulls(truth: Truth, train: Tensor, seed: int) -> dict[str, list[float]]:
    """Return the share of tokens in place that needs no gradient, by null model, for every true sequence."""
    rng = seeds.torch_rng(seed, "null models")
    counts = torch.bincount(train.flatten())
    found: dict[str, list[float]] = {}
    for place, true in enumerate(truth.x):
        others = torch.randint(len(train), (POOL,), generator=rng)
        others = others[others != truth.index[place]]
        shares = (train[others] == true).double().mean(1)
        drawn = torch.multinomial(counts.double(), len(true), replacement=True, generator=rng)
        for name, value in (
            ("most frequent token", (true == counts.argmax()).double().mean()),
            ("random tokens", (true == drawn).double().mean()),
            ("random sequence", shares[0]),
            ("nearest sequence", shares.max()),
        ):
            found.setdefault(name, []).append(float(value))
    return found


def pairs(found: Reconstruction, truth: Truth, order: Sequence[int], vocabulary: Sequence[str]) -> str:
    """Return every true sequence above what was found of it."""
    lines = []
    for place, other in enumerate(order):
        for mark, tokens in (("true ", truth.x[place]), ("found", found.x[other])):
            text = "".join(vocabulary[token] for token in tokens.tolist())
            lines.append(f"{mark} | {text!r}")
        lines.append("")
    return "\n".join(lines)


def _overlap(a: Sequence[object], b: Sequence[object]) -> int:
    """Return how many entries two multisets share."""
    counts: Mapping[object, int] = {x: b.count(x) for x in set(a)}
    return sum(min(a.count(x), n) for x, n in counts.items())
