"""The partition that draws: clients of any number, each with its own samples, computed when asked for."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowerbed.datasets.partitions import DrawnPartition, partition
from flowerbed.errors import ConfigError


@given(st.integers(1, 200), st.data(), st.integers(0, 99))
def test_a_draw_is_distinct_samples_and_a_function_of_seed_and_client(
    samples: int, data: st.DataObject, seed: int
) -> None:
    size = data.draw(st.integers(1, samples))
    drawn = partition("draws", np.zeros(samples), 10**9, seed, per_client=size)
    client = data.draw(st.integers(0, 10**9 - 1))
    indices = drawn.indices(client)
    assert len(indices) == drawn.size(client) == size
    assert (np.diff(indices) > 0).all()
    assert 0 <= indices[0] <= indices[-1] < samples
    assert np.array_equal(indices, pickle.loads(pickle.dumps(drawn)).indices(client))


def test_every_sample_is_drawn_equally_often() -> None:
    drawn = partition("draws", np.zeros(20), 4000, 0, per_client=5)
    counts = np.bincount(np.concatenate([drawn.indices(k) for k in range(4000)]), minlength=20)
    # Each count is binomial with mean 1000 and standard deviation 27; six of them are never exceeded.
    assert abs(counts - 1000).max() < 6 * 27.4


def test_other_samples_and_test_samples_are_divided_by_the_same_rule() -> None:
    drawn = partition("draws", np.zeros(6), 3, 1, per_client=4)
    assert isinstance(drawn, DrawnPartition)
    names = np.array([10, 11, 12, 13, 14, 15])
    assert np.array_equal(drawn.within(names).indices(2), names[drawn.indices(2)])
    assert drawn.of_test(3).indices(0).tolist() == [0, 1, 2]
    assert drawn.sizes.tolist() == [4, 4, 4]
    counts = drawn.class_counts([0, 0, 0, 1, 1, 1], 2)
    assert counts.sum(1).tolist() == [4, 4, 4]
    assert counts[1, 0] == (drawn.indices(1) < 3).sum()


def test_impossible_draws_are_refused() -> None:
    with pytest.raises(ConfigError, match="per_client=7"):
        partition("draws", np.zeros(6), 3, 1, per_client=7)
    with pytest.raises(ConfigError, match="per_client"):
        partition("draws", np.zeros(6), 3, 1, per_client=0)
    with pytest.raises(ConfigError, match="no client 3"):
        partition("draws", np.zeros(6), 3, 1, per_client=2).indices(3)
