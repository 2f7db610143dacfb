"""Plain twins of compressed features, without any federation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.experiments.config import Simulation
from flowerbed.experiments.papers.compress_features import CompressParams, cut_off
from flowerbed.experiments.papers.compress_features.probes import weight_of
from flowerbed.experiments.parts import build_parts
from flowerbed.experiments.reproduction.central import CentralStep, central_run
from flowerbed.models.base import Net
from flowerbed.models.pair import Pair
from flowerbed.storage import Tensors


def central(simulation: Simulation) -> Tensors:
    """Return what a plain loop makes of a network of stage one; K is found by trying one after another."""
    asked = CompressParams(**simulation.strategy.options)

    def loss(step: CentralStep) -> Tensor:
        (net,) = _nets(step.net)
        z = net.features(step.x)
        mask = asked.draw(simulation.seed, 0, step.number, len(step.y), z.shape[1])
        return F.cross_entropy((z if mask is None else z * mask) @ weight_of(net).T, step.y)

    return _tried(simulation, central_run(simulation, loss))


def central_pair(simulation: Simulation) -> Tensors:
    """Return what a plain loop makes of two networks that teach each other."""
    asked = CompressParams(**simulation.strategy.options)
    kept, epoch = 0, -1

    def loss(step: CentralStep) -> Tensor:
        nonlocal kept, epoch
        step.net.eval()
        first, second = _nets(step.net)
        if step.epoch > epoch:
            kept, epoch = _best(simulation, (first, second)), step.epoch
        half, found = len(step.y) // 2, []
        for net, at in ((first, slice(half)), (second, slice(half, 2 * half))):
            with torch.no_grad():
                logits = net.features(step.x[at])[:, :kept] @ weight_of(net)[:, :kept].T
                losses = F.cross_entropy(logits, step.y[at], reduction="none")
            found.append(losses.sort(stable=True).indices[: int((1 - asked.forget) * half)])
        mask = asked.draw(simulation.seed, 0, step.number, len(step.y), first.feature_dim)
        total = torch.zeros(())
        for net, rows in ((first, half + found[1]), (second, found[0])):
            z = net.features(step.x[rows])
            if mask is not None:
                z = z * (mask if mask.ndim == 1 else mask[rows])
            total = total + F.cross_entropy(z @ weight_of(net).T, step.y[rows])
        return total

    return _tried(simulation, central_run(simulation, loss))


def _nets(model: nn.Module) -> tuple[Net, ...]:
    if isinstance(model, Pair):
        return model.first, model.second
    assert isinstance(model, Net)
    return (model,)


def _tried(simulation: Simulation, tensors: Tensors) -> Tensors:
    net = build_parts(simulation).spec.model.build(simulation.seed)
    net.load_state_dict(tensors)
    return cut_off(tensors, _best(simulation, _nets(net.eval())))


@torch.no_grad()
def _best(simulation: Simulation, nets: tuple[Net, ...]) -> int:
    data, channels = build_parts(simulation).dataset, nets[0].feature_dim
    if CompressParams(**simulation.strategy.options).mask != "nested":
        return channels
    assert data.validation is not None
    z, scores = [net.features(data.prepare(data.validation.inputs)) for net in nets], []
    for k in range(1, channels + 1):
        each = [zi[:, :k] @ weight_of(net)[:, :k].T for zi, net in zip(z, nets, strict=True)]
        right = (torch.stack(each).sum(0).argmax(1) == data.validation.labels).double().mean()
        scores.append(float(right) - 1e-5 * (k - 1))
    return scores.index(max(scores)) + 1
