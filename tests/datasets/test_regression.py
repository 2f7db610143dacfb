"""Drawn regression: the truth, the ranges, and a seed of its own."""

from __future__ import annotations

import pytest
import torch

from flowerbed.datasets.dataset import Dataset
from flowerbed.datasets.regression import TARGET, relu_teacher, sparse_linear
from flowerbed.datasets.sources import load_dataset
from flowerbed.errors import ConfigError


def test_sparse_targets_are_exactly_those_of_the_inputs_as_they_are_kept() -> None:
    data = sparse_linear(d=20, n=30, test=10, k=3, seed=1)
    for split, size in ((data.train, 30), (data.test, 10)):
        assert split.inputs.shape == (size, 20)
        assert split.extras[TARGET].dtype == torch.float64
        assert torch.equal(split.extras[TARGET], split.inputs.double()[:, :3].sum(1))
    wide = sparse_linear(d=200, n=500, test=1).train.inputs
    assert float(wide.abs().max()) <= 1
    assert float(wide.square().mean()) == pytest.approx(1 / 3, abs=0.005)


def test_teacher_inputs_lie_on_the_sphere_and_targets_are_not_negative() -> None:
    data = relu_teacher(d=25, n=400, test=1, units=10)
    norms = torch.linalg.vector_norm(data.train.inputs, dim=1)
    torch.testing.assert_close(norms, torch.full((400,), 5.0))
    target = data.train.extras[TARGET]
    assert float(target.min()) >= 0
    # Each unit adds E relu(N(0, 1)) = 1 / sqrt(2 pi), for <v, x> is about standard normal.
    assert float(target.mean()) == pytest.approx(10 * 0.399, rel=0.1)


@pytest.mark.parametrize("make", [sparse_linear, relu_teacher])
def test_a_seed_draws_its_own_data_and_the_same_again(make: type) -> None:
    def inputs(seed: int) -> torch.Tensor:
        found = load_dataset(f"flowerbed.datasets.regression:{make.__name__}", d=5, n=3, test=2, seed=seed)
        assert isinstance(found, Dataset)
        return found.train.inputs

    assert torch.equal(inputs(0), inputs(0))
    assert not torch.equal(inputs(0), inputs(1))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="dataset.k is 4"):
        sparse_linear(d=3, n=2, test=1, k=4)
    with pytest.raises(ConfigError, match="dataset.units is 0"):
        relu_teacher(units=0)
    with pytest.raises(ConfigError, match="give at least 1 of each"):
        sparse_linear(d=3, n=2, test=0)
