"""Kernels written by hand for models that are a plain stack of known layers, trained on the cross entropy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowerbed.clients.cohort import layers
from flowerbed.clients.cohort.dropout import Masks, Site
from flowerbed.clients.cohort.layers import Collect, Descend, Layer, Sink, Weights
from flowerbed.clients.cohort.optimizer import same
from flowerbed.clients.cohort.schedule import Tick
from flowerbed.models.base import Net
from flowerbed.models.layers import ChannelsLast, GlobalMean, MaxPool
from flowerbed.storage import Tensors

LARGE = 2**18
"""Weights of a dense layer from which on another matrix product may be worth its call for each client."""


class UnknownStackError(Exception):
    """The model is not a stack of layers that this module knows; the message names the first other one."""


@dataclass(frozen=True)
class Dropout:
    """The place of a mask, which every tick fills with a ``layers.Multiply``."""

    names: tuple[str, ...] = ()


class FusedStack:
    """Forward and backward passes of K stacked models, written out."""

    def __init__(
        self, model: nn.Module, *, images: bool, low: torch.dtype | None = None, onednn: bool = False
    ) -> None:
        """``images`` says whether a sample is ``(C, H, W)``; ``low`` is the type to convolve in.

        ``onednn`` sends large dense layers there.

        Raises ``UnknownStackError`` for any other model than a stack of known layers.
        """
        self._low = low
        self.layers = _recognise(model, images, low)
        if onednn:
            large = set(large_layers(model))
            self.layers = [
                layers.OneDnnLinear(layer.weight, layer.bias)
                if isinstance(layer, layers.Linear) and layer.weight in large
                else layer
                for layer in self.layers
            ]

    def descend(
        self, weights: Weights, moving: frozenset[str], tick: Tick, noises: Sequence[Tensor]
    ) -> Tensor:
        """Make one plain SGD step, ``w -= lr g``, in place; return the losses ``(A,)``."""
        rate = same(tick.lr)
        return self._pass(Descend(moving, weights), weights, tick, noises, tick.lr if rate is None else rate)

    def gradients(
        self, weights: Weights, moving: frozenset[str], tick: Tick, noises: Sequence[Tensor]
    ) -> tuple[Tensor, Tensors]:
        """Return the losses ``(A,)`` and the gradients of the parameters in ``moving``."""
        sink = Collect(moving)
        return self._pass(sink, weights, tick, noises, 1.0), sink.gradients

    def _pass(
        self,
        sink: Sink,
        weights: Weights,
        tick: Tick,
        noises: Sequence[Tensor],
        factor: float | Sequence[float],
    ) -> Tensor:
        clients, x = tick.active, tick.batch["x"]
        stack: list[Layer] = []
        left = iter(noises)
        for layer in self.layers:
            stack.append(layers.Multiply(next(left)) if isinstance(layer, Dropout) else layer)
        kept = []
        for layer in stack:
            x, saved = layer.forward(x, weights, clients)
            kept.append(saved)
        losses, dy = _cross_entropy(x, tick, factor)
        lowest = next(i for i, layer in enumerate(stack) if any(n in sink.moving for n in layer.names))
        for i in range(len(stack) - 1, lowest - 1, -1):
            found = stack[i].backward(dy, kept.pop(), weights, sink, i > lowest)
            if found is not None:
                dy = found
        return losses

    def place(self, masks: Masks, tick: Tick) -> list[Tensor]:
        """Return the masks of all active clients as one tensor for each call of dropout."""
        return [self._joint([own[call] for own in masks], tick) for call in range(len(masks[0]))]

    def _joint(self, own: Sequence[Tensor], tick: Tick) -> Tensor:
        first, clients, width = own[0], tick.active, tick.width
        if first.dim() != 4:
            joint = first.new_zeros(clients, width, *first.shape[1:])
            for k, mask in enumerate(own):
                joint[k, : tick.sizes[k]] = mask
            return joint
        if clients == 1:
            return first.to(self._low or first.dtype)
        channels, height, across = first.shape[1:]
        joint = first.new_zeros(width, height, across, clients * channels, dtype=self._low or first.dtype)
        images = joint.permute(0, 3, 1, 2)
        for k, mask in enumerate(own):
            images[: tick.sizes[k], k * channels : (k + 1) * channels] = mask
        return images

    def calls(self, sites: Sequence[Site]) -> bool:
        """Return whether the watched calls of dropout are the ones of this stack."""
        return len(sites) == sum(isinstance(layer, Dropout) for layer in self.layers)


def _cross_entropy(z: Tensor, tick: Tick, factor: float | Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return each client's mean cross entropy, and its derivative by the outputs, times ``factor``."""
    labels = tick.batch["y"].unsqueeze(2)
    log_p = z.log_softmax(2)
    losses = log_p.gather(2, labels).squeeze(2)
    dy = log_p.exp_().scatter_add_(2, labels, losses.new_tensor(-1.0).expand(labels.shape))
    if tick.uniform and isinstance(factor, float):
        return losses.mean(1).neg_(), dy.mul_(factor / tick.width)
    rows = row_weights(tick, z)
    scale = rows * (factor if isinstance(factor, float) else z.new_tensor(factor).unsqueeze(1))
    return (losses * rows).sum(1).neg_(), dy.mul_(scale.unsqueeze(2))


