"""The table of models by name, and the one function that builds them."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from flowerbed import seeds
from flowerbed.errors import ConfigError, unknown_name
from flowerbed.models import (
    cnn,
    dense,
    foreign,
    imprint,
    mobilenet,
    recurrent,
    resnet,
    transformer,
)
from flowerbed.models.base import Builder, Net, Shape
from flowerbed.registry import Registry

MODELS: Registry[Builder] = Registry("model")
_BUILDERS: dict[str, Builder] = {
    "linear": dense.linear,
    "mlp": dense.mlp,
    "lenet5": cnn.lenet5,
    "leaf_cnn": cnn.leaf_cnn,
    "pfl_cnn": cnn.pfl_cnn,
    "small_cnn": cnn.small_cnn,
    "dlg_lenet": cnn.dlg_lenet,
    "resnet8": resnet.cifar_resnet(8),
    "resnet20": resnet.cifar_resnet(20),
    "resnet32": resnet.cifar_resnet(32),
    "resnet18": resnet.resnet18,
    "wrn16_2": resnet.wide_resnet(16, 2),
    "wrn28_2": resnet.wide_resnet(28, 2),
    "wrn28_10": resnet.wide_resnet(28, 10),
    "mobilenet_tiny": mobilenet.mobilenet_tiny,
    "vit_tiny": transformer.vit_tiny,
    "gpt_tiny": transformer.gpt_tiny,
    "char_lstm": recurrent.char_lstm,
    "char_gru": recurrent.char_gru,
    "imprinted": imprint.imprinted,
}
for _name, _builder in _BUILDERS.items():
    MODELS.add(_name, _builder)


def build_model(name: str, input_shape: Shape, num_classes: int, seed: int = 0, **options: Any) -> nn.Module:
    """Build the model called ``name`` on the CPU for samples of ``input_shape`` (without the batch).

    ``name`` is registered here, announced by an installed package, an import path
    ``package.module:Builder``, or ``timm:NAME``. Initial weights are a pure function of the arguments; the
    global generators are left as they were. Raises ``ConfigError`` if the name or an option is unknown, an
    option has the wrong type, or the model cannot take the input.
    """
    with seeds.global_streams(seed, "initial weights"):
        return draw_model(name, input_shape, num_classes, **options)


def draw_model(name: str, input_shape: Shape, num_classes: int, **options: Any) -> nn.Module:
    """Do what ``build_model`` does, with initial weights from the global generators as they stand.

    For builders that build on another model.
    """
    builder = foreign.timm_builder(name) if name.startswith(foreign.PREFIX) else MODELS.get(name)
    checked = _check_options(name, builder, options)
    return builder(tuple(input_shape), num_classes, **checked)


def draw_net(name: str, input_shape: Shape, num_classes: int, **options: Any) -> Net:
    """Do what ``draw_model`` does, for builders that replace the head; the model must be a ``Net``."""
    model = draw_model(name, input_shape, num_classes, **options)
    if not isinstance(model, Net):
        raise ConfigError(
            f"Model '{name}' has no separate features and head, so its head cannot be replaced; let its builder "
            "return flowerbed.models.base.Net(body, head, feature_dim)."
        )
    return model


def list_models(pattern: str = "*") -> list[str]:
    """Return the sorted names that match the glob ``pattern``; timm's only if it begins with ``timm:``."""
    if pattern.startswith(foreign.PREFIX):
        return sorted(fnmatch.filter(foreign.timm_names(), pattern))
    return MODELS.names(pattern)


def _check_options(name: str, builder: Builder, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options, lists as tuples; refuse unknown ones and values unlike the default's type."""
    accepted = list(inspect.signature(builder).parameters.values())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted):
        return dict(options)
    defaults = {p.name: p.default for p in accepted[2:]}
    checked = {}
    for option, value in options.items():
        if option not in defaults:
            raise ConfigError(unknown_name(f"option of model '{name}'", option, defaults))
        checked[option] = tuple(value) if isinstance(value, list) else value
        if not _alike(checked[option], defaults[option]):
            wanted = _type_name(defaults[option])
            raise ConfigError(f"Option {option}={value!r} of model '{name}' must be of type {wanted}.")
    return checked


def _alike(value: Any, default: Any) -> bool:
    """Whether ``value`` has the type of ``default`` (a list of the same items); anything goes for None."""
    if default is None or default is inspect.Parameter.empty:
        return True
    if isinstance(default, tuple) and isinstance(value, tuple):
        return not default or all(type(item) is type(default[0]) for item in value)
    if isinstance(default, float):
        return type(value) in (int, float)
    return type(value) is type(default)


def _type_name(default: Any) -> str:
    if isinstance(default, tuple):
        return f"list of {type(default[0]).__name__}" if default else "list"
    return type(default).__name__
