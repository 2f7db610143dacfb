"""The pooled exchange gives the bits of the exchange by messages, for every strategy that allows it."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from conformance_table import CASES

from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import LocalRound, Reply
from flowerbed.clients.store import DiskStore, MemoryStore
from flowerbed.errors import ConfigError, RunError
from flowerbed.experiments.cli import main
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.conformance import Case
from flowerbed.experiments.parts import build_parts
from flowerbed.experiments.simulation import make_federation, open_grid, resume, run_simulation, simulate
from flowerbed.server.callbacks import Callback, Record
from flowerbed.server.loop import RunResult
from flowerbed.server.replies import Failure
from flowerbed.strategies.loader import load_all

load_all()
POOLS = """
apfl ditto fedadagrad fedadam fedavg fedavgm fedbabu fedbn feddc feddyn fedetf fedfixmatch fedloge fedntd fedper
fedprox fedrep fedrod fedsam feduda fedyogi finetune gan labels_only local moon pfedme per_fedavg scaffold tau_norm
""".split()  # noqa: SIM905
"""What must pool, in the settings of the conformance table."""


def told(result: RunResult) -> list[dict[str, Any]]:
    """Return everything that the records say, without the time."""
    return [{k: v for k, v in vars(r).items() if k != "seconds"} for r in result.history]


def assert_same(one: RunResult, other: RunResult) -> None:
    assert one.model.keys() == other.model.keys()
    for name, value in one.model.items():
        assert torch.equal(value, other.model[name]), name
        assert value.dtype == other.model[name].dtype
    assert told(one) == told(other)


def exchanged(case: Case, exchange: str, **sections: Any) -> RunResult:
    simulation = case.simulation(**sections)
    grid = replace(simulation.grid, exchange=exchange)
    return run_simulation(replace(simulation, grid=grid))


@pytest.mark.parametrize("name", POOLS)
def test_pooled_equals_messages(name: str) -> None:
    assert_same(exchanged(CASES[name], "pooled"), exchanged(CASES[name], "messages"))


def test_logit_adjustment_pools_where_no_client_is_counted() -> None:
    case = Case("logit_adjustment", {"prior": "local"})
    assert_same(exchanged(case, "pooled"), exchanged(case, "messages"))


def test_the_table_of_strategies_that_pool_is_complete() -> None:
    pooling = []
    for name, case in CASES.items():
        parts = build_parts(case.simulation())
        with open_grid(parts, MemoryStore()) as grid:
            if make_federation(parts, grid).pooling_refusal() is None:
                pooling.append(name)
    assert sorted(pooling) == sorted(POOLS)


BIG: dict[str, Any] = {
    "model": {"name": "mlp", "hidden": [8]},
    "federation": {"clients": 90, "cohort": 75, "rounds": 2, "quorum": 0.2},
    "evaluation": {"every": 0},
}


def run_half(half: ClientHalf, grid: Mapping[str, Any], folder: Path, **sections: Any) -> RunResult:
    """Run a client half under FedAvg and return the result."""
    parts = build_parts(Simulation.of({**BIG, **sections, "grid": {"device": "cpu", **grid}}))
    parts.strategy.half = half
    parts = replace(parts, spec=replace(parts.spec, half=half))
    with open_grid(parts, DiskStore(folder)) as opened:
        return make_federation(parts, opened).run()


def without_traces(result: RunResult) -> RunResult:
    """Leave out where an error was raised, which in a shallow call is one of our own lines."""

    def first(failure: Failure) -> Failure:
        return replace(failure, reason=failure.reason.splitlines()[0])

    history = [replace(r, failures=tuple(map(first, r.failures))) for r in result.history]
    return replace(result, history=history)


def test_every_kind_of_failure_excludes_its_client_alone_and_is_told_alike(tmp_path: Path) -> None:
    pooled = run_half(toys.Unreliable(), {"exchange": "pooled"}, tmp_path)
    by_message = run_half(toys.Unreliable(), {"exchange": "messages"}, tmp_path)
    assert_same(without_traces(pooled), without_traces(by_message))
    first = pooled.history[0]
    assert {failure.kind for failure in first.failures} == {
        "raised",
        "non-finite",
        "wrong-shape",
        "missing-metric",
    }
    assert first.asked == first.answered + first.failed == 75
    assert first.failed > 30


def test_a_run_may_change_its_exchange_when_it_is_resumed(tmp_path: Path) -> None:
    settings = {"strategy": "scaffold", "federation": {"clients": 6, "cohort": 4, "rounds": 2}}
    whole = {**settings, "federation": {"clients": 6, "cohort": 4, "rounds": 4}}
    pooled = simulate(**whole, grid={"device": "cpu"}, run={"dir": str(tmp_path / "whole")})
    simulate(**settings, grid={"device": "cpu"}, run={"dir": str(tmp_path / "short")})
    grid = {"device": "cpu", "exchange": "messages"}
    later = resume(tmp_path / "short", federation={"rounds": 4}, grid=grid)
    assert_same(pooled, later)


class Watched(ClientHalf):
    """Sends fresh tensors and counts how many of those sent so far are still alive."""

    alive = 0
    most = 0

    def run(self, local: LocalRound) -> Reply:
        reply = super().run(local)
        # On numpy's memory, since that lives as long as any view of it.
        memory = {name: value.detach().numpy().copy() for name, value in reply.streams["arrays"].items()}
        for array in memory.values():
            Watched.alive += 1
            weakref.finalize(array, Watched.gone)
        Watched.most = max(Watched.most, Watched.alive)
        return Reply({"arrays": {name: torch.from_numpy(a) for name, a in memory.items()}}, reply.metrics)

    @classmethod
    def gone(cls) -> None:
        cls.alive -= 1


@pytest.mark.parametrize(("exchange", "clients"), [("pooled", 2), ("messages", 75)])
def test_replies_do_not_pile_up(exchange: str, clients: int, tmp_path: Path) -> None:
    """A reply dies before the next but one is made; the exchange by messages shows that the test would notice."""
    Watched.alive = Watched.most = 0
    run_half(Watched(), {"exchange": exchange}, tmp_path)
    tensors = 4
    assert clients * tensors / 2 < Watched.most <= clients * tensors


class Progress(Callback):
    """Counts what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, bool]] = []
        self.asked_for: list[int] = []

    def asked(self, server_round: int, phase: str, clients: int) -> None:
        self.asked_for.append(clients)

    def answered(self, server_round: int, ok: bool) -> None:
        self.told.append((server_round, ok))

    def recorded(self, record: Record) -> None:
        if record.phase == "train":
            assert [ok for round_, ok in self.told if round_ == record.round].count(True) == record.answered


