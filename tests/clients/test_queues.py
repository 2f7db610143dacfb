"""First in, first out: columns that are filled together, across rounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowerbed.clients.queues import Queue
from flowerbed.clients.rates import scaled
from flowerbed.clients.store import ClientState
from flowerbed.errors import ClientError

CPU = torch.device("cpu")


@given(st.integers(1, 7), st.lists(st.integers(1, 10), max_size=6))
def test_it_holds_the_last_rows_oldest_first_whatever_the_batches(size: int, batches: list[int]) -> None:
    queue, twin, state = Queue.empty(size), [], ClientState()
    start = 0
    for count in batches:
        values = torch.arange(start, start + count)
        queue.push({"a": values.float()[:, None], "b": values})
        twin = (twin + values.tolist())[-size:]
        start += count
        # By way of the state, as into the next round.
        queue.keep(state, "q")
        kept = Queue.kept(state, "q", CPU)
        assert kept is not None
        queue = kept
        rows = queue.rows()
        assert rows["b"].tolist() == twin
        assert torch.equal(rows["a"][:, 0], rows["b"].float())
    assert len(queue) == len(twin)


def test_what_is_read_is_a_copy_and_what_is_pushed_is_no_graph() -> None:
    queue = Queue.empty(2)
    queue.push({"a": torch.ones(2, 3, requires_grad=True)})
    rows = queue.rows()["a"]
    assert not rows.requires_grad
    rows[0] = 9
    assert torch.equal(queue.rows()["a"], torch.ones(2, 3))
    assert Queue.kept({}, "q", CPU) is None


def test_columns_of_different_length_are_refused() -> None:
    queue = Queue.empty(3)
    with pytest.raises(ClientError, match="filled together"):
        queue.push({"a": torch.ones(2), "b": torch.ones(1)})
    queue.push({"a": torch.ones(2)})
    with pytest.raises(ClientError, match="filled together"):
        queue.push({"b": torch.ones(2)})
    with pytest.raises(ClientError, match="remembers nothing"):
        Queue.empty(0)


def test_scaled_gradients_are_a_learning_rate_of_their_own() -> None:
    """Against torch's parameter groups, with momentum and weight decay."""
    torch.manual_seed(0)
    start = {"a": torch.randn(4, dtype=torch.float64), "b": torch.randn(4, dtype=torch.float64)}
    mine = {n: v.clone().requires_grad_() for n, v in start.items()}
    groups = {n: v.clone().requires_grad_() for n, v in start.items()}
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    one = torch.optim.SGD(mine.values(), lr=0.05, **options)
    other = torch.optim.SGD(
        [{"params": [groups["a"]], "lr": 0.05}, {"params": [groups["b"]], "lr": 0.35}], lr=0.05, **options
    )
    for _ in range(5):
        for optimizer, at in ((one, mine), (other, groups)):
            optimizer.zero_grad()
            (at["a"] * at["b"]).square().sum().backward()
        gradients = {n: p.grad for n, p in mine.items() if p.grad is not None}
        for name, gradient in scaled(gradients, mine, {"b": 7.0}, 0.1).items():
            mine[name].grad = gradient
        one.step()
        other.step()
    for name, value in mine.items():
        torch.testing.assert_close(value, groups[name])
