"""Plain twins of MSBReg, without any federation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed import seeds
from flowerbed.datasets.augment import AUGMENTATIONS, Scale
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.papers.msbreg import MsbParams
from flowerbed.experiments.parts import build_parts
from flowerbed.experiments.reproduction.central import CentralStep, central_run
from flowerbed.models.base import Net
from flowerbed.storage import Tensors


def central(simulation: Simulation) -> Tensors:
    """Return what a plain loop makes of an arm: views, two networks, three losses."""
    asked = MsbParams(**simulation.strategy.options)
    data = build_parts(simulation).dataset
    augment, scale = AUGMENTATIONS.get(asked.view), Scale(data.mean, data.std)
    target: list[Net] = []

    def copied(net: nn.Module) -> None:
        twin = build_parts(simulation).spec.model.build(simulation.seed)
        assert isinstance(twin, Net)
        twin.load_state_dict(net.state_dict())
        target.append(twin.requires_grad_(False))

    def loss(step: CentralStep) -> Tensor:
        net, count = step.net, asked.views
        assert isinstance(net, Net)
        streams = [seeds.torch_rng(simulation.seed, f"view {v}", 0, step.number) for v in range(count)]
        x = torch.cat([augment(step.x, stream, scale=scale) for stream in streams])
        raw = net.body(x)
        # In this order, which decides how gradients add up.
        q, aim, z = (
            F.normalize(e, dim=1).reshape(count, -1, e.shape[1])
            for e in (net.head(raw), target[0].body(x), raw)
        )
        if asked.pull == "pairs":
            value = (2 - 2 * (q * ((aim.sum(0) - aim) / (count - 1))).sum(-1)).mean()
        else:
            value = (2 - 2 * (q * F.normalize(aim.mean(0), dim=1)).sum(-1)).mean()
        if asked.lambda_s:
            centroids = F.normalize(z.mean(0), dim=1)
            n, d = centroids.shape
            sigma = torch.linalg.svdvals(centroids - centroids.mean(0))[: min(n - 1, d)]
            value = value + asked.lambda_s * (sigma * (d / n) ** 0.5 - 1).square().mean()
        if asked.lambda_b:
            kicks = F.normalize(torch.randn(z.shape[1:]), dim=1)
            value = value + asked.lambda_b * (z * kicks).sum(-1).mean()
        return value

    @torch.no_grad()
    def follow(step: CentralStep) -> None:
        for old, new in zip(target[0].parameters(), step.net.parameters(), strict=True):
            old.lerp_(new, 1 - asked.tau)
        for kept, seen in zip(target[0].buffers(), step.net.buffers(), strict=True):
            kept.copy_(seen)

    return central_run(simulation, loss, before=copied, after=follow)
