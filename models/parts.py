"""The one view of a model that a loss uses, whether the weights are in the module or handed in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flowerbed.errors import ConfigError
from flowerbed.models.base import Net
from flowerbed.models.layers import ChannelsLast, GlobalMean, MaxPool

DRAWLESS = frozenset(
    {
        Net,
        nn.Sequential,
        ChannelsLast,
        nn.Identity,
        nn.Flatten,
        nn.Linear,
        nn.Conv2d,
        nn.ReLU,
        nn.Tanh,
        MaxPool,
    }
    | {GlobalMean, nn.GroupNorm, nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d}
)
"""Layers that draw no random numbers when they compute."""
WHOLE, BODY, HEAD = "", "body", "head"


@dataclass(frozen=True)
class ModelParts:
    """A model to compute with: ``parts(x)``, ``parts.features(x)``, ``parts.head(z)``, ``parts.parameters``.

    Make one with ``resident`` or ``functional``; a loss cannot tell them apart. Train or evaluation mode is
    the module's.
    """

    module: nn.Module
    parameters: Mapping[str, Tensor]
    """The trainable tensors by name."""
    buffers: Mapping[str, Tensor]
    """The other tensors of the state dict by name; batch norm in training mode updates them in place."""
    in_place: bool
    low: torch.dtype | None = None
    """The type in which autocast computes the model; weights and what it returns keep theirs. None: theirs."""

    @classmethod
    def resident(cls, module: nn.Module) -> ModelParts:
        """View the module's own weights; whoever changes them in place changes what the view computes."""
        state = module.state_dict(keep_vars=True)
        parameters = dict(module.named_parameters())
        buffers = {name: tensor for name, tensor in state.items() if not isinstance(tensor, nn.Parameter)}
        return cls(module, parameters, buffers, in_place=True)

    @cached_property
    def state(self) -> Mapping[str, Tensor]:
        """The module's own parameters and buffers themselves, in the order of its state dict."""
        return dict(self.module.state_dict(keep_vars=True))

    @cached_property
    def draws(self) -> bool:
        """Whether the module may draw random numbers: not if it is made of layers known to draw none."""
        return not all(
            type(module) in DRAWLESS and not (module._forward_hooks or module._forward_pre_hooks)
            for module in self.module.modules()
        )

    @classmethod
    def functional(
        cls,
        module: nn.Module,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        low: torch.dtype | None = None,
    ) -> ModelParts:
        """Compute with the given tensors in place of the module's, by name; works under ``torch.func``.

        Names that are left out keep the module's own tensors.
        """
        return cls(module, parameters, buffers, in_place=False, low=low)

    def __call__(self, x: Tensor, *further: Tensor) -> Tensor:
        """Return the outputs of a batch, ``(N, C)`` or ``(N, L, V)``; ``further`` are inputs beside ``x``, if any."""
        return self._apply(WHOLE, x, *further)

    def features(self, x: Tensor) -> Tensor:
        """Return the features of a batch, ``(N, D)`` or ``(N, L, D)``; ``head`` of these are the outputs."""
        return self._apply(BODY, x)

    def head(self, z: Tensor) -> Tensor:
        """Return the outputs that belong to the features ``z``."""
        return self._apply(HEAD, z)

    def _apply(self, part: str, *inputs: Tensor) -> Tensor:
        if self.low is not None:
            with torch.autocast(inputs[0].device.type, self.low):
                return self._compute(part, *inputs).float()
        return self._compute(part, *inputs)

    def _compute(self, part: str, *inputs: Tensor) -> Tensor:
        module = self._submodule(part) if part else self.module
        if self.in_place:
            y: Tensor = module(*inputs)
            return y
        prefix = f"{part}." if part else ""
        tensors = {
            name.removeprefix(prefix): tensor
            for group in (self.parameters, self.buffers)
            for name, tensor in group.items()
            if name.startswith(prefix)
        }
        y = functional_call(module, tensors, inputs)
        return y

    def _submodule(self, part: str) -> nn.Module:
        if not isinstance(self.module, Net):
            raise ConfigError(
                f"{type(self.module).__name__} has no separate features and head; let its builder return "
                "flowerbed.models.base.Net(body, head, feature_dim)."
            )
        return self.module.get_submodule(part)
