"""Masks on the features before a classifier: dropout, and nested dropout, which orders the channels by importance.

Nested dropout (Rippel et al., ICML 2014) keeps the first k of D channels with a random k. A head that is linear without
bias can then be cut off after any number of channels, and which number is best is counted for all of them at once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.errors import ConfigError

PENALTY = 1e-5
"""What one more channel must gain in accuracy, so that ties go to the fewest channels."""
CHUNK = 2**22
"""Numbers that are computed at a time when cut-offs are counted."""


class LeadingLinear(nn.Linear):
    """A linear layer without bias that, in evaluation mode, looks at its first ``kept`` inputs only."""

    kept: Tensor
    """How many, an int64 scalar; part of the state dict."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.register_buffer("kept", torch.tensor(in_features))

    def forward(self, z: Tensor) -> Tensor:
        if not self.training:
            z = z * (torch.arange(self.in_features, device=z.device) < self.kept)
        return F.linear(z, self.weight)


def nested_law(channels: int, sigma: float, mu: float = 0.0) -> Tensor:
    """Return P(k) of keeping the first k channels, float64 ``(D,)``, for k = 1..D: ~ exp(-((k - mu) / sigma)^2).

    There is no 1/2 in the exponent, so sigma is no standard deviation.
    """
    k = torch.arange(1, channels + 1, dtype=torch.float64)
    # Relative to the largest, so that a narrow law far from its mean is not 0 everywhere.
    return (-(((k - mu) / sigma) ** 2)).softmax(0)


def leading(channels: int, kept: int) -> Tensor:
    """Return the mask ``(D,)`` that keeps the first ``kept`` channels."""
    return (torch.arange(channels) < kept).float()


def nested_mask(law: Tensor, rng: torch.Generator) -> Tensor:
    """Draw one mask ``(D,)`` for a whole batch; what it keeps is not scaled up."""
    return leading(len(law), int(torch.multinomial(law, 1, generator=rng)) + 1)


def dropout_mask(batch: int, channels: int, p: float, rng: torch.Generator) -> Tensor:
    """Draw independent masks ``(B, D)``: 0 with probability ``p``, else 1 / (1 - p)."""
    if not 0 <= p < 1:
        raise ConfigError(f"Dropout with p={p} keeps nothing or is no probability; give 0 <= p < 1.")
    return (torch.rand(batch, channels, generator=rng) >= p).float() / (1 - p)


@torch.no_grad()
def correct_by_channels(pairs: list[tuple[Tensor, Tensor]], labels: Tensor) -> Tensor:
    """Count the right answers for every number of leading channels, int64 ``(D,)``, for K = 1..D.

    ``pairs`` are features ``(N, D)`` and head weights ``(C, D)``, one for each network; several answer by the sum of
    their outputs, all cut off at the same K.
    """
    weight = pairs[0][1]
    channels = weight.shape[1]
    rows = max(1, CHUNK // weight.numel())
    correct = torch.zeros(channels, dtype=torch.int64, device=labels.device)
    for start in range(0, len(labels), rows):
        part = slice(start, start + rows)
        # (n, C, D): the output with the first K channels is a running sum over channels.
        outputs = sum((z[part].unsqueeze(1) * w).cumsum(-1) for z, w in pairs)
        assert isinstance(outputs, Tensor)
        correct += (outputs.argmax(1) == labels[part].unsqueeze(1)).sum(0)
    return correct


def best_cut(correct: Tensor, total: int) -> int:
    """Return the K in 1..D with the largest accuracy - 1e-5 (K - 1), given right answers ``(D,)`` of ``total``."""
    scores = correct.double() / total - PENALTY * torch.arange(len(correct), device=correct.device)
    return int(scores.argmax()) + 1


def decomposition(log_q: Tensor, law: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return bias, variance and entropy of predictions under random masks, ``(N,)`` each, in nats.

    ``log_q`` are log q(y|z) of every mask, ``(M, N, C)``, ``law`` the masks' probabilities ``(M,)``, ``p`` the labels'
    law p(y|x) ``(N, C)``. With q~ ~ exp E_z log q: KL(p || q~), E_z KL(q~ || q) and H(p); their sum is the expected
    cross entropy.
    """
    weighted = law.to(log_q.dtype).view(-1, 1, 1)
    central = (weighted * log_q).sum(0).log_softmax(-1)
    bias = (torch.xlogy(p, p) - p * central).sum(-1)
    variance = (weighted * (central.exp() * (central - log_q))).sum((0, -1))
    entropy = -torch.xlogy(p, p).sum(-1)
    return bias, variance, entropy
