"""Weights that are functions of the tensors that are trained: torch's parametrizations, under the platform's names.

A reparametrised model holds a raw tensor v where the plain one holds a weight w = Psi(v). Optimizer, weight decay,
server and files see v, and whatever parameters Psi has; layers compute with w. ``effective_state_dict`` is the plain
network with the same outputs, ``fold`` makes it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.nn.utils import parametrize

from flowerbed.models.info import ModelInfo
from flowerbed.models.sparsity import prunable
from flowerbed.storage import Tensors

MIDDLE, ORIGINAL = ".parametrizations.", ".original"


def reparametrise(
    model: nn.Module, make: Callable[[Tensor], nn.Module], names: Iterable[str] | None = None
) -> nn.Module:
    """Put ``make(w)`` before each weight w, in place, and return the model.

    ``make`` returns a module whose ``forward`` maps v to w and whose ``right_inverse`` gives the v to start from.
    ``names`` are those of the weights, by default all kernels of convolutions and linear layers.
    """
    for name in prunable(ModelInfo.of(model)) if names is None else list(names):
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        weight = getattr(owner, leaf).detach()
        parametrize.register_parametrization(owner, leaf, make(weight))
    return model


def raw_name(name: str) -> str:
    """Return under which name a state dict has the raw tensor of the weight called ``name``."""
    path, _, leaf = name.rpartition(".")
    return f"{path}{MIDDLE}{leaf}{ORIGINAL}".lstrip(".")


def part_name(raw: str, part: str) -> str:
    """Return under which name a state dict has a tensor of the transform of the raw tensor called ``raw``."""
    return f"{raw.removesuffix(ORIGINAL)}.0.{part}"


def raw_names(names: Iterable[str]) -> list[str]:
    """Return those names of a state dict that are raw tensors, in their order."""
    return [name for name in names if MIDDLE.lstrip(".") in name and name.endswith(ORIGINAL)]


def fold(model: nn.Module) -> nn.Module:
    """Replace every raw tensor by its weight, in place, and return the model, now a plain one with the same outputs."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            assert isinstance(module.parametrizations, nn.ModuleDict)
            weights = {leaf: getattr(module, leaf).detach() for leaf in module.parametrizations}
            # Not remove_parametrizations: it empties the class, which a module shares with its deep copies.
            kind = parametrize.type_before_parametrizations(module)
            del module.parametrizations
            module.__class__ = kind
            for leaf, weight in weights.items():
                module.register_parameter(leaf, nn.Parameter(weight))
    return model


def effective_state_dict(model: nn.Module) -> Tensors:
    """Return the state dict of the folded model; the model itself stays as it is."""
    return {name: value.detach() for name, value in fold(copy.deepcopy(model)).state_dict().items()}
