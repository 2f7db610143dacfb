"""The table of models by name, and the one function that builds them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from flowerbed import seeds
from flowerbed.errors import ConfigError, unknown_name
from flowerbed.models import dense
from flowerbed.models.base import Builder, Shape
from flowerbed.registry import Registry

MODELS: Registry[Builder] = Registry("model")
MODELS.add("linear", dense.linear)
MODELS.add("mlp", dense.mlp)


def build_model(
    name: str, input_shape: Shape, num_classes: int, seed: int = 0, **options: Any
) -> nn.Module:
    """Build the model called ``name`` on the CPU for samples of ``input_shape`` (without the batch).

    ``name`` is registered here, announced by an installed package, an import path
    ``package.module:Builder``, or ``timm:NAME``. Initial weights are a pure function of the arguments; the
    global generators are left as they were. Raises ``ConfigError`` if the name or an option is unknown, an
    option has the wrong type, or the model cannot take the input.
    """
    builder = MODELS.get(name)
    checked = _check_options(name, builder, options)
    with seeds.global_streams(seed, "initial weights"):
        return builder(tuple(input_shape), num_classes, **checked)


def list_models(pattern: str = "*") -> list[str]:
    """Return the sorted names that match the glob ``pattern``."""
    return MODELS.names(pattern)


def _check_options(name: str, builder: Builder, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options, lists as tuples; refuse unknown ones and values unlike the default's type."""
    accepted = inspect.signature(builder).parameters
    if any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        return dict(options)
    defaults = {n: p.default for n, p in list(accepted.items())[2:]}
    checked = {}
    for option, value in options.items():
        if option not in defaults:
            raise ConfigError(unknown_name(f"option of model '{name}'", option, defaults))
        checked[option] = tuple(value) if isinstance(value, list) else value
        wanted = type(defaults[option])
        if type(checked[option]) is not wanted:
            raise ConfigError(f"Option {option}={value!r} of model '{name}' must be of type {wanted.__name__}.")
    return checked
