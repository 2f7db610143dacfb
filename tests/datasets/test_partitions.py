"""Partitions: properties that every rule keeps, and each rule against what its paper says."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowerbed.datasets.partitioners import (
    Dirichlet,
    DirichletFloor,
    Domain,
    Iid,
    Pathological,
    Quantity,
    Shards,
    largest_remainder,
)
from flowerbed.datasets.partitions import PARTITIONS, Partition, partition
from flowerbed.errors import ConfigError

BALANCED = np.tile(np.arange(10), 100)

RULES: list[Any] = [
    Iid(),
    Dirichlet(alpha=5.0),
    Dirichlet(alpha=5.0, variant="per-class-balanced"),
    Dirichlet(alpha=0.05, variant="per-client"),
    DirichletFloor(alpha=0.05),
    Shards(),
    Shards(per_client=3),
    Pathological(classes_per_client=3),
    Pathological(classes_per_client=2, assignment="deterministic"),
    Quantity(),
    Quantity(profile="exponential", strength=50.0),
    Quantity(profile="dirichlet", strength=0.3, min_size=2),
    Domain(),
    Domain(allocation="proportional"),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_every_rule_conserves_samples_serves_all_and_is_pure(rule: Any, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**40), label="seed")
    rng = np.random.default_rng(seed)
    classes = data.draw(st.integers(3, 8), label="classes")
    clients = data.draw(st.integers(8, 14), label="clients")
    # Gaps in the labels and unequal classes, but enough of each for the class-wise rules.
    labels = rng.permutation(np.repeat(np.arange(classes) * 2, rng.integers(40, 80, classes)))
    domains = rng.permutation(np.arange(len(labels)) % 5)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    python_state, numpy_state = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]

    first = partition(rule, torch.from_numpy(labels), clients, seed, domains)

    assert random.getstate() == python_state
    assert np.random.get_state()[1].tolist() == numpy_state  # type: ignore[index, union-attr]
    assert first.num_clients == clients
    assert sorted(first.samples.tolist()) == list(range(len(labels)))
    assert first.sizes.min() >= getattr(rule, "min_size", 1)
    np.random.seed(0)
    again = partition(rule, labels, clients, seed, domains)
    assert np.array_equal(first.samples, again.samples)
    assert np.array_equal(first.offsets, again.offsets)


@pytest.mark.parametrize("rule", [rule for rule in RULES if not isinstance(rule, Domain)], ids=str)
def test_the_seed_matters(rule: Any) -> None:
    results = [partition(rule, BALANCED, 10, seed).samples.tolist() for seed in (0, 1)]
    assert results[0] != results[1]


def test_partition_views_and_class_counts() -> None:
    made = Partition.from_owners([1, 0, 1, -1, 1], 3)
    assert [made.indices(client).tolist() for client in range(3)] == [[1], [0, 2, 4], []]
    assert made.sizes.tolist() == [1, 3, 0]
    assert made.class_counts(torch.tensor([0, 1, 0, 1, 1]), 2).tolist() == [[0, 1], [2, 1], [0, 0]]
    assert made.indices(1).base is not None
    with pytest.raises(ValueError, match="read-only"):
        made.indices(1)[0] = 5
    with pytest.raises(ConfigError, match=r"no client 3; clients are 0\.\.2"):
        made.indices(3)
    with pytest.raises(ConfigError, match="Owners"):
        Partition.from_owners([0, 3], 3)
    copy = pickle.loads(pickle.dumps(made))
    assert np.array_equal(copy.samples, made.samples)


def test_a_million_clients_are_two_arrays() -> None:
    made = partition("iid", np.zeros(1_000_003, dtype=np.int64), 1_000_000, seed=3)
    assert np.bincount(made.sizes).tolist() == [0, 999_997, 3]
    buffers: list[pickle.PickleBuffer] = []
    assert len(pickle.dumps(made, protocol=5, buffer_callback=buffers.append)) < 1000
    assert len(buffers) == 2


def test_iid_matches_the_overall_distribution() -> None:
    counts = partition("iid", BALANCED, 4, seed=0).class_counts(BALANCED, 10)
    assert counts.sum(axis=1).tolist() == [250] * 4
    # Hypergeometric: mean 25, standard deviation sqrt(250 * .1 * .9 * 750/999) = 4.1
    assert abs(counts - 25).max() < 5 * 4.1


@pytest.mark.parametrize("variant", ["per-class", "per-class-balanced", "per-client"])
def test_dirichlet_alpha_sets_the_skew(variant: Any) -> None:
    def skew(alpha: float) -> float:
        made = partition("dirichlet", BALANCED, 10, 1, alpha=alpha, variant=variant)
        counts = made.class_counts(BALANCED, 10)
        return float((counts.max(axis=1) / counts.sum(axis=1)).mean())

    # The largest class of a client: about 1/10 where alpha is large, most of it where alpha is small.
    assert skew(1000.0) < 0.2
    assert skew(0.1) > 0.4


def test_dirichlet_per_class_follows_the_beta_law() -> None:
    """Yurochkin: a client's share of a class is Beta(alpha, (K - 1) alpha), so its variance is known."""
    labels = np.repeat(np.arange(3), 2000)
    clients, alpha = 4, 2.0
    shares = np.concatenate(
        [
            partition("dirichlet", labels, clients, seed, alpha=alpha).class_counts(labels, 3).ravel() / 2000
            for seed in range(25)
        ]
    )
    expected = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    assert shares.mean() == pytest.approx(1 / clients)
    assert shares.var() == pytest.approx(expected, rel=0.25)


