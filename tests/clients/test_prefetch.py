"""Data prepared ahead are the data prepared in turn: order, errors, bounds, and the bits of a whole run."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowerbed.clients.data import ClientData, ViewCache
from flowerbed.clients.prefetch import Key, Prefetch
from flowerbed.errors import ClientError
from flowerbed.experiments.simulation import simulate

WAIT = 20.0
"""Seconds until a thread that never comes is given up."""


def view(client: int) -> ClientData:
    x = torch.full((2, 3), float(client))
    return ClientData(x, torch.zeros(2, dtype=torch.int64), torch.arange(2), {})


def keys(clients: Iterator[int] | range | list[int]) -> list[Key]:
    return [(client, "train") for client in clients]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every worker finds its data heavy."""
    monkeypatch.setattr(Prefetch, "heavy", True)


@pytest.mark.usefixtures("always")
def test_the_next_clients_data_are_made_while_one_trains_and_no_more_than_two() -> None:
    made: list[int] = []
    second = threading.Event()

    def make(key: Key) -> ClientData:
        made.append(key[0])
        if key[0] == 2:
            second.set()
        return view(key[0])

    views = Prefetch(ViewCache(10**6), make)
    with views.ahead(keys(range(6))):
        assert float(views.get((0, "train")).x[0, 0]) == 0
        # Client 0 trains; nobody asks for anything, and yet the two after it are made.
        assert second.wait(WAIT)
        assert made == [0, 1, 2]
        for client in range(1, 6):
            assert float(views.get((client, "train")).x[0, 0]) == client
    assert made == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("making", "training", "heavy"),
    [(0.02, 0.05, True), (0.02, 0.5, False), (0.0002, 0.0001, False)],
    ids=["heavy", "a small share", "short calls"],
)
def test_what_is_heavy(making: float, training: float, heavy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that data and training move: a tenth of the time, and 5 ms a client."""
    clock = [0.0]
    monkeypatch.setattr("flowerbed.clients.prefetch.time.perf_counter", lambda: clock[0])

    def make(key: Key) -> ClientData:
        clock[0] += making
        return view(key[0])

    views = Prefetch(ViewCache(10**6), make)
    assert not views.heavy
    with views.ahead(keys(range(3))):
        for client in range(3):
            views.get((client, "train"))
            clock[0] += training
    assert views.heavy is heavy


@pytest.mark.usefixtures("always")
def test_an_error_is_that_of_the_client_whose_data_it_is() -> None:
    def make(key: Key) -> ClientData:
        if key[0] == 1:
            raise ClientError("client 1 has no data")
        return view(key[0])

    views = Prefetch(ViewCache(10**6), make)
    with views.ahead(keys(range(3))):
        views.get((0, "train"))
        with pytest.raises(ClientError, match="client 1"):
            views.get((1, "train"))
        assert float(views.get((2, "train")).x[0, 0]) == 2


@given(
    block=st.lists(st.integers(0, 9), max_size=12, unique=True),
    asked=st.lists(st.integers(0, 9), max_size=20),
    limit=st.sampled_from([1, 200, 10**6]),
)
@settings(max_examples=60, deadline=None)
def test_any_order_of_asking_finds_the_right_data_and_makes_none_twice(
    block: list[int], asked: list[int], limit: int
) -> None:
    """Clients that are announced and never asked for, asked for unannounced, or in another order."""
    counts: dict[Key, int] = {}

    def make(key: Key) -> ClientData:
        counts[key] = counts.get(key, 0) + 1
        return view(key[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prefetch, "heavy", True)
        views = Prefetch(ViewCache(limit), make)
        with views.ahead(keys(block)):
            for client in asked:
                assert float(views.get((client, "train")).x[0, 0]) == client
        assert float(views.get((10, "train")).x[0, 0]) == 10
    in_order = [client for client in block if client in asked]
    if limit == 10**6 and asked == in_order:
        assert all(count == 1 for count in counts.values())


@pytest.mark.parametrize("engine", ["generic", "cohort"])
def test_a_run_has_the_same_bits(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> dict[str, torch.Tensor]:
        result = simulate(
            federation={"clients": 12, "rounds": 2, "cohort": 6},
            evaluation={"every": 0},
            seed=5,
            grid={"name": "inprocess", "engine": engine, "device": "cpu"},
        )
        return dict(result.model)

    threads: list[str] = []
    make = ClientData.view.__func__  # type: ignore[attr-defined]

    def noted(cls: type[ClientData], *args: object) -> ClientData:
        threads.append(threading.current_thread().name)
        found: ClientData = make(cls, *args)
        return found

    monkeypatch.setattr(ClientData, "view", classmethod(noted))
    monkeypatch.setattr(Prefetch, "heavy", False)
    plain = run()
    assert not any(name.startswith("prefetch") for name in threads)
    monkeypatch.setattr(Prefetch, "heavy", True)
    ahead = run()
    assert any(name.startswith("prefetch") for name in threads)
    assert all(torch.equal(plain[name], ahead[name]) for name in plain)
