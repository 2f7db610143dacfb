"""Gradients from losses alone: finite differences along coordinates, or along random directions.

Everything is a function of ``value``, which takes some of the parameters by name and returns the loss (a scalar) with
these in place of the model's own. It is evaluated for many perturbations at once, under ``torch.func.vmap``. Only the
tensor that a coordinate belongs to is then batched, so what the model computes before it reaches that tensor is
computed once for many coordinates: features below a perturbed layer are reused, however the layers are connected.

What is random in ``value`` must be the same in every call, or its noise is divided by the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.func import vmap

from flowerbed.errors import require
from flowerbed.storage import Tensors

Value = Callable[[Tensors], Tensor]
Active = Mapping[str, Tensor]
"""Which entries of each parameter are estimated: int64 indices into the flattened tensor."""


@torch.no_grad()
def coordinate_wise(
    value: Value,
    parameters: Mapping[str, Tensor],
    mu: float,
    base: Tensor | None = None,
    *,
    active: Active | None = None,
    scratch: Mapping[str, Tensor] | None = None,
    chunk: int = 256,
) -> tuple[Tensors, int]:
    """Return the gradient by a difference for each coordinate (CGE), and how many losses that took.

    ``base`` is the loss where the parameters stand: forward differences, one loss a coordinate, error O(mu). Without it
    central differences, two losses a coordinate, error O(mu^2). Entries that are not ``active`` (a parameter that is
    not named has none; None: all are) stay zero. ``scratch`` are buffers that evaluating changes: every evaluation gets
    copies of its own, which are dropped. ``chunk`` perturbations are computed at a time.
    """
    require(mu > 0, f"The step of a finite difference is {mu}; give a number above 0.")
    found, queries = {}, 0
    for name, parameter in parameters.items():
        flat = parameter.detach().reshape(-1)
        gradient = torch.zeros_like(flat)
        indices = torch.arange(len(flat)) if active is None else active.get(name, torch.empty(0)).long()
        for piece in torch.split(indices.to(flat.device), chunk):
            if not len(piece):
                continue
            ahead = _moved(value, name, parameter, piece, mu, scratch)
            behind = base if base is not None else _moved(value, name, parameter, piece, -mu, scratch)
            width = mu if base is not None else 2 * mu
            gradient[piece] = ((ahead - behind) / width).to(flat.dtype)
            queries += len(piece) * (1 if base is not None else 2)
        found[name] = gradient.view_as(parameter)
    return found, queries


@torch.no_grad()
def random_directions(
    value: Value,
    parameters: Mapping[str, Tensor],
    mu: float,
    q: int,
    base: Tensor,
    generator: torch.Generator,
    *,
    unit: bool = False,
    scratch: Mapping[str, Tensor] | None = None,
    chunk: int = 128,
) -> tuple[Tensors, int]:
    """Return the gradient by differences along ``q`` random directions (RGE), and how many losses that took.

    The mean of ((value(x + mu u) - base) / mu) u over standard normal u, unbiased for the smoothed loss. With ``unit``
    every tensor's u has length 1, so that each tensor's estimate is scaled by about one over its size.
    """
    require(mu > 0, f"The step of a finite difference is {mu}; give a number above 0.")
    require(q >= 1, f"The number of random directions is {q}; give at least 1.")
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for count in _chunks(q, chunk):
        drawn = {name: _directions(p, count, generator, unit) for name, p in parameters.items()}
        moved = {name: p + mu * drawn[name] for name, p in parameters.items()}
        slopes = (_many(value, moved, scratch, count) - base) / mu
        for name, u in drawn.items():
            total[name] += torch.tensordot(slopes.to(u.dtype), u, 1)
    return {name: t / q for name, t in total.items()}, q


def _moved(
    value: Value,
    name: str,
    parameter: Tensor,
    piece: Tensor,
    step: float,
    scratch: Mapping[str, Tensor] | None,
) -> Tensor:
    """Return the losses with one entry of the named parameter moved by ``step``, for every index of ``piece``."""
    copies = parameter.detach().reshape(1, -1).repeat(len(piece), 1)
    rows = torch.arange(len(piece), device=copies.device)
    copies[rows, piece] += step
    return _many(value, {name: copies.view(-1, *parameter.shape)}, scratch, len(piece))


def _many(value: Value, moved: Tensors, scratch: Mapping[str, Tensor] | None, count: int) -> Tensor:
    """Return the loss for each of ``count`` stacked versions of some tensors, ``(count,)``."""
    own = {n: b.unsqueeze(0).repeat(count, *[1] * b.ndim) for n, b in (scratch or {}).items()}
    found: Tensor = vmap(value, randomness="same")({**moved, **own})
    return found


def _directions(parameter: Tensor, count: int, generator: torch.Generator, unit: bool) -> Tensor:
    drawn = torch.randn(
        count, *parameter.shape, generator=generator, dtype=parameter.dtype, device=parameter.device
    )
    if not unit:
        return drawn
    lengths = torch.linalg.vector_norm(drawn.flatten(1), dim=1)
    found: Tensor = drawn / lengths.view(-1, *[1] * parameter.ndim)
    return found


def _chunks(whole: int, most: int) -> Iterator[int]:
    for start in range(0, whole, most):
        yield min(most, whole - start)
