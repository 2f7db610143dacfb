"""What the README shows works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from flowerbed.experiments.conformance import CHECKS, Case
from flowerbed.experiments.reproduction import ledger
from flowerbed.experiments.simulation import simulate
from flowerbed.strategies.fedprox import FedProx

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
FEDERATED = re.findall(r"\(docs/methods/(\w+)\.md\)\s\((\d+) of (\d+)", README)
CENTRALIZED = re.search(
    r"of the (\d+) claims of the (\d+) centralized papers (\d+) are reproduced", " ".join(README.split())
)


def test_the_python_example_runs() -> None:
    done = subprocess.run([sys.executable, "-c", PYTHON[0]], capture_output=True, text=True, check=True)
    accuracy, failures = done.stdout.splitlines()[-1].split()
    assert float(accuracy) > 0.5
    assert failures == "0"


def test_the_algorithm_is_complete_and_equals_the_one_we_ship(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_fedprox.py").write_text(PYTHON[1])
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"federation": {"clients": 4, "cohort": 2, "rounds": 2}, "evaluation": {"every": 0}}
    mine = simulate(strategy={"name": "my_fedprox:MyFedProx", "mu": 0.5}, **settings)
    ours = simulate(strategy={"name": FedProx.__name__.lower(), "mu": 0.5}, **settings)
    for name, value in ours.model.items():
        assert value.equal(mine.model[name])
    for check in CHECKS:
        check(Case("my_fedprox:MyFedProx", {"mu": 0.5}, one_client_is_central=False))
    sys.modules.pop("my_fedprox")


def test_the_example_is_as_short_as_promised() -> None:
    assert len([line for line in PYTHON[1].splitlines() if line.strip()]) <= 30


def test_the_counts_of_claims_are_those_of_the_records() -> None:
    found = {}
    for path in ledger.LEDGER.glob("*.json"):
        verdicts = [claim["verdict"] for claim in ledger.read(path)["quick"]["claims"]]
        found[path.stem] = (verdicts.count("reproduced"), len(verdicts))
    assert len(FEDERATED) == 4
    for slug, reproduced, claims in FEDERATED:
        assert found.pop(slug) == (int(reproduced), int(claims))
    assert CENTRALIZED is not None
    passed, count = (sum(numbers) for numbers in zip(*found.values(), strict=True))
    assert tuple(map(int, CENTRALIZED.groups())) == (count, len(found), passed)
