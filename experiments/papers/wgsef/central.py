"""Plain twins of the group sparse envelope, without any federation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.experiments.config import Simulation
from flowerbed.experiments.papers.wgsef import WgsefParams
from flowerbed.experiments.reproduction.central import CentralStep, central_run
from flowerbed.storage import Tensors


def central(simulation: Simulation) -> Tensors:
    """Return what a plain loop makes of the method on ``conv_net``, with eta by bisection, group by group."""
    asked, lam, held, last = WgsefParams(**simulation.strategy.options), 0.0, False, 0
    rounds = simulation.federation.rounds

    def rows(net: nn.Module) -> list[tuple[Tensor, ...]]:
        p = dict(net.named_parameters())
        layers = [("body.0", "body.1"), ("body.3", "body.4"), ("body.6", "body.7"), ("body.10", "body.11")]
        return [
            (p[f"{a}.weight"][j], p[f"{b}.weight"][j : j + 1], p[f"{b}.bias"][j : j + 1])
            for a, b in layers
            for j in range(len(p[f"{b}.bias"]))
        ]

    def length(group: tuple[Tensor, ...]) -> float:
        return math.sqrt(sum(float(part.double().square().sum()) for part in group))

    @torch.no_grad()
    def prox(step: CentralStep) -> None:
        nonlocal lam, held, last
        groups = rows(step.net)
        k, weight = round(asked.k * len(groups)), step.lr * (lam or asked.lam)
        n = [length(group) for group in groups]
        low, high = 0.0, 2 * max(n) / weight**0.5
        for _ in range(200):
            eta = (low + high) / 2
            u = [min(1.0, max(0.0, weight**0.5 * one / eta - weight)) for one in n]
            low, high = (eta, high) if sum(u) > k else (low, eta)
        if sum(one > 0 for one in n) <= k:
            u = [float(one > 0) for one in n]
        for group, share in zip(groups, u, strict=True):
            for part in group:
                part.mul_(torch.tensor(share / (share + weight)).float())
        if (step.number + 1) % (-(-step.examples // simulation.local.batch_size)) == 0:
            held = held or sum(length(g) > 0 for g in groups) <= (1 + asked.tolerance) * k
            lam = (lam or asked.lam) * (1.0 if held else asked.growth)
            last += 1
        if last == rounds:
            sizes_now = [length(group) for group in groups]
            best = {
                max(range(start, stop), key=lambda j: (sizes_now[j], j)) for start, stop in spans(step.net)
            }
            for j in sorted(range(len(groups)), key=lambda j: (j in best, sizes_now[j], j))[
                : len(groups) - k
            ]:
                for part in groups[j]:
                    part.zero_()

    def spans(net: nn.Module) -> list[tuple[int, int]]:
        counts = [len(m.weight) for m in net.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        return [(sum(counts[:i]), sum(counts[: i + 1])) for i in range(len(counts))]

    return central_run(simulation, lambda step: F.cross_entropy(step.net(step.x), step.y), after=prox)
