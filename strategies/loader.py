"""Finds the algorithm files of this folder, so that adding one needs no list to be edited."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path


@cache
def load_all() -> None:
    """Import every module beside this one; each registers its strategies."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"flowerbed.strategies.{module.name}")
