"""Plain twins of neural collapse in deep linear networks, without any federation."""

from __future__ import annotations

import torch
from torch import Tensor

from flowerbed.experiments.config import Simulation
from flowerbed.experiments.papers.nc_deep_linear import DeepLinearParams, fitted
from flowerbed.experiments.reproduction.central import CentralStep, central_run
from flowerbed.storage import Tensors


def central(simulation: Simulation) -> Tensors:
    """Return what a plain loop makes of an arm: descent on F as it is written."""
    asked = DeepLinearParams(**simulation.strategy.options)

    def objective(step: CentralStep) -> Tensor:
        z = step.net.body(step.x)  # type: ignore[operator]
        fit = fitted(step.net.head(z), step.y, asked.loss)  # type: ignore[operator]
        decay = torch.stack([layer.weight.square().sum() for layer in step.net.head]).sum()  # type: ignore[union-attr]
        size = z.square().sum(1).mean() * torch.tensor(float(step.examples), dtype=torch.float64)
        value: Tensor = fit + asked.lambda_w / 2 * decay + asked.lambda_h / 2 * size
        return value

    return central_run(simulation, objective)
