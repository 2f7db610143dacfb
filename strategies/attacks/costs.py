"""The cost of candidates for several victims at once, and what it costs to know it."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from flowerbed.errors import ConfigError
from flowerbed.models.base import parameter_names
from flowerbed.models.bottleneck import BOTTLENECK
from flowerbed.storage import Tensors
from flowerbed.strategies.attacks import candidates
from flowerbed.strategies.attacks.candidates import Steps
from flowerbed.strategies.attacks.imitations import Imitation
from flowerbed.strategies.attacks.objectives import Objective
from flowerbed.strategies.attacks.observation import Gradient
from flowerbed.strategies.attacks.priors import BatchStatistics, SameSamples, group_gap
from flowerbed.strategies.attacks.spaces import LABELS, NOISE, Pixels, Rows, Space, Variables, X, clamped
from flowerbed.strategies.attacks.text import TextSpace, take_distributions

BOTTLENECK_NOISE = f"{BOTTLENECK}.noise"
Prior = Callable[[Tensor], Tensor]
Given = tuple[Variables, Tensor, Variables, Variables, Variables]
"""What a row's cost depends on beside its variables: fixed ones, labels, observed, parameters, buffers."""


@dataclass(frozen=True)
class Terms:
    """What is added up."""

    objective: Objective
    scale: float
    """Of the objective."""
    priors: Sequence[Prior]
    statistics: BatchStatistics | None
    group: float
    imitation: Imitation
    order: SameSamples | None = None
    """What ties epochs that have samples of their own."""


