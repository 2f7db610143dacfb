"""The round loop: failure policy, early stopping, resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from flwr.app import Message
from hypothesis import given
from hypothesis import strategies as st

from flowerbed import messages
from flowerbed.clients.local_round import LocalRound, Reply
from flowerbed.clients.params import LocalParams
from flowerbed.clients.store import DiskStore
from flowerbed.errors import CheckpointError, ConfigError, FlowerbedError, RunError
from flowerbed.server.callbacks import Callback, EarlyStop, MetricsLog, Record
from flowerbed.server.checkpoint import Checkpoints
from flowerbed.server.loop import Federation
from flowerbed.server.params import EvaluationParams, FederationParams, StopParams
from flowerbed.server.sampling import UniformSampler
from flowerbed.storage import Tensors
from flowerbed.strategies.base import Phase
from flowerbed.strategies.fedavg import FedAvg

LOCAL = LocalParams(lr=0.1, batch_size=0)


def federation(rounds: int = 3, clients: int = 2, **changes: Any) -> Federation:
    """Return FedAvg on the quadratics with the samples dealt to ``clients`` clients."""
    strategy = toys.with_half(FedAvg(), toys.QuadraticHalf())
    made = toys.quadratic_federation(strategy, rounds, LOCAL, owners=range(clients))
    return replace(made, **changes)


class Sabotage:
    """Stands before a grid and spoils what some clients answer."""

    def __init__(self, grid: Any, spoil: Callable[[Message], Message | None]) -> None:
        self._grid, self._spoil = grid, spoil

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def send_and_receive(self, messages: Any, **options: Any) -> list[Message]:
        spoilt = [self._spoil(reply) for reply in self._grid.send_and_receive(messages, **options)]
        return [reply for reply in spoilt if reply is not None]


def nan_from(node: int) -> Callable[[Message], Message]:
    def spoil(reply: Message) -> Message:
        if reply.metadata.src_node_id == node:
            reply.content["metrics"]["loss"] = float("nan")  # type: ignore[index]
        return reply

    return spoil


def test_a_bad_client_is_left_out_and_named() -> None:
    made = federation(1)
    made.grid = Sabotage(made.grid, nan_from(1001))  # type: ignore[assignment]
    result = made.run()
    # Client 0 alone: 0.3 - 0.1 * 0.3.
    assert float(result.model["w"]) == pytest.approx(0.27, abs=1e-12)
    (failure,) = result.failures
    assert (failure.round, failure.client, failure.kind) == (1, 1, "non-finite")
    assert result.history[0].asked == 2
    assert (result.history[0].answered, result.history[0].failed) == (1, 1)


def test_below_the_quorum_the_run_ends_with_an_error_and_the_record_stays() -> None:
    made = federation(3, params=FederationParams(clients=2, rounds=3, quorum=1.0))
    made.grid = Sabotage(made.grid, nan_from(1001))  # type: ignore[assignment]
    with pytest.raises(RunError, match="1 of 2 clients gave a usable reply, 2 are needed.*client 1"):
        made.run()
    assert made.history[-1].failures[0].client == 1


def test_all_clients_failing_ends_the_run_whatever_the_quorum() -> None:
    made = federation(3, params=FederationParams(clients=2, rounds=3, quorum=0.0))
    made.grid = Sabotage(made.grid, lambda reply: None)  # type: ignore[assignment]
    with pytest.raises(RunError, match="0 of 2 clients gave a usable reply, 1 are needed"):
        made.run()


def test_a_model_that_diverges_is_an_error() -> None:
    class Explode(FedAvg):
        def aggregate(self, server_round: int, current: Tensors, replies: Any) -> Tensors:
            return {"w": torch.tensor([float("inf")], dtype=torch.float64)}

    made = toys.quadratic_federation(toys.with_half(Explode(), toys.QuadraticHalf()), 2, LOCAL)
    with pytest.raises(RunError, match="aggregated model is not finite \\('w'\\)"):
        made.run()


class Prepared(FedAvg):
    """FedAvg after a round that asks for statistics, and does nothing with them."""

    def phases(self, rounds: int) -> list[Phase]:
        return [Phase("ask", 1, "query", everyone=True, preparatory=True), *super().phases(rounds)]

    def aggregate(self, server_round: int, current: Tensors, replies: Any) -> Tensors:
        return {} if self.phase.name == "ask" else super().aggregate(server_round, current, replies)


class Answering(toys.QuadraticHalf):
    def query(self, local: LocalRound) -> Reply:
        return Reply({}, {"num-examples": 1})


def test_a_preparatory_round_leaves_the_others_as_they_are() -> None:
    """Their numbers, hence the schedules, streams and cohorts that go by them; the record counts every round."""
    told: list[tuple[Any, ...]] = []

    class Listening(Sabotage):
        def send_and_receive(self, sent: Any, **options: Any) -> list[Message]:
            found = messages.settings(sent[0].content)
            told.append((found["phase"], found["server-round"], found.get(messages.EARLIER)))
            return super().send_and_receive(sent, **options)

    made = toys.quadratic_federation(toys.with_half(Prepared(), Answering()), 2, LOCAL, owners=range(2))
    made.grid = Listening(made.grid, lambda reply: reply)  # type: ignore[assignment]
    result = made.run()
    assert told == [("ask", 0, 1), ("train", 1, 1), ("train", 2, 1)]
    assert [record.round for record in result.history if record.asked] == [1, 2, 3]
    assert torch.equal(result.model["w"], federation(2).run().model["w"])


def test_nothing_is_prepared_after_the_start() -> None:
    class Late(Prepared):
        def phases(self, rounds: int) -> list[Phase]:
            return super().phases(rounds)[::-1]

    made = toys.quadratic_federation(toys.with_half(Late(), Answering()), 2, LOCAL, owners=range(2))
    with pytest.raises(
        ConfigError, match="Phase 'ask' is preparatory and follows one that is not; put it first"
    ):
        made.run()


def test_oversampling_uses_the_first_usable_replies_in_order_of_asking() -> None:
    params = FederationParams(clients=2, cohort=1, rounds=1, oversample=1.0)
    made = federation(1, params=params)
    assert made.strategy.setting is not None
    made.strategy.setup(replace(made.strategy.setting, sampler=UniformSampler(0, 1, oversample=1.0)))
    assert float(made.run().model["w"]) == pytest.approx(0.27, abs=1e-12)
    spoilt = federation(1, params=params)
    spoilt.strategy.setup(replace(made.strategy.setting, sampler=UniformSampler(0, 1, oversample=1.0)))
    spoilt.grid = Sabotage(spoilt.grid, nan_from(1000))  # type: ignore[assignment]
    # Client 1 alone: 0.3 - 0.1 * 3 * (0.3 - 1).
    assert float(spoilt.run().model["w"]) == pytest.approx(0.51, abs=1e-12)


def evaluations(values: list[float]) -> list[Record]:
    return [Record(i, "evaluate-server", {"accuracy": v}) for i, v in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "stop", "stops"),
    [
        ([0.1, 0.2, 0.2, 0.2], StopParams(patience=2), True),
        ([0.1, 0.2, 0.2, 0.3], StopParams(patience=2), False),
        ([0.1, 0.2, 0.205, 0.208], StopParams(patience=2, min_delta=0.01), True),
        ([0.9, 0.8, 0.7], StopParams(patience=2), True),
        ([0.9, 0.8, 0.7], StopParams(patience=2, mode="min"), False),
        ([0.1, 0.5], StopParams(target=0.5), True),
        ([0.6, 0.4], StopParams(target=0.5), False),
        ([0.6, 0.4], StopParams(target=0.5, mode="min"), True),
        ([0.1] * 9, StopParams(), False),
        ([], StopParams(patience=1), False),
    ],
)
def test_early_stopping(values: list[float], stop: StopParams, stops: bool) -> None:
    assert (EarlyStop(stop).reason(evaluations(values)) is not None) == stops


class KilledError(Exception):
    """Stands for the death of the process."""


class KillAfter(Callback):
    """Dies when the training of a round is recorded, before its checkpoint."""

    def __init__(self, server_round: int) -> None:
        self.server_round = server_round

    def recorded(self, record: Record) -> None:
        if record.round == self.server_round:
            raise KilledError


def stateful(directory: Path, rounds: int, **changes: Any) -> Federation:
    """Return a federation whose clients keep momentum and a generator across rounds."""
    strategy = toys.with_half(FedAvg(), toys.QuadraticHalf())
    store = DiskStore(directory / "clients")
    directory.mkdir(exist_ok=True)
    local = LocalParams(lr=0.05, momentum=0.9, batch_size=0, steps=3, persist=True)
    made = toys.quadratic_federation(strategy, rounds, local, store=store)
    return replace(
        made,
        checkpoints=Checkpoints(directory / "checkpoints"),
        log=MetricsLog(directory / "metrics.jsonl"),
        store=store,
        identity="same",
        **changes,
    )


def test_a_killed_run_resumes_to_the_bits_and_records_of_one_that_was_not(tmp_path: Path) -> None:
    whole = stateful(tmp_path / "whole", 8).run()
    for killed_at in (2, 5, 8):
        directory = tmp_path / f"killed-{killed_at}"
        with pytest.raises(KilledError):
            stateful(directory, 8, callbacks=[KillAfter(killed_at)]).run()
        resumed = stateful(directory, 8).run(resume=True)
        assert resumed.resumed_from == killed_at - 1
        assert torch.equal(resumed.model["w"], whole.model["w"])

        def without_time(path: Path) -> list[dict[str, Any]]:
            lines = (path / "metrics.jsonl").read_text().splitlines()
            return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

        assert without_time(directory) == without_time(tmp_path / "whole")


def test_sparser_checkpoints_lose_more_rounds_but_no_bits(tmp_path: Path) -> None:
    whole = stateful(tmp_path / "whole", 8).run()
    with pytest.raises(KilledError):
        stateful(tmp_path / "killed", 8, callbacks=[KillAfter(6)], checkpoint_every=4).run()
    resumed = stateful(tmp_path / "killed", 8, checkpoint_every=4).run(resume=True)
    assert resumed.resumed_from == 4
    assert torch.equal(resumed.model["w"], whole.model["w"])


def test_a_run_can_be_prolonged(tmp_path: Path) -> None:
    whole = stateful(tmp_path / "whole", 6).run()
    stateful(tmp_path / "short", 4).run()
    longer = stateful(tmp_path / "short", 6).run(resume=True)
    assert torch.equal(longer.model["w"], whole.model["w"])


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    stateful(tmp_path / "run", 2).run()
    with pytest.raises(CheckpointError, match="another configuration"):
        replace(stateful(tmp_path / "run", 2), identity="other").run(resume=True)


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No usable checkpoint"):
        stateful(tmp_path / "run", 2).run(resume=True)
    with pytest.raises(CheckpointError, match="keeps no checkpoints"):
        federation().run(resume=True)
    with pytest.raises(ConfigError, match="metrics log"):
        federation(checkpoints=Checkpoints(tmp_path))


def test_private_state_follows_the_client_through_partial_participation(tmp_path: Path) -> None:
    """Each client counts its own rounds; the counts sent must be those of the sampler's draws."""
    from flowerbed.experiments import simulation as build
    from flowerbed.experiments.config import Simulation
    from flowerbed.experiments.parts import build_parts

    settings = {"federation": {"clients": 5, "cohort": 2, "rounds": 6}, "evaluation": {"every": 0}}
    parts = build_parts(Simulation.of(settings))
    strategy = toys.with_half(parts.strategy, toys.CountingHalf())
    parts = replace(parts, strategy=strategy, spec=replace(parts.spec, half=strategy.half))
    store = DiskStore(tmp_path)
    with build.open_grid(parts, store) as grid:
        build.make_federation(parts, grid).run()
    sampler = UniformSampler(0, 2)
    drawn = [client for r in range(1, 7) for client in sampler.train(r, range(5))]
    for client in range(5):
        state = store.read(client, 99)
        assert drawn.count(client) > 0
        assert int(state["count"]["rounds"]) == drawn.count(client)
        assert state["private"].keys() == {"head.weight", "head.bias"}


