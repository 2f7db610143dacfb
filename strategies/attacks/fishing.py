"""Fishing: the attack on what a client sends for a model that was made to fish (Wen et al. 2022).

Under such a head (``flowerbed.strategies.attacks.tampering``) the body's gradient is that of the n samples that were
caught, times n / B; the head's says how many those are, and what classes the others have. So an update of any number of
samples is attacked as one of n, with labels known, the head left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flowerbed.errors import ConfigError
from flowerbed.strategies.attacks.descents import Watch
from flowerbed.strategies.attacks.inversion import Inversion
from flowerbed.strategies.attacks.labels import rounded
from flowerbed.strategies.attacks.observation import (
    Observation,
    Reconstruction,
    SideInfo,
    batch_size,
    gradient_of,
)
from flowerbed.strategies.attacks.tampering import HEAD, caught, target_of


@dataclass(frozen=True)
class Fishing:
    """Searches for the samples that were caught; every other sample's guess is one of them again."""

    name: str = "fishing"
    search: Inversion = field(default_factory=lambda: Inversion("modern"))
    """How; the preset is the one of this name."""

    def run(
        self,
        cases: Sequence[tuple[Observation, SideInfo]],
        *,
        seed: int = 0,
        device: torch.device | None = None,
        watch: Watch | None = None,
    ) -> list[Reconstruction]:
        """Attack every observation and return what was found, in their order.

        Where nothing was caught the guess is grey, at a cost of 1 and with ``caught`` 0. Raises ``ConfigError`` for a
        model that was not made to fish, for an update that is no gradient, or if nothing was caught anywhere.
        """
        counts = []
        for observation, side in cases:
            side.demand(self.name, "local")
            counts.append(caught(observation, side))
        if not any(counts):
            raise ConfigError(
                f"The attack '{self.name}' caught nothing: no observed client had a sample of class "
                f"{target_of(cases[0][0])} there; fish for another class (tampering.target), or in later rounds."
            )
        chosen = [place for place, count in enumerate(counts) if count]
        given = [_of_caught(*cases[place], counts[place]) for place in chosen]
        found = dict(zip(chosen, self.search.run(given, seed=seed, device=device, watch=watch), strict=True))
        return [
            _whole(observation, side, counts[place], found.get(place))
            for place, (observation, side) in enumerate(cases)
        ]


def _of_caught(observation: Observation, side: SideInfo, count: int) -> tuple[Observation, SideInfo]:
    """Return the observation as if the client had had the caught samples alone."""
    size, target = batch_size(observation, side), target_of(observation)
    returned = {
        name: observation.sent[name] + (value - observation.sent[name]) * (size / count)
        for name, value in observation.returned.items()
        if not name.startswith(f"{HEAD}.")
    }
    labels = torch.full((count,), target, dtype=torch.int64)
    return replace(observation, returned=returned), replace(side, batch=count, labels=labels)


def _whole(
    observation: Observation, side: SideInfo, count: int, found: Reconstruction | None
) -> Reconstruction:
    """Return a guess of all samples."""
    size = batch_size(observation, side)
    labels = side.labels if side.labels is not None else _labels(observation, side, size, count)
    if found is None:
        grey = side.scale.values(torch.full((size, *observation.model.input_shape), 0.5))
        return Reconstruction(grey, labels, 1.0, found={"caught": 0})
    x = found.x.repeat(-(-size // count), *[1] * (found.x.ndim - 1))[:size]
    return replace(found, x=x, labels=labels, found={**found.found, "caught": count})


def _labels(observation: Observation, side: SideInfo, size: int, count: int) -> Tensor:
    """Return all labels, the caught ones first.

    Under ``ClassFishing`` every sample has probability 1 / (C - 1) of each class but the target, so the others are
    counted as B (1 / (C - 1) - db_k); ``FeatureFishing`` takes all for the target's.
    """
    target = target_of(observation)
    own = torch.full((count,), target, dtype=torch.int64)
    sure = observation.sent[f"{HEAD}.bias"].clone()
    sure[target] = 0
    if not sure.any():
        return own.new_full((size,), target)
    bias = gradient_of(observation, side)[f"{HEAD}.bias"].double()
    counts = size * (1 / (len(bias) - 1) - bias)
    counts[target] = 0
    return torch.cat([own, rounded(counts, size - count)])
