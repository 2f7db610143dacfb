"""A device is the same client as a simulated one: parity, persistence, refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message

from flowerbed.clients.device import RUN_KEY, Expectations, device_app
from flowerbed.clients.device_data import save_npz
from flowerbed.clients.store import MemoryStore
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.parts import Parts, build_parts
from flowerbed.experiments.simulation import make_federation, open_grid
from flowerbed.server.grids.inprocess import InProcessGrid


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


def fleet(configs: list[Path]) -> Callable[[], Callable[[Message, Context], Message]]:
    """Return an app that answers each message by a new app of the right device: one process per message."""

    def answer(message: Message, context: Context) -> Message:
        return device_app(configs[int(context.node_config["partition-id"])])(message, context)

    return lambda: answer


def deployed(folder: Path, parts: Parts) -> InProcessGrid:
    config = {RUN_KEY: expectations(parts).dumps()}
    return InProcessGrid(fleet(make_devices(folder, parts)), len(parts.train.sizes), run_config=config)


CASES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "scaffold": {},
    "fedloge": {"options": {"gamma": 1.0, "beta": 0.3, "ssec_steps": 20, "ssec_lr": 0.01}},
    "fedlabel": {"options": {"beta": 0.15}, "data": {"labelled": 0.3}},
    "ggeur": {"options": {"T": 30}, "model": {"name": "linear"}},
}


@pytest.mark.parametrize("strategy", CASES)
def test_a_device_is_bit_for_bit_the_simulated_client(strategy: str, tmp_path: Path) -> None:
    case = dict(CASES[strategy])
    parts = parts_of(strategy, case.pop("options", None), **case)
    with open_grid(parts, MemoryStore()) as grid:
        simulated = make_federation(parts, grid).run()
    again = parts_of(strategy, dict(CASES[strategy]).pop("options", None), **case)
    with deployed(tmp_path, again) as grid:
        real = make_federation(again, grid).run()
    assert not real.failures
    assert simulated.model.keys() == real.model.keys()
    for name, value in simulated.model.items():
        assert torch.equal(value, real.model[name]), name
    assert simulated.final("clients") == real.final("clients")
