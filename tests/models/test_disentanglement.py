"""InfoMEC against hand-worked codes, closed forms and scikit-learn's estimators."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import digamma
from sklearn.feature_selection import mutual_info_classif
from sklearn.metrics import mutual_info_score

from flowerbed.models.disentanglement import (
    active_latents,
    binned,
    counted_information,
    explicitness,
    infomec,
    neighbour_information,
    normalised_information,
    one_hot,
    standardised,
)

RNG = np.random.default_rng(0)
GRID = np.stack(np.meshgrid(np.arange(4), np.arange(3), np.arange(5), indexing="ij"), -1).reshape(-1, 3)
FACTORS = np.tile(GRID, (20, 1))


def test_sources_as_latents_are_a_perfect_code() -> None:
    found = infomec(FACTORS, FACTORS)
    assert found.modularity == pytest.approx(1, abs=1e-9)
    assert found.compactness == pytest.approx(1, abs=1e-9)
    assert found.explicitness == pytest.approx(1, abs=0.01)
    np.testing.assert_allclose(found.nmi, np.eye(3), atol=1e-12)


def test_several_latents_for_a_factor_cost_compactness_alone() -> None:
    found = infomec(np.concatenate([FACTORS, FACTORS], 1), FACTORS)
    assert found.modularity == pytest.approx(1, abs=1e-9)
    # Two equal latents among six: (1/2 - 1/6) / (1 - 1/6).
    assert found.compactness == pytest.approx(0.4, abs=1e-9)


def test_a_latent_of_two_factors_costs_modularity() -> None:
    """One code for the pair of two fair bits, one for a third bit: shares 1/2 and 1."""
    bits = np.tile(np.stack(np.meshgrid(*[np.arange(2)] * 3, indexing="ij"), -1).reshape(-1, 3), (50, 1))
    found = infomec(np.stack([2 * bits[:, 0] + bits[:, 1], bits[:, 2]], 1), bits)
    assert found.modularity == pytest.approx((0.75 - 1 / 3) / (1 - 1 / 3), abs=1e-9)
    assert found.compactness == pytest.approx(1, abs=1e-9)
    assert found.explicitness == pytest.approx(1, abs=0.01)


def test_random_latents_have_no_explicitness_and_a_rotation_keeps_it() -> None:
    noise = infomec(RNG.normal(size=(len(FACTORS), 4)), FACTORS)
    assert noise.explicitness < 0.03
    numbers = FACTORS + 0.01 * RNG.normal(size=FACTORS.shape)
    turn = np.linalg.qr(RNG.normal(size=(3, 3)))[0]
    plain, turned = infomec(numbers, FACTORS), infomec(standardised(numbers) @ turn, FACTORS)
    assert plain.modularity > 0.95
    assert turned.modularity < 0.5
    assert turned.explicitness == pytest.approx(plain.explicitness, abs=0.02)


def test_random_codes_have_no_modularity_where_factors_have_equal_sizes() -> None:
    factors = RNG.integers(0, 4, (200_000, 3))
    # In the limit every share is a random third-of-noise; averaged over many latents it stays well below a code's.
    assert infomec(RNG.integers(0, 10, (len(factors), 8)), factors).modularity < 0.3
    assert normalised_information(RNG.integers(0, 10, (len(factors), 1)), factors).max() < 1e-3


def test_the_counted_information_is_scikit_learns_and_the_entropy_of_a_column_with_itself() -> None:
    a, b = RNG.integers(0, 5, 300), RNG.integers(3, 9, 300)
    b = np.where(RNG.random(300) < 0.4, a, b)
    assert counted_information(a, b) == pytest.approx(mutual_info_score(a, b), abs=1e-12)
    assert counted_information(np.arange(8) % 4, np.arange(8) % 4) == pytest.approx(math.log(4))


@pytest.mark.parametrize("n", [60, 300])
def test_the_neighbours_information_is_that_of_counting_by_hand(n: int) -> None:
    """Also with a class of one sample, which is left out, and one smaller than the number of neighbours."""
    source = RNG.integers(0, 4, n)
    source[0], source[1:6] = 9, 8
    z = standardised(source[:, None] + RNG.normal(size=(n, 3)) * np.array([0.1, 1.0, 10.0]))
    mine = [neighbour_information(column, source) for column in z.T]
    by_hand = [max(0.0, counted_by_hand(column[1:], source[1:])) for column in z.T]
    np.testing.assert_allclose(mine, by_hand, atol=1e-9)


def test_the_neighbours_information_is_scikit_learns() -> None:
    """To 0.01 nats: rounding makes the latter count the k-th neighbour itself now and then."""
    source = RNG.integers(0, 4, 800)
    z = standardised(source[:, None] + RNG.normal(size=(800, 3)) * np.array([0.1, 1.0, 10.0]))
    expected = mutual_info_classif(z, source, discrete_features=False, n_neighbors=10, random_state=0)
    np.testing.assert_allclose([neighbour_information(c, source) for c in z.T], expected, atol=0.01)


def counted_by_hand(z: np.ndarray, source: np.ndarray) -> float:
    terms = []
    for i in range(len(z)):
        same = np.sort(np.abs(z[source == source[i]] - z[i]))
        k = min(10, len(same) - 1)
        others = np.delete(np.abs(z - z[i]), i)
        within = 1 + (others < same[k] - 1e-12).sum()
        terms.append(digamma(k) - digamma(len(same)) - digamma(within))
    return float(digamma(len(z)) + np.mean(terms))


def test_latents_that_do_not_vary_are_pruned() -> None:
    codes = np.stack([FACTORS[:, 0], np.full(len(FACTORS), 7)], 1)
    assert active_latents(codes).tolist() == [True, False]
    assert infomec(codes, FACTORS).nmi.shape == (3, 1)
    numbers = np.array([[0.0, 0.0, 1.0], [1.0, 0.05, 1.06]])
    assert active_latents(numbers).tolist() == [True, False, True]


def test_nothing_known_is_nothing_won() -> None:
    dead = infomec(np.zeros((len(FACTORS), 3), dtype=np.int64), FACTORS)
    assert (dead.modularity, dead.explicitness, dead.compactness) == (0, 0, 0)
    assert explicitness(np.zeros((len(FACTORS), 2)), FACTORS) == pytest.approx(0, abs=1e-6)


def test_bins_and_one_hot_columns() -> None:
    assert binned(np.array([[0.0], [0.09], [0.1], [0.95], [1.0]])).ravel().tolist() == [0, 0, 1, 9, 9]
    assert binned(np.full((3, 1), 2.0)).ravel().tolist() == [0, 0, 0]
    assert one_hot(np.array([[3, 0], [5, 0]])).tolist() == [[1, 0, 1], [0, 1, 1]]
