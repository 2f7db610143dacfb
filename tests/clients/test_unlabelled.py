"""Labelled and unlabelled batches, their views, and the counts that measure pseudo-labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flowerbed.clients.data import CLEAN, LABELLED, ClientData
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Clock, LocalRound
from flowerbed.clients.params import LocalParams
from flowerbed.clients.training import own_batches, train
from flowerbed.clients.unlabelled import (
    CORRECT,
    KEPT,
    STRONG,
    TOTAL,
    TRUTH,
    WEAK,
    joined_batches,
    labelled,
    pseudo_label_counts,
    unlabelled,
    unlabelled_batches,
)
from flowerbed.datasets.augment import Scale
from flowerbed.errors import ClientError
from flowerbed.models.base import ModelSpec
from flowerbed.models.info import ModelInfo
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Classification


def images(examples: int, known: int) -> ClientData:
    """Return random 8x8 images of 3 classes, the first ``known`` of them labelled."""
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(examples, 1, 8, 8, generator=generator)
    clean = torch.randint(0, 3, (examples,), generator=generator)
    mask = torch.arange(examples) < known
    extras = {LABELLED: mask, CLEAN: clean}
    return ClientData(x, torch.where(mask, clean, -1), torch.arange(examples), extras, Scale())


def open_round(data: ClientData, local: LocalParams, *, client: int = 0) -> LocalRound:
    model = ModelSpec("linear", tuple(data.x.shape[1:]), 3).build(0)
    return LocalRound(
        client=client, seed=0, clock=Clock(1, 5, local.steps_per_round(len(data))), phase="train", config={},
        received={"arrays": dict(model.state_dict())}, model=model, parts=ModelParts.resident(model),
        info=ModelInfo.of(model), task=Classification(3), local=local, open_train=lambda: data,
        open_test=lambda: data, state={}, device=torch.device("cpu"),
    )  # fmt: skip


def test_the_two_parts_are_all_samples() -> None:
    data = images(10, 4)
    assert labelled(data).index.tolist() == [0, 1, 2, 3]
    assert unlabelled(data).index.tolist() == [4, 5, 6, 7, 8, 9]
    supervised = replace(data, extras={})
    assert len(labelled(supervised)) == 10
    assert len(unlabelled(supervised)) == 0


@pytest.mark.parametrize("augment", ["none", "flip_crop", "shift"])
def test_labelled_batches_are_those_of_supervised_training_on_the_labelled_samples(augment: str) -> None:
    local = LocalParams(batch_size=3, augment=augment)
    data = images(50, 7)
    alone = own_batches(open_round(labelled(data), local), local)
    joined = joined_batches(open_round(data, local), "none", 2)
    fewer = joined_batches(open_round(images(10, 7), local), "none", 1)
    for step in range(6):
        for name in ("x", "y", "index"):
            assert torch.equal(joined(step)[name], alone(step)[name])
        assert torch.equal(fewer(step)["index"], alone(step)["index"])


def test_every_unlabelled_sample_is_seen_once_an_epoch() -> None:
    data = images(40, 4)
    batches = unlabelled_batches(
        open_round(data, LocalParams(batch_size=4)), LocalParams(batch_size=4), "none", 3
    )
    seen = [batches(step) for step in range(3)]
    assert [len(b["y"]) for b in seen] == [12, 12, 12]
    assert sorted(torch.cat([b["index"] for b in seen]).tolist()) == list(range(4, 40))
    assert all(bool((b["y"] == -1).all()) for b in seen)
    assert torch.equal(seen[0][CLEAN], data.extras[CLEAN][seen[0]["index"]])


def test_views_are_of_the_same_images_and_drawn_anew() -> None:
    data = images(12, 2)
    plain = LocalParams(batch_size=0)
    same = unlabelled_batches(open_round(data, plain), plain, "none")(0)
    assert torch.equal(same["x"], same[STRONG])
    assert torch.equal(same["x"], data.x[same["index"]])
    # With the strong augmentation off, the strong view is a second weak one.
    local = LocalParams(batch_size=0, augment="shift")
    first, again = (unlabelled_batches(open_round(data, local), local, "none")(0) for _ in range(2))
    assert torch.equal(first[STRONG], again[STRONG])
    assert not torch.equal(first["x"], first[STRONG])
    strong = unlabelled_batches(open_round(data, local), local, "cutout")
    draws = {}
    for step in range(2):
        batch = strong(step)
        order = batch["index"].argsort()
        draws[step] = (batch["x"][order], batch[STRONG][order])
    assert not torch.equal(draws[0][0], draws[1][0])
    assert not torch.equal(draws[0][1], draws[1][1])
    other = unlabelled_batches(open_round(data, local, client=1), local, "cutout")(0)
    assert not torch.equal(other[STRONG][other["index"].argsort()], draws[0][1])


def test_the_strong_view_lies_on_a_weak_one() -> None:
    """Every image marked by its own grey value keeps it in both views, whatever is drawn."""
    data = images(9, 0)
    marked = replace(data, x=(torch.arange(9) / 10).view(9, 1, 1, 1).expand(9, 1, 8, 8))
    local = LocalParams(batch_size=0, augment="flip_shift")
    batch = unlabelled_batches(open_round(marked, local), local, "cutout")(0)
    marks = batch["index"] / 10
    torch.testing.assert_close(batch["x"], marks.view(9, 1, 1, 1).expand(9, 1, 8, 8))
    flat = batch[STRONG].flatten(1)
    kept = torch.isclose(flat, marks[:, None])
    assert bool((kept | (flat == 0.5)).all())
    assert bool(kept.any(1).all())


def test_a_client_may_lack_either_kind() -> None:
    local = LocalParams(batch_size=4)
    nothing_hidden = joined_batches(open_round(images(6, 6), local), "randaugment", 2)(0)
    assert len(nothing_hidden["y"]) == 4
    assert len(nothing_hidden[WEAK]) == len(nothing_hidden[STRONG]) == len(nothing_hidden[TRUTH]) == 0
    nothing_known = joined_batches(open_round(images(6, 0), local), "randaugment", 1)(0)
    assert len(nothing_known["y"]) == 0
    assert len(nothing_known[STRONG]) == 4


def test_hidden_labels_are_still_refused_by_supervised_training() -> None:
    with pytest.raises(ClientError, match="semi-supervised strategy"):
        own_batches(open_round(images(6, 3), LocalParams()), LocalParams())


def test_counts_by_hand() -> None:
    labels, truth = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 2, 2, 0])
    kept = torch.tensor([True, True, True, True, False, True])
    counts = pseudo_label_counts(labels, kept, truth, 4)
    assert counts[KEPT].tolist() == [2, 1, 2, 0]
    assert counts[CORRECT].tolist() == [1, 1, 1, 0]
    assert counts[TOTAL].tolist() == [2, 2, 2, 0]


@given(
    st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 4)), max_size=30), st.integers(0, 30)
)
def test_counts_of_parts_add_up(rows: list[tuple[int, bool, int]], cut: int) -> None:
    def counted(part: list[tuple[int, bool, int]]) -> dict[str, Tensor]:
        labels = torch.tensor([r[0] for r in part], dtype=torch.int64)
        kept = torch.tensor([r[1] for r in part], dtype=torch.bool)
        truth = torch.tensor([r[2] for r in part], dtype=torch.int64)
        return pseudo_label_counts(labels, kept, truth, 5)

    whole, first, second = counted(rows), counted(rows[:cut]), counted(rows[cut:])
    for name, count in whole.items():
        assert torch.equal(count, first[name] + second[name])
    assert int(whole[KEPT].sum()) == sum(r[1] for r in rows)
    assert int(whole[CORRECT].sum()) == sum(r[1] and r[0] == r[2] for r in rows)


def test_training_adds_up_integers_and_averages_the_rest() -> None:
    local = open_round(images(10, 10), LocalParams(batch_size=4))

    def loss(model: ModelParts, batch: Mapping[str, Tensor], extras: Any, task: Any) -> Any:
        size = torch.tensor(len(batch["y"]))
        value, _ = ClientHalf().loss(model, dict(batch), extras, task)
        return value, {"sizes": torch.stack([size, 2 * size]), "once": torch.tensor(1), "mean": size.double()}

    trained = train(local, loss, extras={})
    assert trained.counts == {"sizes": [10, 20], "once": 3}
    assert trained.metrics["mean"] == pytest.approx((4 * 4 + 4 * 4 + 2 * 2) / 10)
    assert "sizes" not in trained.metrics
