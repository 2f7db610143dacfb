"""The ways to run flowerbed that are measured, as data: a name, and what is set beside the workload's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flowerbed.errors import ConfigError
from flowerbed.experiments.config import Simulation

Settings = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Variant:
    """One way to run flowerbed."""

    name: str
    settings: Settings
    note: str
    ray: bool = False

    def missing(self) -> str:
        """Return why this version cannot be run so; "" if it can."""
        try:
            Simulation.of(self.settings)
        except ConfigError as error:
            return f"not in this version ({str(error).split('. ')[0].rstrip('.')})"
        return ""


STRICT = "generic strict"

VARIANTS = (
    Variant("flowerbed", {}, "as it comes: nothing is set, in process"),
    Variant(
        "messages",
        {"grid": {"exchange": "messages"}},
        "as it comes, but what goes to and from every client is a Flower message",
    ),
    Variant(
        STRICT,
        {"local": {"engine": "strict"}, "grid": {"engine": "generic"}},
        "one client after the other, bits of the plain loop",
    ),
    Variant(
        "generic fast",
        {"local": {"engine": "fast"}, "grid": {"engine": "generic"}},
        "one client after the other, the same steps up to rounding, other dropout masks",
    ),
    Variant(
        "generic bf16",
        {"local": {"engine": "fast", "precision": "bfloat16"}, "grid": {"engine": "generic"}},
        "the same in bfloat16, weights and updates in float32",
    ),
    Variant(
        "cohort",
        {"grid": {"engine": "cohort"}},
        "many clients as one batched computation",
    ),
    Variant(
        "cohort bf16",
        {"cohort": {"precision": "bfloat16"}, "grid": {"engine": "cohort"}},
        "many clients at once in bfloat16, weights and updates in float32",
    ),
    Variant(
        "cohort compiled",
        {"cohort": {"kernel": "compiled"}, "grid": {"engine": "cohort"}},
        "many clients at once, the step compiled (before the rounds that count)",
    ),
    Variant(
        "ray messages",
        {"grid": {"name": "ray", "engine": "generic", "exchange": "messages"}},
        "Ray actors, every client a Flower message",
        ray=True,
    ),
    Variant(
        "ray",
        {"grid": {"name": "ray", "engine": "auto"}},
        "Ray actors, the engine chosen by the platform",
        ray=True,
    ),
)


def strict_settings() -> Settings:
    """Return what makes the generic engine strict, where this version has the choice."""
    variant = next(variant for variant in VARIANTS if variant.name == STRICT)
    return {} if variant.missing() else variant.settings
