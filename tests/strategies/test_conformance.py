"""The house contract over everything that is registered."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conformance_table import CASES

from flowerbed.experiments.conformance import CHECKS, Case, check_ray_equals_in_process
from flowerbed.strategies.base import STRATEGIES
from flowerbed.strategies.loader import load_all

load_all()


def test_the_table_names_every_registered_strategy() -> None:
    assert sorted(CASES) == STRATEGIES.names()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", sorted(CASES))
def test_contract(name: str, check: Callable[[Case], None]) -> None:
    check(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CASES))
def test_ray_equals_in_process(name: str) -> None:
    check_ray_equals_in_process(CASES[name])
