"""The clients' store: what a round reads is a function of the round, whatever happened since."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowerbed.clients.store import ClientStore, DiskStore, MemoryStore
from flowerbed.errors import CheckpointError
from flowerbed.storage import load_groups, save_groups


def state(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"own": {"v": torch.tensor([value])}, "empty": {}}


@pytest.fixture(params=["memory", "disk"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], ClientStore]:
    return MemoryStore if request.param == "memory" else lambda: DiskStore(tmp_path / "clients")


def test_a_round_reads_the_newest_version_below_it(make_store: Callable[[], ClientStore]) -> None:
    store = make_store()
    assert store.read(3, 1) == {}
    store.write(3, 2, state(2.0))
    store.write(3, 5, state(5.0))
    assert store.read(3, 2) == {}
    assert store.read(3, 5)["own"]["v"] == 2.0
    assert store.read(3, 6)["own"]["v"] == 5.0
    assert store.read(4, 6) == {}


def test_a_repeated_round_reads_what_it_read_and_replaces_what_it_wrote(
    make_store: Callable[[], ClientStore],
) -> None:
    store = make_store()
    store.write(0, 1, state(1.0))
    store.write(0, 2, state(2.0))
    assert store.read(0, 2)["own"]["v"] == 1.0
    store.write(0, 2, state(2.5))
    assert store.read(0, 3)["own"]["v"] == 2.5


def test_rewind_forgets_the_rounds_after(make_store: Callable[[], ClientStore]) -> None:
    store = make_store()
    for round_ in (1, 2):
        store.write(0, round_, state(float(round_)))
    store.rewind(1)
    assert store.read(0, 9)["own"]["v"] == 1.0


def test_what_is_read_is_a_copy(make_store: Callable[[], ClientStore]) -> None:
    store = make_store()
    store.write(0, 1, state(1.0))
    store.read(0, 2)["own"]["v"].add_(10)
    assert store.read(0, 2)["own"]["v"] == 1.0


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 8)), max_size=12), st.integers(0, 9))
def test_pruning_keeps_all_that_a_later_run_can_read(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[int, int]], keep: int
) -> None:
    """Against a plain dictionary that never forgets."""
    disk = DiskStore(tmp_path_factory.mktemp("clients"))
    oracle: dict[int, dict[int, float]] = {}
    for client, round_ in writes:
        disk.write(client, round_, state(float(round_)))
        oracle.setdefault(client, {})[round_] = float(round_)
    disk.prune(keep)
    for client in range(3):
        for before in range(keep + 1, 10):
            below = [r for r in oracle.get(client, {}) if r < before]
            found = disk.read(client, before)
            assert (found["own"]["v"].item() if found else None) == (max(below) if below else None)


def test_a_disk_store_travels_to_other_processes(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.write(12345, 1, state(1.0))
    assert pickle.loads(pickle.dumps(store)).read(12345, 2)["own"]["v"] == 1.0


def test_any_name_and_type_survives(tmp_path: Path) -> None:
    groups = {
        "a/b.c": {"x/y": torch.arange(3), "": torch.tensor(True)},
        "z": {"half": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor([1 + 2j])},
        "none": {},
    }
    save_groups(tmp_path / "f", groups)
    found = load_groups(tmp_path / "f")
    assert found.keys() == groups.keys()
    for group, tensors in groups.items():
        assert list(found[group]) == list(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(found[group][name], tensor)
            assert found[group][name].dtype == tensor.dtype


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    save_groups(tmp_path / "f", state(1.0))
    (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[:-2])
    with pytest.raises(CheckpointError, match="/f cannot be read"):
        load_groups(tmp_path / "f")


def test_pruning_looks_at_the_clients_that_wrote_and_at_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    prune = DiskStore._prune_client
    monkeypatch.setattr(DiskStore, "_prune_client", lambda s, c, r: (looked.append(c), prune(s, c, r)))
    store = DiskStore(tmp_path)
    for client in range(40):
        store.write(client, 1, state(1.0))
    store.prune(1)
    assert sorted(looked) == list(range(40))
    looked.clear()
    for client in (3, 7, 9):
        store.write(client, 2, state(2.0))
    other = pickle.loads(pickle.dumps(store))
    other.write(11, 3, state(3.0))
    store.prune(2)
    assert sorted(looked) == [3, 7, 9]
    assert store._rounds(store._folder(3)) == [2]
    assert store._rounds(store._folder(11)) == [1, 3]
    looked.clear()
    store.prune(3)
    assert looked == [11]
    assert store._rounds(store._folder(11)) == [3]


def test_what_is_written_again_after_a_rewind_is_pruned_like_anything_else(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    for round_ in (1, 2, 3):
        store.write(0, round_, state(float(round_)))
    store.rewind(2)
    assert store.read(0, 9)["own"]["v"] == 2.0
    store.write(0, 3, state(3.5))
    store.prune(3)
    assert store._rounds(store._folder(0)) == [3]
    assert store.read(0, 9)["own"]["v"] == 3.5
