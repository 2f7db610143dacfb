"""Counts and what follows from them: hand-worked cases, a slow twin, and published group sizes."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor

from flowerbed.models import evaluation
from flowerbed.models.tasks import CONFIDENCE_BINS, Classification, NextToken, Task


def probabilities(*rows: tuple[float, ...]) -> Tensor:
    """Return float64 outputs with these softmax probabilities."""
    return torch.tensor(rows, dtype=torch.float64).log()


def judged(outputs: Tensor, labels: Tensor, task: Task) -> dict[str, float]:
    found = evaluation.metrics(task.counts(outputs, labels), len(labels), outputs.shape[-1])
    return evaluation.scores(found)


def slow_ece(outputs: Tensor, labels: Tensor) -> float:
    """Guo et al. 2017, eq. 3, sample by sample with the bins ((m - 1) / 15, m / 15]."""
    probability = outputs.softmax(-1).flatten(0, -2).numpy()
    truth = labels.flatten().numpy()
    error = 0.0
    for m in range(1, 16):
        inside = [i for i, row in enumerate(probability) if (m - 1) / 15 < row.max() <= m / 15]
        if inside:
            accuracy = np.mean([probability[i].argmax() == truth[i] for i in inside])
            confidence = np.mean([probability[i].max() for i in inside])
            error += len(inside) / len(truth) * abs(accuracy - confidence)
    return error


def test_calibration_by_hand() -> None:
    # Confidence 0.7 (bin 11), right and wrong; 0.98 (bin 15), right.
    outputs = probabilities((0.7, 0.3), (0.3, 0.7), (0.98, 0.02))
    labels = torch.tensor([0, 0, 0])
    counts = Classification(2).counts(outputs, labels)
    assert counts["bin_total"].nonzero().flatten().tolist() == [10, 14]
    assert counts["bin_total"][[10, 14]].tolist() == [2, 1]
    assert counts["bin_correct"][[10, 14]].tolist() == [1, 1]
    assert counts["bin_confidence"][[10, 14]].tolist() == pytest.approx([1.4, 0.98])
    # (2/3) |1/2 - 0.7| + (1/3) |1 - 0.98|
    assert judged(outputs, labels, Classification(2))["ece"] == pytest.approx((2 * 0.2 + 0.02) / 3)


def test_bins_are_closed_above() -> None:
    logits = torch.tensor([[math.inf, 0.0], [0.0, 0.0]], dtype=torch.float64)
    logits[0, 0] = 1e4
    five = torch.zeros(1, 5, dtype=torch.float64)
    assert Classification(2).counts(logits, torch.tensor([0, 0]))["bin_total"].nonzero().tolist() == [
        [7],
        [14],
    ]
    # 1/5 = 3/15 is the upper end of the third bin.
    assert Classification(5).counts(five, torch.tensor([0]))["bin_total"].nonzero().tolist() == [[2]]


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1), classes=st.integers(2, 6), scale=st.floats(0.1, 20), tokens=st.booleans()
)
def test_scores_equal_their_slow_twins(seed: int, classes: int, scale: float, tokens: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (20, 3) if tokens else (60,)
    outputs = scale * torch.randn(*shape, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, shape, generator=generator)
    task: Task = NextToken(classes) if tokens else Classification(classes)
    found = judged(outputs, labels, task)
    predicted = outputs.argmax(-1).flatten()
    assert found["ece"] == pytest.approx(slow_ece(outputs, labels), abs=1e-9)
    assert found["accuracy"] == pytest.approx(float((predicted == labels.flatten()).double().mean()))
    with warnings.catch_warnings():
        # It tells of classes that are predicted but do not occur.
        warnings.simplefilter("ignore")
        expected = balanced_accuracy_score(labels.flatten().numpy(), predicted.numpy())
    assert found["balanced-accuracy"] == pytest.approx(expected)


def test_a_confidence_that_is_no_number_does_not_crash_the_count() -> None:
    counts = Classification(2).counts(torch.full((1, 2), math.nan), torch.tensor([1]))
    assert counts["bin_total"].sum() == 1
    assert math.isnan(float(counts["loss_sum"]))


def test_bin_counts_work_under_vmap() -> None:
    outputs, labels = torch.randn(2, 5, 3), torch.randint(3, (2, 5))
    stacked = torch.func.vmap(Classification(3).counts)(outputs, labels)
    single = Classification(3).counts(outputs[1], labels[1])
    for name in ("bin_total", "bin_correct", "bin_confidence"):
        assert torch.equal(stacked[name][1], single[name])


def test_counts_do_not_depend_on_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, labels = torch.randn(23, 4, dtype=torch.float64), torch.randint(4, (23,))
    whole = evaluation.counts(lambda x: 3 * x, Classification(4), inputs, labels)
    monkeypatch.setattr(evaluation, "BATCH", 5)
    parts = evaluation.counts(lambda x: 3 * x, Classification(4), inputs, labels)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value)


def test_a_client_without_samples_reports_the_same_names() -> None:
    sums = Classification(3).counts(torch.randn(2, 3), torch.tensor([0, 1]))
    full, empty = evaluation.metrics(sums, 2, 3), evaluation.metrics({}, 0, 3)
    assert full.keys() == empty.keys()
    assert {name: len(v) for name, v in full.items() if isinstance(v, list)} == {
        name: len(v) for name, v in empty.items() if isinstance(v, list)
    }
    assert len(empty["total-per-bin"]) == CONFIDENCE_BINS  # type: ignore[arg-type]
    assert evaluation.scores(empty) == {"accuracy": 0.0}


def exponential(largest: int, factor: float, classes: int) -> list[int]:
    """The class sizes of FedLoGe's long-tailed CIFAR sets."""
    return [int(largest * factor ** (c / (classes - 1))) for c in range(classes)]


