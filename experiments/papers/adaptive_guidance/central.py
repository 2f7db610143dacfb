"""Plain twins of adaptive guidance, without any federation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.experiments.config import Simulation
from flowerbed.experiments.parts import build_parts
from flowerbed.experiments.reproduction.central import CentralStep, central_run
from flowerbed.storage import Tensors
from flowerbed.strategies.diffusion import DdpmParams


def central_unet(simulation: Simulation) -> Tensors:
    """Return what a plain loop makes of the noise predictor: Ho et al. 2020, Algorithm 1, with labels left out."""
    asked = DdpmParams(**simulation.strategy.options)
    average: dict[str, Tensor] = {}

    def begin(net: nn.Module) -> None:
        average.update({name: p.detach().clone() for name, p in net.named_parameters()})

    def loss(step: CentralStep) -> Tensor:
        hidden = torch.rand(len(step.y)) < asked.drop
        labels = torch.where(hidden, step.classes, step.y)
        t = torch.randint(1000, (len(step.y),))
        e = torch.randn(step.x.shape)
        abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[t].view(-1, 1, 1, 1)
        noisy = abar.sqrt().float() * step.x + (1 - abar).sqrt().float() * e
        return F.mse_loss(step.net(noisy, t, labels), e)

    def remember(step: CentralStep) -> None:
        with torch.no_grad():
            for name, p in step.net.named_parameters():
                average[name].lerp_(p, 1 - asked.ema)

    final = central_run(simulation, loss, before=begin, after=remember)
    return {**final, **average}


def central_exact(simulation: Simulation) -> Tensors:
    """Return the first training images and their labels."""
    parts = build_parts(simulation)
    chosen = torch.from_numpy(parts.train.indices(0)[: simulation.model.options["centres"]].copy())
    train = parts.dataset.train
    return {"centres": parts.dataset.prepare(train.inputs[chosen]), "labels": train.labels[chosen]}
