"""Plain twins of DeepZero, without any federation."""

from __future__ import annotations

import torch
from torch import Tensor

from flowerbed.experiments.config import Simulation
from flowerbed.experiments.papers.deepzero import DeepZeroParams, losses
from flowerbed.experiments.reproduction.central import CentralStep, central_run
from flowerbed.models.tasks import Classification
from flowerbed.models.zeroth_order import coordinate_wise
from flowerbed.storage import Tensors


def central(simulation: Simulation) -> Tensors:
    """Return what a plain loop makes of backpropagation and of dense CGE."""
    options = DeepZeroParams(**simulation.strategy.options)

    def loss(step: CentralStep) -> Tensor:
        def value(tensors: Tensors) -> Tensor:
            outputs = torch.func.functional_call(step.net, tensors, (step.x,))
            return losses(outputs, step.y, Classification(step.classes)).double().mean()

        if options.estimator == "backprop":
            return value({})
        parameters = dict(step.net.named_parameters())
        with torch.no_grad():
            found, _ = coordinate_wise(value, parameters, options.mu, value({}))
        # A loss whose gradient is the estimate.
        return torch.stack([(p * found[n]).sum() for n, p in parameters.items()]).sum()

    return central_run(simulation, loss)
