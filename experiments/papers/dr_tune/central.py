"""Plain twins of DR-Tune, without any federation."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed import seeds
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.papers.dr_tune import DrTuneParams
from flowerbed.experiments.parts import build_parts
from flowerbed.experiments.reproduction.central import CentralStep, central_run
from flowerbed.models.base import Net
from flowerbed.storage import Tensors


def central(simulation: Simulation) -> Tensors:
    """Return what a plain loop makes of fine-tuning, of L2-SP, and of R_DR without calibration, by hand."""
    asked = DrTuneParams(**simulation.strategy.options)
    decay, size = simulation.local.weight_decay, asked.queue
    frozen: list[Net] = []
    queue: list[tuple[Tensor, Tensor]] = []
    latest: list[tuple[Tensor, Tensor]] = []

    def before(net: nn.Module) -> None:
        assert isinstance(net, Net)
        frozen.append(copy.deepcopy(net).eval())
        for p in net.head.parameters():
            p.register_hook(  # type: ignore[no-untyped-call]
                lambda g, p=p: g * asked.head_lr + (asked.head_lr - 1) * decay * p.detach()
            )
        if asked.weight:
            for x, y in _warming(simulation):
                queue.extend(zip(pretrained(x), y, strict=True))

    def pretrained(x: Tensor) -> Tensor:
        with torch.no_grad():
            return frozen[0].features(x)

    def loss(step: CentralStep) -> Tensor:
        net = step.net
        assert isinstance(net, Net)
        d = net.features(step.x)
        value = F.cross_entropy(net.head(d), step.y)
        if asked.anchor:
            pairs = zip(net.body.parameters(), frozen[0].body.parameters(), strict=True)
            moved = [(w - w0.detach()).square().sum() for w, w0 in pairs]
            value = value + asked.anchor / 2 * torch.stack(moved).sum()
        if asked.weight:
            rows = queue[-size:]
            a = torch.stack([z for z, _ in rows])
            for _ in range(2):
                a = a / a.norm(dim=1, keepdim=True)
            a = d.detach().norm(dim=1).mean() * a
            value = value + asked.weight * F.cross_entropy(net.head(a), torch.stack([y for _, y in rows]))
            latest[:] = zip(pretrained(step.x), step.y, strict=True)
        return value

    def after(step: CentralStep) -> None:
        queue.extend(latest)

    return central_run(simulation, loss, before=before, after=after)


def _warming(simulation: Simulation) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches that fill the queue: epochs of an order of their own."""
    parts, size = build_parts(simulation), simulation.local.batch_size
    rows = torch.from_numpy(parts.train.indices(0).copy())
    x, y = parts.dataset.prepare(parts.dataset.train.inputs[rows]), parts.dataset.train.labels[rows]
    left, epoch = DrTuneParams(**simulation.strategy.options).queue, 0
    while left > 0:
        order = torch.from_numpy(
            seeds.numpy_rng(simulation.seed, "data order of the queue", 0, epoch).permutation(len(y))
        )
        for chosen in torch.split(order, size):
            if left > 0:
                yield x[chosen], y[chosen]
                left -= len(chosen)
        epoch += 1