def row_weights(tick: Tick, like: Tensor) -> Tensor:
    """Return what each row counts in its client's mean, ``(A, B)``: one over the batch size, or zero."""
    sizes = torch.tensor(tick.sizes, device=like.device).unsqueeze(1)
    inside = torch.arange(tick.width, device=like.device) < sizes
    return inside.to(like.dtype) / sizes


def large_layers(model: nn.Module) -> list[str]:
    """Return the weights of the dense layers that oneDNN may do faster: large, float32, on a CPU."""
    return [
        name
        for name, p in model.named_parameters()
        if p.dim() == 2 and p.numel() >= LARGE and p.dtype == torch.float32 and p.device.type == "cpu"
    ]


def _recognise(model: nn.Module, images: bool, low: torch.dtype | None) -> list[Layer | Dropout]:
    parameters = list(model.parameters())
    types = {p.dtype for p in parameters}
    if len(types) != 1 or not next(iter(types)).is_floating_point:
        raise UnknownStackError("its parameters are not all of one real type")
    if len(parameters) != len(list(model.named_parameters(remove_duplicate=False))):
        raise UnknownStackError("it uses a parameter twice")
    (dtype,) = types
    found: list[Layer | Dropout] = []
    inside = images
    for name, module in _flat(model, ""):
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            if not found:
                found.append(layers.FlattenSamples())
            elif inside:
                found.append(layers.FlattenImages(dtype if low else None))
            inside = False
            continue
        if inside and not found:
            found.append(layers.Enter(low))
        found.append(_layer(name, module, inside, dtype if low else None))
        if isinstance(module, GlobalMean):
            inside = False
    if inside:
        raise UnknownStackError("its outputs are images")
    return found


def _flat(module: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        raise UnknownStackError(f"its layer '{name}' has hooks")
    if type(module) in (Net, nn.Sequential, ChannelsLast):
        children = module.named_children()
        return [leaf for n, child in children for leaf in _flat(child, f"{name}.{n}" if name else n)]
    skipped = type(module) is nn.Identity or (type(module) is nn.Dropout and not module.p)
    return [] if skipped else [(name, module)]


def _layer(name: str, module: nn.Module, inside: bool, dense: torch.dtype | None) -> Layer | Dropout:
    """Return the stacked layer of a module, with images as its input where ``inside``.

    ``dense`` is the type to return to where the images end.
    """
    weight, bias = f"{name}.weight", f"{name}.bias"
    match module:
        case nn.Linear() if type(module) is nn.Linear and not inside:
            return layers.Linear(weight, None if module.bias is None else bias)
        case nn.Conv2d() if type(module) is nn.Conv2d and inside and _plain(module):
            stride, padding, dilation = (_pair(v) for v in (module.stride, module.padding, module.dilation))
            return layers.Conv(weight, None if module.bias is None else bias, stride, padding, dilation)
        case nn.GroupNorm() if type(module) is nn.GroupNorm and inside and module.affine:
            return layers.GroupNorm(weight, bias, module.num_groups, module.eps)
        case nn.ReLU():
            return layers.ReLU()
        case nn.Dropout() if type(module) is nn.Dropout:
            return Dropout()
        case MaxPool() if inside:
            return layers.MaxPool(*(_pair(v) for v in (module.size, module.stride, module.padding)))
        case nn.MaxPool2d() if inside and _pair(module.dilation) == (1, 1) and not module.ceil_mode:
            return layers.MaxPool(*(_pair(v) for v in (module.kernel_size, module.stride, module.padding)))
        case nn.AvgPool2d() if inside and module.count_include_pad and not module.ceil_mode:
            return layers.AvgPool(*(_pair(v) for v in (module.kernel_size, module.stride, module.padding)))
        case nn.ZeroPad2d() if inside:
            left, right, top, bottom = module.padding
            return layers.ZeroPad((left, right, top, bottom))
        case GlobalMean() if inside:
            return layers.GlobalMean(dense)
        case _:
            raise UnknownStackError(f"its layer '{name}' ({type(module).__name__}) is none that is known")


def _plain(module: nn.Conv2d) -> bool:
    return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return int(first), int(second)
