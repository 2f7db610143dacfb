"""Real runs through the command line: the run directory's contract, resume, sweeps, faults, interruption."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from flowerbed.datasets.sources import load_dataset
from flowerbed.experiments import cli
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.parts import build_parts
from flowerbed.server.callbacks import MetricsLog

QUICK = [
    "federation.clients=4",
    "federation.rounds=3",
    "local.batch_size=64",
    "model=mlp",
    "model.hidden=[16]",
]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_run_directory_keeps_its_contract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*QUICK, "evaluation.clients_every=1", "partition=dirichlet", "run.dir=run"]
    assert cli.main(["simulate", *arguments]) == 0
    out = capsys.readouterr().out
    assert "completed: accuracy" in out
    assert "flowerbed show run" in out
    run = tmp_path / "run"
    # Hydra leaves nothing of its own.
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints", "config.yaml", "figures", "metrics.jsonl", "model.safetensors", "partition.npz",
        "summary.json",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["run"]

    simulation = Simulation.of(yaml.safe_load((run / "config.yaml").read_text()))
    assert simulation.federation.clients == 4
    assert simulation.partition.plain()["alpha"] == 0.5
    assert simulation.run.dir == "run"

    # The final model, loaded and evaluated by somebody who knows PyTorch only.
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    state = load_file(run / "model.safetensors")
    by_shape = {value.shape: value for value in state.values()}
    plain.load_state_dict({name: by_shape[value.shape] for name, value in plain.state_dict().items()})
    digits = load_dataset("digits")
    predicted = plain(digits.prepare(digits.test.inputs)).argmax(1)
    accuracy = float((predicted == digits.test.labels).float().mean())

    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["final"]["accuracy"] == pytest.approx(accuracy)
    assert {"reason", "rounds", "mean_of_last_5", "failures", "seed", "versions", "git_commit", "config_hash",
            "wall_seconds", "peak_memory_mib"} <= set(summary)  # fmt: skip
    assert summary["failures"] == {"total": 0, "by_kind": {}, "by_client": {}}

    # Who holds what, counted one sample at a time.
    parts = build_parts(simulation)
    with np.load(run / "partition.npz") as file:
        counts, classes = file["counts"], file["classes"].tolist()
    assert classes == list(digits.classes)
    by_hand = [
        Counter(digits.train.labels[i].item() for i in parts.train.indices(k).tolist()) for k in range(4)
    ]
    assert counts.tolist() == [[held[c] for c in range(10)] for held in by_hand]

    # Every client's own figure: on average, weighted by its samples, they are those of all clients together.
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["phase"] == "evaluate-clients"
    found = last["metrics"]
    assert found["client-numbers"] == [0, 1, 2, 3]
    sizes = [len(parts.test.indices(k)) for k in range(4)]
    assert np.average(found["accuracy-by-client"], weights=sizes) == pytest.approx(found["accuracy"])
    assert found["accuracy-quantiles"][0] == found["accuracy-worst"]

    records = MetricsLog(run / "metrics.jsonl").records()
    phases = [(r.round, r.phase) for r in records]
    assert phases == [(0, "evaluate-server")] + [
        (t, phase) for t in (1, 2, 3) for phase in ("train", "evaluate-server", "evaluate-clients")
    ]
    assert all((r.asked, r.answered, r.failed) == (4, 4, 0) for r in records if r.phase == "train")

    for name in ("accuracy.png", "partition.png"):
        with Image.open(run / "figures" / name) as picture:
            picture.verify()
            assert picture.size[0] > 600


def test_show_as_text_and_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["simulate", *QUICK, "run.dir=run", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    stored = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert printed == {"directory": "run", **stored}
    assert cli.main(["show", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == stored
    assert cli.main(["show", "run"]) == 0
    out = capsys.readouterr().out
    assert f"{stored['final']['accuracy']:.4g}" in out
    assert len(out.splitlines()) < 40
    # A run that was killed has no summary; its metrics say how far it came.
    (tmp_path / "run" / "summary.json").unlink()
    assert cli.main(["show", "run"]) == 0
    out = capsys.readouterr().out
    assert "unfinished" in out
    assert "flowerbed resume run" in out


def test_a_second_run_does_not_touch_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", *QUICK, "run.dir=run"]) == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    capsys.readouterr()
    assert cli.main(["simulate", *QUICK, "run.dir=run", "seed=1"]) == 2
    out, err = capsys.readouterr()
    assert "already holds a run" in err
    assert "run.overwrite=true" in err
    assert "completed" not in out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before
    assert cli.main(["simulate", *QUICK, "run.dir=run", "seed=1", "run.overwrite=true"]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["seed"] == 1


def test_resume_goes_on_to_the_bits_of_the_longer_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["simulate", *QUICK, "federation.rounds=4", "run.dir=long"]) == 0
    assert cli.main(["simulate", *QUICK, "federation.rounds=2", "run.dir=short"]) == 0
    assert cli.main(["resume", "short", "federation.rounds=4"]) == 0
    long, short = (load_file(tmp_path / name / "model.safetensors") for name in ("long", "short"))
    assert all(torch.equal(long[name], short[name]) for name in long)
    summary = json.loads((tmp_path / "short" / "summary.json").read_text())
    assert (summary["rounds"], summary["resumed_from"]) == (4, 2)
    assert yaml.safe_load((tmp_path / "short" / "config.yaml").read_text())["federation"]["rounds"] == 4
    capsys.readouterr()
    before = (tmp_path / "short" / "summary.json").read_text()
    for override, message in (
        ("local.lr=0.5", "made with other settings of local"),
        ("local.lrr=0.5", "Unknown key in local 'lrr'. Did you mean 'lr'?"),
        ("federation.rounds=x", "federation.rounds must be a whole number"),
        ("grid=spark", "Unknown grid 'spark'"),
        ("seed=1,2", "cannot be used with resume"),
    ):
        assert cli.main(["resume", "short", override]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "short" / "summary.json").read_text() == before


def test_a_sweep_runs_its_jobs_and_ends_with_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["simulate", "-m", *QUICK, "seed=0,1", "run.dir=sweep"]) == 0
    table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert [row.split()[:3] for row in table[2:]] == [
        ["0", "seed=0", "completed"],
        ["1", "seed=1", "completed"],
    ]
    for number in (0, 1):
        summary = json.loads((tmp_path / "sweep" / str(number) / "summary.json").read_text())
        assert (summary["status"], summary["seed"]) == ("completed", number)
    assert cli.main(["show", "sweep", "--json"]) == 0
    jobs = json.loads(capsys.readouterr().out)
    assert [job["directory"] for job in jobs] == ["sweep/0", "sweep/1"]


def test_one_failed_job_fails_the_sweep_but_not_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 2000 clients cannot share 1437 samples: known only once the data is there.
    assert cli.main(["simulate", "-m", "federation.clients=2000,4", *QUICK[1:], "--json"]) == 1
    out, err = capsys.readouterr()
    jobs = json.loads(out)
    assert [job["status"] for job in jobs] == ["failed", "completed"]
    assert "2000 clients" in jobs[0]["reason"]
    assert jobs[0]["accuracy"] is None
    assert err.startswith("flowerbed: 2000 clients")
    (folder,) = tmp_path.glob("multirun/*/*")
    assert (folder / "1" / "model.safetensors").exists()


def test_a_failing_run_exits_with_1_and_is_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["simulate", *QUICK, "local.lr=1e30", "run.dir=run"]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("flowerbed: Round ")
    assert err.count("\n") == 1
    assert "failed: " in out
    assert "client failures:" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert summary["failures"]["total"] > 0
    assert (tmp_path / "run" / "figures" / "partition.png").exists()
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_default_run_directory_is_never_shared(tmp_path: Path) -> None:
    for _ in range(2):
        assert cli.main(["simulate", *QUICK, "federation.rounds=0"]) == 0
    folders = list(tmp_path.glob("runs/*/*-fedavg-digits*"))
    assert len(folders) == 2


def test_ctrl_c_ends_the_run_with_130_and_a_summary(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "flowerbed.experiments.cli", "simulate", *QUICK[:1],
         "federation.rounds=100000", "run.checkpoint_every=0",
         "run.dir=run"],
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        log = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (log.exists() and len(log.read_text().splitlines()) > 4):
            assert time.monotonic() < deadline, "the run did not start"
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "interrupted: " in out
    assert "Traceback" not in err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert math.isfinite(summary["final"]["accuracy"])
