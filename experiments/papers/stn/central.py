"""Plain twins of self-tuning networks, without any federation."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from flowerbed import seeds
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.papers.stn import HYPER, SPREAD, UPPER, StnParams, conditioned, entropy
from flowerbed.experiments.parts import build_parts
from flowerbed.storage import Tensors


def central(simulation: Simulation) -> Tensors:
    """Return what a plain loop makes of an arm: alternating steps, each level with its optimizer and random stream."""
    asked, local, parts = StnParams(**simulation.strategy.options), simulation.local, build_parts(simulation)
    train, mine = parts.dataset.train, parts.train.indices(0).copy()
    x, y = parts.dataset.prepare(train.inputs[mine]), train.labels[mine]
    order = seeds.numpy_rng(simulation.seed, "validation samples", 0).permutation(len(y))
    held = round(asked.valid * len(y))
    levels = [torch.from_numpy(np.sort(rows)) for rows in (order[held:], order[:held])]
    net = conditioned(parts.spec.model.build(simulation.seed))
    weights = [p for name, p in net.named_parameters() if name not in (HYPER, SPREAD)]
    sgd = torch.optim.SGD(weights, lr=local.lr, momentum=local.momentum)
    rms = torch.optim.RMSprop([net.hyper, net.spread], lr=asked.hyper_lr)
    streams = []
    for purpose in ("modules", f"modules{UPPER}"):
        with seeds.torch_stream(simulation.seed, purpose, 0):
            streams.append(torch.get_rng_state())

    def step(level: int, number: int, optimizer: torch.optim.Optimizer) -> None:
        rows, batch = levels[level], local.batch_size
        epoch, place = divmod(number, -(-len(rows) // batch))
        purpose = ("data order", f"data order{UPPER}")[level]
        shuffled = seeds.numpy_rng(simulation.seed, purpose, 0, epoch).permutation(len(rows))
        chosen = rows[torch.from_numpy(shuffled)[place * batch : (place + 1) * batch]]
        net.train(not level)
        net.zero_grad()
        torch.set_rng_state(streams[level])
        raw = net.hyper.expand(len(chosen), -1)
        if level or asked.perturb:
            raw = raw + F.softplus(net.spread) * torch.randn(len(chosen), len(net.knobs))
        with net.at(raw if level else raw.detach()):
            loss = F.cross_entropy(net(x[chosen]), y[chosen])
        if level:
            loss = loss - asked.tau * entropy(net)
        loss.backward()  # type: ignore[no-untyped-call]
        streams[level] = torch.get_rng_state()
        optimizer.step()

    with seeds.torch_stream(simulation.seed, "modules", 0):
        for number in range(simulation.federation.rounds * local.steps):
            step(0, number, sgd)
            turn, rest = divmod(number + 1, asked.train_steps)
            if asked.tune and not rest and number + 1 > asked.warm_up:
                for own in range((turn - 1) * asked.valid_steps, turn * asked.valid_steps):
                    step(1, own, rms)
    return {name: value.detach().clone() for name, value in net.state_dict().items()}
