"""The running statistics of batch norm: computed anew for weights that no batch has been through, or held fixed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def recompute_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Make the running statistics of every batch norm layer the plain mean over the batches' own.

    ``batches`` are inputs ``(B, ...)``. Every layer sees what the others make of their batch, as in training;
    all other modules are in evaluation mode meanwhile, so that nothing random happens. Afterwards the modes are
    as before. A model without batch norm is left alone.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return
    modes = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.train()
        layer.reset_running_stats()
        # None is torch's sign for the plain mean over all batches.
        layer.momentum = None
    for x in batches:
        model(x)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    for module, training in modes:
        module.training = training


@contextmanager
def fixed_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, batch norm layers use their running statistics and do not move them, whatever the model's mode."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.train()
