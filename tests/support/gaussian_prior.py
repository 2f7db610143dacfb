"""A Gaussian prior of 2x2 images in closed form, and measurements of it."""

from __future__ import annotations

import torch
from torch import Tensor

from flowerbed.models.diffusion import DiffusionPrior
from flowerbed.models.inverse import Mask
from flowerbed.models.restoration import Problem

SHAPE = (2, 1, 2, 2)


class Gaussian(DiffusionPrior):
    """p(x_0) = N(m, C) over the pixels of 2x2 images: everything in closed form."""

    def __init__(self) -> None:
        super().__init__(1, "linear", 1000)
        root = torch.tensor(
            [[1.0, 0, 0, 0], [0.8, 0.5, 0, 0], [0.1, 0.7, 0.4, 0], [0.5, -0.2, 0.1, 0.3]]
        ).double()
        self.mean, self.cov = torch.tensor([0.3, -0.2, 0.1, 0.4]).double(), 0.2 * root @ root.T
        self.eye = torch.eye(4).double()

    def gain(self, t: int) -> Tensor:
        """Return K_t = abar C (abar C + (1 - abar) I)^-1."""
        abar = float(self.schedule.abar[t + 1])
        return abar * self.cov @ torch.linalg.inv(abar * self.cov + (1 - abar) * self.eye)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        one = int(t[0])
        a, s = self.schedule.signal(one), self.schedule.noise(one)
        clean = self.mean + (x.flatten(1) / a - self.mean) @ self.gain(one).T
        return (x - a * clean.view_as(x)) / s


def images(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rng(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(seen: list[bool] | None = None, prior: DiffusionPrior | None = None) -> Problem:
    mask = Mask(torch.tensor(seen or [True, False, True, False]).view(1, 1, 2, 2))
    return Problem(prior or Gaussian(), mask, mask(images()), images())
