"""Plain twins of Weight Compander, without any federation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from flowerbed.experiments.config import Simulation
from flowerbed.experiments.papers.weight_compander import A0, B0, WeightCompanderParams
from flowerbed.experiments.papers.weight_compander.probes import conv3
from flowerbed.experiments.reproduction.central import CentralStep, central_run
from flowerbed.models.reparametrised import part_name, raw_name
from flowerbed.storage import Tensors


def central(simulation: Simulation) -> Tensors:
    """Return what a plain loop makes of a fixed curve: the plain network, called with weights made from v by hand."""
    asked = WeightCompanderParams(**simulation.strategy.options)
    scales: dict[str, Tensor] = {}
    plain: nn.Module | None = None

    def loss(step: CentralStep) -> Tensor:
        nonlocal plain
        if plain is None:
            plain = conv3(tuple(step.x.shape[1:]), step.classes).train()
            scales.update({n: t for n, t in step.net.state_dict().items() if n.endswith((A0, B0))})
        trained = dict(step.net.named_parameters())
        buffers = dict(step.net.named_buffers())
        tensors = {}
        for name, shown in plain.state_dict().items():
            v = trained.get(raw_name(name))
            if v is None:
                tensors[name] = trained[name] if name in trained else buffers[name]
            else:
                assert v.shape == shown.shape
                a, b = (scales[part_name(raw_name(name), part)] for part in (A0, B0))
                tensors[name] = a * torch.arctan(v / b) if asked.shape == "arctan" else v
        return F.cross_entropy(functional_call(plain, tensors, (step.x,)), step.y)

    return central_run(simulation, loss)
