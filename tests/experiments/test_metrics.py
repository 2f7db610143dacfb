"""The selection rule and the cost of a run, against hand-worked numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowerbed.clients.app import OPTIMIZER_STEPS
from flowerbed.clients.params import LocalParams
from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.datasets.partitions import Partition
from flowerbed.experiments import metrics
from flowerbed.experiments.simulation import simulate
from flowerbed.models.base import ModelSpec
from flowerbed.server.callbacks import CLIENTS, SERVER, Record


def judged(server_round: int, phase: str = SERVER, **values: Any) -> Record:
    return Record(server_round, phase, values, seconds=0.5, bytes_down=10, bytes_up=1)


def test_the_last_evaluations_count_and_the_initial_model_does_not() -> None:
    records = [judged(0, accuracy=0.9), *(judged(r, accuracy=r / 10, each=[1]) for r in (1, 2, 3))]
    assert metrics.mean_of_last(records, SERVER, 2) == {"accuracy": 0.25}
    assert metrics.mean_of_last(records, SERVER, 5) == {"accuracy": pytest.approx(0.2)}
    assert metrics.final(records, SERVER) == {"accuracy": pytest.approx(0.3)}
    assert metrics.mean_of_last(records, CLIENTS, 2) == metrics.final(records, CLIENTS) == {}


def test_a_run_without_training_has_its_initial_model() -> None:
    assert metrics.mean_of_last([judged(0, accuracy=0.1)], SERVER, 5) == {"accuracy": 0.1}


def test_what_an_evaluation_lacks_has_no_mean() -> None:
    records = [judged(1, accuracy=0.5, few=0.1), judged(2, accuracy=0.7)]
    assert metrics.mean_of_last(records, SERVER, 2) == {"accuracy": pytest.approx(0.6)}


def test_cost_by_hand() -> None:
    records = [
        judged(1, "train", **{OPTIMIZER_STEPS: 7}),
        judged(1, CLIENTS, accuracy=1.0),
        judged(2, "train", **{OPTIMIZER_STEPS: 3}),
        judged(2, SERVER, accuracy=1.0),
    ]
    found = metrics.cost(records, 100.0)
    assert found["train"] == {
        "bytes_down": 20, "bytes_up": 2, "seconds": 1.0, "client_steps": 10, "flops": 1000.0
    }  # fmt: skip
    assert found["evaluate"] == {"bytes_down": 20, "bytes_up": 2, "seconds": 1.0}
    assert metrics.cost([judged(1, "train")], 100.0)["train"]["flops"] is None
    assert metrics.cost(records, None)["train"]["flops"] is None


@pytest.mark.parametrize(
    ("local", "sizes", "mean"),
    [
        # 10 = 4 + 4 + 2 and 4 = 4: fourteen samples in four steps.
        (LocalParams(batch_size=4), [10, 4], 14 / 4),
        (LocalParams(batch_size=4, epochs=3), [10, 4], 14 / 4),
        # The last batch of two is dropped.
        (LocalParams(batch_size=4, drop_last=True), [10, 4], 4.0),
        (LocalParams(batch_size=0), [10, 4], 7.0),
        # Six steps each: two epochs of ten, six of four.
        (LocalParams(batch_size=4, steps=6), [10, 4], (2 * 10 + 6 * 4) / 12),
        # Draws with replacement fill every batch.
        (LocalParams(batch_size=4, replacement=True), [10, 4], 4.0),
        (LocalParams(batch_size=8, replacement=True), [3], 8.0),
        # A client with less than a batch.
        (LocalParams(batch_size=8, drop_last=True), [3], 3.0),
    ],
)
def test_mean_batch_by_hand(local: LocalParams, sizes: list[int], mean: float) -> None:
    assert metrics.mean_batch(local, np.array(sizes)) == pytest.approx(mean)


def dataset(inputs: Tensor, labels: Tensor, classes: int, **about: Any) -> Dataset:
    split = Split(inputs, labels)
    return Dataset("toy", split, split, tuple(map(str, range(classes))), (0.0,), (1.0,), **about)


def test_flops_of_a_perceptron_by_hand() -> None:
    data = dataset(torch.zeros(3, 64), torch.zeros(3, dtype=torch.int64), 10)
    model = ModelSpec("mlp", (64,), 10, {"hidden": [16]})
    # A sample: forward 2 (64 x 16 + 16 x 10); backward as much for the weights, and 2 x 16 x 10 for the features.
    sample = 2 * 2 * (64 * 16 + 16 * 10) + 2 * 16 * 10
    sizes = np.array([10, 4])
    assert metrics.step_flops(model, data, LocalParams(batch_size=4), sizes) == pytest.approx(3.5 * sample)


def test_flops_of_an_lstm_are_counted() -> None:
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    data = dataset(tokens, tokens, 7, task="next-token")
    model = ModelSpec("char_lstm", (5,), 7, {"embedding": 8, "hidden": 16, "depth": 1})
    found = metrics.step_flops(model, data, LocalParams(batch_size=2), np.array([2]))
    # Gates 4 x 16 from input (8) and state (16), then 16 x 7 outputs; three such products a training step, but
    # for the first state, which needs no gradient.
    token = 2 * (4 * 16 * (8 + 16) + 16 * 7)
    assert found == pytest.approx(2 * (3 * 5 * token - 2 * 4 * 16 * 16))


class Branching(nn.Module):
    """Looks at values, so it cannot run without any."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(input_shape[0], num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w if float(x.sum()) > 0 else -x @ self.w