@pytest.mark.parametrize(
    ("counts", "sizes"),
    [
        (exponential(5000, 0.01, 10), (3, 3, 4)),
        (exponential(5000, 0.02, 10), (4, 3, 3)),
        (exponential(500, 0.01, 100), (30, 31, 39)),
        (exponential(500, 0.02, 100), (34, 34, 32)),
    ],
)
def test_share_groups_are_those_of_fedloge(counts: list[int], sizes: tuple[int, int, int]) -> None:
    groups = evaluation.share_groups(counts)
    assert tuple(map(len, groups.values())) == sizes
    assert groups["many"] == list(range(sizes[0]))


@given(st.lists(st.integers(0, 300), min_size=1, max_size=12).filter(any))
def test_share_groups_are_the_smallest_that_hold_their_share(counts: list[int]) -> None:
    groups = evaluation.share_groups(counts)
    assert sorted(c for members in groups.values() for c in members) == list(range(len(counts)))
    total, many = sum(counts), [counts[c] for c in groups["many"]]
    upto_medium = many + [counts[c] for c in groups["medium"]]
    for held, share in ((many, 0.75), (upto_medium, 0.95)):
        assert sum(held) >= share * total - 1e-9
    assert sum(many[:-1]) < 0.75 * total
    if groups["medium"]:
        assert sum(upto_medium[:-1]) < 0.95 * total
    assert not groups["few"] or min(upto_medium) >= max(counts[c] for c in groups["few"])


def test_count_groups_by_hand() -> None:
    groups = evaluation.count_groups([101, 100, 20, 19, 0, 5000])
    assert groups == {"many": [0, 5], "medium": [1, 2], "few": [3, 4]}


def test_group_scores_pool_the_samples_and_leave_empty_groups_out() -> None:
    summed = {
        "correct-per-class": [9, 1, 0],
        "total-per-class": [10, 2, 0],
        "personal-correct-per-class": [10, 0, 0],
        "personal-total-per-class": [10, 2, 0],
    }
    assert evaluation.group_scores(summed, [200, 150, 10]) == {
        "accuracy-many-share-75-95": 10 / 12,
        "accuracy-many-count-100-20": 10 / 12,
        "personal-accuracy-many-share-75-95": 10 / 12,
        "personal-accuracy-many-count-100-20": 10 / 12,
    }
    # 300 of 360 are 83 %: class 1 is medium by share and by count.
    found = evaluation.group_scores(summed, [300, 60, 0])
    assert found["accuracy-many-share-75-95"] == found["accuracy-many-count-100-20"] == 0.9
    assert found["accuracy-medium-share-75-95"] == found["accuracy-medium-count-100-20"] == 0.5
    assert found["personal-accuracy-many-share-75-95"] == 1.0
    assert not any("few" in name for name in found)


def test_spread_by_hand() -> None:
    found = evaluation.spread([0.5, 1.0, 0.0])
    assert found == pytest.approx(
        {"mean": 0.5, "worst": 0.0, "worst-10pct": 0.0, "std": math.sqrt(1 / 6), "jain": 1.5**2 / (3 * 1.25)}
    )
    # Eleven clients: two are the worst tenth.
    assert evaluation.spread([0.3, 0.1, *[0.9] * 9])["worst-10pct"] == pytest.approx(0.2)
    assert evaluation.spread([0.4] * 7)["jain"] == pytest.approx(1.0)
    assert evaluation.spread([0.0, 0.0, 0.0, 1.0])["jain"] == pytest.approx(0.25)
    assert evaluation.spread([0.0])["jain"] == 1.0
