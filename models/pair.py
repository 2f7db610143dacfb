"""Two networks of one kind as one model, which answers by the mean of their outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from flowerbed.errors import ConfigError
from flowerbed.models.base import Net, Shape, load_weights
from flowerbed.models.parts import ModelParts

MEMBERS = ("first", "second")


class Pair(nn.Module):
    """Two networks; every name in the state dict starts with ``first`` or ``second``, so that no server mixes them."""

    first: Net
    second: Net

    def __init__(self, first: Net, second: Net) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean of the two outputs, ``(N, C)``."""
        mean: Tensor = (self.first(x) + self.second(x)) / 2
        return mean


def pair(
    input_shape: Shape,
    num_classes: int,
    *,
    of: str = "small_cnn",
    options: Mapping[str, Any] | None = None,
    first: str = "",
    second: str = "",
) -> Pair:
    """Return two networks ``of`` one kind, each with initial weights of its own or with those of a model file."""
    # Here, not above: the zoo is made of models.
    from flowerbed.models.zoo import draw_net

    nets = [draw_net(of, input_shape, num_classes, **(options or {})) for _ in MEMBERS]
    for net, path in zip(nets, (first, second), strict=True):
        if path:
            load_weights(net, path)
    return Pair(nets[0], nets[1])


def members(model: ModelParts) -> tuple[ModelParts, ModelParts]:
    """Return the views of the two networks of a pair; raises ``ConfigError`` for a model that is none."""
    if not isinstance(model.module, Pair):
        raise ConfigError(
            f"{type(model.module).__name__} is one network and two are needed; use flowerbed.models.pair:pair."
        )
    first, second = (_member(model, name) for name in MEMBERS)
    return first, second


def _member(model: ModelParts, name: str) -> ModelParts:
    module: nn.Module = model.module.get_submodule(name)
    if model.in_place:
        return replace(ModelParts.resident(module), low=model.low)
    return replace(
        ModelParts.functional(module, _under(name, model.parameters), _under(name, model.buffers)),
        low=model.low,
    )


def _under(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(f"{name}.")}
