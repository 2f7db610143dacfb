"""What is kept of single clients: theirs in the order of their numbers, quantiles of all, and no more than fits."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowerbed.server.by_client import LEVELS, MOST_CLIENTS, by_client

SHARES = st.floats(0, 1, allow_nan=False)


def test_a_client_without_test_samples_is_left_out() -> None:
    replies = [
        {
            "num-examples": 10,
            "accuracy": 0.5,
            "personal-accuracy": 0.9,
            "loss": 2.0,
            "correct-per-class": [5, 0],
        },
        {
            "num-examples": 0,
            "accuracy": 0.0,
            "personal-accuracy": 0.0,
            "loss": 0.0,
            "correct-per-class": [0, 0],
        },
        {
            "num-examples": 2,
            "accuracy": 1.0,
            "personal-accuracy": 0.7,
            "loss": 1.0,
            "correct-per-class": [1, 1],
        },
    ]
    found = by_client([7, 3, 5], replies)
    assert found["client-numbers"] == [7, 5]
    assert found["accuracy-by-client"] == [0.5, 1.0]
    assert found["personal-accuracy-by-client"] == [0.9, 0.7]
    # Between two clients a quantile lies on the line from one to the other.
    assert found["accuracy-quantiles"] == pytest.approx([0.5 + 0.5 * level for level in LEVELS])
    kinds = [f"{whose}accuracy-{kind}" for whose in ("", "personal-") for kind in ("quantiles", "by-client")]
    assert set(found) == {"client-numbers", *kinds}
    assert by_client([3], replies[1:2]) == by_client([], []) == {}


@given(st.lists(SHARES, min_size=2, max_size=60))
def test_quantiles_are_those_of_the_standard_library(accuracies: list[float]) -> None:
    replies = [{"num-examples": 1, "accuracy": value} for value in accuracies]
    found = by_client(range(len(accuracies)), replies)["accuracy-quantiles"]
    between = statistics.quantiles(accuracies, n=20, method="inclusive")
    assert found == pytest.approx([min(accuracies), *between, max(accuracies)])


def test_of_too_many_clients_only_quantiles_are_kept() -> None:
    replies = [{"num-examples": 1, "accuracy": 0.25}] * (MOST_CLIENTS + 1)
    assert set(by_client(range(MOST_CLIENTS + 1), replies)) == {"accuracy-quantiles"}
    assert len(by_client(range(MOST_CLIENTS), replies[1:])["accuracy-by-client"]) == MOST_CLIENTS
