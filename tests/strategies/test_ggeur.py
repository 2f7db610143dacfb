"""GGEUR in runs: identities, the wire, privacy of its statistics, bad statistics, and every algorithm on top."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from torch import Tensor

from flowerbed import messages
from flowerbed.clients.data import ClientData
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import LocalRound, Reply
from flowerbed.clients.training import train
from flowerbed.errors import ClientError, ConfigError, RunError
from flowerbed.experiments.simulation import resume, simulate
from flowerbed.server.loop import RunResult
from flowerbed.strategies.ggeur import (
    BALANCED,
    HEAD,
    INFORMED,
    PROTOTYPES,
    SHAPES,
    STATISTICS,
    Ggeur,
    GgeurParams,
    balanced_data,
    statistics,
)
from flowerbed.strategies.ggeur_geometry import Moments, shapes

CLAIMED = ("fedavg", "fedprox", "feddyn", "fedntd", "moon", "scaffold", "fedproto")
"""The algorithms that the paper puts GGEUR under."""
T = 25


def settings(**sections: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "strategy": {"name": "ggeur", "T": T},
        "model": "linear",
        "partition": {"name": "dirichlet_floor", "alpha": 0.1},
        "federation": {"clients": 4, "cohort": 2, "rounds": 3},
        "local": {"lr": 0.01, "batch_size": 50},
        "grid": {"device": "cpu"},
        "evaluation": {"every": 1, "clients_every": 1},
    }
    for name, value in sections.items():
        merge = isinstance(value, Mapping) and isinstance(base.get(name), Mapping)
        base[name] = {**base[name], **value} if merge and value.get("name", "ggeur") == "ggeur" else value
    return base


def go(**sections: Any) -> RunResult:
    return simulate(**settings(**sections))


def world(options: Mapping[str, Any] | None = None, **sections: Any) -> worlds.World:
    sections = {
        "model": {"name": "linear"},
        "partition": {"name": "dirichlet_floor", "alpha": 0.1},
        **sections,
    }
    return worlds.run("ggeur", {"T": T, **(options or {})}, **sections)


def own_data(found: worlds.World, client: int) -> tuple[Tensor, Tensor]:
    """Return a client's own samples as it sees them, flat, with their classes."""
    dataset, rows = found.parts.dataset, found.parts.train.indices(client)
    return dataset.prepare(dataset.train.inputs[rows]).flatten(1), dataset.train.labels[rows]


def strategy_of(found: worlds.World) -> Ggeur:
    strategy = found.parts.strategy
    assert isinstance(strategy, Ggeur)
    return strategy


# Identities.


@pytest.mark.parametrize("base", ["fedavg", "scaffold"])
def test_without_a_size_it_is_the_base_bit_for_bit(base: str) -> None:
    mine, theirs = go(strategy={"T": 0, "base": base}), go(strategy={"name": base})
    assert worlds.equal(mine.model, theirs.model)
    assert [r.round for r in mine.history] == [r.round for r in theirs.history]


def test_the_shapes_are_those_of_all_data_together() -> None:
    found = world()
    split = [own_data(found, k) for k in range(4)]
    x, y = (torch.cat(parts) for parts in zip(*split, strict=True))
    values, vectors = shapes(Moments.of(x, y, 10).covariance)
    sent = strategy_of(found).state[SHAPES]
    torch.testing.assert_close(sent["values"].double(), values, rtol=1e-5, atol=1e-5)
    rebuilt = sent["vectors"].double().transpose(1, 2) @ (
        sent["values"].double()[:, :, None] * sent["vectors"].double()
    )
    torch.testing.assert_close(
        rebuilt, vectors.transpose(1, 2) @ (values[:, :, None] * vectors), rtol=1e-4, atol=1e-4
    )


