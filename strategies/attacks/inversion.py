"""Gradient inversion by optimisation: the one engine behind all such attacks.

Minimise over the variables v of a search space

    D(g(x(v), y), g*) + priors(x(v))

where g(x, y) is the gradient of the mean loss at the observed parameters, g* the observed one and D an objective. All
victims and restarts are one batch: their costs are computed by ``torch.func.vmap`` and every row moves by its own
gradient, so a batch finds what a loop over victims finds. The restart and stage that is reported is the one of least D
at the clamped images, without priors: nothing that the attacker cannot see takes part in the choice.
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.nn import functional as F

from flowerbed import seeds
from flowerbed.errors import ConfigError, require
from flowerbed.models.base import parameter_names
from flowerbed.strategies.attacks import labels as label_rules
from flowerbed.strategies.attacks.objectives import OBJECTIVES, Objective, masked
from flowerbed.strategies.attacks.observation import (
    Gradient,
    Observation,
    Reconstruction,
    SideInfo,
    batch_size,
    gradient_of,
)
from flowerbed.strategies.attacks.priors import BatchStatistics, group_gap
from flowerbed.strategies.attacks.spaces import LABELS, Pixels, Rows, Space, Variables, clamped

SIGNS = ("none", "hard", "soft")
METHODS = ("adam", "lbfgs", "cma")
IMITATIONS = ("none", "mask", "sign")
SCHEDULES = ("constant", "steps", "cosine", "ilo")
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
SHARPNESS = 3.0
"""Of the soft sign: what is a third of the root mean square has 0.76."""
CURVE = 100
"""Points of a cost curve."""
Prior = Callable[[Tensor], Tensor]
Watch = Callable[[int, int], None]
"""Called with the steps made and those of the whole attack."""


@dataclass(frozen=True)
class Descent:
    """How the variables move."""

    steps: int = 1000
    lr: float = 0.1
    method: str = "adam"
    """adam; lbfgs, row by row, 20 inner steps each; cma, CMA-ES, row by row, ``population`` costs a step and no
    gradient."""
    sign: str = "none"
    """What Adam sees of the gradient: none (itself), hard (its sign), soft (its tanh)."""
    schedule: str = "constant"
    """constant; steps: a tenth after 3/8, 5/8 and 7/8; cosine: towards 0; ilo: up over a twentieth of the steps, level
    to a quarter, then a cosine to 0 (Daras et al. 2021, as GIFD has it)."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly."""
    noise: float = 0.0
    """Langevin noise: normal numbers times this and the learning rate, after each step."""
    clip: float = 0.0
    """Largest norm of a row's gradient; 0 is none."""
    population: int = 50
    """Of CMA-ES."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"attack.steps is {self.steps}; give at least 1.")
        require(self.lr > 0, f"attack.lr is {self.lr}; give a number above 0.")
        for name, value, known in (
            ("method", self.method, METHODS),
            ("sign", self.sign, SIGNS),
            ("schedule", self.schedule, SCHEDULES),
        ):
            require(value in known, f"attack.{name} is '{value}'; choose from {', '.join(known)}.")

    def lr_at(self, step: int) -> float:
        """Return the learning rate of step ``step``, from 0."""
        lr = self.lr * min(1.0, (step + 1) / self.warmup) if self.warmup else self.lr
        if self.schedule == "steps":
            return lr * 0.1 ** sum(step >= self.steps * part / 8 for part in (3, 5, 7))
        if self.schedule == "ilo":
            done = step / self.steps
            ramp = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - done) / 0.75))
            return lr * ramp * min(1.0, done / 0.05)
        if self.schedule == "cosine":
            return lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return lr


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
    descents: tuple[Descent, ...] = (Descent(),)
    """One for each stage of the space; the last one goes on for those that follow."""
    rule: str = "count"
    """How labels are restored where they are not given: a label rule."""
    imitation: str = "none"
    """What of a defence the attacker repeats on its candidates: mask, entries that are 0 in the observed gradient take
    no part (pruning, top-k, Soteria); sign, a soft sign of the candidate's gradient."""
    floor: float = 0.0
    """D as the attacker expects it at the truth, from noise that it knows of: the first stage that gets there is the
    last that counts (a discrepancy rule)."""
    restarts: int = 1
    chunk: int = 0
    """Rows computed at a time; 0 means all of them."""

    def __post_init__(self) -> None:
        require(self.restarts >= 1, f"attack.restarts is {self.restarts}; give at least 1.")
        require(self.chunk >= 0, f"attack.chunk is {self.chunk}; give 0 (all rows) or more.")
        require(self.floor >= 0, f"attack.floor is {self.floor}; give 0 (none) or more.")
        require(
            self.imitation in IMITATIONS,
            f"attack.imitation is '{self.imitation}'; choose from {', '.join(IMITATIONS)}.",
        )
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

        Raises ``ConfigError`` for an update that is no gradient, an unknown batch size, or a model that does not fit.
        """
        device = device or torch.device("cpu")
        for _, side in cases:
            side.demand(self.name, "local")
        victims = [_Victim.of(seen, side, self.rule, seed, joint=self._joint) for seen, side in cases]
        found: dict[int, Reconstruction] = {}
        # Victims with as many samples, of one model, are searched for together.
        for key in dict.fromkeys(victim.group for victim in victims):
            members = [i for i, victim in enumerate(victims) if victim.group == key]
            search = _Search(self, [victims[i] for i in members], seed, device, watch)
            found.update(zip(members, search.run(), strict=True))
        return [found[i] for i in range(len(victims))]

    @property
    def _joint(self) -> bool:
        return isinstance(self.space, Pixels) and self.space.labels


@dataclass(frozen=True)
class _Victim:
    """An observation, understood."""

    observation: Observation
    side: SideInfo
    module: nn.Module
    gradient: Gradient
    labels: Tensor

    @property
    def group(self) -> tuple[Any, ...]:
        """What victims must have in common to be searched for together."""
        side = self.side
        return (
            len(self.labels),
            repr(self.observation.model),
            tuple(self.gradient),
            side.scale,
            side.normalisation,
        )

    @classmethod
    def of(cls, observation: Observation, side: SideInfo, rule: str, seed: int, *, joint: bool) -> _Victim:
        module = observation.module()
        gradient = gradient_of(observation, side)
        size = batch_size(observation, side)
        if side.labels is not None:
            labels = side.labels
            require(len(labels) == size, f"{len(labels)} labels were given for a batch of {size}.")
        elif joint:
            labels = torch.zeros(size, dtype=torch.int64)
        else:
            x = label_rules.dummies(observation.model.input_shape, side, seed)
            labels = label_rules.restore(rule, label_rules.last_layer(module, gradient, size, x))
        return cls(observation, side, module, gradient, labels)


class _Search:
    """One attack on victims with the same number of samples."""

    def __init__(
        self,
        attack: Inversion,
        victims: Sequence[_Victim],
        seed: int,
        device: torch.device,
        watch: Watch | None,
    ) -> None:
        self._attack, self._victims, self._device = attack, victims, device
        self._watch, self._seed = watch, seed
        model = victims[0].observation.model
        self._module = copy.deepcopy(victims[0].module).to(device).eval()
        side = victims[0].side
        if side.normalisation == "train":
            _use_batch_statistics(self._module)
        if not all(p.is_floating_point() for p in self._module.parameters()):
            raise ConfigError(
                "A model with parameters that are no floating numbers has no gradient to match."
            )
        self._rows = Rows(
            len(victims), attack.restarts, len(victims[0].labels), model.input_shape, model.num_classes,
            side.scale, seed,
        )  # fmt: skip
        own = set(parameter_names(self._module))
        states = [victim.module.state_dict() for victim in victims]
        alike = all(torch.equal(state[n], value) for state in states[1:] for n, value in states[0].items())
        # Victims of one round have one model; it is not copied for each.
        self._axis = None if alike else 0
        given = states[0] if alike else self._stacked(states)
        self._parameters = {n: v.to(device) for n, v in given.items() if n in own}
        # What a module lacks (statistics that it does not use) cannot be given to it.
        kept = self._module.state_dict()
        self._buffers = {n: v.to(device) for n, v in given.items() if n not in own and n in kept}
        self._observed = self._stacked([victim.gradient for victim in victims])
        self._labels = self._repeated(torch.stack([victim.labels for victim in victims]))
        self._objective: Objective = OBJECTIVES.get(attack.objective)
        self.evaluations = 0

    def run(self) -> list[Reconstruction]:
        """Return the best of all stages and restarts for each victim."""
        started, count = time.perf_counter(), self._rows.count
        best = torch.full((count,), math.inf)
        images: Tensor | None = None
        found_labels = self._labels.clone()
        curves: list[list[float]] = [[] for _ in range(count)]
        space: Space = self._attack.space
        variables = {n: v.to(self._device) for n, v in space.open(self._rows).items()}
        stage = 0
        while True:
            descent = self._attack.descents[min(stage, len(self._attack.descents) - 1)]
            move = {"lbfgs": self._lbfgs, "cma": self._cma}.get(descent.method, self._adam)
            move(space, variables, descent, curves)
            x, labels, costs = self._judged(space, variables)
            images = x if images is None else images
            better = (costs < best) & ~(best <= self._attack.floor)
            images[better], found_labels[better], best[better] = x[better], labels[better], costs[better]
            following = space.advance(variables, self._labels)
            if following is None:
                break
            space, variables = following
            stage += 1
        seconds = (time.perf_counter() - started) / len(self._victims)
        results = []
        for victim in range(self._rows.victims):
            first = victim * self._rows.restarts
            costs_of = best[first : first + self._rows.restarts]
            row = first + int(costs_of.argmin())
            results.append(
                Reconstruction(
                    images[row].cpu(),
                    found_labels[row].cpu(),
                    float(best[row]),
                    self.evaluations // len(self._victims),
                    seconds,
                    tuple(curves[row]),
                    {"restart": row - first, "costs": costs_of.tolist()},
                )
            )
        return results

    # The cost of a row.

    def _cost(
        self,
        space: Space,
        variables: Mapping[str, Tensor],
        fixed: Mapping[str, Tensor],
        labels: Tensor,
        observed: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return a row's cost with priors, and D alone."""
        x = space.decode({**variables, **fixed}, labels)
        targets = variables[LABELS].softmax(-1) if LABELS in variables else labels
        candidate, layers = self._gradient(parameters, buffers, x, targets)
        distance = self._distance(candidate, observed) * self._attack.objective_scale
        total = distance + space.penalty(variables)
        for prior in self._attack.priors:
            total = total + prior(x)
        if self._attack.statistics is not None:
            total = total + self._attack.statistics.of(layers)
        return total, distance

    def _distance(self, candidate: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
        """Return D, the candidate treated as the client's defence is known to have treated the observed one."""
        objective = self._objective
        if self._attack.imitation == "mask":
            objective = masked(objective, {n: (v != 0).to(v.dtype) for n, v in observed.items()})
        elif self._attack.imitation == "sign":
            candidate = {n: (v * SHARPNESS / _rms(v)).tanh() for n, v in candidate.items()}
        return objective(candidate, observed)

    def _gradient(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x: Tensor, targets: Tensor
    ) -> tuple[Gradient, list[tuple[nn.Module, Tensor]]]:
        """Return the gradient of the mean loss, and the inputs of all batch norms if a prior wants them."""
        norms = [m for m in self._module.modules() if isinstance(m, NORMS)]
        wanted = norms if self._attack.statistics is not None else []

        def loss(moving: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
            seen: list[Tensor] = []
            handles = [m.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for m in wanted]
            try:
                outputs = functional_call(self._module, {**moving, **buffers}, (x,))
            finally:
                for handle in handles:
                    handle.remove()
            return F.cross_entropy(outputs, targets), seen

        found, seen = grad(loss, has_aux=True)(dict(parameters))
        return found, list(zip(wanted, seen, strict=True))

    # All rows.

    def _descend(self, space: Space, variables: Variables) -> tuple[Variables, Tensor]:
        """Return every row's gradient and D."""

        computed = vmap(
            grad_and_value(functools.partial(self._cost, space), has_aux=True),
            in_dims=(0, 0, 0, 0, self._axis, self._axis),
            chunk_size=self._attack.chunk or None,
        )
        found, (_, distances) = computed(
            variables, space.fixed, self._labels, self._observed, self._parameters, self._buffers
        )
        self.evaluations += self._rows.count
        if self._attack.group:
            self._add_group(space, variables, found)
        return found, distances

    def _add_group(self, space: Space, variables: Variables, found: Variables) -> None:
        moving = {n: v.detach().requires_grad_() for n, v in variables.items()}
        x = vmap(space.decode)({**moving, **space.fixed}, self._labels)
        grouped = x.view(self._rows.victims, self._rows.restarts, *x.shape[1:])
        gap = group_gap(grouped, self._attack.group)
        gradients = torch.autograd.grad(gap, list(moving.values()), allow_unused=True)
        for name, gradient in zip(moving, gradients, strict=True):
            if gradient is not None:
                found[name] = found[name] + gradient

    def _adam(self, space: Space, variables: Variables, descent: Descent, curves: list[list[float]]) -> None:
        optimizer = torch.optim.Adam(list(variables.values()), lr=descent.lr)
        rng = seeds.torch_rng(self._seed, "attack noise", device=self._device.type)
        every = max(1, descent.steps // CURVE)
        for step in range(descent.steps):
            gradients, distances = self._descend(space, variables)
            for name, value in variables.items():
                value.grad = _seen(gradients[name].detach(), descent)
            lr = descent.lr_at(step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            with torch.no_grad():
                if descent.noise:
                    for value in variables.values():
                        value.add_(
                            torch.randn(value.shape, generator=rng, device=value.device),
                            alpha=descent.noise * lr,
                        )
                space.constrain(variables, self._rows)
            if step % every == 0 or step + 1 == descent.steps:
                for curve, distance in zip(curves, distances.tolist(), strict=True):
                    curve.append(distance)
            if self._watch is not None:
                self._watch(step + 1, descent.steps)

    def _lbfgs(self, space: Space, variables: Variables, descent: Descent, curves: list[list[float]]) -> None:
        """Move every row by itself: a line search goes its own way in each."""
        for row in range(self._rows.count):
            own = {n: v[row].clone().requires_grad_() for n, v in variables.items()}
            given = ({n: v[row] for n, v in space.fixed.items()}, *self._row(row))
            optimizer = torch.optim.LBFGS(list(own.values()), lr=descent.lr)
            last = math.inf

            def closure(own: Variables = own, given: tuple = given) -> Tensor:  # type: ignore[type-arg]
                nonlocal last
                total, distance = self._cost(space, own, *given)
                gradients = torch.autograd.grad(total, list(own.values()))
                for value, gradient in zip(own.values(), gradients, strict=True):
                    value.grad = gradient
                self.evaluations += 1
                last = float(distance.detach())
                return total.detach()

            for step in range(descent.steps):
                optimizer.step(closure)  # type: ignore[no-untyped-call]
                with torch.no_grad():
                    space.constrain({n: v.data[None] for n, v in own.items()}, self._rows)
                curves[row].append(last)
                if not math.isfinite(last):
                    break
                if self._watch is not None:
                    self._watch(row * descent.steps + step + 1, self._rows.count * descent.steps)
            for name, value in own.items():
                variables[name][row] = value.detach()

    @torch.no_grad()
    def _cma(self, space: Space, variables: Variables, descent: Descent, curves: list[list[float]]) -> None:
        """Move every row by CMA-ES, whose candidates are computed together."""
        cma = _library()
        for row in range(self._rows.count):
            own = {n: v[row] for n, v in variables.items()}
            given = ({n: v[row] for n, v in space.fixed.items()}, *self._row(row))
            sizes = [v.numel() for v in own.values()]

            def unpacked(flat: Tensor, own: Variables = own, sizes: list[int] = sizes) -> Variables:
                pieces = torch.split(flat, sizes, -1)
                return {
                    n: p.view(*flat.shape[:-1], *v.shape)
                    for (n, v), p in zip(own.items(), pieces, strict=True)
                }

            cost = vmap(functools.partial(self._cost, space), in_dims=(0, *[None] * len(given)))
            number = int(seeds.seed_sequence(self._seed, "cma", row).generate_state(1)[0]) or 1
            start = torch.cat([v.flatten() for v in own.values()]).double().cpu().numpy()
            search = cma.CMAEvolutionStrategy(
                start, descent.lr, {"popsize": descent.population, "seed": number, "verbose": -9}
            )
            for step in range(descent.steps):
                asked = search.ask()
                stacked = torch.stack([torch.from_numpy(a) for a in asked]).float().to(self._device)
                totals, distances = cost(unpacked(stacked), *given)
                self.evaluations += len(asked)
                search.tell(asked, totals.nan_to_num(nan=math.inf).tolist())
                curves[row].append(float(distances.min()))
                if self._watch is not None:
                    self._watch(row * descent.steps + step + 1, self._rows.count * descent.steps)
            best = torch.from_numpy(search.result.xbest).float().to(self._device)
            for name, value in unpacked(best).items():
                variables[name][row] = value

    @torch.no_grad()
    def _judged(self, space: Space, variables: Variables) -> tuple[Tensor, Tensor, Tensor]:
        """Return the samples of all rows, clamped, their labels, and D there; what is not finite costs infinity."""
        x = vmap(space.decode)({**variables, **space.fixed}, self._labels)
        if len(self._rows.shape) == 3:
            x = clamped(x, self._rows.scale)
        labels = variables[LABELS].argmax(-1) if LABELS in variables else self._labels
        judge = Pixels()
        costs = []
        for row in range(self._rows.count):
            own = {"x": x[row], **({LABELS: variables[LABELS][row]} if LABELS in variables else {})}
            _, distance = self._cost(judge, own, {}, *self._row(row))
            costs.append(float(distance))
        self.evaluations += self._rows.count
        found = torch.tensor(costs).nan_to_num(nan=math.inf, posinf=math.inf)
        return x.detach(), labels, found

    def _row(self, row: int) -> tuple[Tensor, Variables, Variables, Variables]:
        """Return what the cost of a row depends on beside its variables."""
        observed = {n: v[row] for n, v in self._observed.items()}
        if self._axis is None:
            return self._labels[row], observed, self._parameters, self._buffers
        parameters = {n: v[row] for n, v in self._parameters.items()}
        return self._labels[row], observed, parameters, {n: v[row] for n, v in self._buffers.items()}

    def _stacked(self, groups: Sequence[Mapping[str, Tensor]]) -> Variables:
        """Return the tensors of all victims with one entry a row."""
        return {name: self._repeated(torch.stack([g[name] for g in groups])) for name in groups[0]}

    def _repeated(self, by_victim: Tensor) -> Tensor:
        return by_victim.to(self._device).repeat_interleave(self._rows.restarts, 0)


def _seen(gradient: Tensor, descent: Descent) -> Tensor:
    """Return what the optimizer sees of a gradient of all rows."""
    if descent.clip:
        sizes = gradient.flatten(1).norm(dim=1).view(-1, *[1] * (gradient.ndim - 1))
        gradient = gradient * (descent.clip / sizes.clamp(min=1e-12)).clamp(max=1)
    if descent.sign == "hard":
        return gradient.sign()
    return gradient.tanh() if descent.sign == "soft" else gradient


def _use_batch_statistics(module: nn.Module) -> None:
    """Let batch norms use the statistics of the batch, and remember nothing."""
    for layer in module.modules():
        if isinstance(layer, NORMS):
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None


def _rms(v: Tensor) -> Tensor:
    """Return the root mean square, a constant for the derivative."""
    return v.detach().square().mean().add(1e-24).sqrt()


def _library() -> Any:
    try:
        import cma
    except ImportError as error:
        raise ConfigError(
            "attack.method=cma searches with the package 'cma'; install flowerbed[attacks]."
        ) from error
    return cma
