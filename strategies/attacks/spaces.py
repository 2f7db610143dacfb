"""Where an attack searches: variables, and how images come from them.

All victims and restarts are searched at once; a *row* is one restart of one victim. Variables are tensors by name with
one entry a row in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flowerbed import seeds
from flowerbed.datasets.augment import Scale
from flowerbed.errors import require
from flowerbed.models.base import Shape

STARTS = ("normal", "uniform", "grey")
LABELS = "labels"
X = "x"
NOISE = "noise"
Variables = dict[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """What is searched for together."""

    victims: int
    restarts: int
    batch: int
    """B, samples a row."""
    shape: Shape
    """Of one sample."""
    classes: int
    scale: Scale
    seed: int

    @property
    def count(self) -> int:
        """Rows in all; row v * restarts + r is restart r of victim v."""
        return self.victims * self.restarts

    def draws(self, purpose: str, *shape: int) -> Tensor:
        """Return normal numbers ``(rows, *shape)``; those of a row depend on no other row."""
        found = [
            torch.randn(*shape, generator=seeds.torch_rng(self.seed, purpose, victim, restart))
            for victim in range(self.victims)
            for restart in range(self.restarts)
        ]
        return torch.stack(found)


class Space(Protocol):
    """A search space."""

    @property
    def fixed(self) -> Variables:
        """Tensors with one entry a row that ``decode`` finds among the variables and nothing moves."""

    def open(self, rows: Rows) -> Variables:
        """Return where the search begins."""

    def decode(self, variables: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Return the samples of one row, ``(B, *shape)`` in the model's input space. Pure; works under ``vmap``."""

    def penalty(self, variables: Mapping[str, Tensor]) -> Tensor:
        """Return what one row's variables cost by themselves, a scalar. Pure."""

    def constrain(self, variables: Variables, rows: Rows) -> None:
        """Bring the variables of all rows back to where they are allowed, in place, after a step."""

    def advance(self, variables: Variables, labels: Tensor) -> tuple[Space, Variables] | None:
        """Return the next stage and where it begins, given where this one ended; None after the last."""


@dataclass(frozen=True)
class Pixels:
    """The samples themselves."""

    boxed: bool = True
    """Keep pixels within [0, 1]."""
    start: str = "normal"
    """normal: standard normal values; uniform: pixels in [0, 1]; grey: pixels of 0.5."""
    labels: bool = False
    """Search for labels as well: B rows of logits, a soft target each (DLG)."""
    encoded: bool = False
    """Whether the samples are encodings, whose values may be anything: no box, then or at the end."""
    bottleneck: int = 0
    """Search for the noise of the model's variational bottleneck as well: so many numbers a sample; 0 is none."""

    @property
    def fixed(self) -> Variables:
        return {}

    def __post_init__(self) -> None:
        require(
            self.start in STARTS, f"The search begins at '{self.start}'; choose from {', '.join(STARTS)}."
        )

    def open(self, rows: Rows) -> Variables:
        values = rows.draws("start", rows.batch, *rows.shape)
        if self.start == "uniform":
            values = rows.scale.values(torch.special.ndtr(values))
        elif self.start == "grey":
            values = rows.scale.values(torch.full_like(values, 0.5))
        found = {X: values}
        self.constrain(found, rows)
        if self.labels:
            found[LABELS] = rows.draws("start labels", rows.batch, rows.classes)
        if self.bottleneck:
            found[NOISE] = rows.draws("start noise", rows.batch, self.bottleneck)
        return found

    def decode(self, variables: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        return variables[X]

    def penalty(self, variables: Mapping[str, Tensor]) -> Tensor:
        return variables[X].new_zeros(())

    def constrain(self, variables: Variables, rows: Rows) -> None:
        if self.boxed and not self.encoded and len(rows.shape) == 3:
            variables[X].copy_(clamped(variables[X], rows.scale))

    def advance(self, variables: Variables, labels: Tensor) -> tuple[Space, Variables] | None:
        return None


def clamped(x: Tensor, scale: Scale) -> Tensor:
    """Return images with their pixels brought into [0, 1]."""
    black, white = (scale.values(torch.full_like(x[..., :1, :1], value)) for value in (0.0, 1.0))
    return torch.maximum(torch.minimum(x, white), black)
