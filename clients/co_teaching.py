"""Two networks that choose samples for each other: who learns them first is likely to be right about them.

Co-teaching (Han et al., NeurIPS 2018) in the form of Chen et al. 2022: each network looks at its own half of the batch,
and learns from what the other one has chosen in the other half.
"""

from __future__ import annotations

import torch
from torch import Tensor


def remembered(count: int, forget: float) -> int:
    """Return how many of ``count`` samples are kept at a forget rate: the whole part of (1 - r) n, but at least one."""
    # The tiny allowance keeps exact products such as 0.7 * 10 from being one too low.
    return min(count, max(1, int((1 - forget) * count + 1e-9)))


def small_loss(losses: Tensor, forget: float) -> Tensor:
    """Return the rows (int64) of the smallest of ``losses`` ``(n,)``, those that are kept at the forget rate."""
    return losses.argsort(stable=True)[: remembered(len(losses), forget)]


def halves(count: int) -> tuple[Tensor, Tensor]:
    """Return the rows of the two halves of a batch; an odd last one belongs to neither, a single one to both."""
    half = count // 2
    if not half:
        return torch.arange(count), torch.arange(count)
    return torch.arange(half), torch.arange(half, 2 * half)
