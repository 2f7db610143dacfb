"""The house contract over every paper that has a module; none can be left out, since the folder is the table."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flowerbed.experiments.reproduction.conformance import CHECKS, check_table_is_complete
from flowerbed.experiments.reproduction.paper import built


def test_the_table_is_complete() -> None:
    check_table_is_complete()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", built())
def test_contract(name: str, check: Callable[[str], None]) -> None:
    check(name)