def test_a_model_that_cannot_be_counted_has_no_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelSpec, "build", lambda self, seed: Branching((4,), 2))
    data = dataset(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), 2)
    assert metrics.step_flops(ModelSpec("any", (4,), 2), data, LocalParams(), np.array([3])) is None


def test_train_counts_are_of_what_clients_hold() -> None:
    labels = torch.tensor([0, 1, 1, 2, 2, 2])
    held = Partition.from_owners([0, 0, 1, -1, 1, -1], 2)
    assert metrics.train_counts(labels, held, 4) == [1, 2, 1, 0]
    tokens = torch.tensor([[0, 1], [1, 1]])
    assert metrics.train_counts(tokens, Partition.from_owners([0, 0], 1), 2) == [1, 3]


def test_the_summary_agrees_with_the_log(tmp_path: Path) -> None:
    result = simulate(
        model={"name": "mlp", "hidden": [8]},
        federation={"clients": 4, "cohort": 2, "rounds": 3},
        evaluation={"clients_every": 1, "last": 2},
        grid={"device": "cpu"},
        run={"dir": str(tmp_path)},
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    server = [r for r in result.history if r.phase == SERVER]
    assert summary["final"]["ece"] == server[-1].metrics["ece"]
    assert summary["mean_of_last_2"]["accuracy"] == pytest.approx(
        (server[-1].metrics["accuracy"] + server[-2].metrics["accuracy"]) / 2
    )
    assert {"balanced-accuracy", "accuracy-many-share-75-95", "accuracy-many-count-100-20"} <= set(
        summary["final"]
    )
    assert {"accuracy-std", "accuracy-jain", "accuracy-worst-10pct", "ece"} <= set(
        summary["clients_mean_of_last_2"]
    )
    trained = [r for r in result.history if r.phase == "train"]
    cost = summary["cost"]["train"]
    assert cost["client_steps"] == sum(r.metrics["steps"] for r in trained) > 0
    assert cost["bytes_up"] == sum(r.bytes_up for r in trained) < summary["bytes"]["up"]
    assert cost["flops"] == pytest.approx(cost["client_steps"] * summary["cost"]["flops_per_step"])


def test_a_method_that_trains_twice_costs_twice() -> None:
    def steps(strategy: str) -> int:
        result = simulate(strategy=strategy, federation={"clients": 2, "rounds": 1}, grid={"device": "cpu"})
        found: int = metrics.cost(result.history, None)["train"]["client_steps"]
        return found

    # Ditto trains the global and the personal model, one epoch each.
    assert steps("ditto") == 2 * steps("fedavg") > 0
