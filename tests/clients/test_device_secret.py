"""What a device hides from the server: the noise and the keys come from a secret of its own."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message

from flowerbed.clients.device_data import save_npz
from flowerbed.clients.device_store import run_secret
from flowerbed.clients.masking import Secrets
from flowerbed.clients.store import MemoryStore
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.deploy.device import RUN_KEY, Expectations, device_app
from flowerbed.experiments.parts import Parts, build_parts
from flowerbed.experiments.simulation import make_federation, open_grid
from flowerbed.server.grids.inprocess import InProcessGrid


def parts_of(**sections: Any) -> Parts:
    base: dict[str, Any] = {
        "model": {"name": "mlp", "hidden": [16]},
        "federation": {"clients": 3, "rounds": 2},
        "local": {"batch_size": 128, "lr": 0.1},
        "evaluation": {"every": 0},
        "seed": 3,
    }
    return build_parts(Simulation.of({**base, **sections}))


def deployed(folder: Path, parts: Parts) -> InProcessGrid:
    """Return a grid of devices, each with its folder and its share of the data."""
    for client in range(3):
        own = folder / f"device-{client}"
        own.mkdir(parents=True)
        save_npz(own / "data.npz", parts.dataset, parts.train.indices(client))
        (own / "device.toml").write_text(f'client = {client}\n[data]\nkind = "npz"\npath = "data.npz"\n')

    def answer(message: Message, context: Context) -> Message:
        number = context.node_config["partition-id"]
        return device_app(folder / f"device-{number}" / "device.toml")(message, context)

    told = Expectations.of(parts.simulation, parts.dataset, parts.model, "run-1").dumps()
    return InProcessGrid(lambda: answer, 3, run_config={RUN_KEY: told})


def models(tmp_path: Path, **sections: Any) -> tuple[dict[str, torch.Tensor], ...]:
    """Return what a simulation and two fleets of devices with other secrets make of one configuration."""
    parts = parts_of(**sections)
    with open_grid(parts, MemoryStore()) as grid:
        found = [make_federation(parts, grid).run().model]
    for number in range(2):
        parts = parts_of(**sections)
        with deployed(tmp_path / str(number), parts) as grid:
            result = make_federation(parts, grid).run()
        assert not result.failures
        found.append(result.model)
    return tuple(found)


def test_a_secret_is_private_lasts_and_is_another_one_for_every_run_and_device(tmp_path: Path) -> None:
    first = run_secret(tmp_path / "a", "run-1")
    assert first == run_secret(tmp_path / "a", "run-1")
    assert len({first, run_secret(tmp_path / "a", "run-2"), run_secret(tmp_path / "b", "run-1")}) == 3
    assert stat.S_IMODE((tmp_path / "a" / "secret").stat().st_mode) == 0o600
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["secret"]
    assert first.bit_length() > 200


def test_masks_cancel_whatever_the_secrets(tmp_path: Path) -> None:
    simulated, first, second = models(tmp_path, secure={"enabled": True})
    for name, value in simulated.items():
        assert value.equal(first[name]), name
        assert value.equal(second[name]), name


def test_local_noise_is_none_that_the_seed_would_give(tmp_path: Path) -> None:
    private = {"mode": "local", "clip": 1.0, "noise": 0.5}
    simulated, first, second = models(tmp_path, privacy=private)
    for one, other in ((simulated, first), (first, second)):
        differs = torch.cat([(one[n] - other[n]).flatten() for n in one])
        # Two rounds of three clients' noise of 0.5 each, averaged, in both: sqrt(2 * 2 / 3) / 2.
        assert differs.std().item() == pytest.approx(0.577, rel=0.1)


def test_keys_follow_from_the_secret_and_the_round_alone() -> None:
    assert Secrets.draw(2**255 + 7, 1, 3) == Secrets.draw(2**255 + 7, 1, 3)
    drawn = {
        Secrets.draw(seed, client, round_) for seed in (5, 2**255) for client in (0, 1) for round_ in (1, 2)
    }
    assert len(drawn) == 8


def test_the_servers_noise_does_not_follow_from_what_devices_know() -> None:
    settings = {"privacy": {"mode": "central", "clip": 1.0, "noise": 0.5}, "model": "linear", "seed": 4}
    plain = build_parts(Simulation.of(settings))
    hidden = build_parts(Simulation.of(settings), secret=2**100 + 1)
    seeds = [
        next(t for t in p.strategy.transforms if type(t).__name__ == "CentralPrivacy")
        for p in (plain, hidden)
    ]
    assert [t.seed for t in seeds] == [4, 2**100 + 1]  # type: ignore[attr-defined]
    assert np.array_equal(plain.train.sizes, hidden.train.sizes)
