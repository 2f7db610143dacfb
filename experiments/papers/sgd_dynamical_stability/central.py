"""Plain twins of dynamical stability of SGD, without any federation."""

from __future__ import annotations

import torch
from torch import Tensor

from flowerbed.datasets.regression import TARGET
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.parts import build_parts
from flowerbed.experiments.reproduction.central import CentralStep, central_run
from flowerbed.storage import Tensors


def central(simulation: Simulation) -> Tensors:
    """Return what a plain loop makes of an arm."""
    parts = build_parts(simulation)
    target = parts.dataset.train.extras[TARGET][torch.from_numpy(parts.train.indices(0).copy())]

    def loss(step: CentralStep) -> Tensor:
        outputs = step.net(step.x)
        value: Tensor = 0.5 * (outputs - target[step.rows].to(outputs.dtype)).square().mean()
        return value

    return central_run(simulation, loss)
