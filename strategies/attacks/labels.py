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
``greedy-measured``     the same as ``greedy``, what an absent class   r >= 0, a likely p and O
                        has and what a sample adds measured on dummies
``ilrg``                Ma et al. 2023: p by class from dW_c / db_c   a bias, one p for all samples of a class
``count``               Geng et al. 2021: n = B p - B S / O           a likely p and O, from dummy inputs
======================  ============================================  ===========================================

``count`` is the default. With the true p (and a bias) it is exact; p and O come from surrogate inputs, or from noise.
It works for B above the number of classes, and so does ``ilrg``.

Behind several local steps the same holds for means over the steps. Those of p and O are taken from a line between the
model that was sent and the one that came back (Dimitrov et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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
    layer: nn.Linear
    """As it was sent."""
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
    assert isinstance(head, nn.Linear)
    inputs: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    was_training = module.training
    module.eval()
    try:
        probabilities = module(x).double().softmax(-1).flatten(0, -2).mean(0)
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
        head,
    )


def between(sent: Last, returned: Last, share: float) -> Last:
    """Return what the rules read of several steps: p and O this share of the way from the first model to the last."""
    return replace(
        sent,
        probabilities=torch.lerp(sent.probabilities, returned.probabilities, share),
        total=sent.total + share * (returned.total - sent.total),
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


@RULES.register("greedy-measured")
def greedy_measured(last: Last) -> Tensor:
    """Return B labels as ``greedy`` does, where a class without samples has S = p O and a sample adds -O / B."""
    return _greedily(
        last.sums - last.probabilities * last.total, torch.tensor(-last.total / last.batch), last.batch
    )


@RULES.register("ilrg")
def ilrg(last: Last) -> Tensor:
    """Return B labels whose counts solve sum_c n_c P_ck - n_k = B db_k for all k, and sum_c n_c = B.

    P_c is the softmax at the mean input r_c = dW_c / db_c of class c (instance-wise in the paper, which takes every
    sample of a class to be like the others).
    """
    bias = _bias(last)
    weight, offset = last.layer.weight.detach().double(), last.layer.bias.detach().double()
    r = last.weight / torch.where(bias.abs() < 1e-12, 1e-12, bias)[:, None]
    p = (r @ weight.T + offset).softmax(-1)
    a = torch.cat([p.T - torch.eye(len(bias), dtype=p.dtype), torch.ones(1, len(bias), dtype=p.dtype)])
    b = last.batch * torch.cat([bias, torch.ones(1, dtype=p.dtype)])
    return rounded(torch.linalg.pinv(a) @ b, last.batch)


@RULES.register("count")
def count(last: Last) -> Tensor:
    """Return B labels whose counts are the most likely ones given p, from db if there is a bias, else from S / O."""
    difference = last.bias if last.bias is not None else last.sums / last.total
    found = last.batch * (last.probabilities - difference)
    # What is found are sums of softened labels, (1 - s) n_c + s B / C.
    counts = (found - last.smoothing * last.batch / len(found)) / (1 - last.smoothing)
    return rounded(counts, last.batch)


def rounded(counts: Tensor, batch: int) -> Tensor:
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
