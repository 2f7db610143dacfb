"""Label restoration: which classes are behind a gradient, from the gradient of the last linear layer.

With B samples, n_c of them of class c, mean softmax p and the inputs r of the last layer (W, b), the cross entropy
gives

    db_c = p_c - n_c / B,        dW_c = 1/B sum_i (softmax_ic - 1[y_i = c]) r_i

and every rule reads n from one of the two. S_c = sum_j dW_cj needs no bias, but r >= 0 (after a ReLU).

======================  ============================================  ===========================================
rule                    reference                                     what it takes for granted
======================  ============================================  ===========================================
``idlg``                Zhao et al. 2020: argmin_c S_c                B = 1 and r >= 0
``smallest``            as in GGL and GIFD: the B smallest S_c        distinct labels, r >= 0
``minimum``             Yin et al. 2021: the B smallest min_j dW_cj   distinct labels
``negative``            {c: db_c < 0}                                 distinct labels, a bias
``greedy``              Wainakh et al. 2022 (LLG)                     r >= 0
``greedy-bias``         the same on db                                a bias
``count``               Geng et al. 2021: n = B p - B S / O           a likely p and O, from dummy inputs
======================  ============================================  ===========================================

``count`` is the default. With the true p (and a bias) it is exact; p and O come from surrogate inputs, or from noise.
It alone works for B above the number of classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowerbed import seeds
from flowerbed.errors import ConfigError
from flowerbed.models.base import Net, Shape
from flowerbed.registry import Registry
from flowerbed.strategies.attacks.observation import Gradient, SideInfo

DUMMIES = 256
"""How many inputs of noise stand in for surrogate data."""


@dataclass(frozen=True)
class Last:
    """The gradient of the last linear layer, and what is expected of an unlearned sample there."""

    weight: Tensor
    """dW ``(C, D)``, float64."""
    bias: Tensor | None
    """db ``(C,)``, float64."""
    batch: int
    probabilities: Tensor
    """p as measured on dummy inputs, ``(C,)``."""
    total: float
    """O: the mean sum of the layer's inputs on them."""
    smoothing: float = 0.0
    """The share of every label that all classes divide between them, as far as the attacker knows; ``count`` takes it
    off."""

    @property
    def sums(self) -> Tensor:
        """S_c."""
        return self.weight.sum(1)


Rule = Callable[[Last], Tensor]
"""Returns B labels, int64, in ascending order."""
RULES: Registry[Rule] = Registry("label rule")


def dummies(shape: Shape, side: SideInfo, seed: int) -> Tensor:
    """Return inputs to measure p and O on: the surrogate data, else pixels of noise (normal features)."""
    if side.surrogate is not None:
        return side.surrogate
    rng = seeds.torch_rng(seed, "label dummies")
    if len(shape) == 3:
        return side.scale.values(torch.rand(DUMMIES, *shape, generator=rng))
    return torch.randn(DUMMIES, *shape, generator=rng)


@torch.no_grad()
def last_layer(module: nn.Module, gradient: Gradient, batch: int, x: Tensor) -> Last:
    """Return what the rules read, with p and O measured on the inputs ``x``.

    Raises ``ConfigError`` if the model ends in no linear layer.
    """
    names = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    if not names or not isinstance(module, Net) or f"{names[-1]}.weight" not in gradient:
        raise ConfigError("Labels are read from the gradient of a last linear layer, and there is none.")
    name = names[-1]
    head = module.get_submodule(name)
    inputs: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    was_training = module.training
    module.eval()
    try:
        probabilities = module(x).double().softmax(-1).mean(0)
    finally:
        handle.remove()
        module.train(was_training)
    bias = gradient.get(f"{name}.bias")
    return Last(
        gradient[f"{name}.weight"].double(),
        None if bias is None else bias.double(),
        batch,
        probabilities,
        float(inputs[0].double().sum(-1).mean()),
    )


def restore(rule: str, last: Last) -> Tensor:
    """Return B labels by the rule of that name; raises ``ConfigError`` for an unknown one, or no bias."""
    return RULES.get(rule)(last)


@RULES.register("idlg")
def idlg(last: Last) -> Tensor:
    """Return the class of the smallest S_c, for each of the batch's samples."""
    return last.sums.argmin().repeat(last.batch)


@RULES.register("smallest")
def smallest(last: Last) -> Tensor:
    """Return the classes of the B smallest S_c."""
    return _distinct(last, last.sums)


@RULES.register("minimum")
def minimum(last: Last) -> Tensor:
    """Return the classes with the B smallest entries of dW."""
    return _distinct(last, last.weight.amin(1))


@RULES.register("negative")
def negative(last: Last) -> Tensor:
    """Return the classes whose db is negative, the most negative ones first if there are more than B."""
    bias = _bias(last)
    order = bias.argsort()[: min(last.batch, int((bias < 0).sum()))]
    return _filled(order, last)


@RULES.register("greedy")
def greedy(last: Last) -> Tensor:
    """Return B labels by repeatedly taking the class of the smallest S and giving it back one sample's share.

    A sample adds about m = (1 + 1/C) / B times the sum of the negative S to its class.
    """
    sums = last.sums
    impact = sums[sums < 0].sum() * (1 + 1 / len(sums)) / last.batch
    return _greedily(sums.clone(), impact, last.batch)


@RULES.register("greedy-bias")
def greedy_bias(last: Last) -> Tensor:
    """Return B labels as ``greedy`` does, from db, where a sample adds its share of the negative entries."""
    bias = _bias(last)
    return _greedily(bias.clone(), bias[bias < 0].sum() / last.batch, last.batch)


@RULES.register("count")
def count(last: Last) -> Tensor:
    """Return B labels whose counts are the most likely ones given p, from db if there is a bias, else from S / O."""
    difference = last.bias if last.bias is not None else last.sums / last.total
    found = last.batch * (last.probabilities - difference)
    # What is found are sums of softened labels, (1 - s) n_c + s B / C.
    counts = (found - last.smoothing * last.batch / len(found)) / (1 - last.smoothing)
    return _rounded(counts, last.batch)


def _rounded(counts: Tensor, batch: int) -> Tensor:
    """Return labels whose counts are integers near ``counts`` that add up to ``batch`` (largest remainders)."""
    counts = counts.clamp(min=0)
    counts = counts * batch / counts.sum().clamp(min=1e-12)
    whole = counts.floor()
    rest = (counts - whole).argsort(descending=True, stable=True)[: batch - int(whole.sum())]
    whole[rest] += 1
    return torch.repeat_interleave(torch.arange(len(whole)), whole.long())


def _greedily(values: Tensor, impact: Tensor, batch: int) -> Tensor:
    # Classes with a negative entry are there for sure.
    labels = values.argsort()[: min(batch, int((values < 0).sum()))].tolist()
    values[labels] -= impact
    while len(labels) < batch:
        labels.append(int(values.argmin()))
        values[labels[-1]] -= impact
    return torch.tensor(sorted(labels))


def _distinct(last: Last, scores: Tensor) -> Tensor:
    return _filled(scores.argsort()[: last.batch], last)


def _filled(labels: Tensor, last: Last) -> Tensor:
    """Return B labels, the found ones repeated in turn where they are fewer."""
    if not len(labels):
        labels = last.sums.argmin().view(1)
    return labels.repeat(-(-last.batch // len(labels)))[: last.batch].sort().values


def _bias(last: Last) -> Tensor:
    if last.bias is None:
        raise ConfigError(
            "This label rule reads the gradient of a bias, and the last layer has none; use count."
        )
    return last.bias
