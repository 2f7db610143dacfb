"""What a candidate batch would have made a client send: the differentiable imitation of its local training."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from flowerbed.clients.params import LocalParams
from flowerbed.models.bottleneck import divergence
from flowerbed.strategies.attacks.observation import Gradient

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
Layers = list[tuple[nn.Module, Tensor]]
"""Batch norms with what came in, in the order of the forward pass."""


@dataclass(frozen=True)
class Steps:
    """Local training as an attacker repeats it: batches of a candidate's samples, one step each, epoch after epoch."""

    local: LocalParams
    sizes: tuple[int, ...]
    """Samples of every step of one epoch."""
    count: int
    """Steps in all."""
    first: int = 0
    """Clock of the first one."""
    rounds: int = 1
    apart: bool = False
    """Whether every epoch has samples of its own in the candidate, one epoch after another, since the order in which a
    later one went through them is the client's secret. Else later epochs repeat the first."""

    @property
    def plain(self) -> bool:
        """Whether it is a single step, whose gradient says everything."""
        return self.count == 1

    @property
    def epochs(self) -> int:
        """Passes over the samples, the last of which may be cut short."""
        return -(-self.count // len(self.sizes))

    def batches(self) -> list[slice]:
        """Return the candidate's rows of every step."""
        ends = [0]
        for size in self.sizes * (self.epochs if self.apart else 1):
            ends.append(ends[-1] + size)
        slices = [slice(a, b) for a, b in itertools.pairwise(ends)]
        return [slices[step % len(slices)] for step in range(self.count)]

    def weights(self) -> list[float]:
        """Return how much every step's gradient moves the parameters: learning rates, added up over momentum."""
        rates = [self.local.lr_at(self.first + place, self.count, self.rounds) for place in range(self.count)]
        m, found = self.local.momentum, []
        for place in range(self.count):
            later = [
                rate * m ** (i + (1 if self.local.nesterov else 0)) for i, rate in enumerate(rates[place:])
            ]
            found.append(sum(later) + (rates[place] if self.local.nesterov else 0.0))
        return found


def gradient(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    x: Tensor,
    targets: Tensor,
    watched: Sequence[nn.Module] = (),
    clip: float = 0.0,
) -> tuple[Gradient, Layers]:
    """Return the gradient of the mean cross entropy, and what went into the ``watched`` layers.

    ``targets``: int64 ``(B,)``, or probabilities ``(B, C)``; of token models ``(B, L)`` or ``(B, L, V)``. With
    ``clip`` it is the mean over examples of gradients that are clipped to that norm one by one, and nothing is watched.
    """
    if clip:
        one = functools.partial(_one_clipped, module, parameters, buffers, clip)
        found = vmap(one)(x, targets)
        return {name: value.mean(0) for name, value in found.items()}, []

    def loss(moving: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        seen: list[Tensor] = []
        handles = [m.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for m in watched]
        try:
            outputs = functional_call(module, {**moving, **buffers}, (x,))
        finally:
            for handle in handles:
                handle.remove()
        if outputs.ndim == 3:
            return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(0, 1)), seen
        return F.cross_entropy(outputs, targets) + divergence(module), seen

    found, seen = grad(loss, has_aux=True)(dict(parameters))
    return found, list(zip(watched, seen, strict=True))


def _one_clipped(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    clip: float,
    x: Tensor,
    target: Tensor,
) -> Gradient:
    """Return the gradient of one example, of norm ``clip`` at most."""
    found, _ = gradient(module, parameters, buffers, x[None], target[None])
    norm = sum(value.square().sum() for value in found.values())
    assert isinstance(norm, Tensor)
    factor = (clip / norm.add(1e-24).sqrt()).clamp(max=1.0)
    return {name: value * factor for name, value in found.items()}


def update(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    x: Tensor,
    targets: Tensor,
    steps: Steps,
    watched: Sequence[nn.Module] = (),
    clip: float = 0.0,
) -> tuple[Gradient, Layers]:
    """Return how far several steps of SGD move the parameters back, ``w_t - w_k``, and the first step's layers.

    Momentum starts fresh, as it does in every round of a client that keeps none.
    """
    local, own = steps.local, dict(parameters)
    velocity: Gradient = {}
    layers: Layers = []
    for place, rows in enumerate(steps.batches()):
        first = watched if place == 0 else ()
        found, seen = gradient(module, own, buffers, x[rows], targets[rows], first, clip)
        layers = seen or layers
        lr = local.lr_at(steps.first + place, steps.count, steps.rounds)
        for name, value in own.items():
            step = found[name] + local.weight_decay * value if local.weight_decay else found[name]
            if local.momentum:
                velocity[name] = local.momentum * velocity[name] + step if place else step
                step = step + local.momentum * velocity[name] if local.nesterov else velocity[name]
            own[name] = value - lr * step
    return {name: parameters[name] - own[name] for name in own}, layers


def use_batch_statistics(module: nn.Module) -> None:
    """Let batch norms use the statistics of the batch, and remember nothing."""
    for layer in module.modules():
        if isinstance(layer, NORMS):
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """Return all batch norms in the order of their names' appearance."""
    return [layer for layer in module.modules() if isinstance(layer, NORMS)]


def soft_sign(values: Mapping[str, Tensor], sharpness: float = 3.0) -> Gradient:
    """Return a differentiable sign of every tensor; what is a third of its root mean square has 0.76."""
    return {
        n: (v * sharpness / v.detach().square().mean().add(1e-24).sqrt()).tanh() for n, v in values.items()
    }
