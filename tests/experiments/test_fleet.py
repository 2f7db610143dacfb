"""Node processes on loopback: the same bits as a simulation, and every misbehaviour a counted failure."""

from __future__ import annotations

import os
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deployed import expectations, make_devices, parts_of
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from flowerbed import messages
from flowerbed.clients.store import MemoryStore
from flowerbed.errors import ConfigError
from flowerbed.experiments.benchmarks.fleet import frames, nodes
from flowerbed.experiments.benchmarks.fleet.grid import LoopbackGrid
from flowerbed.experiments.deploy.device import RUN_KEY
from flowerbed.experiments.parts import Parts
from flowerbed.experiments.simulation import make_federation, open_grid
from flowerbed.server.devices import DeviceLink
from flowerbed.server.loop import RunResult


def pair() -> tuple[socket.socket, socket.socket]:
    one, other = socket.socketpair()
    one.settimeout(10)
    other.settimeout(10)
    return one, other


def test_frames_carry_every_kind_of_record() -> None:
    arrays = {
        "w": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "n": torch.tensor(7),
        "b": torch.tensor([True, False]),
        "none": torch.zeros(0, 2),
    }
    content = RecordDict(
        {
            "arrays": messages.array_record(arrays),
            "turned": messages.array_record({"w": np.asfortranarray(np.arange(6.0).reshape(2, 3))}),
            "metrics": MetricRecord({"a": 0.1, "b": [1, 2], "nan": float("nan")}),
            "config": ConfigRecord({"t": "x", "f": True, "l": ["a"]}),
        }
    )
    one, other = pair()
    frames.send(one, {"to": "1"}, content)
    found = frames.receive(other)
    assert found is not None
    header, again = found
    assert header == {"to": "1"}
    assert list(again) == list(content)
    for name, value in arrays.items():
        assert torch.equal(messages.tensors(again.array_records["arrays"])[name], value)
    assert messages.tensors(again.array_records["turned"])["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert str(again["metrics"]) == str(content["metrics"])
    assert again["config"] == content["config"]
    one.close()
    assert frames.receive(other) is None


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", bytes(64), frames.LENGTH.pack(20) + b"x" * 20])
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    one, other = pair()
    one.sendall(data)
    with pytest.raises(frames.FrameError):
        frames.receive(other)


def test_a_machine_has_room_for_so_many_processes_only() -> None:
    with pytest.raises(ConfigError, match="65 node processes are too many"):
        LoopbackGrid([Path("x")] * 65, {})


def with_nodes(
    folder: Path, parts: Parts, behaviours: tuple[str, ...] = ()
) -> tuple[RunResult, LoopbackGrid]:
    configs = make_devices(folder, parts)
    with LoopbackGrid(configs, {RUN_KEY: expectations(parts).dumps()}, behaviours) as grid:
        federation = make_federation(parts, grid)
        params = parts.simulation.devices
        federation.link = DeviceLink(params, parts.link.devices if parts.link else [], tickets=True)
        return federation.run(), grid


def simulated(parts: Parts) -> RunResult:
    with open_grid(parts, MemoryStore()) as grid:
        return make_federation(parts, grid).run()


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
def test_node_processes_give_the_bits_of_a_simulation(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "federation": {"clients": 4, "rounds": 3},
        "devices": {"compression": "top-k-int8", "keep": 0.2, "work": "speed", "weak": 0.5},
    }
    real, grid = with_nodes(tmp_path, parts_of("scaffold", **settings))
    expected = simulated(parts_of("scaffold", **settings))
    assert not real.failures
    assert all(torch.equal(value, real.model[name]) for name, value in expected.model.items())
    assert [r.bytes_up for r in real.history if r.phase == "train"] != [0, 0, 0]
    assert gone(grid.process.pid)


FIFTY = (
    *(nodes.LATE,) * 2,
    *(nodes.REPLAY,) * 2,
    *(nodes.VANISH,) * 2,
    *(nodes.CRASH,) * 2,
    *(nodes.GARBAGE,) * 2,
    *(nodes.NOISE,) * 2,
    *(nodes.SLOW,) * 2,
    *(nodes.GOOD,) * 36,
)


@pytest.mark.slow
def test_fifty_nodes_of_which_twelve_misbehave(tmp_path: Path) -> None:
    """The run goes on with the 38 good ones, to the bits of a run in which only they are left."""
    settings: dict[str, Any] = {
        "federation": {"clients": 50, "rounds": 3, "quorum": 0.5},
        "partition": {"name": "iid"},
        "evaluation": {"every": 0, "clients_every": 0},
    }
    result, grid = with_nodes(tmp_path, parts_of("fedavg", **settings), FIFTY)
    assert [(r.round, r.answered) for r in result.history if r.phase == "train"] == [
        (1, 50),
        (2, 38),
        (3, 38),
    ]
    kinds = {k: Counter(f.kind for f in result.failures if f.client == k) for k in range(12)}
    assert all(kinds[k] == {"no-reply": 2, "replayed": 1} for k in (0, 1)), kinds
    assert all(kinds[k] == {"no-reply": 2, "replayed": 1} for k in (2, 3)), kinds
    assert all(kinds[k] == {"raised": 2} for k in (4, 5, 10, 11)), kinds
    assert all(kinds[k] == {"died": 2} for k in (6, 7)), kinds
    assert all(kinds[k] == {"non-finite": 2} for k in (8, 9)), kinds
    assert {f.client for f in result.failures} == set(range(12))
    assert gone(grid.process.pid)
