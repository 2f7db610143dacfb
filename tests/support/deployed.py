"""Small federations on digits whose clients are devices, each with its share of the data in a folder of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowerbed.clients.device_data import save_npz
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.deploy.device import Expectations
from flowerbed.experiments.parts import Parts, build_parts


def parts_of(strategy: str = "fedavg", options: Mapping[str, Any] | None = None, **sections: Any) -> Parts:
    base: dict[str, Any] = {
        "strategy": {"name": strategy, **(options or {})},
        "model": {"name": "mlp", "hidden": [16]},
        "partition": {"name": "dirichlet", "alpha": 0.5},
        "federation": {"clients": 3, "rounds": 2},
        "local": {"batch_size": 128, "lr": 0.1},
        "evaluation": {"every": 0, "clients_every": 1},
        "grid": {"device": "cpu"},
        "seed": 3,
    }
    for name, value in sections.items():
        base[name] = {**base.get(name, {}), **value} if "name" not in value else value
    return build_parts(Simulation.of(base))


def make_devices(folder: Path, parts: Parts) -> list[Path]:
    """Give every device its share of the data in a folder of its own; return the configuration files."""
    configs = []
    for client in range(parts.simulation.federation.clients):
        own = folder / f"device-{client}"
        own.mkdir()
        save_npz(own / "data.npz", parts.dataset, parts.train.indices(client), parts.test.indices(client))
        (own / "device.toml").write_text(f'client = {client}\n[data]\nkind = "npz"\npath = "data.npz"\n')
        configs.append(own / "device.toml")
    return configs


def expectations(parts: Parts, run: str = "run-1") -> Expectations:
    return Expectations.of(parts.simulation, parts.dataset, parts.model, run)
