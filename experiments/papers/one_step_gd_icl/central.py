"""Plain twins of one step of gradient descent in context, without any federation."""

from __future__ import annotations

import math

import torch
from torch import nn

from flowerbed import seeds
from flowerbed.datasets.prompts import Prompts
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.papers.one_step_gd_icl import STREAM
from flowerbed.experiments.parts import build_parts
from flowerbed.storage import Tensors


def central(simulation: Simulation) -> Tensors:
    """Return what a plain loop makes of an arm: fresh prompts, Adam, a cosine, clipping."""
    parts, local, rounds = build_parts(simulation), simulation.local, simulation.federation.rounds
    table = Prompts.of(parts.dataset.train.inputs, parts.dataset.train.extras)
    net = parts.spec.model.build(simulation.seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=local.lr)
    steps = rounds * local.steps
    for step in range(steps):
        tokens, y, _ = table.draw(local.batch_size, seeds.torch_rng(simulation.seed, STREAM, 0, step))
        optimizer.param_groups[0]["lr"] = 0.5 * local.lr * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        (y - net(tokens)).square().mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), local.clip_norm)
        optimizer.step()
    return {name: value.detach().clone() for name, value in net.state_dict().items()}
