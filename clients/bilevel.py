"""Two levels of training in one client: the lower one on training samples, the upper one on validation samples.

Turn by turn: some steps of the lower level, which moves most parameters, then some of the upper level, which moves the
others on samples that the lower one never sees. Both are ordinary trainings (``flowerbed.clients.training.train``),
each with its own optimizer, batches and random stream, which persist with ``local.persist``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from flowerbed import seeds
from flowerbed.clients.data import ClientData
from flowerbed.clients.local_round import Extras, LocalRound, Trained
from flowerbed.clients.params import LocalParams
from flowerbed.clients.training import Batches, Loss, train
from flowerbed.errors import ClientError


@dataclass(frozen=True)
class Level:
    """One of the two."""

    loss: Loss
    moves: frozenset[str]
    """The parameters that it trains, by name."""
    params: LocalParams
    batches: Batches
    """By its own clock."""
    steps: int
    """Of one turn."""
    scope: str = ""
    """What keeps its optimizer and its random stream apart from the other's."""


def held_out(local: LocalRound, share: float) -> tuple[ClientData, ClientData]:
    """Return the client's samples in two parts, the second one with ``share`` of them; the same in every round.

    Raises ``ClientError`` if a part would be empty.
    """
    data = local.train_data
    held = round(share * len(data))
    if not 0 < held < len(data):
        raise ClientError(
            f"{len(data)} samples cannot be divided into training and validation with a share of {share}"
        )
    order = seeds.numpy_rng(local.seed, "validation samples", local.client).permutation(len(data))
    rows = torch.from_numpy(order).to(data.y.device)
    return data.take(rows[held:].sort().values), data.take(rows[:held].sort().values)


def alternate(
    local: LocalRound, lower: Level, upper: Level | None, extras: Extras, warm_up: int = 0
) -> tuple[Trained, Trained | None]:
    """Do one round of both levels and return what each did; None for an upper one that has not acted.

    The round's steps are those of the lower level. The upper one acts after every whole turn of it that ends beyond
    the first ``warm_up`` lower steps of the run. Turns are counted from the start of the run, wherever rounds begin.
    """
    below, above = [], []
    for steps, turn in turns(local.clock.all_steps, lower.steps):
        below.append(_trained(local, lower, steps, extras))
        if upper is not None and turn is not None and steps.stop > warm_up:
            own = range(turn * upper.steps, (turn + 1) * upper.steps)
            above.append(_trained(local, upper, own, extras))
    return merged(below), merged(above) if above else None


def turns(steps: range, length: int) -> Iterator[tuple[range, int | None]]:
    """Yield the pieces of ``steps`` up to the end of each turn, with the turn's number where it ends there."""
    start = steps.start
    while start < steps.stop:
        stop = min(steps.stop, (start // length + 1) * length)
        yield range(start, stop), stop // length - 1 if stop % length == 0 else None
        start = stop


def merged(parts: Sequence[Trained]) -> Trained:
    """Return several trainings as one: steps add up, metrics are means over the steps."""
    steps = sum(part.steps for part in parts)
    names = parts[0].metrics
    means = {n: math.fsum(part.metrics[n] * part.steps for part in parts) / steps for n in names}
    return replace(parts[-1], steps=steps, metrics=means)


def _trained(local: LocalRound, level: Level, steps: range, extras: Extras) -> Trained:
    return train(
        local,
        level.loss,
        extras=extras,
        frozen=frozenset(local.parts.parameters) - level.moves,
        params=level.params,
        steps=steps,
        batches=level.batches,
        scope=level.scope,
    )
