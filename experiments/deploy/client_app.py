"""The client side of a deployment's Flower app: the device that ``FLOWERBED_DEVICE`` describes.

A run names its strategy and model, and a name may be an import path, so that whoever submits a run could let a device
import and call anything that is installed on it. A device therefore takes the names of flowerbed, and import paths only
of modules that its owner allows (``allow`` in ``node.toml``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context, Message

from flowerbed.errors import ClientError
from flowerbed.experiments.deploy.device import RUN_KEY, DeviceApp

DEVICE = "FLOWERBED_DEVICE"
"""Environment variable with the path of the device's configuration; ``flowerbed deploy node`` sets it."""
ALLOW = "FLOWERBED_ALLOW"
"""Environment variable with the modules from which a run may name strategies and models, separated by commas."""
USED = ("strategy", "model", "encoder", "defence", "local", "privacy", "byzantine", "secure", "devices")
"""The sections of a run's description whose names a device looks up."""
NAMESPACES = ("timm", "flower")
"""Prefixes that stand for a package's own names, not for an import path."""


class OwnCodeOnly(DeviceApp):
    """The device's app, for runs that name nothing but what the device's owner allows."""

    def __init__(self, config_path: Path, allowed: Sequence[str]) -> None:
        super().__init__(config_path)
        self._allowed = allowed

    def __call__(self, message: Message, context: Context) -> Message:
        refuse_foreign(str(context.run_config.get(RUN_KEY, "")), self._allowed)
        return super().__call__(message, context)


def refuse_foreign(expectations: str, allowed: Sequence[str]) -> None:
    """Raise ``ClientError`` if a run names a module that is neither flowerbed's nor allowed.

    What cannot be read is left to the app, which refuses it.
    """
    try:
        simulation = dict(json.loads(expectations)["simulation"])
    except (ValueError, TypeError, KeyError):
        return
    for section in USED:
        for text in _strings(simulation.get(section)):
            module = _module(text)
            if module and not any(module == a or module.startswith(f"{a}.") for a in ("flowerbed", *allowed)):
                raise ClientError(
                    f"the run names '{text}' in '{section}', and this device takes nothing from the module {module}; "
                    "its owner may allow that module with allow= in node.toml"
                )


def _module(text: str) -> str:
    """Return the module of an import path, ``package.module:Name``; "" for a text that is none."""
    head, colon, rest = text.partition(":")
    if colon and head in NAMESPACES:
        head, colon, rest = rest.partition(":")
    return head if colon else ""


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


app = OwnCodeOnly(
    Path(os.environ.get(DEVICE, "device.toml")),
    [module for module in os.environ.get(ALLOW, "").split(",") if module],
)
