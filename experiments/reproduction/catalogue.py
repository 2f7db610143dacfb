"""The published methods that the platform reproduces, in the order of the catalogue: facts, no results."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

FILE = Path(__file__).with_name("catalogue.yaml")


@dataclass(frozen=True)
class Entry:
    """One published method."""

    slug: str
    title: str
    seam: str
    """The part of the platform that it leans on most."""


@cache
def catalogue() -> dict[str, Entry]:
    """Return every entry by slug."""
    return {row["slug"]: Entry(**row) for row in yaml.safe_load(FILE.read_text())}
