"""Which samples networks choose for each other."""

from __future__ import annotations

import torch

from flowerbed.clients.co_teaching import halves, remembered, small_loss


def test_forgetting_keeps_whole_numbers_and_halves_do_not_overlap() -> None:
    assert [remembered(n, r) for n, r in ((10, 0.3), (64, 0.5), (7, 0.5), (1, 0.9), (10, 0.0))] == [
        7,
        32,
        3,
        1,
        10,
    ]
    assert small_loss(torch.tensor([3.0, 1.0, 2.0, 0.5]), 0.5).tolist() == [3, 1]
    one, other = halves(7)
    assert [one.tolist(), other.tolist()] == [[0, 1, 2], [3, 4, 5]]
    assert [h.tolist() for h in halves(1)] == [[0], [0]]