@given(st.integers(1, 50), st.integers(0, 60), st.integers(1, 9), st.integers(0, 5))
def test_sampling_draws_distinct_clients_and_depends_on_the_round_alone(
    clients: int, cohort: int, server_round: int, seed: int
) -> None:
    nodes = list(range(1000, 1000 + clients))
    drawn = UniformSampler(seed, cohort).train(server_round, nodes)
    assert len(set(drawn)) == len(drawn) == (min(cohort, clients) or clients)
    assert set(drawn) <= set(nodes)
    assert drawn == UniformSampler(seed, cohort).train(server_round, nodes)


def test_every_client_is_drawn_equally_often() -> None:
    sampler = UniformSampler(0, 3)
    counts = torch.bincount(torch.tensor([n for r in range(4000) for n in sampler.train(r, range(10))]))
    # Each count is binomial with mean 1200 and standard deviation 29; six of them are never exceeded.
    assert (counts - 1200).abs().max() < 6 * 29


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        ({"clients": 0}, "clients"), ({"clients": 3, "cohort": 4}, "cohort"), ({"rounds": -1}, "rounds"),
        ({"quorum": 1.5}, "quorum"), ({"oversample": -0.1}, "oversample"), ({"time_limit": -1.0}, "time_limit"),
    ],
)  # fmt: skip
def test_impossible_federations_are_refused(bad: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"federation.{name}"):
        FederationParams(**bad)


def test_bad_evaluation_and_stop_are_refused() -> None:
    with pytest.raises(ConfigError, match="evaluation.every"):
        EvaluationParams(every=-1)
    with pytest.raises(ConfigError, match="stop.mode"):
        StopParams(mode="up")


def test_a_refused_resume_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    from flowerbed.experiments.simulation import resume, simulate

    settings = {"federation": {"clients": 3, "rounds": 2}, "run": {"dir": str(tmp_path / "run")}}
    simulate(**settings)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(FlowerbedError, match="other settings of seed"):
        resume(tmp_path / "run", seed=5)
    with pytest.raises(ConfigError, match="already holds a run"):
        simulate(**settings)
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
