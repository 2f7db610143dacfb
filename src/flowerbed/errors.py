"""The errors that flowerbed raises on purpose: each names the thing that is wrong and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FlowerbedError(Exception):
    """Base of every error that is a message to the user; the command line prints it without a traceback."""


class ConfigError(FlowerbedError):
    """A setting is unknown, has the wrong type, or asks for something impossible."""


class DataError(FlowerbedError):
    """A data set is missing, unreadable or does not fit what it is used for."""


class RunError(FlowerbedError):
    """A run cannot go on: too few usable replies, or a strategy that cannot aggregate."""


class DivergedError(RunError):
    """The training left the finite numbers: a result, not a defect, and reported as one."""


class CheckpointError(FlowerbedError):
    """A checkpoint is missing, damaged, or belongs to another configuration."""


class ClientError(FlowerbedError):
    """A client cannot do what it was asked; becomes an error reply and is counted."""


def require(condition: bool, message: str) -> None:
    """Raise ``ConfigError(message)`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the sentence that says that ``name`` is no ``kind``, with the nearest and all known names."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"Unknown {kind} '{name}'.{hint} Known: {', '.join(names) or '(none)'}."
