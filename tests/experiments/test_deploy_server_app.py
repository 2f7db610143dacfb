"""What a run's server process makes of what devices say of themselves."""

from __future__ import annotations

from typing import Any

import pytest

from flowerbed.experiments.deploy import server_app
from flowerbed.server.devices import Device


class PlayedGrid:
    """Three registered devices."""

    nodes = range(1000, 1003)

    def __init__(self) -> None:
        self.refused: dict[int, str] = {}

    def refuse(self, client: int, reason: str) -> None:
        self.refused[client] = reason


def test_who_takes_itself_for_another_is_refused_and_costs_nobody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = {1000: (0, Device(examples=5)), 1002: (0, Device(examples=9))}
    asked: list[Any] = []

    def survey(grid: Any, nodes: Any, *, distinct: bool) -> dict[int, tuple[int, Device]]:
        asked.append((list(nodes), distinct))
        return told

    monkeypatch.setattr(server_app, "survey", survey)
    grid = PlayedGrid()
    found = server_app.introduced(grid)  # type: ignore[arg-type]
    assert asked == [([1000, 1001, 1002], False)]
    # One did not answer; it is taken as it comes.
    assert [device.examples for device in found] == [5, 0, 9]
    assert grid.refused.keys() == {2}
    assert "says that it is client 0" in grid.refused[2]
