"""How a failure looks from outside: one line, and an exit code."""

from __future__ import annotations

import os
import traceback

from flowerbed.errors import ConfigError, FlowerbedError

FAILED, BAD_CONFIG, INTERRUPTED = 1, 2, 130
"""Exit codes: a run failed; it could not start as it was asked for; Ctrl-C."""


def describe(error: FlowerbedError) -> str:
    """Return an error's first line; its traceback is printed before if FLOWERBED_TRACEBACK asks for it."""
    if os.environ.get("FLOWERBED_TRACEBACK", "0") not in ("", "0"):
        traceback.print_exception(error)
    return f"flowerbed: {first_line(error)}"


def first_line(error: BaseException | str) -> str:
    """Return the first line of a message; a client's own error brings its traceback along."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def exit_code(error: BaseException) -> int:
    """Return the exit code that an error stands for."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return BAD_CONFIG if isinstance(error, ConfigError) else FAILED
