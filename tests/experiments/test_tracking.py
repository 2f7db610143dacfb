"""What wandb receives: the same records, pictures and summary as the run directory, without a network."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from flowerbed.errors import ConfigError
from flowerbed.experiments import tracking
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.simulation import simulate
from flowerbed.server.callbacks import MetricsLog

QUICK = {"federation": {"clients": 2, "rounds": 2}, "model": {"name": "mlp", "hidden": [8]}}


def test_no_tracker_is_the_default(tmp_path: Path) -> None:
    assert type(tracking.open_tracker(Simulation(), tmp_path)) is tracking.Tracker


def test_tracking_needs_a_run_directory() -> None:
    with pytest.raises(ConfigError, match=r"needs a run directory; give run\.dir"):
        simulate(tracking="wandb", **QUICK)


def test_without_wandb_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'flowerbed\[tracking\]'"):
        simulate(tracking="wandb", run={"dir": str(tmp_path / "run")}, **QUICK)
    assert not (tmp_path / "run").exists()


class FakeWandb:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, Any], int | None]] = []
        self.summary: dict[str, Any] = {}
        self.started: dict[str, Any] = {}
        self.exit_code: int | None = None

    def init(self, **arguments: Any) -> FakeWandb:
        self.started = arguments
        return self

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append((values, step))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code

    @staticmethod
    def Settings(**arguments: Any) -> dict[str, Any]:
        return arguments

    @staticmethod
    def Image(path: str) -> str:
        return path


def test_wandb_receives_every_record_picture_and_the_summary(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    simulate(tracking="wandb", run={"dir": str(run)}, **QUICK)
    records = MetricsLog(run / "metrics.jsonl").records()
    steps = [(values, step) for values, step in fake.logged if step is not None]
    assert [step for _, step in steps] == [r.round for r in records]
    for record, (values, _) in zip(records, steps, strict=True):
        for name, value in record.metrics.items():
            if not isinstance(value, list):
                assert values[f"{record.phase}/{name}"] == value
    pictures = [values for values, step in fake.logged if step is None]
    assert {key for values in pictures for key in values} == {"figures/accuracy", "figures/partition"}
    assert fake.summary["final"] == json.loads((run / "summary.json").read_text())["final"]
    assert fake.started["mode"] == "offline"
    assert fake.started["config"]["federation"]["clients"] == 2
    assert fake.exit_code == 0


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_real_wandb_offline_keeps_its_files_in_the_run_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    simulate(tracking="wandb", run={"dir": str(run)}, **QUICK)
    (kept,) = run.glob("wandb/offline-run-*/*.wandb")
    assert kept.stat().st_size > 0
    assert not (tmp_path / "wandb").exists()
