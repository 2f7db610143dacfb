"""flowerbed: a federated-learning simulation platform.

An algorithm is written once, as a server half and a client half that exchange Flower messages, and runs
unchanged in this process, on a Ray cluster, or on real devices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowerbed.offline import offline_defaults

if TYPE_CHECKING:
    from flowerbed.experiments.simulation import resume, simulate

# Before any import of Flower, Ray or wandb, which read these switches when they are imported.
offline_defaults()

__version__ = "0.1.0"
__all__ = ["resume", "simulate"]


def __getattr__(name: str) -> Any:
    # Late, so that a device or a quick command does not import what only a simulation needs.
    if name in __all__:
        from flowerbed.experiments import simulation

        return getattr(simulation, name)
    raise AttributeError(f"module 'flowerbed' has no attribute '{name}'")
