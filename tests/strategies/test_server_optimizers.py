"""FedAvgM, the adaptive server optimizers and server learning rates, against hand-worked numbers and Flower."""

from __future__ import annotations

import math
from typing import Any

import flwr.serverapp.strategy as flower
import numpy as np
import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st

from flowerbed.clients.params import LocalParams
from flowerbed.errors import ConfigError
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.simulation import simulate
from flowerbed.storage import Tensors
from flowerbed.strategies.base import ClientReply, FederatedStrategy
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams
from flowerbed.strategies.fedavgm import FedAvgM, FedAvgMParams
from flowerbed.strategies.fedopt import (
    FedAdagrad,
    FedAdagradParams,
    FedAdam,
    FedOpt,
    FedOptParams,
    FedYogi,
)
from flowerbed.strategies.server_lr import ServerRate


def follow(strategy: FederatedStrategy, start: Tensors, updates: list[Tensors]) -> list[Tensors]:
    """Return the models after rounds in which the mean of the clients is the model plus the update."""
    path, w = [], start
    for server_round, update in enumerate(updates, start=1):
        reply = ClientReply(1, {"arrays": {n: w[n] + update[n] for n in w}}, {"num-examples": 5})
        w = strategy.aggregate(server_round, w, [reply])
        path.append(w)
    return path


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Momentum.


def test_momentum_of_a_constant_update_by_hand() -> None:
    """d = 1 (down) and d = -2 (up): after three rounds -(1 + 1.9 + 2.71) d."""
    path = follow(FedAvgM(), {"w": double(10.0, 10.0)}, [{"w": double(-1.0, 2.0)}] * 3)
    torch.testing.assert_close(path[-1]["w"], double(10 - 5.61, 10 + 11.22), rtol=0, atol=1e-12)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=6), st.floats(0, 0.99), st.floats(0.1, 2))
def test_momentum_is_the_textbook_recursion(updates: list[float], beta: float, lr: float) -> None:
    strategy = FedAvgM(FedAvgMParams(beta=beta, server_lr=lr))
    found = follow(strategy, {"w": double(0.5)}, [{"w": double(u)} for u in updates])[-1]["w"]
    w, v = 0.5, 0.0
    for update in updates:
        v = beta * v - update
        w -= lr * v
    assert float(found) == pytest.approx(w, abs=1e-9)


def test_momentum_reaches_the_optimum_of_the_mean_loss() -> None:
    """One full-batch step a round is heavy-ball gradient descent on the mean loss."""
    strategy = toys.on_quadratics(FedAvgM(FedAvgMParams(beta=0.5)))
    run = toys.quadratic_federation(strategy, 120, LocalParams(lr=0.1, batch_size=0)).run()
    assert float(run.model["w"]) == pytest.approx(0.75, abs=1e-12)


def test_no_momentum_is_fedavg_bit_for_bit() -> None:
    base: dict[str, Any] = {"federation": {"clients": 4, "rounds": 2}, "evaluation": {"every": 0}}
    plain = simulate(strategy={"name": "fedavg", "server_lr": 0.7}, **base)
    zero = simulate(strategy={"name": "fedavgm", "beta": 0.0, "server_lr": 0.7}, **base)
    some = simulate(strategy={"name": "fedavgm", "beta": 0.5, "server_lr": 0.7}, **base)
    assert all(torch.equal(v, zero.model[n]) for n, v in plain.model.items())
    assert not torch.equal(plain.model["head.weight"], some.model["head.weight"])


# Adaptive optimizers.


@pytest.mark.parametrize("kind", [FedAdam, FedYogi])
def test_first_adaptive_step_is_the_learning_rate_against_the_sign(kind: type[FedOpt]) -> None:
    """With |D| far above tau, (1 - beta_1) / sqrt(1 - beta_2) = 1, so every weight moves by eta."""
    strategy = kind(FedOptParams(server_lr=0.1, tau=1e-9))
    moved = follow(strategy, {"w": double(1.0, 1.0)}, [{"w": double(3.0, -0.2)}])[0]["w"]
    torch.testing.assert_close(moved, double(1.1, 0.9), rtol=0, atol=1e-8)


