"""Dropout of many clients at once, with the numbers that each client would draw by itself.

``torch.nn.Dropout`` draws from torch's default generator, which the training loop seeds for each client and
round. Here every client has a generator of its own in that state, and its masks are drawn in the same order
and in the same memory layout. On a CPU the numbers are those of one client at a time; on a GPU, where torch
draws inside its fused kernel, only their distribution is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from flowerbed import seeds
from flowerbed.clients.local_round import LocalRound

Generator = torch.Generator | np.random.Generator
Masks = list[list[Tensor]]
"""By client and call."""


@dataclass(frozen=True)
class Site:
    """One call of a dropout layer in the loss of a batch."""

    module: nn.Dropout
    shape: tuple[int, ...]
    """Of its input, the batch included."""
    channels_last: bool
    """Whether the input's memory is channels-last, in which order the mask is then drawn."""

    def noise(self, generator: Generator, dtype: torch.dtype) -> Tensor:
        """Return a fresh mask, already divided by the probability to keep."""
        keep = 1 - self.module.p
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        if isinstance(generator, np.random.Generator):
            return self._from_bytes(generator, dtype, keep)
        drawn = torch.empty(self.shape, dtype=dtype, device=generator.device, memory_format=layout)
        if not keep:
            return drawn.zero_()
        return drawn.bernoulli_(keep, generator=generator).div_(keep)

    def _from_bytes(self, generator: np.random.Generator, dtype: torch.dtype, keep: float) -> Tensor:
        """Draw with one byte an element, which is exact for probabilities in steps of 1/256."""
        shape = self.shape
        if self.channels_last:
            batch, channels, height, width = shape
            shape = (batch, height, width, channels)
        drawn = torch.frombuffer(bytearray(generator.bytes(math.prod(shape))), dtype=torch.uint8)
        kept = drawn.ge(round(self.module.p * 256)).view(shape).to(dtype).mul_(1 / keep)
        return kept.permute(0, 3, 1, 2) if self.channels_last else kept


class DropoutSites:
    """Where a loss calls dropout, by batch size; found by watching one evaluation."""

    def __init__(self, model: nn.Module, evaluate: Callable[[int], object], device: torch.device) -> None:
        """``evaluate(size)`` computes the loss of some batch of that size, with the model in training mode."""
        self._modules = [m for m in model.modules() if type(m) is nn.Dropout and m.p > 0]
        self._evaluate = evaluate
        self._device = device
        self._known: dict[int, tuple[Site, ...]] = {}

    def __bool__(self) -> bool:
        return bool(self._modules)

    @property
    def coarse(self) -> bool:
        """Whether every probability is a multiple of 1/256 below one, and the masks are wanted on a CPU."""
        return self._device.type == "cpu" and all((m.p * 256).is_integer() and m.p < 1 for m in self._modules)

    def of(self, size: int) -> tuple[Site, ...]:
        """Return the calls in the loss of a batch of ``size`` samples, in order."""
        if size not in self._known:
            found: list[Site] = []

            def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                x = inputs[0]
                if module.training and isinstance(module, nn.Dropout):
                    plain = x.is_contiguous() or x.dim() != 4
                    found.append(Site(module, tuple(x.shape), not plain and _channels_last(x)))

            handles = [module.register_forward_pre_hook(watch) for module in self._modules]
            try:
                with torch.no_grad(), seeds.torch_stream(0, "dropout sites", device=self._device):
                    self._evaluate(size)
            finally:
                for handle in handles:
                    handle.remove()
            self._known[size] = tuple(found)
        return self._known[size]

    def draw(self, drawing: Sequence[Generator], sizes: Sequence[int], dtype: torch.dtype) -> Masks:
        """Return the masks of one step: for each client, those of its calls in order; none without dropout."""
        if not self._modules:
            return []
        return [[s.noise(g, dtype) for s in self.of(size)] for g, size in zip(drawing, sizes, strict=False)]


def generators(locals_: Sequence[LocalRound], *, fast: bool) -> Sequence[Generator]:
    """Return each client's generator, by default as the training loop would seed torch's for this round.

    ``fast`` ones are numpy's, for masks of the same distribution in a quarter of the time.
    """
    if fast:
        return [seeds.numpy_rng(c.seed, "modules", c.client, c.clock.round) for c in locals_]
    return [
        seeds.torch_rng(c.seed, "modules", c.client, c.clock.round, device=c.device.type) for c in locals_
    ]


class GivenMasks:
    """Lets all calls of dropout in a model multiply by masks that are handed over, instead of drawing.

    Made once for a model and used again and again: what is put in place of a layer's ``forward`` stays the same object,
    so that code compiled for it stays valid.
    """

    def __init__(self, model: nn.Module) -> None:
        self.left: list[Tensor] = []
        """The masks of the calls to come, in order; each is taken out by its call."""
        self._forwards = {m: self._forward(m) for m in model.modules() if type(m) is nn.Dropout and m.p > 0}

    def _forward(self, module: nn.Dropout) -> Callable[[Tensor], Tensor]:
        return lambda x: x * self.left.pop(0) if module.training else x

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replace the layers' own ``forward`` meanwhile."""
        for module, forward in self._forwards.items():
            module.__dict__["forward"] = forward  # The instance's own goes before that of the class.
        try:
            yield
        finally:
            for module in self._forwards:
                del module.__dict__["forward"]
            self.left.clear()


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)
