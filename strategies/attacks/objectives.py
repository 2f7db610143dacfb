"""How far the gradient of a candidate is from the one observed: pure functions of two named gradients.

Every function takes the candidate's gradient u and the observed v, tensors by the same names, and returns a scalar
that is 0 where they are equal. What of a defence is repeated on u first is ``flowerbed.strategies.attacks.imitations``.
Of Gaussian noise on v of unknown size the cosine is the likelihood: min over s of |s u - v|^2 is |v|^2 (1 - cos^2).

===============  ==================================================================  ==============================
name             formula                                                             reference
===============  ==================================================================  ==============================
``l2``           sum (u - v)^2                                                       Zhu et al. 2019 (DLG)
``means``        mean over tensors of sum (u - v)^2                                  Li et al. 2022 (GGL)
``l1``           sum |u - v|
``cosine``       1 - <u, v> / (|u| |v|), one vector of all tensors                   Geiping et al. 2020
``layers``       mean over tensors of the same, each for itself                      Balunovic et al. 2022
``norms``        sum over tensors of |u - v|                                         Yin et al. 2021
``l1-relative``  sum |u - v| / sum |v|                                               likelihood of Laplace noise
``tag``          sum over tensors of |u - v|^2 + a w_l |u - v|_1, w_l = 1 .. 1/L     Deng et al. 2021
===============  ==================================================================  ==============================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flowerbed.registry import Registry

Objective = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]
OBJECTIVES: Registry[Objective] = Registry("objective")
SCALE_FREE = frozenset({"cosine", "layers"})
"""Objectives that do not see how long a gradient is."""
TINY = 1e-12
TAG_SCALE = 0.1
"""a of ``tag``."""


@OBJECTIVES.register("l2")
def l2(candidate: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Tensor:
    """Return the squared distance."""
    return _total((candidate[n] - v).square().sum() for n, v in observed.items())


@OBJECTIVES.register("means")
def means(candidate: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Tensor:
    """Return the mean over tensors of the squared distances."""
    return l2(candidate, observed) / len(observed)


@OBJECTIVES.register("l1")
def l1(candidate: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of absolute differences."""
    return _total((candidate[n] - v).abs().sum() for n, v in observed.items())


@OBJECTIVES.register("l1-relative")
def l1_relative(candidate: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of absolute differences, in units of the observed size."""
    return l1(candidate, observed) / _total(v.abs().sum() for v in observed.values()).clamp(min=TINY)


@OBJECTIVES.register("cosine")
def cosine(candidate: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Tensor:
    """Return one minus the cosine of the angle between all entries."""
    product = _total((candidate[n] * v).sum() for n, v in observed.items())
    sizes = [_total(g[n].square().sum() for n in observed) for g in (candidate, observed)]
    return 1 - product / (sizes[0] * sizes[1]).clamp(min=TINY**2).sqrt()


@OBJECTIVES.register("layers")
def layers(candidate: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Tensor:
    """Return the mean over tensors of one minus the cosine."""
    return _total(cosine({n: candidate[n]}, {n: v}) for n, v in observed.items()) / len(observed)


@OBJECTIVES.register("norms")
def norms(candidate: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Tensor:
    """Return the sum over tensors of the distances, not squared."""
    return _total((candidate[n] - v).square().sum().add(TINY).sqrt() for n, v in observed.items())


@OBJECTIVES.register("tag")
def tag(candidate: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Tensor:
    """Return squared distances plus absolute ones, whose weight falls linearly from the first tensor to the last."""
    total = l2(candidate, observed)
    for place, (name, v) in enumerate(observed.items()):
        weight = TAG_SCALE * (1 - place / len(observed))
        total = total + weight * (candidate[name] - v).abs().sum()
    return total


def _total(terms: object) -> Tensor:
    found = list(terms)  # type: ignore[call-overload]
    return torch.stack(found).sum()
