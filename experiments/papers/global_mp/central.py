"""Plain twins of global magnitude pruning, without any federation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowerbed.experiments.config import Simulation
from flowerbed.experiments.papers.global_mp import GlobalMpParams
from flowerbed.experiments.reproduction.central import central_run
from flowerbed.storage import Tensors


def central(simulation: Simulation) -> Tensors:
    """Return what a plain loop makes of one-shot global pruning: a threshold, a mask, fine-tuning."""
    share = GlobalMpParams(**simulation.strategy.options).s
    pruned: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def prune(net: nn.Module) -> None:
        weights = [p for p in net.parameters() if p.ndim > 1]
        sizes = torch.cat([w.abs().flatten() for w in weights])
        gone = sizes.argsort(stable=True)[: round(share * len(sizes))]
        flat = torch.ones_like(sizes)
        flat[gone] = 0
        for weight, mask in zip(weights, torch.split(flat, [w.numel() for w in weights]), strict=True):
            pruned[weight] = mask.view_as(weight)
        apply()

    @torch.no_grad()
    def apply() -> None:
        for weight, mask in pruned.items():
            weight.mul_(mask)

    return central_run(
        simulation,
        lambda step: nn.functional.cross_entropy(step.net(step.x), step.y),
        before=prune,
        after=lambda step: apply(),
    )
