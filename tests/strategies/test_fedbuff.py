"""Asynchronous strategies against an event simulation written apart, and in their synchronous limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys

from flowerbed.clients.params import LocalParams
from flowerbed.errors import ConfigError
from flowerbed.experiments.simulation import simulate
from flowerbed.strategies.fedbuff import FedAsync, FedAsyncParams, FedBuff, FedBuffParams

LOCAL = LocalParams(lr=0.1, batch_size=0, steps=5)
STILL = {"sigma": 0.0, "jitter": 0.0}


def local_training(w: float, client: int) -> float:
    """Five steps of gradient descent on the client's quadratic."""
    for _ in range(5):
        w -= 0.1 * toys.CURVATURES[client] * (w - toys.MINIMA[client])
    return w


class TwoSpeeds(FedAsync):
    """Client 0 needs 1 unit a job, client 1 needs 2.5."""

    def _pace(self, client: int) -> float:
        return (1.0, 2.5)[client]


def test_fedasync_follows_the_clock_by_hand() -> None:
    """Client 0 ends at 1, 2, 3 ..., client 1 at 2.5, 5 ...: the arrivals are 0 0 1 0 0 1."""
    params = FedAsyncParams(concurrency=2, alpha=0.5, a=1.0, sigma=0.0, jitter=0.0)
    strategy = toys.with_half(TwoSpeeds(params), toys.QuadraticHalf())
    made = toys.quadratic_federation(strategy, 4, LOCAL, cohort=1)
    result = made.run()

    w, starts, ends, versions = 0.3, {0: 0.3, 1: 0.3}, {0: 1.0, 1: 2.5}, {0: 0, 1: 0}
    for update in range(4):
        client = min(ends, key=lambda c: ends[c])
        now = ends[client]
        alpha = 0.5 / (1 + update - versions[client])
        w = (1 - alpha) * w + alpha * local_training(starts[client], client)
        # Its next job starts with the next round, from the model of then, at the time of its arrival.
        starts[client], versions[client] = w, update + 1
        ends[client] = now + (1.0, 2.5)[client]
    assert float(result.model["w"]) == pytest.approx(w, abs=1e-12)
    assert [r.metrics["staleness"] for r in result.history] == [0, 0, 2, 1]
    assert [r.metrics["virtual-seconds"] for r in result.history] == [1.0, 2.0, 2.5, 3.0]


def test_equal_clients_and_a_full_buffer_are_synchronous_uniform_fedavg() -> None:
    params = FedBuffParams(concurrency=2, **STILL)
    strategy = toys.with_half(FedBuff(params), toys.QuadraticHalf())
    w = 0.3
    for _ in range(7):
        w = (local_training(w, 0) + local_training(w, 1)) / 2
    assert float(toys.quadratic_federation(strategy, 7, LOCAL).run().model["w"]) == pytest.approx(
        w, abs=1e-12
    )


def test_staleness_weights() -> None:
    assert [FedBuff(FedBuffParams(a=0.5)).weight(tau) for tau in (0, 3)] == [1.0, 0.5]
    assert FedBuff(FedBuffParams(a=0.0)).weight(9) == 1.0


def test_buffers_and_types_are_kept() -> None:
    current = {"w": torch.tensor([1.0]), "n": torch.tensor(3)}
    models = [
        {"w": torch.tensor([3.0]), "n": torch.tensor(4)},
        {"w": torch.tensor([-1.0]), "n": torch.tensor(9)},
    ]
    starts = [{"w": torch.tensor([1.0])}, {"w": torch.tensor([0.0])}]
    found = FedBuff(FedBuffParams(server_lr=0.5)).combine_models(current, starts, models, [1.0, 0.5])
    # 1 + 0.5/2 * (1 * (3 - 1) + 0.5 * (-1 - 0)).
    assert found["w"] == 1.375
    assert found["n"] == 9
    assert found["w"].dtype == torch.float32


def test_faster_clients_are_heard_more_often_and_no_client_twice_a_round() -> None:
    result = simulate(
        strategy={"name": "fedbuff", "sigma": 1.0},
        federation={"clients": 8, "cohort": 2, "rounds": 12},
        evaluation={"every": 0},
    )
    rounds = [record for record in result.history if record.phase == "train"]
    assert [record.answered for record in rounds] == [2] * 12
    times = [record.metrics["virtual-seconds"] for record in rounds]
    assert times == sorted(times)
    assert any(record.metrics["staleness"] > 0 for record in rounds)


@pytest.mark.parametrize(
    ("strategy", "federation", "message"),
    [
        ({"name": "fedasync"}, {"clients": 4, "cohort": 2}, "federation.cohort=1"),
        ({"name": "fedbuff", "concurrency": 9}, {"clients": 4, "cohort": 2}, "strategy.concurrency"),
        ({"name": "fedbuff", "concurrency": 1}, {"clients": 4, "cohort": 2}, "strategy.concurrency"),
        ({"name": "fedbuff", "a": -1.0}, {"clients": 4}, "strategy.a"),
        ({"name": "fedasync", "alpha": 0.0}, {"clients": 4, "cohort": 1}, "strategy.alpha"),
    ],
)
def test_impossible_settings_are_refused(
    strategy: dict[str, Any], federation: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        simulate(strategy=strategy, federation=federation)
