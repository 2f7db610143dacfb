"""What trackers receive: the same records, tables, pictures and summary as the run directory, without a network."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowerbed.errors import ConfigError
from flowerbed.experiments import cli, sync, tracking
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.simulation import resume, simulate
from flowerbed.server.callbacks import SERVER, MetricsLog, Record
from flowerbed.server.replies import Failure

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

    @staticmethod
    def Table(columns: list[str], data: list[list[Any]]) -> tuple[list[str], list[list[Any]]]:
        return columns, data


def test_wandb_receives_every_record_picture_and_the_summary(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = tmp_path / "run"
    simulate(tracking="wandb", run={"dir": str(run)}, **QUICK)
    records = MetricsLog(run / "metrics.jsonl").records()
    steps = [(values, step) for values, step in fake.logged if step is not None]
    assert [step for _, step in steps] == [r.round for r in records]
    for record, (values, _) in zip(records, steps, strict=True):
        for name, value in record.metrics.items():
            if not isinstance(value, list):
                assert values[f"{record.phase}/{name}"] == value
    further = {key: value for values, step in fake.logged if step is None for key, value in values.items()}
    assert set(further) == {
        "figures/accuracy",
        "figures/partition",
        f"{SERVER}/per-class",
        f"{SERVER}/per-bin",
    }
    columns, rows = further[f"{SERVER}/per-class"]
    last = [r for r in records if r.phase == SERVER][-1].metrics
    assert columns == ["class", "correct", "total"]
    assert [row[1] for row in rows] == last["correct-per-class"]
    assert [row[2] for row in rows] == last["total-per-class"]
    assert fake.summary["final"] == json.loads((run / "summary.json").read_text())["final"]
    assert fake.started["mode"] == "offline"
    assert fake.started["config"]["federation"]["clients"] == 2
    assert fake.exit_code == 0


def test_tables_by_hand() -> None:
    records = [
        Record(1, SERVER, {"loss": 1.0, "correct-per-class": [1, 2], "total-per-class": [3, 3]}),
        Record(
            1,
            "train",
            {"agreement-per-client": [0.5] * 1001},
            failures=(Failure(1, 7, "died", "why\nwhere"),),
        ),
        Record(2, SERVER, {"correct-per-class": [2, 3], "personal-correct-per-class": [4], "listed": [1, 2]}),
    ]
    classes, failures = tracking.tables_of(records)
    assert classes.name == f"{SERVER}/per-class"
    assert classes.columns == ("class", "correct", "total", "personal-correct")
    # The last values of each; what has too few of them, or is too long for a table, is left empty or out.
    assert classes.rows == ((0, 2, 3, 4), (1, 3, 3, None))
    assert failures.rows == ((1, 7, "died", "why"),)


def test_an_unknown_mode_of_wandb_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Unknown tracking.mode 'onlin'. Did you mean 'online'"):
        simulate(tracking={"name": "wandb", "mode": "onlin"}, run={"dir": str(tmp_path / "run")}, **QUICK)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_real_wandb_is_offline_keeps_its_files_in_the_run_directory_and_goes_on_after_a_resume(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    # A key alone sends nothing.
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    simulate(tracking="wandb", run={"dir": str(run)}, **QUICK)
    (kept,) = run.glob("wandb/offline-run-*/*.wandb")
    assert kept.stat().st_size > 0
    assert not (tmp_path / "wandb").exists()
    assert tracking.earlier_id(run) == kept.stem.removeprefix("run-")
    resume(run, federation={"rounds": 3})
    logs = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert {log.name for log in logs} == {kept.name}, "another run for wandb"
    # What is to be sent are these; what wandb has marked is not sent again.
    assert sync.waiting([tmp_path]) == sorted({log.parent for log in logs})
    assert cli.main(["sync", str(tmp_path), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == [
        str(path) for path in sync.waiting([tmp_path])
    ]
    for log in logs:
        log.with_name(f"{log.name}.synced").touch()
    assert sync.waiting([tmp_path]) == []
    assert cli.main(["sync", "run"]) == 0
    assert "nothing to send" in capsys.readouterr().out


def test_sync_hands_what_is_waiting_to_wandb(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run" / "wandb" / "offline-run-20260101_000000-abc"
    folder.mkdir(parents=True)
    (folder / "run-abc.wandb").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["sync", str(tmp_path)]) == 2
    assert "There is no key for Weights & Biases: wandb login" in capsys.readouterr().err
    assert cli.main(["sync", str(tmp_path / "nowhere")]) == 2
    monkeypatch.setenv("WANDB_API_KEY", "key")
    monkeypatch.setenv("WANDB_MODE", "offline")
    called: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], env: dict[str, str], **rest: Any) -> subprocess.CompletedProcess[str]:
        called.append((command, env))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(sync.subprocess, "run", run)
    assert cli.main(["sync", str(tmp_path), "--project", "mine"]) == 3
    ((command, environment),) = called
    assert command[1:] == ["-m", "wandb", "sync", "--project", "mine", str(folder)]
    assert "WANDB_MODE" not in environment


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_reads_back_what_the_run_directory_holds(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    simulate(tracking="tensorboard", run={"dir": str(run)}, **QUICK)
    resume(run, federation={"rounds": 3})
    read = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    read.Reload()
    records = MetricsLog(run / "metrics.jsonl").records()
    for phase in {r.phase for r in records}:
        mine = [r for r in records if r.phase == phase]
        for name, value in mine[0].metrics.items():
            if isinstance(value, list):
                continue
            events = read.Scalars(f"{phase}/{name}")
            assert [e.step for e in events] == [r.round for r in mine]
            assert [e.value for e in events] == pytest.approx([r.metrics[name] for r in mine], rel=1e-6)
    tags = read.Tags()
    assert set(tags["images"]) == {"figures/accuracy", "figures/partition"}
    picture = read.Images("figures/accuracy")[-1]
    kept = Image.open(io.BytesIO(picture.encoded_image_string)).convert("RGB")
    drawn = Image.open(run / "figures" / "accuracy.png").convert("RGB")
    assert (np.asarray(kept) == np.asarray(drawn)).all()
    texts = {tag: read.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in tags["tensors"]}
    assert json.loads(texts["summary/text_summary"]) == json.loads((run / "summary.json").read_text())
    assert "rounds: 3" in texts["config/text_summary"]
    last = [r for r in records if r.phase == SERVER][-1].metrics
    cells = [row.split(" | ") for row in texts[f"{SERVER}/per-class/text_summary"].splitlines()[2:]]
    assert [int(row[1]) for row in cells] == last["correct-per-class"]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_a_run_that_fails_before_it_starts_leaves_its_summary(tmp_path: Path) -> None:
    tracker = tracking.TensorBoardTracker(Simulation(), tmp_path)
    tracker.close({"status": "failed", "reason": "why"}, [], [])
    (written,) = (tmp_path / "tensorboard").glob("events.*")
    assert b'"reason": "why"' in written.read_bytes()
