"""Two levels of training in one client: turns, streams and samples kept apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
import worlds
from torch import Tensor

from flowerbed.clients.bilevel import Level, alternate, held_out, merged, turns
from flowerbed.clients.data import Batch
from flowerbed.clients.local_round import Clock, Extras, LocalRound, Trained
from flowerbed.clients.params import LocalParams
from flowerbed.errors import ClientError
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task

STEP = LocalParams(batch_size=4, lr=0.1, momentum=0.9, persist=True)


def test_turns_go_by_the_run_wherever_a_round_begins() -> None:
    assert list(turns(range(5), 2)) == [(range(2), 0), (range(2, 4), 1), (range(4, 5), None)]
    assert list(turns(range(5, 9), 2)) == [(range(5, 6), 2), (range(6, 8), 3), (range(8, 9), None)]
    assert list(turns(range(3, 5), 10)) == [(range(3, 5), None)]


def test_held_out_samples_are_others_and_always_the_same() -> None:
    local = worlds.open_round(STEP)
    train, valid = held_out(local, 0.4)
    assert (len(train), len(valid)) == (12, 8)
    assert sorted(train.index.tolist() + valid.index.tolist()) == list(range(20))
    later = replace(local, clock=Clock(3, 5, 5))
    assert held_out(later, 0.4)[1].index.tolist() == valid.index.tolist()
    assert held_out(replace(local, client=1), 0.4)[1].index.tolist() != valid.index.tolist()
    with pytest.raises(ClientError, match="20 samples cannot be divided"):
        held_out(local, 0.01)


def test_merged_metrics_are_means_over_steps() -> None:
    parts = [Trained(2, 20, 0.1, {"loss": 1.0}), Trained(1, 20, 0.05, {"loss": 4.0})]
    assert merged(parts) == Trained(3, 20, 0.05, {"loss": 2.0})


class Diary:
    """Two levels of a small classifier that note each batch: the last layer below, the bias of the first above."""

    def __init__(self, local: LocalRound) -> None:
        self.notes: list[tuple[str, int]] = []
        names = local.parts.parameters
        self.above = frozenset(name for name in names if name.endswith("bias"))
        self.below = frozenset(names) - self.above

    def level(self, name: str, moves: frozenset[str], steps: int, scope: str = "") -> Level:
        def batches(step: int) -> Batch:
            self.notes.append((name, step))
            x = torch.full((4, 6), float(step % 3))
            return {"x": x, "y": torch.tensor([0, 1, 2, 0])}

        return Level(
            self.loss, moves, replace(STEP, lr=0.1 if name == "lower" else 0.01), batches, steps, scope
        )

    @staticmethod
    def loss(
        model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return task.mean_loss(model(batch["x"]), batch["y"]), {}

    def levels(self) -> tuple[Level, Level]:
        return self.level("lower", self.below, 2), self.level("upper", self.above, 1, " upper")


def rounds(lengths: list[int], warm_up: int = 0) -> tuple[Diary, dict[str, Tensor]]:
    """Run rounds of those numbers of lower steps on one client, as one after the other."""
    local = worlds.open_round(STEP)
    diary, start = Diary(local), 0
    for number, length in enumerate(lengths):
        now = replace(local, clock=Between(number + 1, 5, length, start=start))
        alternate(now, *diary.levels(), {}, warm_up)
        start += length
    return diary, {name: value.detach().clone() for name, value in local.model.state_dict().items()}


@dataclass(frozen=True)
class Between(Clock):
    """A clock whose round begins at a given step."""

    start: int = 0

    @property
    def all_steps(self) -> range:
        return range(self.start, self.start + self.steps)


def test_the_upper_level_acts_after_each_whole_turn_beyond_the_warm_up() -> None:
    lower = [("lower", i) for i in range(6)]
    diary, _ = rounds([6])
    assert diary.notes == [*lower[:2], ("upper", 0), *lower[2:4], ("upper", 1), *lower[4:], ("upper", 2)]
    diary, _ = rounds([6], warm_up=4)
    assert diary.notes == [*lower, ("upper", 2)]


def test_rounds_of_any_length_are_one_long_round() -> None:
    whole, one = rounds([6])
    pieces, other = rounds([1, 3, 2])
    assert whole.notes == pieces.notes
    assert worlds.equal(one, other)


def test_each_level_moves_its_own_parameters_alone() -> None:
    local = worlds.open_round(STEP)
    diary = Diary(local)
    before = local.parameters()
    lower, upper = diary.levels()
    alternate(local, replace(lower, params=replace(lower.params, lr=0.0)), upper, {})
    moved = {n for n, v in local.parameters().items() if not torch.equal(v, before[n])}
    assert moved == diary.above
    trained, tuned = alternate(local, lower, None, {})
    assert tuned is None
    assert trained.steps == local.clock.steps


def test_it_is_the_plain_alternation() -> None:
    """Two torch optimizers in turn on the same batches; neither sees the other's gradients."""
    _, mine = rounds([6])
    local = worlds.open_round(STEP)
    diary, net = Diary(local), local.model
    named = dict(net.named_parameters())
    below = torch.optim.SGD([named[n] for n in named if n in diary.below], lr=0.1, momentum=0.9)
    above = torch.optim.SGD([named[n] for n in named if n in diary.above], lr=0.01, momentum=0.9)

    def step(optimizer: torch.optim.Optimizer, number: int) -> None:
        net.zero_grad()
        x = torch.full((4, 6), float(number % 3))
        torch.nn.functional.cross_entropy(net(x), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()

    for turn in range(3):
        step(below, 2 * turn)
        step(below, 2 * turn + 1)
        step(above, turn)
    assert worlds.equal(mine, net.state_dict())
