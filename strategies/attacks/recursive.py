"""R-GAP: the input of a network of linear layers and activations, layer by layer from the loss backwards.

Zhu and Blaschko, "R-GAP: Recursive Gradient Attack on Privacy", ICLR 2021, for one sample and a cross entropy over any
number of classes. For a layer z = W x + b with k = dL/dz, both the weight's gradient and z itself are linear in x:

    dW = k x^T,        W x = z - b        (a convolution: the same with its own linear maps)

so x is the least squares solution of both, given k and z. Where x = a(z') is an activation of the layer before, z' is
its inverse and k' = (W^T k) a'(z'), and so on down to the input. The last layer begins: with a bias k = db; without one
dW = u v^T gives x = t v and k = u / t up to a factor t, and t k(t v) = u is one equation for each class. Three classes
or more determine t and its sign; two leave several answers (the paper's twin data), of which one is taken.

A ReLU has no inverse where it is 0: the rows W x = z - b of those units are left out, and k' is 0 there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.errors import ConfigError, require
from flowerbed.models.base import Net
from flowerbed.strategies.attacks import candidates
from flowerbed.strategies.attacks.descents import Watch
from flowerbed.strategies.attacks.objectives import cosine
from flowerbed.strategies.attacks.observation import (
    Gradient,
    Observation,
    Reconstruction,
    SideInfo,
    batch_size,
    gradient_of,
)

INVERSES: dict[type[nn.Module], Callable[[Tensor, Any], Tensor]] = {
    nn.LeakyReLU: lambda y, layer: torch.where(y < 0, y / layer.negative_slope, y),
    nn.Sigmoid: lambda y, layer: y.clamp(1e-12, 1 - 1e-12).logit(),
    nn.Tanh: lambda y, layer: y.clamp(-1 + 1e-12, 1 - 1e-12).atanh(),
    nn.ReLU: lambda y, layer: y,
    nn.Identity: lambda y, layer: y,
}
CHUNK = 256
"""Unit inputs that a convolution is applied to at a time, to write it as a matrix."""
FAINT = 1e-3
"""What is left of a ReLU's output after rounding counts as 0 below this share of its largest entry."""
SCALES = 4000
"""Factors tried for the last layer's input, where it has no bias."""


@dataclass(frozen=True)
class Recursive:
    """Solves for the input of one sample."""

    name: str = "rgap"

    def run(
        self,
        cases: Sequence[tuple[Observation, SideInfo]],
        *,
        seed: int = 0,
        device: torch.device | None = None,
        watch: Watch | None = None,
    ) -> list[Reconstruction]:
        """Attack every observation and return what was found, in their order.

        ``found`` has the share of unknowns that each layer's equations determine, from the last layer to the first.
        Raises ``ConfigError`` for a batch of several samples, an update that is no gradient, or a layer that cannot be
        gone through, by its name.
        """
        found = []
        for place, (observation, side) in enumerate(cases):
            side.demand(self.name, "local")
            found.append(self._solved(observation, side))
            if watch is not None:
                watch(place + 1, len(cases))
        return found

    def _solved(self, observation: Observation, side: SideInfo) -> Reconstruction:
        started = time.perf_counter()
        size = batch_size(observation, side)
        require(
            size == 1, f"The attack '{self.name}' solves for one sample, and the update is that of {size}."
        )
        module = observation.module().double().eval().requires_grad_(False)
        gradient = gradient_of(observation, side)
        layers = layers_of(module, self.name, observation)
        shapes = _shapes(layers, observation.model.input_shape)
        own = {name: value.double() for name, value in gradient.items()}
        head_name, head = layers[-1]
        if not isinstance(head, nn.Linear) or f"{head_name}.weight" not in own:
            raise ConfigError(
                f"The attack '{self.name}' begins at a last linear layer, and the model '{observation.model.name}' "
                f"ends in {type(head).__name__}."
            )
        y, k, label = _from_the_loss(head, own, head_name, side)
        k, determined = k @ head.weight.detach(), [1.0]
        for place in range(len(layers) - 2, -1, -1):
            name, layer = layers[place]
            before = shapes[place]
            if isinstance(layer, nn.Flatten):
                y, k = y.view(before), k.view(before)
            elif type(layer) in INVERSES:
                z = INVERSES[type(layer)](y, layer)
                zero = _zero(layer, y)
                slope = torch.func.vmap(torch.func.grad(lambda v, layer=layer: layer(v)))(z.flatten())
                k = k * slope.view_as(k).masked_fill(zero, 0.0)
                y = z.masked_fill(zero, torch.nan)
            else:
                weight = own.get(f"{name}.weight")
                if weight is None:
                    raise ConfigError(
                        f"The gradient of '{name}.weight' did not come back; '{self.name}' needs every layer's."
                    )
                assert isinstance(layer, nn.Linear | nn.Conv2d)
                x, share = _input_of(layer, weight, y, k, before)
                determined.append(share)
                k = _back(layer, k, before)
                y = x
        x = y[None].float()
        labels = torch.tensor([label])
        float_module = observation.module().eval()
        made, _ = candidates.gradient(
            float_module,
            {n: p for n, p in float_module.named_parameters() if n in gradient},
            dict(float_module.named_buffers()),
            x,
            labels,
        )
        cost = float(cosine({n: v.detach() for n, v in made.items()}, gradient))
        seconds = time.perf_counter() - started
        return Reconstruction(x, labels, cost, 1, seconds, (), {"determined": determined})


