"""What methods need to know about a model's head before they treat it apart."""

from __future__ import annotations

from flowerbed.errors import require
from flowerbed.strategies.base import Setting


def require_head(setting: Setting, method: str) -> None:
    """Raise ``ConfigError`` if the model has no head that could be told from its body."""
    require(
        bool(setting.info.head),
        f"{method} treats the model's head apart and this model has none; choose one that is a body and a head "
        "(flowerbed.models.base.Net, or a module with get_classifier()).",
    )


def linear_head(setting: Setting, method: str) -> tuple[str, str | None]:
    """Return the names of the weight ``(C, D)`` and the bias ``(C,)``, if any, of a head that is one linear layer.

    Raises ``ConfigError`` if the model has no head or its head is something else.
    """
    require_head(setting, method)
    info = setting.info
    weights = sorted(n for n in info.head if len(info.shapes[n]) == 2)
    biases = sorted(n for n in info.head if len(info.shapes[n]) == 1)
    require(
        len(weights) == 1 and len(biases) <= 1 and len(weights) + len(biases) == len(info.head),
        f"{method} needs a head that is one linear layer, this model's has {sorted(info.head)}; choose a model "
        "with a linear head.",
    )
    return weights[0], next(iter(biases), None)
