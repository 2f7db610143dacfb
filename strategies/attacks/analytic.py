"""Read-outs: attacks that compute inputs from gradients without any search.

For a linear layer y = W r + b and one sample, dW = d r^T and db = d, so r = dW_i / db_i for any row with db_i != 0. For
several samples this holds in every row that a single one of them reaches.

===============  ==================================================================================================
``readout``      the first linear layer, if it sees the input itself: one sample from one row
``imprint``      differences of neighbouring rows of the layer that a malicious server has put in front
                 (``flowerbed.models.imprint``, Fowl et al. 2022): every sample that is alone in its bin
``trap``         the first linear layer, whose rows a malicious server made to fire rarely (``TrapWeights``, Boenisch
                 et al. 2021): what two rows agree on is one sample, since mixtures differ from row to row
===============  ==================================================================================================
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowerbed.errors import ConfigError
from flowerbed.models.imprint import IMPRINT
from flowerbed.strategies.attacks import labels as label_rules
from flowerbed.strategies.attacks.descents import Watch
from flowerbed.strategies.attacks.observation import (
    Gradient,
    Observation,
    Reconstruction,
    SideInfo,
    batch_size,
    gradient_of,
)

FAINT = 1e-6
"""Rows whose bias gradient is smaller than this share of the largest are rounding."""
AGREE = 1e-2
"""Root mean square, in units of the inputs, within which two rows say the same."""


@dataclass(frozen=True)
class ReadOut:
    """Divides rows of a weight's gradient by those of its bias."""

    name: str
    layer: str = ""
    """The layer's name; "" is the first linear layer of the model."""
    differences: bool = False
    """Whether of neighbouring rows, as behind an imprint layer."""
    agreement: bool = False
    """Whether inputs that several rows agree on come first, once each, instead of those of the strongest rows."""
    rule: str = "count"
    """How labels are restored where they are not given."""

    def run(
        self,
        cases: Sequence[tuple[Observation, SideInfo]],
        *,
        seed: int = 0,
        device: torch.device | None = None,
        watch: Watch | None = None,
    ) -> list[Reconstruction]:
        """Attack every observation and return what was found, in their order.

        Raises ``ConfigError`` for an update that is no gradient, or a model without a layer to read.
        """
        found = []
        for place, (observation, side) in enumerate(cases):
            side.demand(self.name, "local")
            found.append(self._read(observation, side, seed))
            if watch is not None:
                watch(place + 1, len(cases))
        return found

    def _read(self, observation: Observation, side: SideInfo, seed: int) -> Reconstruction:
        started = time.perf_counter()
        module, gradient = observation.module(), gradient_of(observation, side)
        size = batch_size(observation, side)
        weight, bias = self._rows(module, gradient, observation)
        strength = bias.abs()
        order = strength.argsort(descending=True)
        rows = order[: int((strength > FAINT * strength.max()).sum())]
        if self.agreement:
            rows = agreed(weight[rows] / bias[rows, None], rows)
        rows = rows[:size]
        x = (weight[rows] / bias[rows, None]).float().view(-1, *observation.model.input_shape)
        # What was not found is filled up with what was, so that every sample has a guess.
        x = x.repeat(-(-size // max(1, len(x))), *[1] * (x.ndim - 1))[:size]
        labels = side.labels
        if labels is None:
            dummies = label_rules.dummies(observation.model.input_shape, side, seed)
            labels = label_rules.restore(self.rule, label_rules.last_layer(module, gradient, size, dummies))
        seconds = time.perf_counter() - started
        return Reconstruction(x, labels, 0.0, 0, seconds, (), {"rows": rows.tolist()})

    def _rows(self, module: nn.Module, gradient: Gradient, observation: Observation) -> tuple[Tensor, Tensor]:
        """Return the gradients of weight ``(k, D)`` and bias ``(k,)`` to divide, float64."""
        name = self.layer or next((n for n, m in module.named_modules() if isinstance(m, nn.Linear)), "")
        weight, bias = (gradient.get(f"{name}.{part}") for part in ("weight", "bias"))
        inputs = math.prod(observation.model.input_shape)
        if weight is None or bias is None or weight[0].numel() != inputs:
            where = f"called {self.layer}" if self.layer else "in front"
            raise ConfigError(
                f"The attack '{self.name}' reads the input from a linear layer with a bias that sees all of it, and "
                f"the model '{observation.model.name}' has none {where}."
            )
        weight, bias = weight.double(), bias.double()
        if self.differences:
            end = torch.zeros_like(bias[:1])
            weight = weight - torch.cat([weight[1:], torch.zeros_like(weight[:1])])
            bias = bias - torch.cat([bias[1:], end])
        return weight, bias


def agreed(x: Tensor, rows: Tensor) -> Tensor:
    """Return those of ``rows`` that say different things, what most rows say first.

    ``x``: what each row says, ``(k, D)``, the strongest rows first. Of rows that agree the strongest one stays.
    """
    near = torch.cdist(x, x) < AGREE * x.shape[1] ** 0.5
    votes, left, found = near.sum(1), torch.ones(len(x), dtype=torch.bool), []
    for place in votes.argsort(descending=True, stable=True).tolist():
        if left[place]:
            found.append(place)
            left &= ~near[place]
    return rows[found]


READOUT = ReadOut("readout")
TRAP = ReadOut("trap", agreement=True)
BINS = ReadOut("imprint", f"{IMPRINT}.rows", differences=True)
