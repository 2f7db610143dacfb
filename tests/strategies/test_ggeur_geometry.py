"""GGEUR's statistics, shapes, generation and privacy as pure functions, against identities and toy cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowerbed.errors import ClientError
from flowerbed.seeds import numpy_rng
from flowerbed.strategies.ggeur_generation import (
    Balanced,
    ClassKnowledge,
    Rule,
    balanced,
    centres,
    displacements,
)
from flowerbed.strategies.ggeur_geometry import (
    Moments,
    fault,
    from_low_rank,
    guiding,
    low_rank,
    shapes,
    similarity,
    stretched,
    total,
)
from flowerbed.strategies.ggeur_privacy import (
    SENSITIVITY,
    clipped,
    gaussian_delta,
    gaussian_epsilon,
    noised,
)

D, C = 5, 3


def samples(n: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return correlated float64 samples ``(n, D)`` off the origin, and their classes."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=rng, dtype=torch.float64)
    y = torch.arange(n) % C
    return torch.randn(n, D, generator=rng, dtype=torch.float64) @ mix + 3.0 * y[:, None], y


def rotation(seed: int = 1) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(D, D, generator=rng, dtype=torch.float64))[0]


def rebuilt(values: Tensor, vectors: Tensor) -> Tensor:
    return vectors.transpose(-1, -2) @ torch.diag_embed(values) @ vectors


def set_of(
    x: Tensor, y: Tensor, rule: Rule, knowledge: list[ClassKnowledge | None], seed: int = 0
) -> Balanced:
    return balanced(x, y, knowledge, rule, lambda c: numpy_rng(seed, "test", c))


def of_all(x: Tensor, y: Tensor, rank: int = 0) -> list[ClassKnowledge | None]:
    moments = Moments.of(x, y, C)
    values, vectors = shapes(moments.covariance, rank)
    return [ClassKnowledge(values[c], vectors[c], moments.mean[c]) for c in range(C)]


# Statistics.


def test_the_known_answer_in_one_dimension() -> None:
    a = Moments.of(torch.tensor([[0.0], [2.0]]), torch.tensor([0, 0]), 1)
    b = Moments.of(torch.tensor([[6.0]]), torch.tensor([0]), 1)
    assert (a.mean.item(), a.covariance.item(), b.mean.item(), b.covariance.item()) == (1.0, 1.0, 6.0, 0.0)
    both = total([a, b])
    assert both.mean.item() == pytest.approx(8 / 3, rel=1e-12)
    assert both.covariance.item() == pytest.approx(56 / 9, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=60, max_size=60), st.integers(0, 5))
def test_any_split_has_the_covariance_of_the_whole(owners: list[int], seed: int) -> None:
    x, y = samples(seed=seed)
    owner = torch.tensor(owners)
    parts = [Moments.of(x[owner == k], y[owner == k], C) for k in range(4)]
    joined = total(parts)
    for c in range(C):
        own = x[y == c]
        direct = np.cov(own.numpy().T, bias=True)
        scale = np.abs(direct).max()
        assert np.abs(joined.covariance[c].numpy() - direct).max() <= 1e-10 * scale
        # The paper's own form: within the clients plus between their means.
        n, mu = joined.count[c], joined.mean[c]
        between = sum(p.count[c] * torch.outer(p.mean[c] - mu, p.mean[c] - mu) for p in parts)
        within = sum(p.count[c] * p.covariance[c] for p in parts)
        assert float(((within + between) / n - joined.covariance[c]).abs().max()) <= 1e-10 * scale
    assert bool((joined.covariance == joined.covariance.transpose(1, 2)).all())


def test_one_sample_has_no_covariance_and_counts_through_its_mean() -> None:
    x, y = samples(31)
    one, rest = Moments.of(x[:1], y[:1], C), Moments.of(x[1:], y[1:], C)
    assert float(one.covariance.abs().max()) < 1e-12
    torch.testing.assert_close(
        total([one, rest]).covariance, Moments.of(x, y, C).covariance, rtol=1e-10, atol=1e-10
    )
    assert torch.equal(one.mean[1], torch.zeros(D, dtype=torch.float64))


@pytest.mark.parametrize("n", [2, 3, D + 1])
def test_low_rank_statistics_are_exact_up_to_their_rank(n: int) -> None:
    x = samples(n)[0]
    moments = Moments.of(x, torch.zeros(n, dtype=torch.int64), 1)
    again = from_low_rank(low_rank(moments, n - 1))
    for mine, theirs in zip(moments.tensors().values(), again.tensors().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-9)
    # With one direction less something is lost, and never added.
    if n > 2:
        less = from_low_rank(low_rank(moments, n - 2)).covariance[0]
        assert torch.linalg.eigvalsh(moments.covariance[0] - less)[0] > -1e-9
        assert float(less.trace()) < float(moments.covariance[0].trace()) - 1e-6


def test_statistics_that_no_data_have_are_found() -> None:
    x, y = samples()
    good = Moments.of(x, y, C)
    assert fault(good) is None
    assert fault(Moments.of(x[:2], y[:2], C)) is None, "singular and empty classes are honest"
    negative = Moments(good.count, good.sum, good.outer.clone())
    negative.outer[1, 0] -= 2 * good.outer[1, 0]
    assert fault(negative) == (1, "its covariance is not positive semi-definite")
    # A mean that is too large for the second moment.
    shifted = Moments(good.count, good.sum * 3, good.outer)
    assert fault(shifted) is not None
    half = Moments(good.count + torch.tensor([0.0, 0.0, 0.5]), good.sum, good.outer)
    found = fault(half)
    assert found is not None
    assert found[0] == 2
    nobody = Moments(torch.zeros(C), good.sum, good.outer)
    found = fault(nobody)
    assert found is not None
    assert "without samples" in found[1]


def test_guiding_clients_are_the_shortest_prefix() -> None:
    counts = torch.tensor([[10.0, 0.0], [60.0, 5.0], [30.0, 5.0]]).double()
    assert guiding(counts, 0.8).T.tolist() == [[False, True, True], [False, True, True]]
    assert guiding(counts, 0.6).T.tolist() == [[False, True, False], [False, True, True]]
    assert guiding(counts, 1.0).T.tolist() == [[True, True, True], [False, True, True]]


# Shapes.


def test_shapes_rebuild_the_covariance_and_keep_their_order() -> None:
    covariance = Moments.of(*samples(), C).covariance
    values, vectors = shapes(covariance)
    torch.testing.assert_close(rebuilt(values, vectors), covariance, rtol=1e-10, atol=1e-10)
    assert bool((values.diff(dim=1) <= 0).all())
    torch.testing.assert_close(vectors @ vectors.transpose(1, 2), torch.eye(D).double().expand(C, D, D))
    few, leading = shapes(covariance, 2)
    assert torch.equal(few, values[:, :2])
    assert torch.equal(leading, vectors[:, :2])
    assert float(shapes(-covariance)[0].max()) == 0.0, "negative eigenvalues are clipped"


def test_similarity_of_shapes() -> None:
    _, vectors = shapes(Moments.of(*samples(), C).covariance)
    assert similarity(vectors[0, :3], vectors[0, :3]) == pytest.approx(3.0)
    assert similarity(vectors[0, :3], -vectors[0, :3]) == pytest.approx(3.0)
    assert similarity(vectors[0, :1], vectors[0, 1:2]) == pytest.approx(0.0, abs=1e-12)


def test_stretching() -> None:
    values = torch.tensor([[8.0, 4.0, 2.0, 1.0]])
    assert stretched(values, "none").tolist() == values.tolist()
    assert stretched(values, "top", 3).tolist() == [[40.0, 12.0, 2.0, 1.0]]
    # As released: ascending order, so that the smallest gets the five.
    assert stretched(values, "bottom", 3).tolist() == [[8.0, 4.0, 6.0, 5.0]]


# Generation.


@pytest.mark.parametrize("spread", ["sqrt", "lambda"])
def test_the_covariance_of_generated_points(spread: str) -> None:
    covariance = Moments.of(*samples(), C).covariance
    values, vectors = shapes(covariance)
    n = 100_000
    eps = torch.from_numpy(np.random.default_rng(3).standard_normal((n, D)))
    beta = displacements(values[0], vectors[0], eps, spread)
    wanted = covariance[0] if spread == "sqrt" else covariance[0] @ covariance[0]
    found = beta.T @ beta / n
    error = ((wanted.square() + torch.outer(wanted.diag(), wanted.diag())) / n).sqrt()
    assert float(((found - wanted).abs() / error).max()) < 4.0
    assert float((beta.mean(0).abs() / (wanted.diag() / n).sqrt()).max()) < 4.0


@pytest.mark.parametrize("spread", ["sqrt", "lambda"])
def test_rotating_the_embeddings_rotates_what_is_generated(spread: str) -> None:
    x, y = samples()
    q = rotation()
    values, vectors = shapes(Moments.of(x, y, C).covariance)
    turned, theirs = shapes(Moments.of(x @ q.T, y, C).covariance)
    torch.testing.assert_close(turned, values, rtol=1e-9, atol=1e-9)
    # An eigenvector is one up to its sign, and eps up to its.
    expected = vectors @ q.T
    sign = (expected * theirs).sum(2, keepdim=True).sign()
    torch.testing.assert_close(theirs * sign, expected, rtol=1e-7, atol=1e-7)
    eps = torch.randn(7, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mine = displacements(values[0], vectors[0], eps, spread)
    other = displacements(turned[0], theirs[0], eps * sign[0].T, spread)
    torch.testing.assert_close(mine @ q.T, other, rtol=1e-7, atol=1e-7)


def test_scaling_the_embeddings_commutes_with_the_square_root_alone() -> None:
    x, y = samples()
    eps = torch.randn(7, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values, vectors = shapes(Moments.of(x, y, C).covariance)
    larger, same = shapes(Moments.of(10 * x, y, C).covariance)
    once = displacements(values[0], vectors[0], eps, "sqrt")
    torch.testing.assert_close(
        displacements(larger[0], same[0], eps, "sqrt"), 10 * once, rtol=1e-7, atol=1e-7
    )
    once = displacements(values[0], vectors[0], eps, "lambda")
    torch.testing.assert_close(
        displacements(larger[0], same[0], eps, "lambda"), 100 * once, rtol=1e-7, atol=1e-7
    )


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.sampled_from(["sample", "duplicate", "global_mean", "domains"])
)
def test_every_class_with_a_centre_has_exactly_t(n: int, t: int, centre: str) -> None:
    x, y = samples(n)
    knowledge = of_all(*samples())
    made = set_of(x, y, Rule(t, centre, "sqrt", 4), knowledge)
    labels = torch.cat([y[made.rows], made.y])
    counts = torch.bincount(labels, minlength=C).tolist()
    for c in range(C):
        held = int((y == c).sum())
        assert counts[c] == (t if held or centre == "global_mean" else 0)
        if held <= t:
            assert int((y[made.rows] == c).sum()) == held, "originals stay"
    assert bool((made.rows.diff() > 0).all())
    assert made.x.shape == (len(made.y), D)


def test_the_seed_decides_the_set() -> None:
    x, y = samples(10)
    rule, knowledge = Rule(20, "sample", "sqrt", 4), of_all(*samples())
    one, same, other = (set_of(x, y, rule, knowledge, seed) for seed in (1, 1, 2))
    assert torch.equal(one.x, same.x)
    assert not torch.equal(one.x, other.x)


def test_generated_points_are_around_what_the_rule_says() -> None:
    x, y = samples(3)
    still = [ClassKnowledge(torch.zeros(D).double(), torch.eye(D).double(), torch.full((D,), 7.0).double(),
                            torch.tensor([[1.0] * D, [2.0] * D]).double()) for _ in range(C)]  # fmt: skip
    around = set_of(x, y, Rule(9, "sample", "sqrt", 4), list(still))
    assert torch.equal(around.x, x[around.y]), "with no spread there is one original a class to repeat"
    repeated = set_of(x, y, Rule(9, "duplicate", "sqrt", 4), [None] * C)
    assert torch.equal(repeated.x, around.x)
    assert bool((set_of(x, y, Rule(9, "global_mean", "sqrt", 4), list(still)).x == 7.0).all())
    of_others = set_of(x, y, Rule(9, "prototype", "sqrt", 4), list(still)).x
    assert set(of_others.unique().tolist()) == {1.0, 2.0}
    mixed = set_of(x, y, Rule(13, "domains", "sqrt", 4), list(still))
    for c in range(C):
        # Pools of four around the own sample and each of two prototypes, all twelve of them drawn.
        mine = mixed.x[mixed.y == c][:, 0]
        assert int((mine == 1.0).sum()) == int((mine == 2.0).sum()) == 4
    without = set_of(x[1:], y[1:], Rule(9, "domains", "sqrt", 4), list(still))
    assert torch.bincount(torch.cat([y[1:][without.rows], without.y])).tolist() == [9, 9, 9]
    nobody = [
        ClassKnowledge(k.values, k.vectors, k.mean, k.prototypes[:0])
        for k in still
        if k.prototypes is not None
    ]
    assert set(set_of(x[1:], y[1:], Rule(9, "domains", "sqrt", 4), list(nobody)).y.tolist()) == {1, 2}


def test_a_class_without_shapes_is_an_error() -> None:
    with pytest.raises(ClientError, match="no shapes"):
        set_of(*samples(3), Rule(9, "sample", "sqrt", 4), [None] * C)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 60), st.integers(1, 100))
def test_centres_are_distinct_while_they_can_be(n: int, points: int, batch: int) -> None:
    found = centres(n, points, batch, np.random.default_rng(0))
    assert len(found) == points
    assert found.min() >= 0
    assert found.max() < n
    if points <= n:
        assert len(set(found.tolist())) == points
    else:
        assert np.bincount(found).max() <= max(batch, points)


def test_centres_are_fair() -> None:
    found = np.concatenate([centres(3, 30, 30, np.random.default_rng(s)) for s in range(300)])
    shares = np.bincount(found) / len(found)
    assert np.abs(shares - 1 / 3).max() < 0.02


# Privacy.


def test_clipping_bounds_the_norm_and_leaves_the_rest() -> None:
    x = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    torch.testing.assert_close(clipped(x, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=D, max_size=D), st.floats(0.1, 3.0))
def test_one_sample_moves_the_sums_by_at_most_the_sensitivity(row: list[float], bound: float) -> None:
    x = clipped(torch.tensor([row], dtype=torch.float64), bound)
    moments = Moments.of(x, torch.tensor([1]), C)
    units = (moments.count, moments.sum / bound, moments.outer / bound**2)
    assert math.sqrt(sum(float(u.square().sum()) for u in units)) <= SENSITIVITY + 1e-9


def test_noise_has_the_stated_deviations() -> None:
    nothing = Moments(
        torch.zeros(400).double(), torch.zeros(400, 20).double(), torch.zeros(400, 210).double()
    )
    made = noised(nothing, 0.7, 2.0, torch.Generator().manual_seed(0))
    for value, unit in ((made.count, 1.0), (made.sum, 2.0), (made.outer, 4.0)):
        assert float(value.std()) == pytest.approx(0.7 * SENSITIVITY * unit, rel=0.15)


def test_epsilon_of_the_gaussian_mechanism() -> None:
    # Independent oracle: delta is the hockey-stick divergence of N(1/z, 1) from N(0, 1), integrated on a grid.
    z, epsilon = 1.3, 0.8
    grid = np.linspace(-12, 12, 400_001)
    p, q = np.exp(-((grid - 1 / z) ** 2) / 2), np.exp(-(grid**2) / 2)
    delta = np.maximum(p - math.exp(epsilon) * q, 0).sum() * (grid[1] - grid[0]) / math.sqrt(2 * math.pi)
    assert gaussian_delta(epsilon, z) == pytest.approx(delta, rel=1e-6)
    assert gaussian_epsilon(gaussian_delta(epsilon, z), z) == pytest.approx(epsilon, rel=1e-6)
    assert gaussian_epsilon(1e-5, 0.05) > gaussian_epsilon(1e-5, 1.0) > gaussian_epsilon(1e-5, 10.0) > 0
    assert gaussian_epsilon(1e-5, 0.0) == math.inf
