"""The house contract for strategies, as plain functions that anybody can run on their own.

``flowerbed check package.module:MyStrategy`` runs all of them; the test suite runs them over everything that is
registered. A check returns nothing and raises ``AssertionError`` with a sentence that says what is broken.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict

from flowerbed.clients.store import MemoryStore
from flowerbed.experiments import simulation
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.parts import build_parts
from flowerbed.server.grids.base import SimulationGrid
from flowerbed.server.loop import RunResult
from flowerbed.storage import Tensors

ROUNDS = 3


@dataclass(frozen=True)
class Case:
    """The smallest honest setting of a strategy."""

    strategy: str
    """Its name or import path."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Its own parameters, where the defaults are too large for a few seconds."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Other sections that it needs, for example a model with batch norm."""
    one_client_is_central: bool = True
    """Whether one client that keeps its optimizer equals the central loop, which here is FedAvg's client."""

    def simulation(self, **sections: Any) -> Simulation:
        """Return the case as a run of three rounds on digits; ``sections`` replace parts of it."""
        base: dict[str, Any] = {
            "strategy": {"name": self.strategy, **self.options},
            "model": {"name": "mlp", "hidden": [16]},
            "federation": {"clients": 6, "cohort": 4, "rounds": ROUNDS},
            "local": {"batch_size": 64, "momentum": 0.5},
            "evaluation": {"every": 1, "clients_every": 1},
            "grid": {"device": "cpu"},
        }
        for source in (self.settings, sections):
            for name, value in source.items():
                both = (
                    isinstance(value, Mapping) and isinstance(base.get(name), Mapping) and "name" not in value
                )
                base[name] = {**base[name], **value} if both else value
        return Simulation.of(base)


def run(case: Case, **sections: Any) -> RunResult:
    """Run the case."""
    return simulation.run_simulation(case.simulation(**sections))


def check_trains(case: Case) -> None:
    """The case runs to its end, no client fails, the model moves and stays finite."""
    result = run(case)
    assert result.status == "completed", f"the run ended as {result.status}"
    assert not result.failures, f"a client failed: {result.failures[0]}"
    initial = build_parts(case.simulation()).model
    trained = [r for r in result.history if r.answered]
    assert trained, "no client was asked"
    for name, value in result.model.items():
        assert value.shape == initial[name].shape, f"'{name}' changed its shape"
        assert value.dtype == initial[name].dtype, f"'{name}' changed its type to {value.dtype}"
        assert not value.is_floating_point() or bool(torch.isfinite(value).all()), f"'{name}' is not finite"


def check_same_seed_same_bits(case: Case) -> None:
    """Two runs with one seed agree in every bit; another seed gives another model."""
    first, second = run(case), run(case)
    assert_equal(first.model, second.model, "two runs with the same seed differ")
    assert first.final() == second.final(), "two runs with the same seed evaluate differently"
    assert first.final("evaluate-clients") == second.final("evaluate-clients"), "clients evaluate differently"


def check_resumes(case: Case) -> None:
    """A run of two rounds that is resumed for a third equals a run of three, in model and evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        whole = run(case, run={"dir": f"{folder}/whole"})
        run(case, run={"dir": f"{folder}/short"}, federation={"rounds": ROUNDS - 1})
        longer = simulation.resume(f"{folder}/short", federation={"rounds": ROUNDS})
    assert_equal(whole.model, longer.model, "a resumed run differs from one that was not interrupted")
    assert whole.final("evaluate-clients") == longer.final("evaluate-clients"), (
        "after a resume the clients evaluate differently: some state is kept outside the client store"
    )


def check_messages_round_trip(case: Case) -> None:
    """Every message may be turned into bytes and back, as on a real network, without changing a bit."""
    direct = run(case)
    simulated = case.simulation()
    parts = build_parts(simulated)
    with simulation.open_grid(parts, MemoryStore()) as grid:
        wired = simulation.make_federation(parts, cast(SimulationGrid, _Wired(grid))).run()
    assert_equal(direct.model, wired.model, "a message that went over a wire gives another model")


def check_one_client_is_central(case: Case) -> None:
    """One client that keeps its optimizer and generators equals FedAvg's client, hence the central loop."""
    if not case.one_client_is_central:
        return
    sections = {"federation": {"clients": 1, "cohort": 0}, "local": {"persist": True}}
    mine = run(case, **sections)
    central = run(Case("fedavg", settings=case.settings), **sections)
    assert_equal(mine.model, central.model, "with one client the strategy is not the central loop")


def check_ray_equals_in_process(case: Case) -> None:
    """Two Ray actors give the bits of the in-process grid."""
    direct = run(case)
    with tempfile.TemporaryDirectory() as folder:
        distributed = run(case, grid={"name": "ray", "workers": 2, "device": "cpu"}, run={"dir": folder})
    assert_equal(direct.model, distributed.model, "Ray gives another model than the in-process grid")


CHECKS: tuple[Callable[[Case], None], ...] = (
    check_trains,
    check_same_seed_same_bits,
    check_resumes,
    check_messages_round_trip,
    check_one_client_is_central,
)
"""What runs in seconds; ``check_ray_equals_in_process`` needs Ray and half a minute."""


def assert_equal(one: Tensors, other: Tensors, sentence: str) -> None:
    """Raise ``AssertionError`` with ``sentence`` and the first name whose bits differ."""
    assert one.keys() == other.keys(), f"{sentence}: the names differ"
    for name, value in one.items():
        assert torch.equal(value, other[name]), f"{sentence}: '{name}' differs"


class _Wired:
    """A grid whose messages and replies are serialised and read back, array by array."""

    def __init__(self, grid: SimulationGrid) -> None:
        self._grid = grid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        sent = list(messages)
        for message in sent:
            message.content = _through_bytes(message.content)
        replies = self._grid.send_and_receive(sent, timeout=timeout)
        for reply in replies:
            if reply.has_content():
                reply.content = _through_bytes(reply.content)
        return replies


def _through_bytes(content: RecordDict) -> RecordDict:
    result = RecordDict()
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            plain = ArrayRecord()
            for key, array in record.items():
                plain[key] = Array(array.dtype, tuple(array.shape), array.stype, array.data)
            result[name] = plain
        else:
            result[name] = record
    return result
