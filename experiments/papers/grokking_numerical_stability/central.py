"""Plain twins of StableMax and perpGrad, without any federation."""

from __future__ import annotations

import torch
from torch import Tensor

from flowerbed.experiments.config import Simulation
from flowerbed.experiments.papers.grokking_numerical_stability import StabilityParams
from flowerbed.experiments.reproduction.central import CentralStep, central_run
from flowerbed.storage import Tensors


def central(simulation: Simulation) -> Tensors:
    """Return what a plain loop makes of an arm without perpGrad: the loss in its precision."""
    asked = StabilityParams(**simulation.strategy.options)
    high = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}[asked.precision]

    def loss(step: CentralStep) -> Tensor:
        z = step.net(step.x).to(high)
        rows = torch.arange(len(z))
        if asked.loss == "stablemax":
            s = torch.where(z >= 0, z.clamp(min=0) + 1, 1 / (1 - z.clamp(max=0)))
            each = s.sum(1).log() - s[rows, step.y].log()
        else:
            z = z - z.detach().amax(1, keepdim=True)
            each = z.exp().sum(1).log() - z[rows, step.y]
        value: Tensor = (each.float() if asked.precision == "float16" else each).mean()
        return value

    return central_run(simulation, loss)
