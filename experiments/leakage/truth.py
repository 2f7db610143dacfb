"""What a client really trained on: for scorers, and nobody else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowerbed import seeds
from flowerbed.clients.data import BatchOrder, ClientData
from flowerbed.clients.defence import Encoding
from flowerbed.datasets.augment import AUGMENTATIONS
from flowerbed.errors import ConfigError
from flowerbed.experiments.parts import Parts


@dataclass(frozen=True)
class Truth:
    """The samples behind one update."""

    x: Tensor
    """``(B, ...)``, as the model took them (augmented, if they were), or as they were before a defence mixed them."""
    y: Tensor
    """int64 ``(B,)``."""
    index: Tensor
    """int64 ``(B,)``, rows of the training split."""
    other: Mapping[str, Tensor] = field(default_factory=dict)
    """Where samples were encoded: ``(B, ...)`` under the name of what ``x`` is not, ``original`` or ``encoded``."""


def truth_of(parts: Parts, client: int, round_: int) -> Truth:
    """Return what a client trained on in a round, made again from the run's description.

    Samples that it visited more than once come once, as they were first seen. A defence says whether what it encodes is
    private as it was before or as the model saw it. Raises ``ConfigError`` for a client that the run lacks.
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
    encodings = [transform for transform in parts.spec.transforms if isinstance(transform, Encoding)]
    order = BatchOrder(local, len(data), seed, client)
    steps = local.steps_per_round(len(data))
    xs, seen_by_model, rows = [], [], []
    seen: set[int] = set()
    for step in range((round_ - 1) * steps, round_ * steps):
        chosen = order.rows(step)
        batch = data.batch(chosen)
        if local.augment != "none":
            rng = seeds.torch_rng(seed, "augment", client, step)
            batch["x"] = AUGMENTATIONS.get(local.augment)(batch["x"], rng, scale=data.scale)
        new = [place for place, row in enumerate(chosen.tolist()) if row not in seen]
        seen.update(chosen.tolist())
        xs.append(batch["x"][new])
        for encoding in encodings:
            batch = encoding.of_step(batch, data, parts.dataset.num_classes, seed, client, step)
        seen_by_model.append(batch["x"][new])
        rows.append(chosen[new])
    found = torch.cat(rows)
    original, encoded = torch.cat(xs), torch.cat(seen_by_model)
    y, index = data.y[found], data.index[found]
    if torch.equal(original, encoded):
        return Truth(original, y, index)
    if any(encoding.sees_original for encoding in encodings):
        return Truth(original, y, index, {"encoded": encoded})
    return Truth(encoded, y, index, {"original": original})


def truth_of_all(parts: Parts, clients: Sequence[int], round_: int) -> Truth:
    """Return what the clients of a cohort trained on in a round, one client after another."""
    found = [truth_of(parts, client, round_) for client in clients]
    names = {name for truth in found for name in truth.other}
    other = {name: torch.cat([t.other.get(name, t.x) for t in found]) for name in sorted(names)}
    x, y, index = (torch.cat([getattr(t, name) for t in found]) for name in ("x", "y", "index"))
    return Truth(x, y, index, other)