def test_flowers_form_starts_slower() -> None:
    strategy = FedAdam(FedOptParams(server_lr=1.0, tau=1e-12, form="flower"))
    moved = follow(strategy, {"w": double(0.0, 0.0)}, [{"w": double(2.0, -2.0)}])[0]["w"]
    factor = math.sqrt(1 - 0.99**2) / (1 - 0.9**2)
    assert factor == pytest.approx(0.74246, abs=1e-5)
    torch.testing.assert_close(moved, double(factor, -factor), rtol=0, atol=1e-9)


def test_paper_form_by_hand_over_two_rounds() -> None:
    """tau = 0.1, so v_{-1} = 0.01; updates 0.5 and then -0.1. Each number worked out with a pocket calculator."""
    updates = [{"w": double(0.5)}, {"w": double(-0.1)}]
    expected = {
        # v: 0.26, 0.27; beta_1 = 0, so m is the update.
        FedAdagrad: 1 + 0.5 / (math.sqrt(0.26) + 0.1) - 0.1 / (math.sqrt(0.27) + 0.1),
        # v: 0.99 * 0.01 + 0.01 * 0.25 = 0.0124, then 0.012376; m: 0.05, then 0.035.
        FedAdam: 1 + 0.05 / (math.sqrt(0.0124) + 0.1) + 0.035 / (math.sqrt(0.012376) + 0.1),
        # v: 0.01 + 0.01 * 0.25 = 0.0125 (v below D^2 grows), then 0.0125 - 0.01 * 0.01 = 0.0124.
        FedYogi: 1 + 0.05 / (math.sqrt(0.0125) + 0.1) + 0.035 / (math.sqrt(0.0124) + 0.1),
    }
    for kind, value in expected.items():
        strategy = kind(kind.Params(server_lr=1.0, tau=0.1))
        assert float(follow(strategy, {"w": double(1.0)}, updates)[-1]["w"]) == pytest.approx(
            value, abs=1e-12
        )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (FedAdam(FedOptParams(server_lr=0.05, form="flower")), flower.FedAdam(eta=0.05)),
        (FedYogi(FedOptParams(server_lr=0.05, form="flower")), flower.FedYogi(eta=0.05)),
        (FedAdagrad(FedAdagradParams(server_lr=0.05, form="flower")), flower.FedAdagrad(eta=0.05)),
    ],
    ids=["fedadam", "fedyogi", "fedadagrad"],
)
def test_flowers_form_is_flowers_class(ours: FedOpt, theirs: Any) -> None:
    """Flower's own code, fed the same means in float64, over five rounds that go both ways."""
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

    rng = np.random.default_rng(0)
    start = rng.normal(size=6)
    updates = [rng.normal(size=6) * 10.0 ** rng.integers(-3, 1) for _ in range(5)]
    path = follow(ours, {"w": torch.from_numpy(start)}, [{"w": torch.from_numpy(u)} for u in updates])
    w = start
    for server_round, update in enumerate(updates, start=1):
        theirs.current_arrays = {"w": w}
        content = RecordDict(
            {"arrays": ArrayRecord({"w": Array(w + update)}), "m": MetricRecord({"num-examples": 1})}
        )
        asked = Message(content=RecordDict(), dst_node_id=1, message_type="train")
        record, _ = theirs.aggregate_train(server_round, [Message(content, reply_to=asked)])
        w = record["w"].numpy()
        # Flower weighs in float32, hence the tolerance on the shared mean.
        np.testing.assert_allclose(path[server_round - 1]["w"].numpy(), w, rtol=2e-5, atol=2e-6)


