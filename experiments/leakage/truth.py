"""What a client really trained on: for scorers, and nobody else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowerbed import seeds
from flowerbed.clients.data import BatchOrder, ClientData
from flowerbed.datasets.augment import AUGMENTATIONS
from flowerbed.errors import ConfigError
from flowerbed.experiments.parts import Parts


@dataclass(frozen=True)
class Truth:
    """The samples behind one update."""

    x: Tensor
    """``(B, ...)``, as the model took them (augmented, if they were)."""
    y: Tensor
    """int64 ``(B,)``."""
    index: Tensor
    """int64 ``(B,)``, rows of the training split."""


def truth_of(parts: Parts, client: int, round_: int) -> Truth:
    """Return what a client trained on in a round, made again from the run's description.

    Samples that it visited more than once come once, as they were first seen. Raises ``ConfigError`` for a client that
    the run lacks.
    """
    clients = parts.train.num_clients
    if not 0 <= client < clients:
        raise ConfigError(f"The run has {clients} clients, and none is number {client}.")
    local, seed = parts.simulation.local, parts.simulation.seed
    data = ClientData.view(
        parts.dataset, parts.dataset.train, parts.train.indices(client), torch.device("cpu")
    )
    for transform in parts.spec.transforms:
        data = transform.data(client, data)
    order = BatchOrder(local, len(data), seed, client)
    steps = local.steps_per_round(len(data))
    xs, rows = [], []
    seen: set[int] = set()
    for step in range((round_ - 1) * steps, round_ * steps):
        chosen = order.rows(step)
        x = data.x[chosen]
        if local.augment != "none":
            rng = seeds.torch_rng(seed, "augment", client, step)
            x = AUGMENTATIONS.get(local.augment)(x, rng, scale=data.scale)
        new = [place for place, row in enumerate(chosen.tolist()) if row not in seen]
        seen.update(chosen.tolist())
        xs.append(x[new])
        rows.append(chosen[new])
    found = torch.cat(rows)
    return Truth(torch.cat(xs), data.y[found], data.index[found])
