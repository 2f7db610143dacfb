"""Long tail, labelled split and matched test sets against counts worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowerbed.datasets.partitions import partition
from flowerbed.datasets.subsets import labelled_classes, labelled_split, long_tail, matched_test_partition
from flowerbed.errors import ConfigError


def test_long_tail_has_the_published_class_sizes() -> None:
    labels = np.tile(np.arange(10), 5000)
    # CIFAR-10-LT with factor 100, as the papers print it.
    kept = long_tail(torch.from_numpy(labels), 10, 100, seed=0)
    assert np.bincount(labels[kept]).tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert (np.diff(kept) > 0).all()
    assert not np.array_equal(kept, long_tail(labels, 10, 100, seed=1))
    assert np.array_equal(kept, long_tail(labels, 10, 100, seed=0))
    assert len(long_tail(labels, 10, 1, seed=0)) == len(labels)


@pytest.mark.parametrize(("factor", "message"), [(0.5, "at least 1"), (1000, "at least one")])
def test_long_tail_refuses(factor: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        long_tail(np.tile(np.arange(10), 20), 10, factor, seed=0)
    with pytest.raises(ConfigError, match="class 1, which has 2"):
        long_tail([0] * 9 + [1] * 2 + [2] * 9, 3, 1.5, seed=0)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), fraction=st.floats(0, 1), count=st.integers(1, 80))
def test_labelled_split_is_stratified_and_loses_nothing(seed: int, fraction: float, count: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, 100)
    indices = rng.permutation(100)[:count]
    labelled, unlabelled = labelled_split(labels, indices, seed, fraction=fraction)
    assert sorted([*labelled, *unlabelled]) == sorted(indices)
    assert len(labelled) == round(fraction * count)
    for label in range(5):
        exact = fraction * np.count_nonzero(labels[indices] == label)
        # The rounding of the total moves the quotas by less than one on top of the remainder's.
        assert abs(np.count_nonzero(labels[labelled] == label) - exact) < 2


def test_labelled_split_per_class() -> None:
    labels = np.array([0] * 10 + [1] * 3 + [2] * 10)
    labelled, unlabelled = labelled_split(labels, np.arange(13), 0, per_class=4)
    assert np.bincount(labels[labelled]).tolist() == [4, 3]
    assert len(unlabelled) == 6
    for bad in ({}, {"fraction": 0.1, "per_class": 1}, {"fraction": 1.1}, {"per_class": -1}):
        with pytest.raises(ConfigError):
            labelled_split(labels, np.arange(13), 0, **bad)  # type: ignore[arg-type]


def test_labels_of_some_classes_are_as_many_as_of_all() -> None:
    labels = np.array([0] * 40 + [1] * 30 + [2] * 20 + [3] * 10)
    labelled, unlabelled = labelled_split(labels, np.arange(100), 0, fraction=0.2, classes=[1, 3, 7])
    # 20 of 100, now from the 30 and the 10 samples of two classes; class 7 does not occur.
    assert np.bincount(labels[labelled], minlength=4).tolist() == [0, 15, 0, 5]
    assert len(unlabelled) == 80
    # No more than these classes have.
    labelled, _ = labelled_split(labels, np.arange(100), 0, fraction=0.9, classes=[3])
    assert np.bincount(labels[labelled], minlength=4).tolist() == [0, 0, 0, 10]
    labelled, _ = labelled_split(labels, np.arange(100), 0, per_class=4, classes=[0, 3])
    assert np.bincount(labels[labelled], minlength=4).tolist() == [4, 0, 0, 4]
    assert len(labelled_split(labels, np.arange(100), 0, fraction=0.5, classes=[])[0]) == 0
    # Every class is no restriction, to the last sample.
    for how in ({"fraction": 0.3}, {"per_class": 4}):
        some, all_of_them = (
            labelled_split(labels, np.arange(100), 5, classes=c, **how)[0]
            for c in (range(4), None)  # type: ignore[arg-type]
        )
        assert np.array_equal(some, all_of_them)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), share=st.floats(0.05, 1), clients=st.integers(1, 8))
def test_labelled_classes_are_a_share_of_each_clients_and_cover_what_they_can(
    seed: int, share: float, clients: int
) -> None:
    counts = np.random.default_rng(seed).integers(0, 3, (clients, 6))
    chosen = labelled_classes(counts, share, seed)
    held = counts > 0
    assert not (chosen & ~held).any()
    assert (chosen.sum(axis=1) >= share * held.sum(axis=1) - 1e-6).all()
    assert (chosen.sum(axis=1) < share * held.sum(axis=1) + 1).all()
    assert np.array_equal(chosen, labelled_classes(counts, share, seed))
    if share == 1:
        assert np.array_equal(chosen, held)


def test_two_clients_with_half_of_their_classes_have_labels_of_all() -> None:
    chosen = labelled_classes(np.ones((2, 10)), 0.5, seed=0)
    assert chosen.sum(axis=1).tolist() == [5, 5]
    assert chosen.sum(axis=0).tolist() == [1] * 10
    # Which half is random, and another one for another seed.
    assert not np.array_equal(chosen, labelled_classes(np.ones((2, 10)), 0.5, seed=1))
    # 0.1 of ten classes is one, although 0.1 * 10 may round to a little more.
    assert labelled_classes(np.ones((1, 10)), 0.1, seed=0).sum() == 1
    for share, counts in ((0.0, np.ones((2, 3))), (1.1, np.ones((2, 3))), (0.5, np.ones(3))):
        with pytest.raises(ConfigError, match="share of labelled classes"):
            labelled_classes(counts, share, seed=0)


def test_matched_test_partition_by_hand() -> None:
    train = [[6, 0, 0], [3, 5, 0], [0, 5, 0]]
    labels = torch.tensor([0] * 6 + [1] * 3 + [2] * 4)
    made = matched_test_partition(labels, train, seed=0)
    # Class 0: 6 in the ratio 6:3 -> 4, 2. Class 1: 3 in 5:5 -> 2, 1 (tie to the lower). Class 2: nobody's.
    assert made.class_counts(labels, 3).tolist() == [[4, 0, 0], [2, 2, 0], [0, 1, 0]]
    assert sorted(made.samples.tolist()) == list(range(9))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), alpha=st.sampled_from([0.1, 1.0, 10.0]))
def test_matched_test_partition_keeps_quota_and_conserves(seed: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    train_labels, test_labels = rng.integers(0, 6, 400), rng.integers(0, 6, 90)
    train = partition("dirichlet", train_labels, 7, seed, alpha=alpha, variant="per-client")
    counts = train.class_counts(train_labels, 6)
    made = matched_test_partition(test_labels, counts, seed)
    assert sorted(made.samples.tolist()) == list(range(90))
    exact = counts / counts.sum(axis=0) * np.bincount(test_labels, minlength=6)
    assert abs(made.class_counts(test_labels, 6) - exact).max() < 1


def test_matched_test_partition_refuses_unknown_classes() -> None:
    with pytest.raises(ConfigError, match="cover all test labels"):
        matched_test_partition([0, 1, 2], [[1, 1]], seed=0)
