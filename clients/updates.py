"""Arithmetic on updates, ``w_k - w_t``: what clipping, noise and dishonest clients have in common.

All of it is in float64 by direct subtraction; results come back in the type of the model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from flowerbed.clients.local_round import MODEL
from flowerbed.storage import Tensors

Streams = Mapping[str, Mapping[str, Tensor]]
Update = dict[tuple[str, str], Tensor]
"""Everything that a client reveals beyond what it received, by stream and name: float64 or complex128."""


def update_norm(current: Tensors, model: Mapping[str, Tensor], names: Collection[str]) -> float:
    """Return the Euclidean norm of the update over all named tensors together."""
    return norm({(MODEL, n): wide(model[n]) - wide(current[n]) for n in model if n in names})


def scaled(current: Tensors, model: Mapping[str, Tensor], names: Collection[str], factor: float) -> Tensors:
    """Return the model with its update multiplied: ``current + factor (model - current)`` for the named ones.

    Other tensors, and all of them if the factor is one, are those of ``model``, untouched.
    """
    if factor == 1.0:
        return dict(model)
    return {
        n: (wide(current[n]) + factor * (wide(v) - wide(current[n]))).to(v.dtype) if n in names else v
        for n, v in model.items()
    }


def update_of(streams: Streams, current: Mapping[str, Tensor], parameters: Collection[str]) -> Update:
    """Return the update of the model's parameters, and every other stream as it is, all wide."""
    update = {
        (MODEL, n): wide(v) - wide(current[n]) for n, v in streams.get(MODEL, {}).items() if n in parameters
    }
    for stream, tensors in streams.items():
        if stream != MODEL:
            update.update({(stream, n): wide(v) for n, v in tensors.items()})
    return update


def with_update(streams: Streams, current: Mapping[str, Tensor], update: Update) -> dict[str, Tensors]:
    """Return the streams with ``update`` in place of what ``update_of`` read; buffers stay as they are."""
    result = {stream: dict(tensors) for stream, tensors in streams.items()}
    for (stream, name), value in update.items():
        whole = wide(current[name]) + value if stream == MODEL else value
        result[stream][name] = whole.to(streams[stream][name].dtype)
    return result


def whole_numbers(streams: Streams) -> str | None:
    """Return the first stream beside the model that holds integers, which noise cannot protect, or None."""
    for stream, tensors in streams.items():
        if stream != MODEL and not all(v.is_floating_point() or v.is_complex() for v in tensors.values()):
            return stream
    return None


def norm(update: Update) -> float:
    """Return the Euclidean norm of an update."""
    return math.sqrt(math.fsum(float(v.abs().square().sum()) for v in update.values()))


def clip_factor(length: float, bound: float) -> float:
    """Return what an update of norm ``length`` is multiplied by so that its norm is at most ``bound``."""
    return bound / length if length > bound else 1.0


def gaussian_like(value: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Return independent normal numbers of standard deviation ``std`` for every real coordinate of ``value``."""
    shape = (*value.shape, 2) if value.is_complex() else value.shape
    noise = torch.randn(shape, generator=generator, dtype=torch.float64, device=value.device) * std
    return torch.view_as_complex(noise) if value.is_complex() else noise


def wide(value: Tensor) -> Tensor:
    """Return the tensor in double precision."""
    return value.to(torch.complex128 if value.is_complex() else torch.float64)
