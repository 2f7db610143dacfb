"""What every model is to the rest of the platform: a body, a head, and names with roles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flowerbed.errors import ConfigError

Role = Literal["backbone", "head"]
Shape = tuple[int, ...]
"""Shape of one sample, without the batch: ``(C, H, W)`` images, ``(F,)`` features, ``(L,)`` token ids."""
Builder = Callable[..., nn.Module]
"""``builder(input_shape, num_classes, **options)`` returns a freshly initialised model."""


class Net(nn.Module):
    """A model in two parts, ``head(body(x))``; every name in its state dict starts with one of the two."""

    def __init__(self, body: nn.Module, head: nn.Module, feature_dim: int) -> None:
        """``body`` maps a batch to features ``(N, D)`` or ``(N, L, D)``, ``head`` maps these to the outputs.

        ``feature_dim`` is D.
        """
        super().__init__()
        self.body = body
        self.head = head
        self.feature_dim = feature_dim

    def features(self, x: Tensor) -> Tensor:
        """Return the features ``(N, D)``, or ``(N, L, D)`` for token models."""
        z: Tensor = self.body(x)
        return z

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits: ``(N, C)``, or ``(N, L, V)`` for token models."""
        y: Tensor = self.head(self.body(x))
        return y


def classifier(body: nn.Module, feature_dim: int, num_classes: int) -> Net:
    """Return ``body`` with one linear layer as its head."""
    return Net(body, nn.Linear(feature_dim, num_classes), feature_dim)


def parameter_names(model: nn.Module) -> list[str]:
    """Return the names of all parameters in the order of the state dict; tied ones under each name."""
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return [name for name in model.state_dict() if name in known]


def buffer_names(model: nn.Module) -> list[str]:
    """Return the names of all buffers that belong to the state dict, in its order."""
    parameters = set(parameter_names(model))
    return [name for name in model.state_dict() if name not in parameters]


def roles(model: nn.Module) -> dict[str, Role]:
    """Return the role of every name in the state dict.

    The head is what lies under ``head`` of a ``Net``. A module that is no ``Net`` may have a method
    ``get_classifier()`` that returns its last layer (the convention of timm); without it, all is backbone.
    """
    head = _head_of(model)
    inside = {id(tensor) for tensor in head.state_dict(keep_vars=True).values()} if head else set()
    state = model.state_dict(keep_vars=True)
    return {name: "head" if id(tensor) in inside else "backbone" for name, tensor in state.items()}


def _head_of(model: nn.Module) -> nn.Module | None:
    if isinstance(model, Net):
        return model.head
    get_classifier = getattr(model, "get_classifier", None)
    if get_classifier is None:
        return None
    head = get_classifier()
    if not isinstance(head, nn.Module):
        raise ConfigError(
            f"{type(model).__name__}.get_classifier() returned {type(head).__name__}; it must return the one "
            "module that is the head."
        )
    return head


def require_at_least_one(model: str, **sizes: int) -> None:
    """Raise ``ConfigError`` naming the first of ``sizes`` that is below one."""
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"Option {name}={size} of model '{model}' must be at least 1.")


@dataclass(frozen=True)
class ModelSpec:
    """A model as a value: what any process needs to build the same one. Picklable."""

    name: str
    """A name that ``list_models`` knows, ``timm:NAME``, or an import path ``package.module:Builder``."""
    input_shape: Shape
    num_classes: int
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    """A safetensors file with initial values for some or all tensors of the state dict, by name."""
    part: str = "all"
    """What is taken from that file: all of it, or the backbone, for another task than the file's."""

    def build(self, seed: int) -> nn.Module:
        """Return the model on the CPU; its initial weights are a pure function of this spec and ``seed``.

        Raises ``ConfigError`` if the name or an option is unknown, the model cannot take the input, or the file of
        weights does not fit it.
        """
        # Here, not above: the zoo is made of models, which are made of this module.
        from flowerbed.models.zoo import build_model

        model = build_model(self.name, self.input_shape, self.num_classes, seed, **self.options)
        if self.weights is not None:
            load_weights(model, self.weights, self.part)
        return model


def load_weights(model: nn.Module, path: str, part: str = "all") -> None:
    """Put the tensors of a safetensors file into ``model`` by name; what the file lacks stays as it is.

    Of the ``part`` called ``backbone`` is all but the head: the head may be of any size, and this one's stays as it is.
    Raises ``ConfigError`` if the file cannot be read, is of another model, or shares no tensor with this one.
    """
    try:
        given = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"The weights {path} cannot be read: {error}.") from error
    own = model.state_dict(keep_vars=True)
    if part == "backbone":
        known = roles(model)
        given = {n: v for n, v in given.items() if known.get(n) != "head" and not n.startswith("head.")}
    strange = sorted(given.keys() - own.keys())
    if strange or not given:
        what = f"has no tensor '{strange[0]}'" if strange else "gets nothing from it"
        raise ConfigError(f"The weights {path} are those of another model: {type(model).__name__} {what}.")
    with torch.no_grad():
        for name, value in given.items():
            if value.shape != own[name].shape:
                raise ConfigError(
                    f"The weights {path} are those of another model: '{name}' has shape {tuple(value.shape)}, "
                    f"needed is {tuple(own[name].shape)}."
                )
            own[name].copy_(value)