def test_one_client_with_enough_samples_is_plain_training_on_a_part_of_them() -> None:
    """T <= n for every class: no point is generated, and FedAvg of one client is the central loop."""
    world_of_one = worlds.run("ggeur", {"T": 20}, model={"name": "linear"}, partition={"name": "iid"},
                              federation={"clients": 1, "rounds": 3}, local={"persist": True})  # fmt: skip
    state = world_of_one.state(0)[BALANCED]
    assert len(state["y"]) == 0
    x, y = own_data(world_of_one, 0)
    assert torch.bincount(y[state["rows"]]).tolist() == [20] * 10
    local = worlds.open_round(
        replace(world_of_one.parts.simulation.local, persist=True),
        spec=world_of_one.parts.spec.model,
        data=ClientData(x[state["rows"]].reshape(-1, 1, 8, 8), y[state["rows"]], state["rows"], {}),
    )
    local.model.load_state_dict(world_of_one.parts.model)
    local.seed = 3
    for _ in range(3):
        train(local, ClientHalf().loss, extras={}, steps=local.clock.all_steps)
        local.clock = replace(local.clock, round=local.clock.round + 1)
    assert worlds.equal(world_of_one.trained, dict(local.model.state_dict()))


def test_clients_hold_exactly_t_of_every_class_and_weigh_the_same() -> None:
    found = world()
    for client in range(4):
        state = found.state(client)[BALANCED]
        x, y = own_data(found, client)
        labels = torch.cat([y[state["rows"]], state["y"]])
        assert torch.bincount(labels, minlength=10).tolist() == [T] * 10
        data = balanced_data(
            ClientData(x, y, torch.arange(len(y)), {}), {**state, "x": state["x"].flatten(1)}
        )
        assert len(data) == 10 * T
        assert (data.index == -1).sum() == len(state["y"])
    trained = [r for r in found.result.history if r.phase == "train"]
    assert {r.metrics["num-examples"] for r in trained} == {4 * 10 * T}
    assert [r.phase for r in found.result.history if r.asked] == ["statistics", "train", "train"]


def test_the_generated_set_does_not_depend_on_when_a_client_first_trains() -> None:
    everyone = world(federation={"clients": 4, "rounds": 1})
    few = world(federation={"clients": 4, "cohort": 1, "rounds": 4})
    late = [client for client in range(4) if BALANCED in few.state(client)]
    assert late
    for client in late:
        assert worlds.equal(few.state(client)[BALANCED], everyone.state(client)[BALANCED])


def test_the_base_counts_its_own_rounds_only() -> None:
    """A cosine schedule and the cohorts are those of a run without the statistics round."""
    local = {"schedule": "cosine"}
    # With T = n for all, the balanced set is the client's own data, in order.
    sections: dict[str, Any] = {
        "dataset": "test_ggeur:even",
        "partition": "iid",
        "local": local,
        "model": "linear",
    }
    mine = go(**sections, strategy={"T": 6, "base": "fedavg"}, federation={"clients": 1, "cohort": 1})
    theirs = go(**sections, strategy={"name": "fedavg"}, federation={"clients": 1, "cohort": 1})
    assert worlds.equal(mine.model, theirs.model)


def even() -> Any:
    """Return a data set with six samples of each of two classes."""
    from flowerbed.datasets.dataset import Dataset, Split

    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    split = Split(x, torch.arange(12) % 2)
    return Dataset("even", split, split, ("a", "b"), (0.0,), (1.0,))


# What travels.


def test_shapes_travel_once_to_every_client() -> None:
    found = world(federation={"clients": 4, "cohort": 2, "rounds": 5})
    rounds = [r for r in found.result.history if r.phase == "train"]
    seen: set[int] = set()
    size = messages.record_nbytes(messages.array_record(strategy_of(found).state[SHAPES]))
    for number, record in enumerate(rounds, start=1):
        new = set(found.sampled(number)) - seen
        seen |= new
        assert size * len(new) < record.bytes_down < size * (len(new) + 1)
    assert len(strategy_of(found).state[INFORMED]["node"]) == len(seen)


