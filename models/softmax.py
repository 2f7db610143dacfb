"""Cross entropy in a precision of its own, a softmax that grows slowly, and how often rounding has ended a softmax."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowerbed.errors import ConfigError, unknown_name

DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def cross_entropy(logits: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mean cross entropy ``log sum_k exp(z_k - max z) - (z_y - max z)``, with all of it in ``dtype``.

    The mean over samples is taken in the type of the logits. Once the sum rounds to 1, a sample whose label has the
    largest logit has loss 0 and gradient 0 there; shifting by the maximum does not prevent that.
    """
    shifted = logits.to(dtype)
    shifted = shifted - shifted.detach().amax(-1, keepdim=True)
    each = shifted.exp().sum(-1).log() - shifted.gather(-1, labels[:, None]).squeeze(-1)
    return each.to(logits.dtype if logits.dtype.itemsize > dtype.itemsize else dtype).mean()


def growth(z: Tensor) -> Tensor:
    """Return s(z) = z + 1 for z >= 0 and 1 / (1 - z) below."""
    # Each branch sees only what belongs to it, or the gradient of the other would be NaN where it has a pole.
    return torch.where(z >= 0, z.clamp(min=0) + 1, 1 / (1 - z.clamp(max=0)))


def stablemax_cross_entropy(logits: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mean of ``-log(s(z_y) / sum_k s(z_k))`` in ``dtype``: the softmax of sign(z) log(1 + |z|)."""
    size = growth(logits.to(dtype))
    each = size.sum(-1).log() - size.gather(-1, labels[:, None]).squeeze(-1).log()
    return each.mean()


@torch.no_grad()
def collapsed(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return for which samples the softmax has become a single 1 by rounding in ``dtype``, bool ``(N,)``.

    That is, ``sum_k exp(z_k - max z) == 1`` exactly.
    """
    shifted = logits.to(dtype)
    shifted = shifted - shifted.amax(-1, keepdim=True)
    return shifted.exp().sum(-1) == 1


LOSSES: dict[str, Callable[[Tensor, Tensor, torch.dtype], Tensor]] = {
    "ce": cross_entropy,
    "stablemax": stablemax_cross_entropy,
}


def dtype_of(name: str) -> torch.dtype:
    """Return float16, float32 or float64 by name; raises ``ConfigError`` for another."""
    if name not in DTYPES:
        raise ConfigError(unknown_name("precision", name, DTYPES))
    return DTYPES[name]
