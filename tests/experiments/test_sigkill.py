"""SIGKILL at any moment loses at most the round in progress."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flowerbed.experiments.run_directory import load_simulation
from flowerbed.experiments.simulation import resume, simulate

DIGITS: dict[str, Any] = {
    "model": {"name": "resnet8", "norm": "gn"},
    "partition": {"name": "dirichlet", "alpha": 0.3},
    "federation": {"clients": 10, "cohort": 4, "rounds": 6},
    "local": {"momentum": 0.9, "persist": True, "batch_size": 16},
    "grid": {"name": "inprocess", "device": "cpu"},
}
CIFAR: dict[str, Any] = {
    "dataset": "cifar10",
    "model": {"name": "resnet8", "norm": "gn"},
    "partition": {"name": "dirichlet", "alpha": 0.3},
    "federation": {"clients": 100, "cohort": 4, "rounds": 4},
    "local": {"momentum": 0.9, "persist": True, "batch_size": 64, "lr": 0.05},
    "evaluation": {"every": 0},
    "grid": {"name": "ray", "workers": 2, "device": "cpu"},
}


def kill_in_round(settings: dict[str, Any], directory: Path, server_round: int) -> None:
    """Start the run in another process and kill it, with its children, in the round after ``server_round``."""
    settings = {**settings, "run": {"dir": str(directory)}}
    code = f"from flowerbed.experiments.simulation import simulate; simulate(**{settings!r})"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        checkpoint = directory / "checkpoints" / f"round-{server_round:06d}"
        while not checkpoint.exists():
            assert process.poll() is None, "the run ended before it was killed"
            assert time.monotonic() < deadline, "the run does not get on"
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def resumed_equals_whole(settings: dict[str, Any], tmp_path: Path, server_round: int) -> None:
    whole = simulate(**settings, run={"dir": str(tmp_path / "whole")})
    killed = tmp_path / "killed"
    kill_in_round(settings, killed, server_round)
    assert not (killed / "summary.json").exists()
    done = resume(killed)
    assert server_round <= done.resumed_from <= server_round + 1
    assert not done.failures
    for name, value in whole.model.items():
        assert torch.equal(done.model[name], value), name
    assert load_file(killed / "model.safetensors").keys() == whole.model.keys()

    def records(path: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]

    assert records(killed) == records(tmp_path / "whole")
    assert json.loads((killed / "summary.json").read_text())["status"] == "completed"
    assert load_simulation(killed).identity == load_simulation(tmp_path / "whole").identity


@pytest.mark.parametrize("server_round", [1, 4])
def test_killed_in_process(tmp_path: Path, server_round: int) -> None:
    resumed_equals_whole(DIGITS, tmp_path, server_round)


@pytest.mark.slow
@pytest.mark.skipif("FLOWERBED_DATA" not in os.environ, reason="needs CIFAR-10: set FLOWERBED_DATA")
def test_killed_on_ray_with_cifar10_and_100_clients(tmp_path: Path) -> None:
    resumed_equals_whole(CIFAR, tmp_path, 2)