def test_a_lower_rank_makes_the_messages_smaller() -> None:
    whole, few = world().result.history, world({"rank": 4, "client_rank": 4}).result.history
    assert few[0].bytes_up < whole[0].bytes_up / 3
    assert few[1].bytes_down < whole[1].bytes_down / 5


def test_prototypes_are_those_of_the_others() -> None:
    found = world({"centre": "domains", "M": 5})
    strategy = strategy_of(found)
    for client, node in enumerate(strategy.state[PROTOTYPES]["node"].tolist()):
        sent = messages.tensors(strategy._others(node))
        others = [k for k in range(4) if k != client]
        for row, other in enumerate(others):
            x, y = own_data(found, other)
            for c in range(10):
                torch.testing.assert_close(sent["mean"][row, c], x[y == c].mean(0), rtol=1e-4, atol=1e-4)
        assert bool((sent["known"] == 1).all())


# The released protocol.


def test_one_shot_clients_never_see_the_mean() -> None:
    found = world({"protocol": "one_shot"})
    own = [found.state(client)[HEAD] for client in range(4)]
    for name, value in found.trained.items():
        torch.testing.assert_close(value, worlds.mean([head[name] for head in own], [1.0] * 4).float())
    assert not worlds.equal(own[0], own[1])
    # A client that trains apart for two rounds: the same steps on the same set from the initial model.
    x, y = own_data(found, 1)
    state = found.state(1)[BALANCED]
    data = balanced_data(ClientData(x.reshape(-1, 1, 8, 8), y, torch.arange(len(y)), {}), state)
    local = worlds.open_round(found.parts.simulation.local, spec=found.parts.spec.model, data=data)
    local.model.load_state_dict(found.parts.model)
    local.seed, local.client = 3, 1
    for _ in range(2):
        train(local, ClientHalf().loss, extras={}, steps=local.clock.all_steps)
        local.clock = replace(local.clock, round=local.clock.round + 1)
    assert worlds.equal(own[1], dict(local.model.state_dict()))


def test_one_shot_differs_from_rounds_after_the_first() -> None:
    one, other = world({"protocol": "one_shot"}), world()
    assert not worlds.equal(one.trained, other.trained)
    short = {"federation": {"clients": 4, "rounds": 1}}
    assert worlds.equal(world({"protocol": "one_shot"}, **short).trained, world(**short).trained)


# On top of every algorithm.


@pytest.mark.parametrize("base", CLAIMED)
def test_it_runs_under_every_claimed_algorithm_and_resumes(base: str, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "strategy": {"base": base},
        "encoder": {"name": "patches", "patch": 3, "atoms": 4},
        "data": {"server_per_class": 10, "cache": str(tmp_path / "cache")},
        "model": {"name": "mlp", "hidden": [8]},
    }
    whole = go(**sections, run={"dir": str(tmp_path / "whole")})
    assert whole.status == "completed"
    assert not whole.failures
    go(**sections, run={"dir": str(tmp_path / "short")}, federation={"rounds": 2})
    longer = resume(tmp_path / "short", federation={"rounds": 3})
    assert worlds.equal(whole.model, longer.model)
    assert whole.final("evaluate-clients") == longer.final("evaluate-clients")


def test_a_run_resumes_right_after_the_statistics(tmp_path: Path) -> None:
    whole = go(run={"dir": str(tmp_path / "whole")})
    go(run={"dir": str(tmp_path / "short")}, federation={"rounds": 0})
    longer = resume(tmp_path / "short", federation={"rounds": 3})
    assert worlds.equal(whole.model, longer.model)