def test_dirichlet_balanced_stops_serving_full_clients() -> None:
    rule = Dirichlet(alpha=0.3, variant="per-class-balanced")
    made = partition(rule, BALANCED, 5, seed=4)
    counts = made.class_counts(BALANCED, 10)
    before = np.cumsum(counts, axis=1) - counts
    # A client above the average N/K gets nothing of later classes (one sample of rounding apart).
    assert counts[before > len(BALANCED) / 5].max(initial=0) <= 1


def test_dirichlet_per_client_has_equal_sizes_and_follows_the_prior() -> None:
    labels = np.repeat([0, 1, 2], [600, 300, 103])
    made = partition("dirichlet", labels, 10, 2, variant="per-client", alpha=1e6)
    assert sorted(made.sizes.tolist()) == [100] * 7 + [101] * 3
    # With a huge alpha every mixture is the prior (.598, .299, .103); three standard deviations: 15.
    assert abs(made.class_counts(labels, 3)[:, 0] - 60).max() <= 16


def slow_per_client(
    mixtures: np.ndarray, sizes: list[int], available: list[int], rng: np.random.Generator
) -> list[list[int]]:
    """Hsu et al. one sample at a time: draw a class from the mixture, renormalised when one is exhausted."""
    left, result = list(available), []
    for mixture, size in zip(mixtures, sizes):
        counts = [0] * len(available)
        for _ in range(size):
            weights = np.where(np.array(left) > 0, mixture, 0.0)
            drawn = rng.choice(len(left), p=weights / weights.sum())
            left[drawn] -= 1
            counts[drawn] += 1
        result.append(counts)
    return result


def test_dirichlet_per_client_has_the_distribution_of_drawing_one_by_one() -> None:
    labels = np.repeat([0, 1, 2], [8, 8, 14])
    fast = np.zeros((2, 3))
    slow = np.zeros((2, 3))
    rng = np.random.default_rng(0)
    runs = 3000
    concentration = 1.5 * 3 * np.array([8, 8, 14]) / 30
    for seed in range(runs):
        counts = partition("dirichlet", labels, 2, seed, alpha=1.5, variant="per-client").class_counts(
            labels, 3
        )
        fast += np.sort(counts, axis=0)  # which client goes first is random: compare order statistics
        mixtures = rng.dirichlet(concentration, size=2)
        slow += np.sort(np.array(slow_per_client(mixtures, [15, 15], [8, 8, 14], rng)), axis=0)
    assert abs(fast - slow).max() / runs < 0.2


def test_shards_are_consecutive_blocks_of_the_sorted_labels() -> None:
    made = partition("shards", BALANCED, 50, seed=1, per_client=2)
    assert made.sizes.tolist() == [20] * 50
    counts = made.class_counts(BALANCED, 10)
    # 100 shards of 10 samples, 10 per class: each client has two shards of a single class each.
    assert set(counts.ravel().tolist()) == {0, 10, 20}
    assert ((counts > 0).sum(axis=1) <= 2).all()


def test_shards_keep_the_remainder() -> None:
    made = partition("shards", np.arange(103) % 7, 10, seed=0)
    assert len(made.samples) == 103
    assert set(made.sizes.tolist()) <= {10, 11, 12}


def test_pathological_gives_exactly_k_classes() -> None:
    counts = partition("pathological", BALANCED, 20, 3, classes_per_client=3).class_counts(BALANCED, 10)
    assert ((counts > 0).sum(axis=1) == 3).all()
    assert (counts[np.arange(20), np.arange(20) % 10] > 0).all()
    for column in counts.T:
        held = column[column > 0]
        assert held.max() - held.min() <= 1
    fixed = partition(Pathological(2, "deterministic"), BALANCED, 10, 0).class_counts(BALANCED, 10)
    expected = [
        [50 if label in (client, (client + 1) % 10) else 0 for label in range(10)] for client in range(10)
    ]
    assert fixed.tolist() == expected


def test_quantity_profiles() -> None:
    labels = np.zeros(1000, dtype=np.int64)
    assert partition("quantity", labels, 4, 0, strength=0.0).sizes.tolist() == [250] * 4
    # 1 + shares of 996 in the proportions 1:2:3:4
    linear = 1 + largest_remainder([1, 2, 3, 4], 996)
    assert partition("quantity", labels, 4, 0).sizes.tolist() == linear.tolist()
    steep = partition("quantity", labels, 100, 0, profile="exponential", strength=1000.0).sizes
    assert (np.diff(steep) >= 0).all()
    assert steep[0] == 1
    assert steep[-1] > 50
    assert partition("quantity", labels, 1, 0, profile="exponential").sizes.tolist() == [1000]
    drawn = [partition("quantity", labels, 10, 0, profile="dirichlet", strength=s).sizes for s in (0.1, 1e4)]
    assert drawn[0].max() > 3 * drawn[1].max()


