"""Models of the timm library, by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from flowerbed.errors import ConfigError
from flowerbed.models.base import Builder, Net, Shape
from flowerbed.models.layers import image_shape

PREFIX = "timm:"


def timm_builder(name: str) -> Builder:
    """Return the builder of ``timm:<model>``; its options are those of ``timm.create_model``.

    Weights are downloaded only with the option ``pretrained=true``. The classifier becomes the head of a
    ``Net``, the rest its body. Raises ``ConfigError`` if timm is not installed or has no such model.
    """
    timm = _timm()
    model_name = name.removeprefix(PREFIX)
    if not timm.is_model(model_name):
        raise ConfigError(f"timm has no model '{model_name}'; list them with the pattern '{PREFIX}*'.")

    def build(input_shape: Shape, num_classes: int, **options: Any) -> Net:
        channels, *_ = image_shape(name, input_shape)
        asked = {"pretrained": False, "in_chans": channels, "num_classes": num_classes, **options}
        try:
            model = timm.create_model(model_name, **asked)
        except TypeError as error:
            raise ConfigError(
                f"timm cannot build '{model_name}' with the options {options}: {error}"
            ) from error
        head = model.get_classifier()
        if not isinstance(head, nn.Linear):
            raise ConfigError(
                f"'{name}' does not end in one linear layer, so it cannot be split; use another."
            )
        model.reset_classifier(0)
        return Net(model, head, head.in_features)

    return build


def timm_names() -> list[str]:
    """Return the names of timm's models with the prefix; none if timm is not installed."""
    try:
        return [PREFIX + name for name in _timm().list_models()]
    except ConfigError:
        return []


def _timm() -> Any:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: its torchvision was built for another torch
        raise ConfigError(
            f"Models named timm:NAME need timm, which cannot be imported ({error}). Install it with: pip install "
            "timm; it needs a torchvision that fits the installed torch."
        ) from error
    return timm
