"""Gradient inversion by optimisation: the one engine behind all such attacks.

Minimise over the variables v of a search space

    D(m(x(v), y), m*) + priors(x(v))

where m* is what the client sent and m(x, y) what it would have sent for x: the gradient of the mean loss at the
observed parameters where the client made one plain step, else the update of as many steps (Geiping et al. 2020, section
5; Dimitrov et al. 2022). D is an objective. All victims and restarts are one batch: their costs are computed by
``torch.func.vmap`` and every row moves by its own gradient, so a batch finds what a loop over victims finds.

The restart and stage that is reported is the one of least D at the clamped images, without priors: nothing that the
attacker cannot see takes part in the choice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowerbed.errors import ConfigError, require
from flowerbed.models.base import parameter_names
from flowerbed.strategies.attacks import labels as label_rules
from flowerbed.strategies.attacks.candidates import Steps
from flowerbed.strategies.attacks.costs import Costs, Prior, Terms
from flowerbed.strategies.attacks.descents import Descent, Watch, descend
from flowerbed.strategies.attacks.imitations import imitation_of
from flowerbed.strategies.attacks.objectives import OBJECTIVES
from flowerbed.strategies.attacks.observation import (
    Gradient,
    Observation,
    Reconstruction,
    SideInfo,
    batch_size,
    gradient_of,
    why_inexact,
)
from flowerbed.strategies.attacks.priors import BatchStatistics, SameSamples
from flowerbed.strategies.attacks.spaces import Pixels, Rows, Space
from flowerbed.strategies.attacks.text import TextSpace, bag


@dataclass(frozen=True)
class Inversion:
    """An attack, composed. Frozen and plain, so that it can be named, changed and stored."""

    name: str
    space: Space = field(default_factory=Pixels)
    objective: str = "cosine"
    objective_scale: float = 1.0
    priors: tuple[Prior, ...] = ()
    statistics: BatchStatistics | None = None
    group: float = 0.0
    """Weight of the distance of restarts from their mean."""
    order: SameSamples | None = None
    """Where clients made several epochs: every epoch has samples of its own, tied by this term, and what is reported is
    the mean over epochs of samples that belong together. None: later epochs repeat the first."""
    descents: tuple[Descent, ...] = (Descent(),)
    """One for each stage of the space; the last one goes on for those that follow."""
    rule: str = "count"
    """How labels are restored where they are not given: a label rule."""
    imitation: str | Mapping[str, Any] = "none"
    """What of a defence the attacker repeats on its candidates, by name or as a mapping with constants: see
    ``flowerbed.strategies.attacks.imitations``."""
    update_noise: float = 0.0
    """Standard deviation of the noise on every entry of the update, as the attacker knows it; makes a ``floor``."""
    floor: float = 0.0
    """D as the attacker expects it at the truth, from noise that it knows of: the first stage that gets there is the
    last that counts (a discrepancy rule)."""
    last_stage: bool = False
    """Report the last stage, whatever its distance: a control for the choice of the stage."""
    restarts: int = 1
    chunk: int = 0
    """Rows computed at a time; 0 means all of them."""

    def __post_init__(self) -> None:
        require(self.restarts >= 1, f"attack.restarts is {self.restarts}; give at least 1.")
        require(self.chunk >= 0, f"attack.chunk is {self.chunk}; give 0 (all rows) or more.")
        require(self.floor >= 0, f"attack.floor is {self.floor}; give 0 (none) or more.")
        require(self.update_noise >= 0, f"attack.update_noise is {self.update_noise}; give 0 (none) or more.")
        imitation_of(self.imitation)
        OBJECTIVES.get(self.objective)
        label_rules.RULES.get(self.rule)

    def run(
        self,
        cases: Sequence[tuple[Observation, SideInfo]],
        *,
        seed: int = 0,
        device: torch.device | None = None,
        watch: Watch | None = None,
    ) -> list[Reconstruction]:
        """Attack every observation, with what is known beside it, and return what was found, in their order.

        Raises ``ConfigError`` for an update that cannot be imitated, an unknown batch size, or a model that does not
        fit.
        """
        for _, side in cases:
            side.demand(self.name, "local")
        victims = [_Victim.of(seen, side, self, seed) for seen, side in cases]
        found: dict[int, Reconstruction] = {}
        # Victims with as many samples, of one model, are searched for together.
        for key in dict.fromkeys(victim.key for victim in victims):
            members = [i for i, victim in enumerate(victims) if victim.key == key]
            together = [victims[i] for i in members]
            found.update(zip(members, self._searched(together, seed, device, watch), strict=True))
        return [found[i] for i in range(len(victims))]

    @property
    def joint(self) -> bool:
        """Whether labels are searched for as well."""
        return isinstance(self.space, Pixels) and self.space.labels

    def _searched(
        self, victims: Sequence[_Victim], seed: int, device: torch.device | None, watch: Watch | None
    ) -> list[Reconstruction]:
        """Return the best of all stages and restarts for each victim."""
        started, first = time.perf_counter(), victims[0]
        model = first.observation.model
        epochs = first.steps.epochs if first.steps.apart else 1
        size = epochs * len(first.labels)
        rows = Rows(
            len(victims), self.restarts, size, model.input_shape, model.num_classes, first.side.scale, seed
        )  # fmt: skip
        costs = Costs(
            self._terms(),
            rows,
            first.module,
            [victim.module.state_dict() for victim in victims],
            [victim.sent for victim in victims],
            [torch.cat([victim.labels] * epochs) for victim in victims],
            first.steps,
            batch_statistics=first.side.normalisation == "train",
            chunk=self.chunk,
            device=device or torch.device("cpu"),
        )
        best = torch.full((rows.count,), math.inf)
        floors = torch.tensor([self._floor(victim) for victim in victims]).repeat_interleave(rows.restarts)
        images: Tensor | None = None
        labels = costs.labels
        curves: list[list[float]] = [[] for _ in range(rows.count)]
        space: Space = self.space
        if isinstance(space, TextSpace):
            space = space.told(first.side, model)
        variables = {n: v.to(costs.device) for n, v in space.open(rows).items()}
        stage = 0
        while True:
            descent = self.descents[min(stage, len(self.descents) - 1)]
            for curve, more in zip(
                curves, descend(descent, costs, space, variables, seed, watch), strict=True
            ):
                curve.extend(more)
            if isinstance(space, TextSpace):
                space.moved(variables, costs, seed, stage)
            x, found, distances = costs.judged(space, variables)
            if images is None:
                images, labels = x.clone(), found.clone()
            better = (distances < best) & ~(best <= floors)
            if self.last_stage:
                better[:] = True
            images[better], labels[better], best[better] = x[better], found[better], distances[better]
            following = space.advance(variables, costs.labels)
            if following is None:
                break
            space, variables = following
            stage += 1
        seconds = (time.perf_counter() - started) / len(victims)
        results = []
        for place in range(0, rows.count, rows.restarts):
            own = best[place : place + rows.restarts]
            row = place + int(own.argmin())
            victim = victims[place // rows.restarts]
            told = {"restart": row - place, "costs": own.tolist(), **self._read(victim)}
            spent = costs.evaluations // len(victims)
            results.append(
                Reconstruction(
                    merged(images[row].cpu(), epochs),
                    labels[row].cpu()[: size // epochs],
                    float(best[row]),
                    spent,
                    seconds,
                    tuple(curves[row]),
                    told,
                )
            )
        return results

    def _terms(self) -> Terms:
        return Terms(
            OBJECTIVES.get(self.objective),
            self.objective_scale,
            self.priors,
            self.statistics,
            self.group,
            imitation_of(self.imitation),
            self.order,
        )

    def _floor(self, victim: _Victim) -> float:
        """Return the cosine distance to expect at the truth, from the noise in what was observed."""
        if not self.update_noise:
            return self.floor
        moved = moved_back(victim.observation)
        square = sum(float(v.double().square().sum()) for v in moved.values())
        share = self.update_noise**2 * sum(v.numel() for v in moved.values()) / square
        return max(self.floor, 1 - math.sqrt(max(0.0, 1 - share)))

    def _read(self, victim: _Victim) -> dict[str, Any]:
        found = imitation_of(self.imitation).read(victim.sent)
        return {"read": dict(found)} if found else {}


@dataclass(frozen=True)
class _Victim:
    """An observation, understood."""

    observation: Observation
    side: SideInfo
    module: nn.Module
    sent: Gradient
    """The gradient, or how far the parameters moved back."""
    steps: Steps
    labels: Tensor

    @property
    def key(self) -> tuple[Any, ...]:
        """What victims must have in common to be searched for together."""
        side, model = self.side, repr(self.observation.model)
        return len(self.labels), model, tuple(self.sent), self.steps, side.scale, side.normalisation

    @classmethod
    def of(cls, observation: Observation, side: SideInfo, attack: Inversion, seed: int) -> _Victim:
        module, size = observation.module(), batch_size(observation, side)
        steps = steps_of(observation, side, size)
        if attack.order is not None and steps.epochs > 1:
            steps = replace(steps, apart=True)
        if steps.plain:
            gradient = sent = gradient_of(observation, side)
        else:
            sent = moved_back(observation)
            gradient = mean_gradient(observation, sent, steps)
        if isinstance(attack.space, TextSpace):
            labels = bag(observation, gradient, size, side, seed)
        elif side.labels is not None:
            labels = side.labels
            require(len(labels) == size, f"{len(labels)} labels were given for a batch of {size}.")
        elif attack.joint:
            labels = torch.zeros(size, dtype=torch.int64)
        else:
            x = label_rules.dummies(observation.model.input_shape, side, seed)
            last = label_rules.last_layer(module, gradient, size, x)
            if not steps.plain:
                after = observation.model.build(0)
                after.load_state_dict({**observation.sent, **observation.returned})
                share = (steps.count - 1) / (2 * steps.count)
                last = label_rules.between(last, label_rules.last_layer(after, gradient, size, x), share)
            last = replace(last, smoothing=imitation_of(attack.imitation).smoothing)
            labels = label_rules.restore(attack.rule, last)
            if not steps.plain:
                labels = dealt(labels, len(steps.sizes))
        return cls(observation, side, module, sent, steps, labels)


def steps_of(observation: Observation, side: SideInfo, size: int) -> Steps:
    """Return the local training that an attacker imitates; raises ``ConfigError`` for one that it cannot."""
    local = side.local
    assert local is not None
    reason = why_inexact(observation, side)
    if reason is None:
        return Steps(local, (size,), 1)
    require(
        not observation.members,
        f"The update of {observation.who} cannot be attacked: {reason}, and of a mean over clients only single plain "
        "steps are imitated.",
    )
    examples = observation.examples or size
    count = local.steps_per_round(examples)
    plain = local.optimizer == "sgd" and not local.clip_norm and local.lr > 0
    if not plain or count == 1 or (local.persist and local.momentum and observation.round > 1):
        raise ConfigError(
            f"The update of {observation.who} cannot be attacked: {reason}, and only plain steps of SGD are "
            "imitated."
        )
    if count < local.batches_per_epoch(examples):
        raise ConfigError(
            f"The update of {observation.who} cannot be attacked: it comes from {count} steps that saw a "
            "part of the client's samples; only one step, or whole epochs, are imitated."
        )
    batch = min(local.batch_size or examples, examples)
    sizes = [batch] * (examples // batch) + (
        [examples % batch] if examples % batch and not local.drop_last else []
    )
    first = (observation.round - 1) * count
    return Steps(local, tuple(sizes), count, first, side.rounds or observation.round)


def moved_back(observation: Observation) -> Gradient:
    """Return ``w_t - w_k`` of the parameters that came back; raises ``ConfigError`` if it is 0 everywhere."""
    names = [n for n in parameter_names(observation.module()) if n in observation.returned]
    found = {n: observation.sent[n] - observation.returned[n] for n in names}
    if not any(bool(value.any()) for value in found.values()):
        raise ConfigError(f"The update of {observation.who} is 0 everywhere; it tells nothing.")
    return found


def mean_gradient(observation: Observation, moved: Gradient, steps: Steps) -> Gradient:
    """Return the mean gradient over the local steps, as they count in the update ``moved`` (``w_t - w_k``)."""
    total = sum(steps.weights())
    decay = steps.local.weight_decay
    found = {}
    for name, value in moved.items():
        middle = (observation.sent[name] + observation.returned[name]) / 2
        found[name] = value / total - decay * middle
    return found


def merged(x: Tensor, epochs: int) -> Tensor:
    """Return ``(N, ...)`` from ``(epochs * N, ...)``: every sample of the first epoch, averaged with its partners.

    Partners are those of a one-to-one assignment of least squared error, epoch by epoch.
    """
    if epochs == 1:
        return x
    from scipy.optimize import linear_sum_assignment

    first, *others = x.chunk(epochs)
    total = first.clone()
    for other in others:
        gaps = torch.cdist(first.flatten(1).double(), other.flatten(1).double()).square()
        _, columns = linear_sum_assignment(gaps.nan_to_num(nan=1e9).numpy())
        total += other[torch.from_numpy(columns)]
    return total / epochs


def dealt(labels: Tensor, batches: int) -> Tensor:
    """Return labels dealt out to the batches of an epoch in turn, so that each has a likely share of every class."""
    order = [i for first in range(batches) for i in range(first, len(labels), batches)]
    return labels[torch.tensor(order)]
