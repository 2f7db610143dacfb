"""Checkpoints: whole or not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from flowerbed.errors import CheckpointError
from flowerbed.server import checkpoint as module
from flowerbed.server.checkpoint import Checkpoint, Checkpoints


def make(round_: int) -> Checkpoint:
    model = {"w": torch.full((3,), float(round_)), "n": torch.tensor(round_)}
    return Checkpoint(round_, model, {"velocity": {"w": torch.ones(3)}}, {"identity": "x", "records": round_})


def test_round_trip_and_keeping_the_newest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for round_ in (1, 2, 3):
        checkpoints.save(make(round_))
    assert checkpoints.rounds() == [2, 3]
    found, skipped = checkpoints.newest()
    assert found is not None
    assert skipped == []
    assert (found.round, found.extra) == (3, {"identity": "x", "records": 3})
    assert torch.equal(found.model["w"], make(3).model["w"])
    assert found.model["n"].dtype == torch.int64
    assert torch.equal(found.strategy["velocity"]["w"], torch.ones(3))


@pytest.mark.parametrize("name", ["model.safetensors", "strategy.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_checkpoint_is_skipped_for_the_older_one(tmp_path: Path, name: str, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make(1))
    path = checkpoints.save(make(2)) / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        # The manifest is JSON: a broken brace; in a tensor file the last byte belongs to a value.
        data[0 if name.endswith("json") else -1] ^= 1
        path.write_bytes(data)
    found, skipped = checkpoints.newest()
    assert found is not None
    assert found.round == 1
    assert len(skipped) == 1
    with pytest.raises(CheckpointError):
        checkpoints.load(2)


@pytest.mark.parametrize("at", ["save_groups", "_sync", "_digest"])
def test_a_full_disk_leaves_the_older_checkpoint_and_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make(1))

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, at, full)
    with pytest.raises(CheckpointError, match="round 2 cannot be written .* No space left"):
        checkpoints.save(make(2))
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["round-000001"]
    found, _ = checkpoints.newest()
    assert found is not None
    assert found.round == 1


def test_a_half_written_directory_of_a_killed_process_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make(1))
    partial = tmp_path / ".partial-000002"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert checkpoints.rounds() == [1]
    checkpoints.save(make(2))
    assert checkpoints.rounds() == [1, 2]
