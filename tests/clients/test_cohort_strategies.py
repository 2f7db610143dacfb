"""Every registered strategy: its clients are computed together with the same result, or refused with the reason."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from cohorts import assert_close, assert_same
from conformance_table import CASES

from flowerbed.clients.app import Worker
from flowerbed.clients.cohort import CohortEngine, CohortOptions
from flowerbed.clients.cohort.refusal import UNSTACKABLE, overrides, refusal
from flowerbed.clients.local_round import LocalRound, Reply
from flowerbed.clients.store import ClientState, MemoryStore
from flowerbed.experiments.parts import Parts, build_parts, build_strategy
from flowerbed.experiments.simulation import make_federation, open_grid

ROUNDS = 2


@dataclass
class Recorded:
    """The last round of a run, as its clients met it and as they answered."""

    worker: Worker | None = None
    rounds: list[LocalRound] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    states: list[ClientState] = field(default_factory=list)


def recorded(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Run the federation and keep what the clients of the last round received and sent."""
    record = Recorded()
    opened, train = Worker._open, type(parts.strategy.half).run

    def keep(worker: Worker, *args: Any, **kwargs: Any) -> LocalRound:
        local = opened(worker, *args, **kwargs)
        if local.clock.round == ROUNDS and kwargs["train"]:
            record.worker = worker
            record.rounds.append(replace(local, state=copy.deepcopy(local.state)))
        return local

    def answer(half: Any, local: LocalRound) -> Reply:
        reply = train(half, local)
        if local.clock.round == ROUNDS:
            own = {**local.state}
            if names := half.private(local.info):
                own["private"] = {n: v.detach() for n, v in local.model.state_dict().items() if n in names}
            record.replies.append(copy.deepcopy(reply))
            record.states.append(copy.deepcopy(own))
        return reply

    monkeypatch.setattr(Worker, "_open", keep)
    monkeypatch.setattr(type(parts.strategy.half), "run", answer)
    with open_grid(parts, MemoryStore()) as grid:
        make_federation(parts, grid).run()
    monkeypatch.undo()
    return record


def case_parts(strategy: str, **sections: Any) -> Parts:
    base = {"federation": {"clients": 5, "cohort": 4, "rounds": ROUNDS}, "partition": {"name": "dirichlet"}}
    own = CASES[strategy].settings.get("federation", {})
    federation = {**base["federation"], **own}
    return build_parts(CASES[strategy].simulation(**{**base, "federation": federation, **sections}))


@pytest.mark.parametrize("strategy", sorted(CASES))
def test_clients_together_answer_as_alone(
    strategy: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parts = case_parts(strategy)
    half, local = parts.strategy.half, parts.spec.local
    why = refusal(half, local)
    if why is not None:
        assert type(half).__name__ in why
        assert any(method in why and overrides(half, method) for method in UNSTACKABLE)
        return
    # The ordinary loop, message by message, in the same build of the same federation.
    record = recorded(parts, monkeypatch)
    worker = record.worker
    assert worker is not None
    assert record.rounds
    # Of a million activations, one that a rounding puts on the other side of zero has another gradient.
    tolerance = 5e-2 if strategy == "fedbn" else 2e-5
    kernels = ("vmap",) if overrides(half, "loss") or strategy == "fedbn" else ("vmap", "fused")
    for kernel in kernels:
        rounds = [replace(one, state=copy.deepcopy(one.state), optimizer_steps=0) for one in record.rounds]
        engine = CohortEngine(
            half, worker.model, worker.info, worker.task, local, worker.device,
            options=CohortOptions(kernel=kernel, block=3),
        )  # fmt: skip
        assert_same(engine.replies(rounds), record.replies, tolerance)
        for one, state in zip(rounds, record.states, strict=True):
            assert one.state.keys() == state.keys()
            for group, tensors in state.items():
                assert_close(one.state[group], tensors, tolerance)
            assert one.optimizer_steps == one.clock.steps
    said = [r.message for r in caplog.records if r.name.startswith("flowerbed.clients.cohort")]
    assert not said


def test_some_strategies_are_computed_together() -> None:
    """The list that the documentation states; a strategy that leaves it does so on purpose."""
    together = set()
    for name, case in CASES.items():
        simulation = case.simulation()
        if refusal(build_strategy(simulation.strategy).half, simulation.local) is None:
            together.add(name)
    assert together >= {
        "fedavg",
        "fedprox",
        "scaffold",
        "feddyn",
        "feddc",
        "moon",
        "fedntd",
        "fedbabu",
        "fedproto",
    }


@pytest.mark.parametrize("option", [1, 2])
def test_scaffold_with_plain_steps_and_either_control(option: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = build_parts(
        replace(
            CASES["scaffold"].simulation(),
            strategy=replace(CASES["scaffold"].simulation().strategy, options={"option": option}),
        )
    )
    record = recorded(parts, monkeypatch)
    worker = record.worker
    assert worker is not None
    engine = CohortEngine(
        parts.strategy.half, worker.model, worker.info, worker.task, parts.spec.local, worker.device,
        options=CohortOptions(kernel="fused", block=4),
    )  # fmt: skip
    rounds = [replace(one, state=copy.deepcopy(one.state)) for one in record.rounds]
    assert_same(engine.replies(rounds), record.replies, 2e-5)
