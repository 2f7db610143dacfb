"""The scale benchmark: its fits and what it makes of rows; and a sweep of small sizes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowerbed.errors import ConfigError
from flowerbed.experiments.benchmarks import scale
from flowerbed.experiments.config import Simulation


@given(st.floats(-2, 2), st.floats(1e-6, 1e3))
def test_exponent_of_a_power_law(power: float, factor: float) -> None:
    sizes = [10.0, 100.0, 1000.0]
    found = scale.exponent(sizes, [factor * size**power for size in sizes])
    assert found is not None
    assert math.isclose(found, power, abs_tol=1e-9)


def test_exponent_needs_two_points() -> None:
    assert scale.exponent([1.0, 10.0], [0.0, 3.0]) is None
    assert scale.exponent([10.0, 10.0], [1.0, 3.0]) is None


def row(clients: int, cohort: int, **more: Any) -> dict[str, Any]:
    base = {"clients": clients, "cohort": cohort, "failure": "", "build_cpu": 1.0, "cpu": 1.0, "wall": 2.0}
    return {**base, "resident": 100 << 20, "data": 0, "risen": 1 << 20, **more}


def test_registered_clients_shall_cost_nothing() -> None:
    rows = [row(1000, 10), row(100_000, 10, cpu=1.05, resident=140 << 20, data=30 << 20)]
    timed, memory = scale.items("clients", rows)
    assert timed.value == pytest.approx(1.05)
    assert memory.value == pytest.approx(10.0)
    assert memory.bar == 16.0


def test_a_cohort_shall_grow_linearly() -> None:
    rows = [row(9999, 10, cpu=0.5), row(9999, 100), row(9999, 1000, cpu=12.0, risen=31 << 20)]
    timed, memory = scale.items("cohort", rows)
    # The fixed costs of the smallest cohort are no client's.
    assert timed.value == pytest.approx(1.2)
    assert memory.value == pytest.approx(30.0)
    assert "1,000: 31 MiB" in memory.note


def test_a_size_that_failed_is_told() -> None:
    failed = {"clients": 10**6, "cohort": 10, "failure": "out of memory"}
    (item,) = scale.items("clients", [row(1000, 10), failed])
    assert item.value is None
    assert item.note == "1,000,000: out of memory"
    assert "| 1,000,000 | 10 | out of memory |" in scale.table([failed])


def test_settings_are_a_run_with_two_samples_each() -> None:
    asked = Simulation.of(scale.settings(50, 5))
    assert asked.dataset.options["samples"] == 100
    data = scale.tiny_samples(100)
    assert data.input_shape == (1, 4, 4)
    assert len(data.train) == 100


@pytest.mark.parametrize("argv", [["--registered", "10"], ["--cohorts", "10", "200", "--clients", "100"]])
def test_bad_sizes_are_refused(argv: list[str]) -> None:
    with pytest.raises(ConfigError):
        scale.main(argv)


def test_small_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--registered", "20", "40", "--cohort", "2", "--cohorts", "--turns", "1"]
    scale.main([*argv, "--out", str(tmp_path / "scale"), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert list(document) == ["item clients time", "item clients memory"]
    rows = document["item clients time"]["rows"]
    assert [(r["clients"], r["cohort"], r["failure"]) for r in rows] == [(20, 2, ""), (40, 2, "")]
    assert "| 20 | 2 |" in (tmp_path / "scale.md").read_text()