def test_domain_never_mixes_and_splits_evenly() -> None:
    domains = np.repeat([0, 1, 2], [10, 60, 30])
    labels = np.zeros(100, dtype=np.int64)
    for rule, sizes in [
        (Domain(), [5, 5, 30, 30, 15, 15]),
        (Domain("proportional"), [10, 20, 20, 20, 15, 15]),
    ]:
        made = partition(rule, labels, 6, 0, domains)
        assert made.sizes.tolist() == sizes
        assert all(len(set(domains[made.indices(client)])) == 1 for client in range(6))
    assert partition("domain", labels, 3, 0, domains).sizes.tolist() == [10, 60, 30]


@pytest.mark.parametrize(
    ("rule", "options", "clients", "message"),
    [
        ("dirichlet", {"alpha": 0}, 2, "alpha above 0"),
        ("dirichlet", {"alpha": float("nan")}, 2, "alpha above 0"),
        ("dirichlet", {"variant": "hsu"}, 2, "per-client"),
        ("dirichlet", {"min_size": 60}, 2, "Lower min_size"),
        ("dirichlet", {"alpha": 0.001}, 40, "Raise alpha"),
        ("dirichlet", {"beta": 1}, 2, "Known: alpha, variant, min_size"),
        ("iid", {}, 101, "use fewer clients"),
        ("iid", {}, 0, "at least one client"),
        ("shards", {"per_client": 60}, 2, "lower shards per_client"),
        ("shards", {"per_client": 0}, 2, "at least 1"),
        ("pathological", {"classes_per_client": 11}, 20, "more than the 10 classes"),
        ("pathological", {"classes_per_client": 2}, 3, "without a client"),
        ("pathological", {"classes_per_client": 10}, 50, "Use fewer clients"),
        ("pathological", {"assignment": "random"}, 20, "first-deterministic"),
        ("quantity", {"profile": "exponential", "strength": 0.5}, 2, "at least 1"),
        ("quantity", {"profile": "dirichlet", "strength": 0.0}, 2, "above 0"),
        ("quantity", {"min_size": 51}, 2, "Lower min_size"),
        ("domain", {}, 2, "needs a data set with domains"),
        ("dirichle", {}, 2, "Did you mean 'dirichlet'"),
    ],
)
def test_impossible_requests_name_the_remedy(
    rule: str, options: dict[str, Any], clients: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        partition(rule, np.arange(100) % 10, clients, 0, **options)


def test_domain_errors() -> None:
    labels = np.zeros(10, dtype=np.int64)
    with pytest.raises(ConfigError, match="at least 5 clients"):
        partition("domain", labels, 4, 0, np.arange(10) % 5)
    with pytest.raises(ConfigError, match="allocation='proportional'"):
        partition("domain", labels, 6, 0, [0] + [1] * 9)
    assert partition("domain", labels, 6, 0, [0] + [1] * 9, allocation="proportional").sizes.min() == 1
    with pytest.raises(ConfigError, match="10 samples but domains"):
        partition("domain", labels, 2, 0, [0, 1])


def test_next_token_labels_suit_only_rules_that_ignore_labels() -> None:
    labels = np.zeros((20, 5), dtype=np.int64)
    assert partition("iid", labels, 4, 0).sizes.tolist() == [5] * 4
    for rule in ("dirichlet", "shards", "pathological"):
        with pytest.raises(ConfigError, match="use iid, quantity or domain"):
            partition(rule, labels, 4, 0)


def test_a_users_own_rule_is_held_to_the_contract() -> None:
    class Careless:
        def owners(self, labels: Any, num_clients: int, seed: int, domains: Any) -> Any:
            return np.zeros(len(labels), dtype=np.int64)

    with pytest.raises(ConfigError, match="at least one sample for every client"):
        partition(Careless(), BALANCED, 2, 0)
    with pytest.raises(ConfigError, match="already has its own"):
        partition(Iid(), BALANCED, 2, 0, alpha=1)
    assert set(PARTITIONS.names()) == {
        *("iid", "dirichlet", "dirichlet_floor", "shards", "pathological", "quantity", "domain", "draws"),
    }


@given(
    weights=st.lists(st.integers(0, 1000), min_size=1, max_size=30).filter(any), total=st.integers(0, 5000)
)
def test_largest_remainder_keeps_the_quota(weights: list[int], total: int) -> None:
    shares = largest_remainder(weights, total)
    assert shares.sum() == total
    # Hamilton's method: each share is its exact quota rounded down or up, and nothing for nothing.
    for weight, share in zip(weights, shares.tolist()):
        assert weight * total // sum(weights) <= share <= -(-weight * total // sum(weights))
