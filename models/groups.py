"""Groups of weights that live or die together, and what group-sparse methods do to them.

A group is a filter or unit with its bias and the normalisation of its output, or a block of inputs. Groups lie in
the order of layers, so that a vector over groups (norms, factors, masks; float64 or bool, shape ``(m,)``) means the
same everywhere. Tensors are looked up by name in any mapping: a state dict, or the parameters that a client trains.

A group counts as gone only if every one of its numbers is exactly zero. With batch norm it has to hold scale and shift
of its channel, since a filter of zeros still emits the shift.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowerbed.errors import ConfigError
from flowerbed.models.base import Shape
from flowerbed.models.info import ModelInfo
from flowerbed.models.sparsity import prunable


@dataclass(frozen=True)
class Member:
    """A tensor cut along a dimension: group j of its layer holds the entries ``[j size, (j + 1) size)`` of ``dim``."""

    tensor: str
    dim: int = 0
    size: int = 1


@dataclass(frozen=True)
class Layer:
    """Groups of one kind: the j-th consists of the j-th piece of every member."""

    count: int
    members: tuple[Member, ...]


Groups = Sequence[Layer]


def output_units(info: ModelInfo) -> list[Layer]:
    """Return one group for every filter of a convolution and row of a linear layer outside the head.

    To a group belong the parameters of one dimension that follow its kernel in the state dict, before the next
    kernel, and have an entry a unit: the bias, and scale and shift of a normalisation.
    """
    layers: list[Layer] = []
    kernels = set(prunable(info))
    for name in (n for n in info.roles if n in info.parameters and info.roles[n] != "head"):
        if name in kernels:
            layers.append(Layer(info.shapes[name][0], (Member(name),)))
        elif layers and info.shapes[name] == (layers[-1].count,):
            layers[-1] = Layer(layers[-1].count, (*layers[-1].members, Member(name)))
    return layers


def input_blocks(info: ModelInfo, size: int) -> list[Layer]:
    """Return the groups of ``size`` neighbouring inputs of the model's first kernel; raises ``ConfigError``."""
    name = prunable(info)[0]
    inputs = info.shapes[name][1]
    if inputs % size:
        raise ConfigError(f"Groups of {size} inputs do not divide the {inputs} of '{name}'.")
    return [Layer(inputs // size, (Member(name, 1, size),))]


def sizes(groups: Groups, shapes: Mapping[str, Shape]) -> Tensor:
    """Return how many numbers each group has, float64 ``(m,)``."""
    found = []
    for layer in groups:
        numbers = sum(math.prod(shapes[m.tensor]) for m in layer.members)
        found += [numbers / layer.count] * layer.count
    return torch.tensor(found, dtype=torch.float64)


@torch.no_grad()
def norms(groups: Groups, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the Euclidean norm of each group, float64 ``(m,)``, on the tensors' device; exact zeros stay zeros."""
    squares = [
        torch.stack([_pieces(tensors[m.tensor], m).double().square().sum(1) for m in layer.members]).sum(0)
        for layer in groups
    ]
    return torch.cat(squares).sqrt()


@torch.no_grad()
def inner(groups: Groups, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
    """Return the inner product of each group of two models, float64 ``(m,)``."""
    products = [
        torch.stack(
            [
                (_pieces(one[m.tensor], m).double() * _pieces(other[m.tensor], m).double()).sum(1)
                for m in layer.members
            ]
        ).sum(0)
        for layer in groups
    ]
    return torch.cat(products)


@torch.no_grad()
def scaled(groups: Groups, tensors: Mapping[str, Tensor], factors: Tensor) -> dict[str, Tensor]:
    """Return the tensors of the groups, each group times its factor ``(m,)``; a factor of 0 gives exact zeros."""
    found = {}
    for layer, own in zip(groups, by_layer(groups, factors), strict=True):
        for m in layer.members:
            value = tensors[m.tensor]
            entries = own.to(value.dtype).repeat_interleave(m.size)
            shape = [1] * value.ndim
            shape[m.dim] = -1
            # Not a product with zero, which would keep what is not finite.
            spread = entries.view(shape)
            found[m.tensor] = torch.where(spread == 0, torch.zeros_like(value), value * spread)
    return found


def by_layer(groups: Groups, values: Tensor) -> tuple[Tensor, ...]:
    """Return a vector over groups in pieces, one a layer."""
    return torch.split(values, [layer.count for layer in groups])


def largest(groups: Groups, values: Tensor, k: int, least: int = 1) -> Tensor:
    """Return the mask, bool ``(m,)``, of the k groups of largest values, among them the ``least`` first of every layer.

    A network of which a layer is gone emits a constant. Among equal values the later group stays.
    Raises ``ConfigError`` if k is too small for ``least``.
    """
    safe = torch.cat([_top(own, least) for own in by_layer(groups, values)])
    if int(safe.sum()) > k:
        raise ConfigError(f"{k} groups are too few for {least} in each of {len(groups)} layers; keep more.")
    return _top(values.masked_fill(safe, math.inf), k)


def lasso_factors(norms: Tensor, thresholds: Tensor) -> Tensor:
    """Return what the group lasso's proximal map multiplies each group by: ``(1 - threshold / norm)_+``."""
    return torch.where(
        norms > thresholds, 1 - thresholds / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0
    )


def _pieces(tensor: Tensor, member: Member) -> Tensor:
    """Return a tensor as ``(groups, numbers of each)``."""
    count = tensor.shape[member.dim] // member.size
    return tensor.movedim(member.dim, 0).reshape(count, -1)


def _top(values: Tensor, k: int) -> Tensor:
    order = torch.sort(values, stable=True).indices
    mask = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    mask[order[max(0, len(values) - k) :]] = True
    return mask
