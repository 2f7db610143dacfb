"""Losses and counts against hand-worked values, and that counts add up."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from flowerbed.errors import ConfigError
from flowerbed.models.tasks import Classification, NextToken, Task, task_for


def test_classification_by_hand() -> None:
    task = Classification(3)
    # Softmax of (ln 2, 0, 0) is (1/2, 1/4, 1/4).
    outputs = torch.tensor([[math.log(2.0), 0.0, 0.0]] * 3 + [[0.0, 0.0, math.log(2.0)]])
    labels = torch.tensor([0, 1, 0, 2])
    expected = torch.tensor([2.0, 4.0, 2.0, 2.0]).log()
    torch.testing.assert_close(task.loss(outputs, labels), expected)
    counts = task.counts(outputs, labels)
    assert counts["loss_sum"].item() == pytest.approx(math.log(32.0), rel=1e-6)
    assert counts["correct"].tolist() == [2, 0, 1]
    assert counts["total"].tolist() == [2, 1, 1]
    assert counts["loss_sum"].dtype == torch.float64
    assert counts["correct"].dtype == counts["total"].dtype == torch.int64


def test_next_token_by_hand() -> None:
    task = NextToken(2)
    # Odds 3:1 for token 0 at position 0, for token 1 at position 1.
    one = [[math.log(3.0), 0.0], [0.0, math.log(3.0)]]
    outputs = torch.tensor([one, one])
    labels = torch.tensor([[0, 1], [0, 0]])
    first, second = math.log(4 / 3), (math.log(4 / 3) + math.log(4)) / 2
    torch.testing.assert_close(task.loss(outputs, labels), torch.tensor([first, second]))
    counts = task.counts(outputs, labels)
    assert counts["loss_sum"].item() == pytest.approx(2 * first + 2 * second, rel=1e-6)
    assert counts["correct"].tolist() == [2, 1]
    assert counts["total"].tolist() == [3, 1]


@pytest.mark.parametrize("positions", [(), (4,)])
@given(
    cut=st.integers(0, 7), seed=st.integers(0, 2**32 - 1), classes=st.integers(1, 5), scale=st.floats(0, 50)
)
def test_counts_add_up(positions: tuple[int, ...], cut: int, seed: int, classes: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    task: Task = NextToken(classes) if positions else Classification(classes)
    outputs = scale * torch.randn(7, *positions, classes, generator=generator)
    labels = torch.randint(classes, (7, *positions), generator=generator)
    whole = task.counts(outputs, labels)
    parts = [task.counts(outputs[rows], labels[rows]) for rows in (slice(cut), slice(cut, None))]
    for name in ("correct", "total"):
        assert torch.equal(parts[0][name] + parts[1][name], whole[name])
    torch.testing.assert_close(parts[0]["loss_sum"] + parts[1]["loss_sum"], whole["loss_sum"])
    assert whole["total"].tolist() == [int((labels == c).sum()) for c in range(classes)]
    assert int(whole["correct"].sum()) == int((outputs.argmax(-1) == labels).sum())
    tokens = math.prod(positions)
    torch.testing.assert_close(
        whole["loss_sum"], tokens * task.loss(outputs, labels).sum(dtype=torch.float64), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("positions", [(), (4,)])
def test_both_work_under_vmap(positions: tuple[int, ...]) -> None:
    task: Task = NextToken(3) if positions else Classification(3)
    outputs, labels = torch.randn(2, 5, *positions, 3), torch.randint(3, (2, 5, *positions))
    assert torch.equal(vmap(task.loss)(outputs, labels)[1], task.loss(outputs[1], labels[1]))
    stacked, single = vmap(task.counts)(outputs, labels), task.counts(outputs[1], labels[1])
    assert torch.equal(stacked["correct"][1], single["correct"])
    assert torch.equal(stacked["total"][1], single["total"])


def test_tasks_by_name() -> None:
    assert task_for("classification", 4) == Classification(4)
    assert task_for("next-token", 4) == NextToken(4)
    assert pickle.loads(pickle.dumps(task_for("next-token", 4))) == NextToken(4)
    with pytest.raises(ConfigError, match="Did you mean 'classification'"):
        task_for("clasification", 4)
