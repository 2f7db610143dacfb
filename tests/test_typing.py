"""A user's program is type-checked against ours as strictly as our own code."""

from __future__ import annotations

import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# An ignore that is not needed is an error too: these lines show that the types are not just Any.
PROGRAM = """
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, assert_type

from torch import Tensor

from flowerbed import resume, simulate
from flowerbed.clients.half import ClientHalf
from flowerbed.datasets.dataset import Dataset
from flowerbed.datasets.sources import load_dataset
from flowerbed.experiments.measures import Measured
from flowerbed.models.base import Net
from flowerbed.server.callbacks import Callback, Record
from flowerbed.server.loop import RunResult
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams


@dataclass(frozen=True)
class MineParams(FedAvgParams):
    mu: float = 0.01


class MineClient(ClientHalf):
    params: MineParams


class Mine(FedAvg):
    Params = MineParams
    Half = MineClient


class Loudest(Callback):
    best = 0.0

    def recorded(self, record: Record) -> None:
        self.best = max(self.best, float(record.metrics.get("accuracy", 0)))


def brier(measured: Measured) -> Mapping[str, float]:
    outputs, labels = measured.outputs()
    return {"brier": float((outputs.softmax(1)[range(len(labels)), labels] - 1).square().mean())}


result = simulate(
    strategy="mine:Mine", federation={"clients": 4}, callbacks=[Loudest()], evaluation={"measures": ["mine:brier"]}
)
assert_type(result, RunResult)
assert_type(resume("runs/first"), RunResult)
assert_type(result.model, dict[str, Tensor])
assert_type(result.final(), dict[str, Any])
assert_type(load_dataset("digits"), Dataset)
simulate(callbacks=[3])  # type: ignore[list-item]
load_dataset(name=3)  # type: ignore[arg-type]
Net(1, 2, 3)  # type: ignore[arg-type]
"""


@pytest.mark.timeout(900)
def test_a_strict_program_of_a_user_passes(tmp_path: Path) -> None:
    assert resources.files("flowerbed").joinpath("py.typed").is_file()
    program = tmp_path / "mine.py"
    program.write_text(PROGRAM)
    # The cache of the project's own check: without it, torch alone takes a minute.
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", str(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
