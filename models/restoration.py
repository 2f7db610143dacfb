"""Restoring images from measurements: the problem, descent on an image, and solvers of others to compare with.

The solvers take as many calls of the network as they have steps; all see the measurement, the operator and the prior,
and none the truth.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from flowerbed.models.diffusion import DiffusionPrior, ddim_step
from flowerbed.models.inverse import Operator, psnr

BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Problem:
    """Images that were measured."""

    prior: DiffusionPrior
    operator: Operator
    y: Tensor
    truth: Tensor
    """For judging, and for nothing else."""

    @classmethod
    def measured(
        cls,
        prior: DiffusionPrior,
        operator: Operator,
        truth: Tensor,
        sigma_v: float,
        generator: torch.Generator,
    ) -> Problem:
        """Measure images with noise of standard deviation ``sigma_v``."""
        y = operator(truth)
        noise = torch.randn(y.shape, generator=generator, device=y.device)
        # What a mask does not see has no noise either.
        seen = operator(torch.ones_like(truth)) != 0
        return cls(prior, operator, y + sigma_v * noise * seen, truth)

    @property
    def start(self) -> Tensor:
        """H^+ y."""
        return self.operator.inverse(self.y)

    def judged(self, found: Tensor) -> Tensor:
        """Return the PSNR of every image on what was not seen, ``(B,)``."""
        return psnr(found, self.truth, self.operator.hidden(self.truth))


class Adam:
    """Adam on an image, with betas 0.9 and 0.99; elementwise, so that the images of a batch do not touch."""

    def __init__(self, lr: float, state: dict[str, Tensor] | None = None) -> None:
        """``state`` is that of an earlier one, to go on with."""
        self.lr, self.state = lr, state or {}

    def step(self, mu: Tensor, gradient: Tensor) -> Tensor:
        """Return mu after one step."""
        if not self.state:
            zero = torch.zeros_like(mu)
            self.state = {"m": zero, "v": zero, "t": torch.zeros((), dtype=torch.float64)}
        first, second = BETAS
        t = self.state["t"] + 1
        m = first * self.state["m"] + (1 - first) * gradient
        v = second * self.state["v"] + (1 - second) * gradient**2
        self.state = {"m": m, "v": v, "t": t}
        first, second = 1 - first ** float(t), 1 - second ** float(t)
        moved: Tensor = mu - self.lr / first * m / ((v / second).sqrt() + 1e-8)
        return moved


def data_gradient(operator: Operator, y: Tensor, mu: Tensor) -> Tensor:
    """Return the gradient of |y - H(mu)|^2 / 2 for each image, by autograd, so that H need not be linear."""
    with torch.enable_grad():
        x = mu.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(((y - operator(x)) ** 2).sum() / 2, x)
    return gradient


def dps(problem: Problem, generator: torch.Generator, *, steps: int, zeta: float, eta: float) -> Tensor:
    """Return posterior samples: the step of DDIM less ``zeta`` grad_{x_t} |y - H xhat|^2 / |y - H xhat|.

    Chung et al., ICLR 2023; the gradient goes through the network. It starts at a H^+ y + s n.
    """
    prior, grid = problem.prior, [*problem.prior.schedule.grid(steps), -1]
    x = noised(prior, problem.start, grid[0], generator)
    for t, following in itertools.pairwise(grid):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            e = prior.at(x, t)
            missed = (problem.y - problem.operator(prior.denoised(x, e, t))).flatten(1)
            (slope,) = torch.autograd.grad((missed**2).sum(), x)
        size = missed.detach().norm(dim=1).clamp(min=1e-12).view(-1, *[1] * (x.ndim - 1))
        after = ddim_step(prior, x.detach(), e.detach(), t, following, eta, generator)
        x = after - zeta * slope / size
    return x


def pigdm(problem: Problem, generator: torch.Generator, *, steps: int, weight: float, eta: float) -> Tensor:
    """Return posterior samples: the step of DDIM plus ``weight`` a_s a_t J^T (H^+ y - H^+ H xhat), J = d xhat / d x_t.

    Song et al., ICLR 2023, where the weight is 1. Where pixels are seen as they are, xhat is replaced by them.
    """
    prior, grid = problem.prior, [*problem.prior.schedule.grid(steps), -1]
    operator, target = problem.operator, problem.start
    seen = ~operator.hidden(target)
    x = noised(prior, target, grid[0], generator)
    for t, following in itertools.pairwise(grid):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            e = prior.at(x, t)
            clean = prior.denoised(x, e, t)
            missed = (target - operator.inverse(operator(clean))).detach()
            (slope,) = torch.autograd.grad((missed * clean).sum(), x)
        x, e, clean = x.detach(), e.detach(), torch.where(seen, target, clean.detach())
        after = ddim_step(prior, x, e, t, following, eta, generator, denoised=clean)
        x = after + weight * prior.schedule.signal(following) * prior.schedule.signal(t) * slope
    return x


def total_variation(problem: Problem, *, steps: int, lam: float, lr: float, v: float = 1.0) -> Tensor:
    """Return images that fit the measurement and vary little: v |y - H mu|^2 / (2 m) + lam TV(mu) / n, by Adam.

    TV is smoothed at 0, and the border is repeated.
    """
    mu, adam = problem.start, Adam(lr)
    measured = problem.operator.size(mu)
    for _ in range(steps):
        with torch.enable_grad():
            x = mu.detach().requires_grad_()
            wide = F.pad(x, (0, 1, 0, 1), mode="replicate")
            down, right = wide.diff(dim=-2)[..., :-1], wide.diff(dim=-1)[..., :-1, :]
            (slope,) = torch.autograd.grad((down**2 + right**2 + 1e-3).sqrt().sum(), x)
        gradient = lam * slope / mu[0].numel()
        mu = adam.step(mu, gradient + v * data_gradient(problem.operator, problem.y, mu) / measured)
    return mu


def noised(prior: DiffusionPrior, clean: Tensor, t: int, generator: torch.Generator) -> Tensor:
    """Return x_t of a clean image."""
    noise = torch.randn(clean.shape, generator=generator, device=clean.device, dtype=clean.dtype)
    return prior.schedule.signal(t) * clean + prior.schedule.noise(t) * noise