def layers_of(module: nn.Module, attack: str, observation: Observation) -> list[tuple[str, nn.Module]]:
    """Return the layers in order, named; raises ``ConfigError`` naming the first that cannot be gone through."""
    found: list[tuple[str, nn.Module]] = []

    def walk(name: str, layer: nn.Module) -> None:
        if isinstance(layer, nn.Sequential) or (isinstance(layer, Net) and not name):
            # Not named_children: an activation that is used twice would come once.
            for inner, part in layer._modules.items():
                assert part is not None
                walk(f"{name}.{inner}" if name else inner, part)
        elif _can_go_through(layer):
            found.append((name, layer))
        else:
            raise ConfigError(
                f"The attack '{attack}' goes through linear layers, convolutions and activations one after another, "
                f"and '{name or type(module).__name__}' of the model '{observation.model.name}' is a "
                f"{type(layer).__name__}; use a search such as attack=ig."
            )

    walk("", module)
    return found


def _can_go_through(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear | nn.Flatten) or type(layer) in INVERSES


def _shapes(layers: Sequence[tuple[str, nn.Module]], shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return what comes into every layer, without the batch."""
    x, found = torch.zeros(1, *shape, dtype=torch.float64), []
    with torch.no_grad():
        for _, layer in layers:
            found.append(tuple(x.shape[1:]))
            x = layer(x)
    return found


def _from_the_loss(head: nn.Linear, own: Gradient, name: str, side: SideInfo) -> tuple[Tensor, Tensor, int]:
    """Return the last layer's input ``(D,)``, dL/dlogits ``(C,)`` and the label."""
    weight = own[f"{name}.weight"]
    if f"{name}.bias" in own and head.bias is not None:
        k = own[f"{name}.bias"]
        x = (weight * k[:, None]).sum(0) / k.square().sum()
        return x, k, int(k.argmin())
    left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    u, direction = left[:, 0] * sizes[0], right[0]
    best: tuple[float, Tensor, Tensor, int] | None = None
    for sign in (1.0, -1.0):
        label = int((sign * u).argmin()) if side.labels is None else int(side.labels[0])
        scales = torch.logspace(-6, 6, SCALES, dtype=torch.float64)
        ks = (scales[:, None] * head(sign * direction[None])).softmax(-1)
        ks = ks - F.one_hot(torch.tensor(label), len(u))
        gaps = (scales[:, None] * ks - sign * u).norm(dim=1)
        place = int(gaps.argmin())
        t = _refined(scales, place, head, sign * direction, sign * u, label)
        k = (t * head(sign * direction[None])[0]).softmax(-1) - F.one_hot(torch.tensor(label), len(u))
        gap = float((t * k - sign * u).norm().detach())
        if best is None or gap < best[0]:
            best = gap, (t * sign * direction).detach(), k.detach(), label
    assert best is not None
    return best[1], best[2], best[3]


def _refined(scales: Tensor, place: int, head: nn.Linear, direction: Tensor, u: Tensor, label: int) -> float:
    """Return the factor of least gap between the neighbours of a grid point (golden section)."""
    logits, one = head(direction[None])[0].detach(), F.one_hot(torch.tensor(label), len(u))

    def gap(t: float) -> float:
        return float((t * ((t * logits).softmax(-1) - one) - u).norm())

    low, high = float(scales[max(0, place - 1)]), float(scales[min(len(scales) - 1, place + 1)])
    ratio = (5**0.5 - 1) / 2
    for _ in range(100):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if gap(a) < gap(b) else (a, high)
    return (low + high) / 2


def _zero(layer: nn.Module, y: Tensor) -> Tensor:
    """Return where an activation's output says nothing of its input."""
    if not isinstance(layer, nn.ReLU):
        return torch.zeros_like(y, dtype=torch.bool)
    return y <= FAINT * y.abs().max()


def _input_of(
    layer: nn.Linear | nn.Conv2d, weight: Tensor, z: Tensor, k: Tensor, shape: tuple[int, ...]
) -> tuple[Tensor, float]:
    """Return x ``shape`` from the layer's gradient and what came out of it, and the share of x that is determined.

    ``z`` is NaN where it is not known.
    """
    maps, gradients = _matrices(layer, k, shape)
    bias = torch.zeros(()) if layer.bias is None else layer.bias.detach()
    offset = bias.view(-1, *[1] * (z.ndim - 1)).expand_as(z) if bias.ndim else torch.zeros_like(z)
    right = (z - offset).flatten()
    known = ~right.isnan()
    rows = [(gradients, weight.flatten()), (maps[known], right[known])]
    # Rows of both kinds count alike, however small the loss is by now.
    scaled = [(a / s, b / s) for a, b in rows if len(a) and (s := float(a.norm(dim=1).max())) > 0]
    a, b = (torch.cat(parts) for parts in zip(*scaled, strict=True))
    solved = torch.linalg.lstsq(a, b[:, None], rcond=1e-9, driver="gelsd")
    return solved.solution[:, 0].view(shape), int(solved.rank) / a.shape[1]


@torch.no_grad()
def _matrices(layer: nn.Module, k: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the matrices of x -> W x and of x -> dW, rows by outputs and by weights."""
    size = int(torch.tensor(shape).prod())
    if isinstance(layer, nn.Linear):
        return layer.weight, torch.kron(k[:, None], torch.eye(size, dtype=k.dtype))
    assert isinstance(layer, nn.Conv2d)
    maps, gradients = [], []
    assert not isinstance(layer.padding, str)
    units = torch.eye(size, dtype=k.dtype)
    for first in range(0, size, CHUNK):
        x = units[first : first + CHUNK].view(-1, *shape)
        maps.append(F.conv2d(x, layer.weight, None, layer.stride, layer.padding, layer.dilation).flatten(1))
        columns = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        gradients.append((k.flatten(1) @ columns.transpose(1, 2)).flatten(1))
    return torch.cat(maps).T, torch.cat(gradients).T


@torch.no_grad()
def _back(layer: nn.Module, k: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return dL/dx from dL/dz."""
    if isinstance(layer, nn.Linear):
        return k @ layer.weight
    assert isinstance(layer, nn.Conv2d)
    # A convolution is linear, so its gradient by x is the same at every x.
    x = torch.zeros(1, *shape, dtype=k.dtype, requires_grad=True)
    with torch.enable_grad():
        z = F.conv2d(x, layer.weight, None, layer.stride, layer.padding, layer.dilation)
        (found,) = torch.autograd.grad(z, x, k[None])
    return found[0]