def test_options_of_the_base_reach_it() -> None:
    mild = go(strategy={"base": "fedprox", "base_options": {"mu": 0.0}})
    assert worlds.equal(mild.model, go().model)
    assert not worlds.equal(mild.model, go(strategy={"base": "fedprox", "base_options": {"mu": 1.0}}).model)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"base": "fedporx"}, "Did you mean 'fedprox'"),
        ({"base": "ggeur"}, "cannot be wrapped"),
        ({"base_options": {"mu": 1}}, "option of strategy.base='fedavg' 'mu'"),
        ({"T": -1}, "strategy.T is -1"),
        ({"centre": "mean"}, "strategy.centre is 'mean'"),
        ({"guide_fraction": 0.0}, "strategy.guide_fraction"),
        ({"dp": "client", "client_rank": 3}, "set one of them"),
        ({"dp_clip": float("nan")}, "strategy.dp_clip"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        go(strategy=options)


# Controls.


def test_every_control_is_something_else() -> None:
    found = {centre: go(strategy={"centre": centre}) for centre in ("sample", "duplicate", "global_mean")}
    asked = {centre: [r.phase for r in result.history if r.asked] for centre, result in found.items()}
    assert "statistics" not in asked["duplicate"]
    assert "statistics" in asked["global_mean"]
    models = list(found.values())
    assert not worlds.equal(models[0].model, models[1].model)
    assert not worlds.equal(models[0].model, models[2].model)


# Privacy.


def test_a_floor_leaves_small_classes_out_of_the_statistics() -> None:
    x = torch.randn(9, 4, dtype=torch.float64)
    y = torch.tensor([0] * 5 + [1] * 3 + [2])
    data = ClientData(x, y, torch.arange(9), {})
    rng = torch.Generator()
    said = Moments.read(statistics(data, 3, GgeurParams(n_floor=3), rng))
    assert said.count.tolist() == [5, 3, 0]
    assert not bool(said.sum[2].any() or said.outer[2].any())
    torch.testing.assert_close(said.mean[1], x[5:8].mean(0))
    assert Moments.read(statistics(data, 3, GgeurParams(), rng)).count.tolist() == [5, 3, 1]


def test_a_floor_above_every_class_is_an_error() -> None:
    with pytest.raises(RunError, match=r"lower strategy.n_floor"):
        go(strategy={"n_floor": 1000})


@pytest.mark.parametrize("dp", ["server", "client"])
def test_noise_on_the_statistics(dp: str) -> None:
    runs = [go(strategy={"dp": dp, "dp_noise": z}) for z in (1e-9, 0.5)]
    metrics = [next(r.metrics for r in run.history if r.phase == STATISTICS) for run in runs]
    assert 0 < metrics[1]["dp-epsilon"] < metrics[0]["dp-epsilon"]
    assert metrics[1]["shape-trace"] > metrics[0]["shape-trace"], "noise only adds to what is clipped at zero"
    exact = go(strategy={"dp": dp, "dp_noise": 0.0, "dp_clip": 1e6})
    worlds.close(exact.model, go().model)


def test_masked_sums_give_the_same_shapes() -> None:
    """The server sees sums over clients alone; they are right to the rounding of the masks."""
    sections: dict[str, Any] = {"federation": {"clients": 4, "rounds": 1}}
    plain = world(**sections)
    masked = world({"scale": 64.0}, **sections, secure={"enabled": True, "bits": 29, "clip": 16.0})
    assert not masked.result.failures
    mine, theirs = (strategy_of(w).state[SHAPES] for w in (masked, plain))
    rebuilt = [
        s["vectors"].transpose(1, 2) @ (s["values"][:, :, None] * s["vectors"]) for s in (mine, theirs)
    ]
    torch.testing.assert_close(rebuilt[0], rebuilt[1], rtol=1e-3, atol=1e-3)
    record = next(r for r in masked.result.history if r.phase == STATISTICS)
    assert record.metrics["secure-clipped"] == 0.0
    assert record.metrics["statistics-rejected"] == 0


def test_masked_statistics_of_all_clients_must_fit_too() -> None:
    # Three train in a round, but all nine are asked for statistics: 9 * 2**29 would wrap around unseen.
    with pytest.raises(ConfigError, match="the sum over 9 clients does not fit 32 bits"):
        simulate(
            strategy={"name": "ggeur", "scale": 64.0},
            federation={"clients": 9, "cohort": 3, "rounds": 2},
            secure={"enabled": True, "bits": 29},
            grid={"device": "cpu"},
        )


@pytest.mark.parametrize("options", [{"centre": "domains"}, {"client_rank": 2}, {"guide_fraction": 0.8}])
def test_what_needs_single_replies_is_refused_under_masks(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"secure.enabled"):
        go(strategy=options, secure={"enabled": True})


# Bad statistics and bad data.


class Liar(ClientHalf):
    """A client whose statistics no data have; on client 1 only."""

    stateful = True

    def query(self, local: LocalRound) -> Reply:
        honest = self.params.query(local)
        if local.client != 1:
            return honest
        stream = {name: value.clone() for name, value in honest.streams[STATISTICS].items()}
        self.lie(stream)
        return replace(honest, streams={STATISTICS: stream})

    def run(self, local: LocalRound) -> Reply:
        return self.params.run(local)

    def lie(self, stream: dict[str, Tensor]) -> None:
        stream["outer"].neg_()


class NotFinite(Liar):
    def lie(self, stream: dict[str, Tensor]) -> None:
        stream["sum"][2, 0] = float("nan")


class Huge(Liar):
    def lie(self, stream: dict[str, Tensor]) -> None:
        stream["sum"] *= 100
        stream["outer"] *= 100**2


class LyingGgeur(Ggeur):
    """GGEUR whose client 1 lies, by ``kind``."""

    kind: type[Liar] = Liar

    def __init__(self, params: GgeurParams | None = None) -> None:
        super().__init__(params)
        self.half = self.kind(self.half)


class NotFiniteGgeur(LyingGgeur):
    kind = NotFinite


class HugeGgeur(LyingGgeur):
    kind = Huge


@pytest.mark.parametrize(
    ("name", "kind", "told"),
    [
        ("LyingGgeur", "rejected", "statistics of class 0 cannot be used: its covariance is not positive"),
        ("NotFiniteGgeur", "non-finite", "'sum' of stream 'statistics'"),
        ("HugeGgeur", "rejected", "is above strategy.trace_limit"),
    ],
)
def test_bad_statistics_are_rejected_by_name(name: str, kind: str, told: str) -> None:
    result = simulate(**settings(strategy={"name": f"test_ggeur:{name}", "T": T, "trace_limit": 1e3}))
    failures = [f for f in result.failures if f.round == 1]
    assert [(f.client, f.kind) for f in failures] == [(1, kind)]
    assert told in failures[0].reason
    statistics_round = next(r for r in result.history if r.phase == STATISTICS)
    assert statistics_round.failed == 1
    assert statistics_round.metrics["statistics-rejected"] == (kind == "rejected")


def test_unlabelled_samples_are_an_error() -> None:
    data = ClientData(torch.randn(3, 4), torch.tensor([0, -1, 1]), torch.arange(3), {})
    with pytest.raises(ClientError, match=r"data.labelled=1"):
        statistics(data, 2, GgeurParams(), torch.Generator())


def gap() -> Any:
    """Return a data set without training samples of its second class."""
    full = even()
    train_split = full.train
    keep = train_split.labels == 0
    return replace(full, train=type(train_split)(train_split.inputs[keep], train_split.labels[keep]))


def test_a_class_that_nobody_has_is_refused_before_the_run() -> None:
    with pytest.raises(ConfigError, match="No client has a sample of class 'b'"):
        go(dataset="test_ggeur:gap", partition="iid", federation={"clients": 2, "cohort": 0})


def test_data_that_are_no_embeddings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"encoder=patches"):
        go(dataset="test_ggeur:large", partition="iid")
    with pytest.raises(ConfigError, match=r"local.augment"):
        go(local={"augment": "flip_shift"})


def large() -> Any:
    """Return a data set of images with more numbers than a covariance could have rows."""
    from flowerbed.datasets.dataset import Dataset, Split

    split = Split(torch.zeros(12, 3, 64, 64, dtype=torch.uint8), torch.arange(12) % 2)
    return Dataset("large", split, split, ("a", "b"), (0.5,), (0.5,))
