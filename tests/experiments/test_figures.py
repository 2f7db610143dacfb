"""The pictures hold the numbers; whether they are good to look at is for people."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowerbed.experiments.figures import accuracy_figure, draw, partition_figure, pseudo_label_figure
from flowerbed.server.callbacks import CLIENTS, SERVER, Record


def records() -> list[Record]:
    found = [Record(0, SERVER, {"accuracy": 0.1, "loss": 2.3})]
    for t in (1, 2):
        found.append(Record(t, "train", {"loss": 2.0 / t}))
        found.append(Record(t, SERVER, {"accuracy": 0.3 * t, "loss": 1.5 / t}))
    found.append(Record(2, CLIENTS, {"accuracy-mean": 0.5, "accuracy-worst": 0.2, "loss": 1.0}))
    return found


def test_the_curves_are_the_records() -> None:
    figure = accuracy_figure(records())
    assert figure is not None
    accuracy, loss = figure.axes
    curves = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in accuracy.lines}
    assert curves == {
        "server's test set": [[0, 0.1], [1, 0.3], [2, 0.6]],
        "clients' own test data, mean": [[2, 0.5]],
        "clients' own test data, worst": [[2, 0.2]],
    }
    curves = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in loss.lines}
    assert curves["local training"] == [[1, 2.0], [2, 1.0]]
    assert accuracy_figure([]) is None


def test_pseudo_labels_are_drawn_where_there_are_any() -> None:
    def record(round_: int, seen: int, share: float) -> Record:
        found = {"pseudo-coverage": share, "pseudo-precision": 0.9, "pseudo-correct-share": 0.9 * share}
        return Record(
            round_, "train", {"pseudo-total-per-class": [seen, 0], "chosen-global-share": 0.25, **found}
        )

    assert pseudo_label_figure(records()) is None
    assert pseudo_label_figure([record(1, 0, 0.0)]) is None
    figure = pseudo_label_figure([record(1, 0, 0.0), record(2, 5, 0.5), record(3, 5, 0.75), *records()])
    assert figure is not None
    used, right = figure.axes
    curves = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in used.lines}
    assert curves == {
        "used, of all seen (coverage)": [[2, 0.5], [3, 0.75]],
        "right, of those used (precision)": [[2, 0.9], [3, 0.9]],
        "written by the global expert, of those used": [[2, 0.25], [3, 0.25]],
    }
    (line,) = right.lines
    assert np.asarray(line.get_xydata()).tolist() == [[2, 0.45], [3, pytest.approx(0.675)]]


def test_few_clients_keep_their_order_and_carry_numbers() -> None:
    counts = np.array([[1, 0, 5], [7, 2, 0]])
    heat, sizes = partition_figure(counts, ["a", "b", "c"]).axes[:2]
    assert np.array_equal(np.asarray(heat.images[0].get_array()), counts)
    assert sorted(text.get_text() for text in heat.texts) == ["1", "2", "5", "7"]
    assert [patch.get_width() for patch in sizes.patches] == [6, 9]
    assert [label.get_text() for label in heat.get_xticklabels()] == ["a", "b", "c"]


def test_many_clients_are_ordered_by_their_largest_class_as_shares() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 100, (1000, 10))
    heat = partition_figure(counts, [str(k) for k in range(10)]).axes[0]
    shares = np.asarray(heat.images[0].get_array())
    assert shares.sum(axis=1) == pytest.approx(np.ones(1000))
    assert (np.diff(shares.argmax(axis=1)) >= 0).all()
    assert sorted(map(tuple, shares)) == sorted(map(tuple, counts / counts.sum(axis=1, keepdims=True)))
    assert len(heat.get_yticks()) <= 20


@pytest.mark.parametrize(("clients", "classes"), [(1, 10), (10, 10), (60, 100), (1000, 2), (3, 1)])
def test_every_size_is_a_valid_picture(clients: int, classes: int, tmp_path: Path) -> None:
    counts = np.full((clients, classes), 3)
    names = [f"class {k}" for k in range(classes)]
    files = draw(tmp_path / "figures", records(), counts, names, "title")
    assert [path.name for path in files] == ["partition.png", "accuracy.png"]
    for path in files:
        with Image.open(path) as picture:
            picture.verify()


def test_what_cannot_be_drawn_is_logged_and_the_rest_is_drawn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = [Record(0, SERVER, {"accuracy": {}})]
    files = draw(tmp_path, broken, np.ones((2, 2), dtype=np.int64), ["a", "b"], "")
    assert [path.name for path in files] == ["partition.png"]
    assert "accuracy.png was not drawn" in caplog.text
    assert draw(tmp_path / "none", [], np.ones((2, 2), dtype=np.int64), ["a", "b"], "") != []
