"""The malicious server of a run: what ``tampering=NAME`` puts in the observer's place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flowerbed.datasets.augment import Scale
from flowerbed.datasets.dataset import Dataset
from flowerbed.errors import require
from flowerbed.experiments.config import Choice, Simulation, build
from flowerbed.experiments.transforms import OBSERVATIONS, view_of
from flowerbed.server.grids.base import FIRST_NODE_ID
from flowerbed.strategies.attacks.observation import SideInfo
from flowerbed.strategies.attacks.observer import SERVER, Observer
from flowerbed.strategies.attacks.tampering import HONEST, TAMPERINGS, MaliciousServer, Tampering
from flowerbed.strategies.base import FederatedStrategy, ServerTransform


def tampered(
    found: Sequence[ServerTransform], simulation: Simulation, strategy: FederatedStrategy, dataset: Dataset
) -> tuple[ServerTransform, ...]:
    """Return the transforms with a malicious server in the observer's place, where the run has one.

    Raises ``ConfigError`` where no single update is observed.
    """
    choice, observe = simulation.tampering, simulation.observe
    if choice.name == HONEST:
        return tuple(found)
    tampering = build_tampering(choice)
    require(
        bool(observe.rounds),
        "tampering acts on the exchanges that are observed; say which, for example observe.rounds=[1].",
    )
    require(
        view_of(simulation) == SERVER,
        f"tampering={choice.name} reads single updates, and "
        + (
            "secure.enabled hides them"
            if simulation.secure.enabled
            else "observe.view=released does not show them"
        )
        + "; set one of the two.",
    )
    observer = next(transform for transform in found if isinstance(transform, Observer))
    assert strategy.setting is not None
    assert strategy.setting.server is not None
    assert simulation.run.dir is not None
    malicious = MaliciousServer(
        tampering,
        observer,
        strategy.setting.server.model,
        Path(simulation.run.dir) / OBSERVATIONS,
        clients=observe.clients or None,
        rounds=observe.rounds,
        first_node=FIRST_NODE_ID,
        seed=simulation.seed,
        side=SideInfo(
            local=simulation.local,
            rounds=simulation.federation.rounds,
            scale=Scale(dataset.mean, dataset.std),
        ),
    )
    return tuple(malicious if transform is observer else transform for transform in found)


def build_tampering(choice: Choice) -> Tampering:
    """Return the tampering of that name, or import path, with its options."""
    made = build(TAMPERINGS.get(choice.name), choice.options, "tampering")
    assert isinstance(made, Tampering)
    return made
