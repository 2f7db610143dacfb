"""Layers whose weights are a function of hyperparameters, and models that carry theirs along.

A gated layer has a second copy of its weights, scaled for each output unit by a linear function of the hyperparameters
(MacKay et al., ICLR 2019). Every sample of a batch may have its own hyperparameters, while the matrix products are
shared. A ``Conditioned`` model holds the current hyperparameters and how far they are explored among its parameters, so
they travel, resume and average like weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.errors import require


@dataclass(frozen=True)
class Knob:
    """A hyperparameter: its range, and the map from an unconstrained number onto it.

    A sigmoid where both ends are finite, softplus above ``low`` where only that is, else the identity.
    """

    name: str
    start: float
    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    """Whether the value is rounded down to a whole number."""

    def __post_init__(self) -> None:
        require(
            self.low < self.start < self.high,
            f"The hyperparameter '{self.name}' starts at {self.start}; give a number between {self.low} and "
            f"{self.high}.",
        )
        require(
            math.isfinite(self.low) or not math.isfinite(self.high),
            f"The hyperparameter '{self.name}' has an upper end only; give a lower one as well.",
        )

    def value(self, raw: Tensor) -> Tensor:
        """Return the hyperparameter that ``raw`` stands for, elementwise."""
        if math.isfinite(self.high):
            found = self.low + (self.high - self.low) * raw.sigmoid()
        else:
            found = self.low + F.softplus(raw) if math.isfinite(self.low) else raw
        return found.floor() if self.whole else found

    @property
    def raw(self) -> float:
        """What stands for ``start``."""
        if math.isfinite(self.high):
            share = (self.start - self.low) / (self.high - self.low)
            return math.log(share) - math.log1p(-share)
        return inverse_softplus(self.start - self.low) if math.isfinite(self.low) else self.start


def inverse_softplus(value: float) -> float:
    """Return x with log(1 + e^x) = ``value`` > 0."""
    return value + math.log(-math.expm1(-value))


@dataclass
class Condition:
    """What the layers of one model see during one forward pass: the same object in all of them."""

    gates: Tensor | None = None
    """Input of the gates, ``(N, n)``."""
    values: Mapping[str, Tensor] = field(default_factory=dict)
    """The hyperparameters themselves by name, ``(N,)``, detached."""

    def seen(self) -> Tensor:
        """Return the input of the gates."""
        assert self.gates is not None, "a gated layer computes within its Conditioned model only"
        return self.gates


class Conditioned(nn.Module):
    """Base of models with hyperparameters of their own; a subclass brings layers and ``compute``.

    ``hyper`` are the unconstrained hyperparameters lambda, ``(n,)``; ``softplus(spread)`` is the standard deviation
    with which training perturbs each of them.
    """

    def __init__(self, knobs: Sequence[Knob], spread: float = 1.0, centred: bool = False) -> None:
        """``centred`` lets the gates see lambda minus the current one, so that they are 0 where the model stands."""
        super().__init__()
        require(spread > 0, f"Option spread={spread} must be above 0.")
        self.knobs, self.centred, self.condition = tuple(knobs), centred, Condition()
        self.hyper = nn.Parameter(torch.tensor([knob.raw for knob in knobs]))
        self.spread = nn.Parameter(torch.full((len(knobs),), inverse_softplus(spread)))
        self._given: Tensor | None = None

    @contextmanager
    def at(self, raw: Tensor) -> Iterator[None]:
        """Compute with the unconstrained hyperparameters ``raw`` ``(N, n)``, a row for each sample."""
        self._given = raw
        try:
            yield
        finally:
            self._given = None

    def values(self, raw: Tensor | None = None) -> dict[str, Tensor]:
        """Return the hyperparameters by name, of ``raw`` ``(..., n)`` or the current ones, detached."""
        raw = (self.hyper if raw is None else raw).detach()
        return {knob.name: knob.value(raw[..., i]) for i, knob in enumerate(self.knobs)}

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of a batch, at the hyperparameters given by ``at`` or at the current ones."""
        raw = self.hyper.expand(len(x), -1) if self._given is None else self._given
        self.condition.gates = raw - self.hyper.detach() if self.centred else raw
        self.condition.values = self.values(raw)
        try:
            return self.compute(x)
        finally:
            # Nothing of the graph stays behind, so that the model can be copied.
            self.condition.gates, self.condition.values = None, {}

    def compute(self, x: Tensor) -> Tensor:
        """Return the outputs; layers read ``self.condition``."""
        raise NotImplementedError


class GatedLinear(nn.Module):
    """y = W x + b + (V lambda) * (U x) + (C lambda) * c, with * by output unit; V and C start at 0."""

    def __init__(self, width: int, out: int, n: int, condition: Condition) -> None:
        """``n`` is the number of hyperparameters."""
        super().__init__()
        self.plain, self.response = nn.Linear(width, out), nn.Linear(width, out)
        self.gates, self.condition = gates(n, out), condition

    def forward(self, x: Tensor) -> Tensor:
        v, c = self.gates(self.condition.seen()).chunk(2, -1)
        found: Tensor = self.plain(x) + v * F.linear(x, self.response.weight) + c * self.response.bias
        return found


class GatedConv2d(nn.Module):
    """The same for a convolution, with a gate for each output channel."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int,
        n: int,
        condition: Condition,
        stride: int = 1,
        padding: int = 0,
    ) -> None:
        """``n`` is the number of hyperparameters."""
        super().__init__()
        self.plain, self.response = (nn.Conv2d(channels, out, kernel, stride, padding) for _ in range(2))
        self.gates, self.condition = gates(n, out), condition

    def forward(self, x: Tensor) -> Tensor:
        v, c = self.gates(self.condition.seen())[..., None, None].chunk(2, 1)
        one = self.response
        assert one.bias is not None
        response = v * F.conv2d(x, one.weight, None, one.stride, one.padding)
        found: Tensor = self.plain(x) + response + c * one.bias[:, None, None]
        return found


def gates(n: int, out: int) -> nn.Linear:
    """Return the gates of a layer, ``(2 out, n)``: V over C, both 0."""
    made = nn.Linear(n, 2 * out, bias=False)
    nn.init.zeros_(made.weight)
    return made


class RatedDropout(nn.Module):
    """Dropout whose rate is a hyperparameter, one for each sample; no gradient passes to the rate."""

    def __init__(self, name: str, condition: Condition) -> None:
        """``name`` is the knob's."""
        super().__init__()
        self.name, self.condition = name, condition

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.condition.values[self.name]) if self.training else x


def dropout(x: Tensor, rate: Tensor) -> Tensor:
    """Return ``x`` ``(N, ...)``, entries of sample i dropped with chance ``rate[i]`` < 1, the others scaled up."""
    p = rate.detach().view(-1, *[1] * (x.dim() - 1))
    return x * (torch.rand_like(x) >= p) / (1 - p)
