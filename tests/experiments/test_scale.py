"""A million registered clients cost a round nothing."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from flowerbed.experiments.simulation import simulate
from flowerbed.server.callbacks import Callback, Record
from flowerbed.server.loop import RunResult


class Peak(Callback):
    """The most memory of Python and numpy (traced by ``tracemalloc``) that a round after the first needs."""

    def __init__(self) -> None:
        self.bytes = 0

    def recorded(self, record: Record) -> None:
        if record.round == 1:
            tracemalloc.start()
        elif tracemalloc.is_tracing():
            self.bytes = tracemalloc.get_traced_memory()[1]


def peak(clients: int, sampling: str, folder: Path, exchange: str = "auto") -> tuple[int, RunResult]:
    watch = Peak()
    try:
        result = simulate(
            [watch],
            strategy="scaffold",
            partition={"name": "draws", "per_client": 8},
            model={"name": "mlp", "hidden": [4]},
            federation={"clients": clients, "cohort": 6, "rounds": 3, "sampling": sampling},
            evaluation={"every": 0},
            grid={"device": "cpu", "exchange": exchange},
            run={"dir": str(folder)},
        )
    finally:
        tracemalloc.stop()
    return watch.bytes, result


@pytest.mark.parametrize(
    ("sampling", "exchange"), [("uniform", "pooled"), ("cyclic", "pooled"), ("uniform", "messages")]
)
def test_the_memory_of_a_round_does_not_grow_with_the_federation(
    sampling: str, exchange: str, tmp_path: Path
) -> None:
    """A byte for every registered client would be a megabyte."""
    few, _ = peak(1_000, sampling, tmp_path / "few", exchange)
    many, result = peak(1_000_000, sampling, tmp_path / "many", exchange)
    assert many - few < 300_000
    assert [r.answered for r in result.history if r.phase == "train"] == [6, 6, 6]
    written = list((tmp_path / "many" / "checkpoints" / "clients").glob("[0-9]*/*"))
    assert len(written) <= 18
