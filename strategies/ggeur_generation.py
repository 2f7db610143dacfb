"""A client's embeddings with every class brought to the same size: which are kept, and which are made.

    x~ = centre + beta,   beta = sum_m eps_m sqrt(lambda_m) xi_m   (``spread`` sqrt: covariance Sigma)
                          beta = sum_m eps_m lambda_m xi_m         (``spread`` lambda: covariance Sigma^2)

with eps ~ N(0, 1). Centres are the client's own samples, prototypes of other clients, or the global class mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flowerbed.errors import ClientError

Integers = npt.NDArray[np.int64]

SAMPLE, DOMAINS, PROTOTYPE, GLOBAL_MEAN, DUPLICATE = (
    "sample",
    "domains",
    "prototype",
    "global_mean",
    "duplicate",
)
CENTRES = (SAMPLE, DOMAINS, PROTOTYPE, GLOBAL_MEAN, DUPLICATE)


@dataclass(frozen=True)
class Rule:
    """What the generated embeddings of a class are."""

    T: int
    centre: str
    spread: str
    M: int


@dataclass(frozen=True)
class ClassKnowledge:
    """What the server sent about one class."""

    values: Tensor
    """lambda ``(r,)``."""
    vectors: Tensor
    """xi ``(r, d)``, as rows."""
    mean: Tensor | None = None
    """The global mean ``(d,)``; sent for the control that is centred there, and for nothing else."""
    prototypes: Tensor | None = None
    """Means of the class at other clients ``(p, d)``."""


@dataclass(frozen=True)
class Balanced:
    """The balanced set: rows of the client's own data, and generated embeddings beside them."""

    rows: Tensor
    """int64 ``(k,)``, increasing."""
    x: Tensor
    """Generated, ``(m, d)``."""
    y: Tensor
    """Their classes, int64 ``(m,)``."""


def displacements(values: Tensor, vectors: Tensor, eps: Tensor, spread: str) -> Tensor:
    """Return beta ``(m, d)`` for eigenvalues ``(r,)``, eigenvectors ``(r, d)`` and ``eps`` ``(m, r)``."""
    scale = values.sqrt() if spread == "sqrt" else values
    return (eps * scale) @ vectors


def balanced(
    x: Tensor,
    y: Tensor,
    knowledge: Sequence[ClassKnowledge | None],
    rule: Rule,
    stream: Callable[[int], np.random.Generator],
) -> Balanced:
    """Return the balanced set of samples ``x`` ``(n, d)`` with classes ``y`` ``(n,)``.

    A class with at least T samples keeps T random ones and gets none; any other keeps all and gets as many as it
    lacks, unless there is no centre to generate around. ``knowledge`` has one entry a class, ``stream`` gives a
    class its random stream. The set is a pure function of the arguments.
    """
    kept, made, labels = [], [], []
    for c, known in enumerate(knowledge):
        own, rng = torch.nonzero(y == c).flatten(), stream(c)
        if len(own) >= rule.T:
            chosen = np.sort(rng.permutation(len(own))[: rule.T])
            kept.append(own[torch.from_numpy(chosen)])
            continue
        kept.append(own)
        points = _generated(x[own], known, rule, rng)
        made.append(points)
        labels.append(torch.full((len(points),), c, dtype=torch.int64))
    empty = x.new_zeros(0, x.shape[1])
    return Balanced(torch.cat(kept).sort().values, torch.cat([empty, *made]),
                    torch.cat([torch.empty(0, dtype=torch.int64), *labels]))  # fmt: skip


def _generated(own: Tensor, known: ClassKnowledge | None, rule: Rule, rng: np.random.Generator) -> Tensor:
    """Return what a class lacks, given its own samples ``(n, d)``; nothing where there is no centre."""
    lacking = rule.T - len(own)
    if rule.centre == DUPLICATE:
        return own[torch.from_numpy(centres(len(own), lacking, rule.T, rng))] if len(own) else own
    if known is None:
        raise ClientError(
            "this client was sent no shapes to generate embeddings with; start the run anew, so that the server sends "
            "them on first contact"
        )
    around = _centres_of(own, known, rule, lacking, rng)
    eps = torch.from_numpy(rng.standard_normal((len(around), len(known.values)), dtype=np.float32))
    return around + displacements(known.values.to(own.dtype), known.vectors.to(own.dtype), eps.to(own.dtype),
                                  rule.spread)  # fmt: skip


def _centres_of(
    own: Tensor, known: ClassKnowledge, rule: Rule, lacking: int, rng: np.random.Generator
) -> Tensor:
    """Return the centre of every point that is to be generated, ``(lacking, d)`` or ``(0, d)``."""
    if rule.centre == GLOBAL_MEAN:
        if known.mean is None:
            raise ClientError("this client was sent no global class means; start the run anew")
        return known.mean.to(own.dtype).expand(lacking, -1)
    if rule.centre == SAMPLE:
        return own[torch.from_numpy(centres(len(own), lacking, rule.T, rng))] if len(own) else own
    others = own[:0] if known.prototypes is None else known.prototypes.to(own.dtype)
    from_own = bool(len(own)) and rule.centre == DOMAINS
    clouds = len(others) + from_own
    if not clouds:
        return own[:0]
    # The pool of the paper is never built: how many of its points each cloud contributes is all that matters.
    size = max(rule.M, -(-lacking // clouds))
    shares = rng.multivariate_hypergeometric([size] * clouds, lacking)
    around = []
    if from_own:
        around.append(own[torch.from_numpy(centres(len(own), int(shares[0]), rule.T, rng))])
    around += [mean.expand(int(m), -1) for mean, m in zip(others, shares[int(from_own) :], strict=True)]
    return torch.cat(around)


def centres(samples: int, points: int, batch: int, rng: np.random.Generator) -> Integers:
    """Return which of ``samples`` each of ``points`` is centred on, int64 ``(points,)``.

    Distinct samples where there are enough; else ``points`` are drawn without replacement from ``batch`` made around
    each sample, as in the released code.
    """
    if points <= samples:
        return rng.permutation(samples)[:points].astype(np.int64)
    counts = rng.multivariate_hypergeometric([max(batch, points)] * samples, points)
    return np.repeat(np.arange(samples, dtype=np.int64), counts)
