"""The means, against numpy and hand-worked cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowerbed.errors import RunError
from flowerbed.strategies.aggregation import mean_metrics, summed_evaluation, weighted_mean

WEIGHTS = st.lists(st.integers(1, 1000), min_size=1, max_size=6)


@given(WEIGHTS, st.integers(0, 2**32 - 1))
def test_weighted_mean_is_numpy_average_in_float64(weights: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = [
        rng.normal(size=(3, 2)).astype(np.float32) * np.float32(10.0 ** rng.integers(-3, 4)) for _ in weights
    ]
    found = weighted_mean([{"w": torch.from_numpy(v)} for v in values], [float(w) for w in weights])["w"]
    expected = np.average(np.stack(values).astype(np.float64), axis=0, weights=weights).astype(np.float32)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-7)


@given(WEIGHTS, st.integers(0, 2**32 - 1))
def test_equal_models_are_a_fixed_point_bit_for_bit(weights: list[int], seed: int) -> None:
    model = {"w": torch.from_numpy(np.random.default_rng(seed).normal(size=17).astype(np.float32))}
    assert torch.equal(weighted_mean([model] * len(weights), [float(w) for w in weights])["w"], model["w"])


def test_types_are_kept() -> None:
    models = [
        {
            "count": torch.tensor(3),
            "z": torch.tensor([1 + 1j]),
            "d": torch.tensor([1.0], dtype=torch.float64),
        },
        {
            "count": torch.tensor(7),
            "z": torch.tensor([3 - 1j]),
            "d": torch.tensor([2.0], dtype=torch.float64),
        },
    ]
    mean = weighted_mean(models, [1.0, 3.0])
    assert mean["count"] == 7
    assert mean["count"].dtype == torch.int64
    assert mean["z"].dtype == torch.complex64
    assert mean["z"] == 2.5 - 0.5j
    assert mean["d"] == 1.75
    assert mean["d"].dtype == torch.float64


def test_a_round_of_empty_clients_is_an_error() -> None:
    with pytest.raises(RunError, match="weigh nothing"):
        weighted_mean([{"w": torch.zeros(1)}], [0.0])


def test_metrics_are_weighted_by_examples_and_counts_add_up() -> None:
    replies = [{"num-examples": 1, "loss": 1.0}, {"num-examples": 3, "loss": 2.0}]
    assert dict(mean_metrics(replies)) == {"num-examples": 4, "loss": 1.75}


def test_evaluation_is_of_all_samples_and_the_spread_of_clients_with_samples() -> None:
    replies = [
        {
            "num-examples": 4,
            "loss": 1.0,
            "accuracy": 0.75,
            "correct-per-class": [3, 0],
            "total-per-class": [4, 0],
        },
        {
            "num-examples": 1,
            "loss": 2.0,
            "accuracy": 0.0,
            "correct-per-class": [0, 0],
            "total-per-class": [0, 1],
        },
        {
            "num-examples": 0,
            "loss": 0.0,
            "accuracy": 0.0,
            "correct-per-class": [0, 0],
            "total-per-class": [0, 0],
        },
    ]
    found = dict(summed_evaluation(replies))
    assert found["accuracy"] == 0.6
    assert found["loss"] == 1.2
    assert found["accuracy-mean"] == 0.375
    assert found["accuracy-worst"] == 0.0
    assert found["correct-per-class"] == [3, 0]
    assert found["total-per-class"] == [4, 1]