class Costs:
    """Costs and gradients of all rows; ``evaluations`` counts the gradients of the victims' model."""

    def __init__(
        self,
        terms: Terms,
        rows: Rows,
        module: nn.Module,
        states: Sequence[Tensors],
        observed: Sequence[Gradient],
        labels: Sequence[Tensor],
        steps: Steps,
        *,
        batch_statistics: bool,
        chunk: int,
        device: torch.device,
    ) -> None:
        """``states``, ``observed`` and ``labels`` are by victim; ``batch_statistics`` is how batch norms run."""
        if not all(p.is_floating_point() for p in module.parameters()):
            raise ConfigError(
                "A model with parameters that are no floating numbers has no gradient to match."
            )
        self.rows, self.evaluations, self.device = rows, 0, device
        self._terms, self._steps, self._chunk = terms, steps, chunk
        self._module = copy.deepcopy(module).to(device).eval()
        take_distributions(self._module)
        # Torch's recurrent layers have no rule for vmap.
        self.loops = any(isinstance(part, nn.RNNBase) for part in self._module.modules())
        if batch_statistics:
            candidates.use_batch_statistics(self._module)
        self._watched = candidates.batch_norms(self._module) if terms.statistics is not None else []
        own, kept = set(parameter_names(self._module)), self._module.state_dict()
        alike = all(torch.equal(state[n], value) for state in states[1:] for n, value in states[0].items())
        # Victims of one round have one model; it is not copied for each.
        self._axis = None if alike else 0
        given = states[0] if alike else self._stacked(states)
        self._parameters = {n: v.to(device) for n, v in given.items() if n in own}
        # What a module lacks (statistics that it does not use) cannot be given to it.
        self._buffers = {n: v.to(device) for n, v in given.items() if n not in own and n in kept}
        self._observed = self._stacked(observed)
        self.labels = self._repeated(torch.stack(list(labels)))

    def of(
        self,
        space: Space,
        variables: Mapping[str, Tensor],
        fixed: Mapping[str, Tensor],
        labels: Tensor,
        observed: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return a row's cost with priors, and D alone. Pure, but for what ``evaluations`` counts elsewhere."""
        x = space.decode({**variables, **fixed}, labels)
        imitation = self._terms.imitation
        if isinstance(space, TextSpace):
            targets = space.targets({**variables, **fixed}, labels)
        else:
            targets = variables[LABELS].softmax(-1) if LABELS in variables else labels
        targets = imitation.targets(targets, self.rows.classes)
        if NOISE in variables:
            buffers = {**buffers, BOTTLENECK_NOISE: variables[NOISE]}
        given = (self._module, parameters, buffers, x, targets)
        if self._steps.plain:
            candidate, layers = candidates.gradient(*given, self._watched, imitation.example_clip)
        else:
            candidate, layers = candidates.update(*given, self._steps, self._watched, imitation.example_clip)
        distance = self._terms.objective(*imitation.compared(candidate, observed)) * self._terms.scale
        total = distance + space.penalty(variables)
        for prior in self._terms.priors:
            total = total + prior(x)
        if self._terms.order is not None and self._steps.apart:
            total = total + self._terms.order(x, self._steps.epochs)
        if self._terms.statistics is not None:
            total = total + self._terms.statistics.of(layers)
        return total, distance

    def row(self, space: Space, row: int) -> Given:
        """Return what the cost of a row depends on beside its variables."""
        fixed = {n: v[row] for n, v in space.fixed.items()}
        observed = {n: v[row] for n, v in self._observed.items()}
        if self._axis is None:
            return fixed, self.labels[row], observed, self._parameters, self._buffers
        own, buffers = ({n: v[row] for n, v in g.items()} for g in (self._parameters, self._buffers))
        return fixed, self.labels[row], observed, own, buffers

    def count(self, candidates_computed: int) -> None:
        """Count gradients of the victims' model: one for every local step of every candidate."""
        self.evaluations += candidates_computed * self._steps.count

    def gradients(self, space: Space, variables: Variables) -> tuple[Variables, Tensor]:
        """Return every row's gradient by its variables, and every row's D."""
        one = grad_and_value(functools.partial(self.of, space), has_aux=True)
        if self.loops:
            rows = [
                one({n: v[row] for n, v in variables.items()}, *self.row(space, row))
                for row in range(self.rows.count)
            ]
            found = {n: torch.stack([gradients[n] for gradients, _ in rows]) for n in variables}
            distances = torch.stack([distance for _, (_, distance) in rows])
        else:
            computed = vmap(one, in_dims=(0, 0, 0, 0, self._axis, self._axis), chunk_size=self._chunk or None)
            found, (_, distances) = computed(
                variables, space.fixed, self.labels, self._observed, self._parameters, self._buffers
            )
        self.count(self.rows.count)
        if self._terms.group:
            self._add_group(space, variables, found)
        return found, distances

    def _add_group(self, space: Space, variables: Variables, found: Variables) -> None:
        moving = {n: v.detach().requires_grad_() for n, v in variables.items()}
        x = self.decoded(space, moving)
        grouped = x.view(self.rows.victims, self.rows.restarts, *x.shape[1:])
        gap = group_gap(grouped, self._terms.group)
        gradients = torch.autograd.grad(gap, list(moving.values()), allow_unused=True)
        for name, gradient in zip(moving, gradients, strict=True):
            if gradient is not None:
                found[name] = found[name] + gradient

    def decoded(self, space: Space, variables: Variables) -> Tensor:
        """Return the samples of all rows, ``(rows, B, ...)``."""
        found: Tensor = vmap(space.decode)({**variables, **space.fixed}, self.labels)
        return found

    @torch.no_grad()
    def judged(self, space: Space, variables: Variables) -> tuple[Tensor, Tensor, Tensor]:
        """Return the samples of all rows, clamped, their labels, and D there; what is not finite costs infinity."""
        beside = {n: variables[n] for n in (LABELS, NOISE) if n in variables}
        if isinstance(space, TextSpace):
            tokens: Tensor = vmap(space.settled)({**variables, **space.fixed}, self.labels)
            x, labels = tokens[..., :-1], tokens[..., 1:]
        else:
            x = self.decoded(space, variables)
            if len(self.rows.shape) == 3 and not (isinstance(space, Pixels) and space.encoded):
                x = clamped(x, self.rows.scale)
            labels = beside[LABELS].argmax(-1) if LABELS in beside else self.labels
        judge, costs = Pixels(), []
        for row in range(self.rows.count):
            own = {X: x[row], **{n: v[row] for n, v in beside.items()}}
            fixed, _, *others = self.row(judge, row)
            _, distance = self.of(judge, own, fixed, labels[row], *others)
            costs.append(float(distance))
        self.count(self.rows.count)
        found = torch.tensor(costs).nan_to_num(nan=math.inf, posinf=math.inf)
        return x.detach(), labels, found

    def _stacked(self, groups: Sequence[Mapping[str, Tensor]]) -> Variables:
        """Return the tensors of all victims with one entry a row."""
        return {name: self._repeated(torch.stack([g[name] for g in groups])) for name in groups[0]}

    def _repeated(self, by_victim: Tensor) -> Tensor:
        return by_victim.to(self.device).repeat_interleave(self.rows.restarts, 0)
