"""The facts about a model that algorithms decide by: which tensor is what, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from flowerbed.models.base import Role, Shape, parameter_names, roles

NORMALISATION = (_NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class ModelInfo:
    """Names and kinds of every tensor in a model's state dict; picklable, the same on server and clients."""

    roles: Mapping[str, Role]
    """backbone or head, for every parameter and buffer."""
    parameters: frozenset[str]
    """The trainable ones; every other name is a buffer."""
    normalisation: frozenset[str]
    """Parameters and buffers of normalisation layers (batch, instance, group, layer)."""
    shapes: Mapping[str, Shape]

    @classmethod
    def of(cls, model: nn.Module) -> ModelInfo:
        """Describe ``model``."""
        normalisation = {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in model.named_modules()
            if isinstance(module, NORMALISATION)
            for name in module.state_dict()
        }
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        return cls(roles(model), frozenset(parameter_names(model)), frozenset(normalisation), shapes)

    @property
    def head(self) -> frozenset[str]:
        """The names in the head (the last, classifying part)."""
        return frozenset(name for name, role in self.roles.items() if role == "head")

    @property
    def backbone(self) -> frozenset[str]:
        """The names outside the head."""
        return frozenset(self.roles) - self.head


def parameter_count(model: nn.Module) -> int:
    """Return how many numbers a model has that are trained."""
    return sum(p.numel() for p in model.parameters())
