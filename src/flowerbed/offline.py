"""Switches that keep our dependencies off the network unless the user asks for it; imports none of them."""

from __future__ import annotations

import netrc
import os


def offline_defaults() -> None:
    """Default to no telemetry, update check or upload; must run before flwr, ray or wandb is imported.

    Only variables that are unset are set, so a user's own environment always wins. wandb is put offline only
    where it has no key (``WANDB_API_KEY`` or an entry for its host in ``~/.netrc``): with a key the user has
    asked for it.
    """
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not has_wandb_key():
        os.environ.setdefault("WANDB_MODE", "offline")


def has_wandb_key() -> bool:
    """Return whether the user has a key of Weights & Biases, in the environment or in ``~/.netrc``."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
