"""Prompts of random regression problems, for learning in context: an endless source, described by a table.

A prompt is n pairs (x_i, y_i) and a query x_{n+1}, whose y is to be predicted. Every prompt has a function f of its
own, so nothing can be learned about f but from the prompt itself:

    x_i ~ N(0, Sigma),   y_i = f(x_i) + sigma eps_i,   Sigma = diag(spectrum)
    linear:  f(x) = w . x                              w ~ N(0, Sigma^-1)
    relu:    f(x) = a max(w . x, 0),  a = +-1 fair     w ~ N(0, Sigma^-1)

The data set has one row for each *distribution* of prompts, not for each prompt: clients share out distributions, and
draw prompts from theirs at every step (``flowerbed.clients.streams``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.errors import require

SPECTRUM, NOISE, RELU, COUNT = "spectrum", "noise", "relu", "prompts"
FUNCTIONS = ("linear", "relu")


@dataclass(frozen=True)
class Prompts:
    """K distributions of prompts with n pairs of dimension d."""

    n: int
    spectrum: Tensor
    """Eigenvalues of Sigma, ``(K, d)``."""
    noise: Tensor
    """sigma, ``(K,)``."""
    relu: Tensor
    """Which are of the second kind, bool ``(K,)``."""

    @classmethod
    def of(cls, inputs: Tensor, extras: Mapping[str, Tensor]) -> Prompts:
        """Return the distributions that rows of the data set stand for, ``inputs`` ``(K, n + 1, d + 1)``."""
        return cls(inputs.shape[1] - 1, extras[SPECTRUM], extras[NOISE], extras[RELU])

    @property
    def d(self) -> int:
        """The dimension of x."""
        return self.spectrum.shape[1]

    def draw(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``count`` new prompts, each of a random distribution.

        Tokens ``(count, n + 1, d + 1)``, the last one the query with 0 in place of its y; that y, noise included,
        ``(count,)``; and the distributions, int64 ``(count,)``.
        """
        device = self.spectrum.device
        rows = torch.randint(len(self.spectrum), (count,), generator=rng, device=device)
        root = self.spectrum[rows].sqrt()

        def normal(*shape: int) -> Tensor:
            return torch.randn(count, *shape, generator=rng, device=device)

        x = normal(self.n + 1, self.d) * root[:, None]
        w = normal(self.d) / root
        f = torch.einsum("bid,bd->bi", x, w)
        if bool(self.relu.any()):
            signs = torch.randint(2, (count, 1), generator=rng, device=device) * 2 - 1
            f = torch.where(self.relu[rows][:, None], signs * f.relu(), f)
        y = f + self.noise[rows][:, None] * normal(self.n + 1)
        tokens = torch.cat([x, y[..., None]], -1)
        tokens[:, -1, -1] = 0
        return tokens, y[:, -1], rows


def prompts(
    *,
    d: int = 5,
    n: int = 20,
    noise: float = 0.5,
    function: str = "linear",
    spectra: Sequence[Sequence[float]] = (),
    judged: int = 200_000,
) -> Dataset:
    """Return a table of distributions of prompts, one for each spectrum (without any: one with Sigma = I).

    ``judged`` is how many prompts a measure should draw from each. Nothing of the inputs but their shape means
    anything. Raises ``ConfigError`` for options that fit no distribution.
    """
    require(
        d >= 1 and n >= 1, f"dataset.d and dataset.n are {d} and {n}; give at least 1 dimension and 1 pair."
    )
    require(noise >= 0, f"dataset.noise is {noise}; give a standard deviation of 0 or more.")
    require(function in FUNCTIONS, f"dataset.function is '{function}'; choose linear or relu.")
    require(judged >= 1, f"dataset.judged is {judged}; give at least 1 prompt.")
    table = [list(map(float, one)) for one in spectra] or [[1.0] * d]
    require(
        all(len(one) == d and min(one) > 0 for one in table),
        f"dataset.spectra is {table}; give for each distribution {d} eigenvalues above 0.",
    )
    count = len(table)
    extras = {
        SPECTRUM: torch.tensor(table),
        NOISE: torch.full((count,), noise),
        RELU: torch.full((count,), function == "relu"),
    }
    inputs, labels = torch.zeros(count, n + 1, d + 1), torch.zeros(count, dtype=torch.int64)
    return Dataset(
        name="prompts",
        train=Split(inputs, labels, extras),
        test=Split(inputs, labels, {**extras, COUNT: torch.full((count,), judged)}),
        classes=("y",),
        mean=(0.0,),
        std=(1.0,),
        task="measured",
    )