def test_progress_is_told_of_every_client() -> None:
    progress = Progress()
    simulate([progress], **BIG, grid={"device": "cpu", "exchange": "pooled"})
    assert progress.asked_for == [75, 75]
    assert len(progress.told) == 150


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"strategy": "median", "federation": {"clients": 5}}, "Median needs every reply"),
        ({"strategy": "creff"}, "CReFF aggregates replies one by one"),
        ({"strategy": "fedbuff", "federation": {"cohort": 2}}, "FedBuff handles the replies itself"),
        ({"privacy": {"mode": "central", "noise": 0.1}}, "CentralPrivacy needs every reply"),
        ({"federation": {"clients": 5, "cohort": 2, "oversample": 0.5}}, "federation.oversample asks more"),
    ],
)
def test_what_needs_single_replies_says_so(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(
        ConfigError, match=f"grid.exchange=pooled cannot be used: {why}.*set grid.exchange=auto"
    ):
        simulate(**settings, grid={"exchange": "pooled", "device": "cpu"})


def test_a_wrapped_grid_is_not_gone_around() -> None:
    class Wrapper:
        def __init__(self, grid: Any) -> None:
            self._grid = grid

        def __getattr__(self, name: str) -> Any:
            return getattr(self._grid, name)

    parts = build_parts(Simulation.of({"grid": {"device": "cpu"}}))
    with open_grid(parts, MemoryStore()) as grid:
        federation = make_federation(parts, Wrapper(grid))  # type: ignore[arg-type]
        assert federation.pooling_refusal() == "Wrapper carries messages only"


TOGETHER = {"kernel": "vmap", "block": 3}


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "moon"])
def test_clients_computed_together_give_nearly_the_same_model(strategy: str) -> None:
    settings = {**BIG, "federation": {"clients": 12, "cohort": 10, "rounds": 2}, "strategy": strategy}
    one = simulate(**settings, grid={"device": "cpu"})
    many = simulate(**settings, grid={"device": "cpu", "engine": "cohort"}, cohort=TOGETHER)
    for name, value in one.model.items():
        torch.testing.assert_close(many.model[name], value, rtol=1e-4, atol=1e-5)
    for before, after in list(zip(one.history, many.history, strict=True))[:2]:
        assert after.metrics["num-examples"] == before.metrics["num-examples"]
        assert after.metrics["optimizer-steps"] == before.metrics["optimizer-steps"]
        assert (after.bytes_up, after.bytes_down) == (before.bytes_up, before.bytes_down)
        assert after.metrics["loss"] == pytest.approx(before.metrics["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"strategy": "fedrep"}, "FedRepHalf does its local round by itself"),
        ({"strategy": "median", "federation": {"clients": 5}}, "Median needs every reply"),
        ({"local": {"persist": True}}, "local.persist keeps"),
        ({"grid": {"exchange": "messages"}}, "grid.exchange=messages"),
    ],
)
def test_an_engine_that_cannot_be_used_says_why(settings: dict[str, Any], why: str) -> None:
    grid = {"engine": "cohort", "device": "cpu", **settings.pop("grid", {})}
    with pytest.raises(ConfigError, match=f"grid.engine=cohort cannot be used: {why}"):
        simulate(**settings, grid=grid)


def test_a_round_below_the_quorum_ends_the_run() -> None:
    with pytest.raises(RunError, match=r"Round 1: \d+ of 75 clients gave a usable reply, 68 are needed"):
        run_half(toys.Unreliable(), {}, Path("unused"), federation={**BIG["federation"], "quorum": 0.9})


def test_explain_says_what_is_chosen_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*overrides: str) -> dict[str, str]:
        assert main(["explain", *overrides, "grid.device=cpu", "--json"]) == 0
        found: dict[str, str] = json.loads(capsys.readouterr().out)
        return found

    plain = said("federation.clients=100", "federation.cohort=50", "federation.sampling=cyclic")
    assert plain["sampling"].startswith("cyclic: 50 of 100 clients")
    assert plain["exchange"].startswith("pooled")
    assert plain["engine"].startswith("generic: grid.engine=generic")
    assert "25 blocks of up to 2 clients" in plain["engine"]
    assert said("strategy=krum", "federation.clients=9")["exchange"] == (
        "messages: Krum needs every reply as its client sent it"
    )
    together = said("grid.engine=auto", "cohort.kernel=vmap", "cohort.block=4", "grid=ray")
    assert together["engine"].startswith("cohort, kernel vmap, 4 clients at once: chosen by")
    assert together["grid"].startswith("ray: 2 workers on this machine")
    assert main(["explain", "--wrong"]) == 2
