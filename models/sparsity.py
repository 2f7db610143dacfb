"""Which weights of a model to keep: masks by score, over the whole network or layer by layer, exact in number.

Scores are tensors by name, larger is more worth keeping; masks are bool tensors of the same shapes, True where a weight
stays. A sparsity is a share of weights that go. Among equal scores the one that comes first goes first, so that a mask
is a function of the scores alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flowerbed.errors import ConfigError
from flowerbed.models.base import Shape
from flowerbed.models.info import ModelInfo

Scores = Mapping[str, Tensor]
Masks = dict[str, Tensor]


def prunable(info: ModelInfo) -> list[str]:
    """Return the weights of convolutions and linear layers, in the order of the state dict.

    Everything with two or more dimensions that is trained and belongs to no normalisation; biases have one.
    """
    return [
        name
        for name in info.roles
        if name in info.parameters and name not in info.normalisation and len(info.shapes[name]) >= 2
    ]


def keep_largest(scores: Scores, sparsity: float, least: int = 0) -> Masks:
    """Return masks that drop the ``round(sparsity n)`` smallest scores of all n together, no layer below ``least``.

    The ``min(least, n_l)`` largest scores of each layer are safe; what they save is taken from the smallest of the
    others, so the number dropped is exact. Raises ``ConfigError`` if too few are left to drop.
    """
    values = torch.cat([s.flatten().double() for s in scores.values()])
    safe = torch.cat([_largest(s, least).flatten() for s in scores.values()])
    count = round(sparsity * len(values))
    free = int((~safe).sum())
    if count > free:
        raise ConfigError(
            f"A sparsity of {sparsity:.4g} drops {count} weights, but only {free} may go while every layer keeps "
            f"{least}; lower one of the two."
        )
    order = torch.sort(values.masked_fill(safe, math.inf), stable=True).indices
    kept = torch.ones(len(values), dtype=torch.bool, device=values.device)
    kept[order[:count]] = False
    return _split(kept, scores)


def keep_by_layer(scores: Scores, sparsities: Mapping[str, float]) -> Masks:
    """Return masks that drop the ``round(p_l n_l)`` smallest scores of every layer."""
    return {n: _largest(s, s.numel() - round(sparsities[n] * s.numel())) for n, s in scores.items()}


def erdos_renyi_kernel(shapes: Mapping[str, Shape], sparsity: float) -> dict[str, float]:
    """Return the sparsity of every layer for a whole sparsity: ERK of Evci et al., ICML 2020.

    The density of a layer is proportional to the sum of its dimensions over their product, and never above 1.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    kept = (1 - sparsity) * sum(sizes.values())
    dense: set[str] = set()
    while True:
        raw = {n: sum(s) / sizes[n] for n, s in shapes.items() if n not in dense}
        rest = kept - sum(sizes[n] for n in dense)
        scale = rest / sum(raw[n] * sizes[n] for n in raw) if raw else 0.0
        above = {n for n in raw if raw[n] * scale > 1}
        if not above:
            return {n: 0.0 if n in dense else 1 - raw[n] * scale for n in shapes}
        dense |= above


def sparsity_of(masks: Masks) -> float:
    """Return the share of weights that are gone."""
    return 1 - sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


def multiply_adds(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Return the multiply-adds of one sample, (of the nonzero weights, of all), in convolutions and linear layers.

    A weight costs one at each position of the layer's output. ``x`` is a batch that the model takes.
    """
    found = [0.0, 0.0]

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        positions = output[0].numel() / weight.shape[0]
        found[0] += positions * int((weight != 0).sum())
        found[1] += positions * weight.numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0], found[1]


def _largest(scores: Tensor, count: int) -> Tensor:
    """Return a mask of the ``count`` largest scores (all, if there are fewer)."""
    order = torch.sort(scores.flatten(), stable=True).indices
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[max(0, scores.numel() - count) :]] = True
    return mask.view(scores.shape)


def _split(flat: Tensor, like: Scores) -> Masks:
    pieces = torch.split(flat, [s.numel() for s in like.values()])
    return {name: piece.view(s.shape) for (name, s), piece in zip(like.items(), pieces, strict=True)}
