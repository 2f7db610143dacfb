"""Registry and random streams."""

from __future__ import annotations

import random
import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowerbed import registry as module
from flowerbed import seeds
from flowerbed.errors import ConfigError
from flowerbed.registry import Registry


def filled() -> Registry[int]:
    table: Registry[int] = Registry("thing")
    for number, name in enumerate(("fedavg", "fedprox", "scaffold")):
        table.add(name, number)
    return table


def test_names_by_pattern_and_refusal_of_duplicates() -> None:
    table = filled()
    assert table.names("fed*") == ["fedavg", "fedprox"]
    assert "scaffold" in table
    assert table.add("fedavg", 0) == 0
    with pytest.raises(ConfigError, match="'fedavg' is already registered"):
        table.add("fedavg", 7)


def test_an_unknown_name_lists_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError, match="Unknown thing 'fedpro'. Did you mean 'fedprox'.*scaffold"):
        filled().get("fedpro")


def test_import_paths() -> None:
    assert filled().get("toys:MINIMA") == (0.0, 1.0)
    with pytest.raises(ConfigError, match="cannot be imported"):
        filled().get("no_such_module:x")
    with pytest.raises(ConfigError, match="attribute of module toys 'MINIM'. Did you mean 'MINIMA'"):
        filled().get("toys:MINIM")


def test_entry_points_announce_names(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint(name="theirs", value="toys:CURVATURES", group="flowerbed.things")

    def announced(group: str) -> list[EntryPoint]:
        return [point] if group == point.group else []

    monkeypatch.setattr(module, "entry_points", announced)
    assert "theirs" in filled().names()
    assert filled().get("theirs") == (1.0, 3.0)


@given(st.integers(0, 2**40), st.lists(st.integers(0, 2**31), max_size=3))
def test_streams_are_functions_of_their_name(seed: int, numbers: list[int]) -> None:
    one = seeds.numpy_rng(seed, "a", *numbers).integers(2**62)
    assert one == seeds.numpy_rng(seed, "a", *numbers).integers(2**62)
    others = {
        int(seeds.numpy_rng(*key).integers(2**62))
        for key in ((seed + 1, "a", *numbers), (seed, "b", *numbers), (seed, "a", *numbers, 0))
    }
    assert one not in others
    assert len(others) == 3


def test_streams_are_the_same_in_another_process() -> None:
    draws = "print(seeds.torch_seed(3, 'x', 1, 2), seeds.numpy_rng(3, 'x', 1).integers(2**62))"
    code = f"from flowerbed import seeds\n{draws}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    mine = (seeds.torch_seed(3, "x", 1, 2), int(seeds.numpy_rng(3, "x", 1).integers(2**62)))
    assert done.stdout.split() == [str(v) for v in mine]


def test_foreign_code_draws_from_the_stream_and_leaves_no_trace() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)

    def draw() -> tuple[Any, ...]:
        return random.random(), np.random.rand(), torch.rand(1).item()

    expected = draw()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    with seeds.global_streams(0, "foreign", 1):
        inside = draw()
    assert draw() == expected
    with seeds.global_streams(0, "foreign", 1):
        assert draw() == inside
    with seeds.global_streams(0, "foreign", 2):
        assert draw() != inside
