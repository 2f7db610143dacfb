"""Masks on features, and how many of the channels are enough: closed forms and slow twins."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from flowerbed.errors import ConfigError
from flowerbed.models.feature_masks import (
    best_cut,
    correct_by_channels,
    decomposition,
    dropout_mask,
    leading,
    nested_law,
    nested_mask,
)


def test_the_law_of_k_has_no_half_in_its_exponent() -> None:
    law = nested_law(20, 5.0)
    assert float(law.sum()) == pytest.approx(1)
    assert float(law[9] / law[4]) == pytest.approx(torch.tensor(-(100 - 25) / 25.0).exp().item())
    far = nested_law(20, 0.01, mu=-50)
    assert float(far[0]) == pytest.approx(1)
    rng = torch.Generator().manual_seed(0)
    counts = torch.zeros(20)
    for _ in range(4000):
        counts[int(nested_mask(law, rng).sum()) - 1] += 1
    torch.testing.assert_close(counts.double() / 4000, law, rtol=0, atol=0.03)


def test_dropout_is_scaled_and_nested_is_not() -> None:
    rng = torch.Generator().manual_seed(0)
    mask = dropout_mask(400, 50, 0.7, rng)
    assert sorted(mask.unique().tolist()) == pytest.approx([0, 1 / 0.3])
    assert float(mask.mean()) == pytest.approx(1, abs=0.03)
    # Independent for every sample, where a nested mask is one for the batch.
    assert not torch.equal(mask[0], mask[1])
    nested = nested_mask(nested_law(50, 10), rng)
    assert nested.shape == (50,)
    kept = int(nested.sum())
    assert torch.equal(nested, leading(50, kept))
    assert (nested[:kept] == 1).all()
    with pytest.raises(ConfigError, match="p=1"):
        dropout_mask(1, 1, 1.0, rng)


def test_right_answers_for_every_k_are_those_of_trying_each() -> None:
    torch.manual_seed(0)
    z, w = torch.randn(300, 12).relu(), torch.randn(4, 12)
    other = (torch.randn(300, 12).relu(), torch.randn(4, 12))
    y = torch.randint(4, (300,))
    found = correct_by_channels([(z, w), other], y)
    for k in range(1, 13):
        logits = z[:, :k] @ w[:, :k].T + other[0][:, :k] @ other[1][:, :k].T
        assert int(found[k - 1]) == int((logits.argmax(1) == y).sum())


def test_ties_go_to_few_channels_and_k_counts_from_one() -> None:
    assert best_cut(torch.tensor([5, 8, 8, 8]), 10) == 2
    assert best_cut(torch.tensor([0, 0, 0, 9]), 10) == 4
    assert best_cut(torch.zeros(4, dtype=torch.int64), 10) == 1
    # One more right answer of 100,000 does not pay for two more channels.
    assert best_cut(torch.tensor([500, 500, 501]), 100_000) == 1
    assert best_cut(torch.tensor([500, 500, 503]), 100_000) == 3


def test_theorem_one_holds_for_every_sample() -> None:
    """All D masks of a nested network are enumerated; p is any law of the label."""
    torch.manual_seed(0)
    z, w = torch.randn(7, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    law, p = nested_law(9, 3.0), torch.randn(7, 4, dtype=torch.float64).softmax(-1)
    log_q = torch.stack([(z * leading(9, k).double() @ w.T).log_softmax(-1) for k in range(1, 10)])
    bias, variance, entropy = decomposition(log_q, law, p)
    expected = -(law[:, None, None] * p * log_q).sum((0, 2))
    torch.testing.assert_close(bias + variance + entropy, expected)
    # The variance is minus the logarithm of what normalises q~.
    normaliser = (law[:, None, None] * log_q).sum(0).exp().sum(-1)
    torch.testing.assert_close(variance, -normaliser.log())
    assert (bias > 0).all()
    assert (variance > 0).all()
    one = decomposition(log_q[:1], torch.ones(1), F.one_hot(torch.arange(7) % 4, 4).double())
    torch.testing.assert_close(one[0], F.cross_entropy(log_q[0], torch.arange(7) % 4, reduction="none"))
    torch.testing.assert_close(one[1], torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-12)
