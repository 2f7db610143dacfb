"""What all clients say together does not depend on who held which sample."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowerbed.clients.local_round import Metric
from flowerbed.experiments.simulation import simulate
from flowerbed.models import evaluation
from flowerbed.models.tasks import Classification
from flowerbed.strategies.aggregation import mean_metrics, summed_evaluation

CLASSES = 4


def reply(outputs: torch.Tensor, labels: torch.Tensor, prefix: str = "") -> dict[str, Metric]:
    sums = Classification(CLASSES).counts(outputs, labels) if len(labels) else {}
    found = evaluation.metrics(sums, len(labels), CLASSES)
    return {prefix + name: value for name, value in found.items()}


def plain(replies: Sequence[Mapping[str, Metric]]) -> dict[str, Any]:
    return dict(summed_evaluation(replies))


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    owners=st.lists(st.integers(0, 4), min_size=1, max_size=40),
)
def test_any_division_of_the_samples_gives_the_scores_of_the_pool(seed: int, owners: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs = 3 * torch.randn(len(owners), CLASSES, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (len(owners),), generator=generator)
    owner = torch.tensor(owners)
    found = plain([reply(outputs[owner == k], labels[owner == k]) for k in range(5)])
    pooled = reply(outputs, labels)
    for name in ("correct-per-class", "total-per-class", "correct-per-bin", "total-per-bin", "num-examples"):
        assert found[name] == pooled[name]
    for name, value in evaluation.scores(pooled).items():
        assert found[name] == pytest.approx(value, abs=1e-12)
    assert found["loss"] == pytest.approx(pooled["loss"])
    assert found["confidence-per-bin"] == pytest.approx(pooled["confidence-per-bin"])


def test_the_spread_is_over_clients_with_samples_for_every_predictor() -> None:
    right, wrong = torch.eye(CLASSES) * 9, -torch.eye(CLASSES) * 9
    labels = torch.arange(CLASSES)
    replies = [
        reply(right, labels) | reply(right, labels, "personal-"),
        reply(wrong[:2], labels[:2]) | reply(right[:2], labels[:2], "personal-"),
        reply(wrong[:0], labels[:0]) | reply(wrong[:0], labels[:0], "personal-"),
    ]
    found = plain(replies)
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["accuracy-mean"] == 0.5
    assert found["accuracy-worst"] == found["accuracy-worst-10pct"] == 0.0
    assert found["accuracy-std"] == statistics.pstdev([1.0, 0.0])
    assert found["accuracy-jain"] == 0.5
    # Classes 0 and 1 are right in one client of two, classes 2 and 3 in their only one.
    assert found["balanced-accuracy"] == 0.75
    assert (
        found["personal-accuracy"]
        == found["personal-accuracy-worst"]
        == found["personal-accuracy-jain"]
        == 1.0
    )
    assert found["personal-num-examples"] == found["num-examples"] == 6
    assert found["personal-ece"] < 0.001 < found["ece"]


def test_a_federation_without_test_samples_has_no_spread() -> None:
    empty = reply(torch.zeros(0, CLASSES), torch.zeros(0, dtype=torch.int64))
    found = plain([empty, empty])
    assert found["accuracy"] == found["num-examples"] == 0
    assert "accuracy-worst" not in found
    assert "ece" not in found


def test_client_steps_add_up() -> None:
    replies = [{"num-examples": 10, "steps": 3, "loss": 1.0}, {"num-examples": 30, "steps": 5, "loss": 2.0}]
    assert dict(mean_metrics(replies)) == {"num-examples": 40, "steps": 8, "loss": 1.75}


@pytest.mark.parametrize("strategy", ["fedavg", "flower:FedAvg"])
def test_clients_together_agree_with_the_server(strategy: str) -> None:
    # Every digit of the test set belongs to exactly one client, so both judge the same samples.
    result = simulate(
        strategy=strategy,
        partition={"name": "dirichlet", "alpha": 0.2},
        federation={"clients": 5, "rounds": 1},
        evaluation={"clients_every": 1},
        grid={"device": "cpu"},
    )
    server, clients = result.final(), result.final("evaluate-clients")
    for name in ("num-examples", "correct-per-class", "total-per-class", "total-per-bin", "accuracy"):
        assert clients[name] == server[name]
    groups = [name for name in server if "share-75-95" in name or "count-100-20" in name]
    assert len(groups) >= 2
    for name in ("balanced-accuracy", "ece", *groups):
        assert clients[name] == pytest.approx(server[name], abs=1e-9)
    (trained,) = (r for r in result.history if r.phase == "train")
    assert trained.metrics["num-examples"] == 1437
    assert trained.metrics["steps"] >= 1437 / 32