def test_buffers_are_averaged_and_types_kept() -> None:
    base: dict[str, Any] = {
        "model": {"name": "resnet8", "norm": "bn"},
        "federation": {"clients": 3, "rounds": 1},
        "local": {"batch_size": 0},
        "evaluation": {"every": 0},
    }
    plain, momentum, adaptive = (simulate(strategy=n, **base).model for n in ("fedavg", "fedavgm", "fedyogi"))
    buffers = [n for n in plain if "running" in n or n.endswith("num_batches_tracked")]
    assert buffers
    for name, value in plain.items():
        assert momentum[name].dtype == adaptive[name].dtype == value.dtype
        assert torch.equal(adaptive[name], value) == (name in buffers)
        assert torch.equal(momentum[name], value) or name not in buffers


# Server learning rates.


def test_schedules_by_hand() -> None:
    assert [ServerRate(0.5).server_lr_at(t, 0) for t in (1, 9)] == [0.5, 0.5]
    cosine = ServerRate(2.0, "cosine")
    assert cosine.server_lr_at(1, 4) == 2.0
    assert cosine.server_lr_at(3, 4) == pytest.approx(1.0)
    assert cosine.server_lr_at(4, 4) == pytest.approx(1 - math.sqrt(0.5))
    assert cosine.server_lr_at(5, 4) == cosine.server_lr_at(9, 4) == pytest.approx(0.0, abs=1e-15)
    steps = ServerRate(1.0, "exponential", server_lr_decay=0.5, server_decay_every=2)
    assert [steps.server_lr_at(t, 9) for t in (1, 2, 3, 4, 5)] == [1.0, 1.0, 0.5, 0.5, 0.25]


def test_fedavg_and_adam_follow_the_schedule() -> None:
    params = {"server_lr": 1.0, "server_schedule": "exponential", "server_lr_decay": 0.5}
    path = follow(FedAvg(FedAvgParams(**params)), {"w": double(0.0)}, [{"w": double(1.0)}] * 3)
    assert [float(model["w"]) for model in path] == [1.0, 1.5, 1.75]
    strategy = FedAdam(FedOptParams(**params, beta_1=0.0, beta_2=0.0, tau=1e-12))
    path = follow(strategy, {"w": double(0.0)}, [{"w": double(5.0)}] * 3)
    assert [float(model["w"]) for model in path] == pytest.approx([1.0, 1.5, 1.75], abs=1e-9)


def test_cosine_uses_the_rounds_of_the_run_and_no_other_number() -> None:
    params = FedAvgParams(server_lr=0.5, server_schedule="cosine")
    with pytest.raises(ConfigError, match="setup"):
        follow(FedAvg(params), {"w": double(0.0)}, [{"w": double(1.0)}])
    run = toys.quadratic_federation(toys.on_quadratics(FedAvg(params)), 2, LocalParams(lr=0.1, batch_size=0))
    w = 0.3
    for lr in (0.5, 0.25):
        # One step of size 0.1 down the mean gradient 2 w - 1.5, of which the server takes the share lr.
        w -= lr * 0.1 * (2 * w - 1.5)
    assert float(run.run().model["w"]) == pytest.approx(w, abs=1e-12)


def test_a_cosine_run_has_its_number_of_rounds_in_its_identity() -> None:
    def identity(rounds: int, **strategy: Any) -> str:
        settings = {"strategy": {"name": "fedavg", **strategy}, "federation": {"rounds": rounds}}
        return Simulation.of(settings).identity

    assert identity(2) == identity(3)
    assert identity(2, server_schedule="cosine") != identity(3, server_schedule="cosine")


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        (ServerRate, {"server_lr": math.inf}), (ServerRate, {"server_schedule": "step"}),
        (ServerRate, {"server_lr_decay": 0.0}), (ServerRate, {"server_decay_every": 0}),
        (FedAvgMParams, {"beta": 1.0}), (FedAvgMParams, {"server_lr": 0.0}),
        (FedOptParams, {"beta_1": 1.0}), (FedOptParams, {"beta_2": -0.1}), (FedOptParams, {"tau": 0.0}),
        (FedOptParams, {"form": "flwr"}), (FedOptParams, {"weighting": "size"}),
    ],
)  # fmt: skip
def test_bad_parameters_are_named(kind: type, bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"strategy\.{next(iter(bad))} is .*; (give|choose)"):
        kind(**bad)
