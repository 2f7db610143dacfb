"""How variables move: Adam on all rows at once, L-BFGS and CMA-ES row by row."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from flowerbed import seeds
from flowerbed.errors import ConfigError, require
from flowerbed.strategies.attacks.costs import Costs, Given
from flowerbed.strategies.attacks.spaces import Space, Variables

SIGNS = ("none", "hard", "soft")
METHODS = ("adam", "lbfgs", "cma")
SCHEDULES = ("constant", "steps", "cosine", "ilo")
CURVE = 100
"""Points of a cost curve."""
Watch = Callable[[int, int], None]
"""Called with the steps made and those of the whole stage."""


@dataclass(frozen=True)
class Descent:
    """How the variables move in a stage."""

    steps: int = 1000
    lr: float = 0.1
    """Learning rate; where CMA-ES begins, its standard deviation."""
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
        require(self.population >= 4, f"attack.population is {self.population}; give at least 4.")
        for name, value, known in (
            ("method", self.method, METHODS),
            ("sign", self.sign, SIGNS),
            ("schedule", self.schedule, SCHEDULES),
        ):
            require(value in known, f"attack.{name} is '{value}'; choose from {', '.join(known)}.")

    def lr_at(self, step: int) -> float:
        """Return the learning rate of step ``step``, from 0."""
        done = step / self.steps
        if self.schedule == "ilo":
            ramp = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - done) / 0.75))
            return self.lr * ramp * min(1.0, done / 0.05)
        lr = self.lr * min(1.0, (step + 1) / self.warmup) if self.warmup else self.lr
        if self.schedule == "steps":
            return lr * 0.1 ** sum(done >= part / 8 for part in (3, 5, 7))
        if self.schedule == "cosine":
            return lr * 0.5 * (1 + math.cos(math.pi * done))
        return lr


def descend(
    descent: Descent, costs: Costs, space: Space, variables: Variables, seed: int, watch: Watch | None = None
) -> list[list[float]]:
    """Move the variables of all rows, in place, and return D on the way, by row."""
    curves: list[list[float]] = [[] for _ in range(costs.rows.count)]
    seen = watch or _nobody
    if descent.method == "adam":
        _adam(descent, costs, space, variables, seed, curves, seen)
    else:
        move = _lbfgs if descent.method == "lbfgs" else functools.partial(_cma, seed=seed)
        whole = costs.rows.count * descent.steps
        for row, curve in enumerate(curves):
            own = {n: v[row].detach().clone() for n, v in variables.items()}
            shown = functools.partial(_shifted, seen, row * descent.steps, whole)
            move(descent, costs, space, own, row, curve, shown)
            for name, value in own.items():
                variables[name][row] = value.detach()
    return curves


def _adam(
    descent: Descent,
    costs: Costs,
    space: Space,
    variables: Variables,
    seed: int,
    curves: list[list[float]],
    watch: Watch,
) -> None:
    """Move all rows at once; Adam knows no other entry than its own, so each row goes its own way."""
    optimizer = torch.optim.Adam(list(variables.values()), lr=descent.lr)
    rng = seeds.torch_rng(seed, "attack noise", device=costs.device.type)
    every = max(1, descent.steps // CURVE)
    for step in range(descent.steps):
        gradients, distances = costs.gradients(space, variables)
        for name, value in variables.items():
            value.grad = _seen(gradients[name].detach(), descent)
        lr = descent.lr_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        with torch.no_grad():
            if descent.noise:
                for value in variables.values():
                    drawn = torch.randn(value.shape, generator=rng, device=value.device)
                    value.add_(drawn, alpha=descent.noise * lr)
            space.constrain(variables, costs.rows)
        if step % every == 0 or step + 1 == descent.steps:
            for curve, distance in zip(curves, distances.tolist(), strict=True):
                curve.append(distance)
        watch(step + 1, descent.steps)


def _lbfgs(
    descent: Descent,
    costs: Costs,
    space: Space,
    own: Variables,
    row: int,
    curve: list[float],
    watch: Callable[[int], None],
) -> None:
    """Move one row; it ends early where its cost is not finite."""
    given: Given = costs.row(space, row)
    for value in own.values():
        value.requires_grad_()
    optimizer = torch.optim.LBFGS(list(own.values()), lr=descent.lr)
    last = math.inf

    def closure() -> Tensor:
        nonlocal last
        total, distance = costs.of(space, own, *given)
        for value, gradient in zip(own.values(), torch.autograd.grad(total, list(own.values())), strict=True):
            value.grad = gradient
        costs.count(1)
        last = float(distance.detach())
        return total.detach()

    for step in range(descent.steps):
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        space.constrain({n: v.data[None] for n, v in own.items()}, costs.rows)
        curve.append(last)
        watch(step + 1)
        if not math.isfinite(last):
            break


@torch.no_grad()
def _cma(
    descent: Descent,
    costs: Costs,
    space: Space,
    own: Variables,
    row: int,
    curve: list[float],
    watch: Callable[[int], None],
    seed: int,
) -> None:
    """Move one row to the best of all candidates, which are computed a population at a time."""
    cma, given = _library(), costs.row(space, row)
    sizes = [v.numel() for v in own.values()]

    def unpacked(flat: Tensor) -> Variables:
        pieces = torch.split(flat, sizes, -1)
        return {n: p.view(*flat.shape[:-1], *v.shape) for (n, v), p in zip(own.items(), pieces, strict=True)}

    cost = vmap(functools.partial(costs.of, space), in_dims=(0, *[None] * len(given)))
    number = int(seeds.seed_sequence(seed, "cma", row).generate_state(1)[0]) or 1
    start = torch.cat([v.flatten() for v in own.values()]).double().cpu().numpy()
    search = cma.CMAEvolutionStrategy(
        start, descent.lr, {"popsize": descent.population, "seed": number, "verbose": -9}
    )
    for step in range(descent.steps):
        asked = search.ask()
        stacked = torch.stack([torch.from_numpy(a) for a in asked]).float().to(costs.device)
        totals, distances = cost(unpacked(stacked), *given)
        costs.count(len(asked))
        search.tell(asked, totals.nan_to_num(nan=math.inf).tolist())
        curve.append(float(distances.min()))
        watch(step + 1)
    own.update(unpacked(torch.from_numpy(search.result.xbest).float().to(costs.device)))


def _seen(gradient: Tensor, descent: Descent) -> Tensor:
    """Return what the optimizer sees of a gradient of all rows."""
    if descent.clip:
        sizes = gradient.flatten(1).norm(dim=1).view(-1, *[1] * (gradient.ndim - 1))
        gradient = gradient * (descent.clip / sizes.clamp(min=1e-12)).clamp(max=1)
    if descent.sign == "hard":
        return gradient.sign()
    return gradient.tanh() if descent.sign == "soft" else gradient


def _shifted(watch: Watch, done: int, whole: int, step: int) -> None:
    """Tell ``watch`` of a step of one row among those of all."""
    watch(done + step, whole)


def _nobody(step: int, steps: int) -> None:
    """Watch nothing."""


def _library() -> Any:
    try:
        import cma
    except ImportError as error:
        raise ConfigError(
            "attack.method=cma searches with the package 'cma'; install flowerbed[attacks]."
        ) from error
    return cma
