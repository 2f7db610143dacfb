"""The kinds of data that a device may have, and what is said where they do not fit the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowerbed.clients import device_data
from flowerbed.clients.data import CLEAN, LABELLED
from flowerbed.clients.device_data import DeviceSplits, load_data, save_npz
from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.datasets.form import DataForm
from flowerbed.errors import ConfigError, DataError

GREY = DataForm("shapes", (1, 4, 4), "uint8", ("cat", "dog"), (0.5,), (0.25,))
COLOUR = replace(GREY, input_shape=(3, 4, 4), mean=(0.5,) * 3, std=(0.25,) * 3)
ROWS = DataForm("rows", (2,), "float32", ("no", "yes"), (0.0, 0.0), (1.0, 1.0))


def load(folder: Path, kind: str, form: DataForm, **options: Any) -> Dataset:
    return load_data(kind, options, folder, form, folder / "kept")


# Pictures.


def picture(path: Path, value: Any, size: int = 4) -> None:
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size, size) if np.ndim(value) == 0 else (size, size, 3)
    image.fromarray(np.full(shape, value, dtype=np.uint8)).save(path)


def test_pictures_in_folders_called_as_their_classes_or_by_number(tmp_path: Path) -> None:
    picture(tmp_path / "p" / "dog" / "a.png", 7)
    picture(tmp_path / "p" / "0" / "b.png", 3, size=8)
    picture(tmp_path / "p" / "unlabelled" / "c.png", 9)
    (tmp_path / "p" / "dog" / "readme.txt").write_text("no picture")
    found = load(tmp_path, "images", GREY, path="p", test_fraction=0.0)
    assert found.train.labels.tolist() == [0, 1, 0]
    assert found.train.inputs[:, 0, 0, 0].tolist() == [3, 7, 9]
    assert found.train.inputs.shape == (3, 1, 4, 4)
    # Nobody knows the third label: it is shown to no loss and to no measure.
    assert found.train.extras[LABELLED].tolist() == [True, True, False]
    assert found.train.extras[CLEAN].tolist() == [0, 1, -1]
    assert (found.mean, found.std, found.classes) == (GREY.mean, GREY.std, GREY.classes)


def test_pictures_become_grey_or_coloured_as_the_run_needs(tmp_path: Path) -> None:
    picture(tmp_path / "p" / "cat" / "a.png", (100, 50, 200))
    picture(tmp_path / "p" / "dog" / "b.png", 80)
    grey = load(tmp_path, "images", GREY, path="p", test_fraction=0.0).train.inputs
    # 0.299 * 100 + 0.587 * 50 + 0.114 * 200 = 82.05
    assert grey[:, 0, 0, 0].tolist() == [82, 80]
    colour = load(tmp_path, "images", COLOUR, path="p", test_fraction=0.0).train.inputs
    assert colour[:, :, 0, 0].tolist() == [[100, 50, 200], [80, 80, 80]]


def test_a_folder_for_each_part(tmp_path: Path) -> None:
    picture(tmp_path / "p" / "train" / "cat" / "a.png", 1)
    picture(tmp_path / "p" / "test" / "dog" / "b.png", 2)
    picture(tmp_path / "p" / "validation" / "dog" / "c.png", 3)
    found = load(tmp_path, "images", GREY, path="p")
    assert found.validation is not None
    parts = (found.train, found.test, found.validation)
    assert [part.labels.tolist() for part in parts] == [[0], [1], [1]]


def test_pictures_are_decoded_once_and_changes_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "p" / "cat" / "a.png", 1)
    load(tmp_path, "images", GREY, path="p", test_fraction=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(device_data, "read_image", None)
        assert load(tmp_path, "images", GREY, path="p", test_fraction=0.0).train.inputs.max() == 1
    for value in range(2, 7):
        picture(tmp_path / "p" / "cat" / f"{value}.png", value)
        assert load(tmp_path, "images", GREY, path="p", test_fraction=0.0).train.inputs.max() == value
    assert len(list((tmp_path / "kept").iterdir())) == 3


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    (tmp_path / "p" / "cat").mkdir(parents=True)
    (tmp_path / "p" / "cat" / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a\.png cannot be read: .* Remove or replace it"):
        load(tmp_path, "images", GREY, path="p")


def make(*folders: str) -> Callable[[Path], None]:
    return lambda root: [(root / f).mkdir(parents=True) for f in folders] and None


@pytest.mark.parametrize(
    ("prepare", "form", "message"),
    [
        (make(), GREY, "data folder .* does not exist; correct data.path"),
        (make("p"), GREY, "holds no pictures; put them into one folder for each class"),
        (make("p/bird"), GREY, "'bird' is no class of the run's data 'shapes'; its classes are cat, dog"),
        (make("p/test/cat"), GREY, "has a folder 'test' but no folder 'train'"),
        (make("p/cat"), ROWS, r"data.kind is images, but the run's data 'rows' are inputs of shape \(2,\)"),
        (make("p/cat"), replace(GREY, input_shape=(1, 4, 6)), "4 by 6 pixels .* npz"),
    ],
)
def test_folders_that_do_not_fit(
    prepare: Callable[[Path], None], form: DataForm, message: str, tmp_path: Path
) -> None:
    prepare(tmp_path)
    with pytest.raises(DataError, match=message):
        load(tmp_path, "images", form, path="p")


# Arrays.


def arrays(path: Path, **found: Any) -> None:
    np.savez(path, **found)


def test_arrays_with_extras(tmp_path: Path) -> None:
    x = np.arange(3 * 16, dtype=np.uint8).reshape(3, 4, 4)
    arrays(
        tmp_path / "d.npz",
        x_train=x, y_train=np.array([0, 1, 1], dtype=np.int8), domain_train=np.array([0, 0, 1]),
        x_test=x[:1], y_test=np.array([1]),
    )  # fmt: skip
    found = load(tmp_path, "npz", replace(GREY, domains=("a", "b")), path="d.npz")
    assert torch.equal(found.train.inputs, torch.from_numpy(x)[:, None])
    assert found.train.extras["domain"].tolist() == [0, 0, 1]
    assert found.test.labels.tolist() == [1]


def test_images_as_floats_are_those_in_zero_to_one(tmp_path: Path) -> None:
    x = np.linspace(0, 1, 32).reshape(2, 1, 4, 4)
    arrays(tmp_path / "d.npz", x_train=x, y_train=np.array([0, 1]))
    found = load(tmp_path, "npz", GREY, path="d.npz", test_fraction=0.0)
    as_bytes = replace(GREY).dataset(
        Split(torch.full((1, 1, 4, 4), 51, dtype=torch.uint8), torch.tensor([0])),
        Split(torch.empty((0, 1, 4, 4), dtype=torch.uint8), torch.empty(0, dtype=torch.int64)),
    )
    # 51 / 255 = 0.2, whatever the type.
    one = found.prepare(torch.full((1, 1, 4, 4), 0.2))
    assert torch.allclose(one, as_bytes.prepare(as_bytes.train.inputs))
    arrays(tmp_path / "d.npz", x_train=x * 255, y_train=np.array([0, 1]))
    with pytest.raises(
        DataError, match=r"floats between 0 and 255; the run needs uint8, or floats in \[0, 1\]"
    ):
        load(tmp_path, "npz", GREY, path="d.npz", test_fraction=0.0)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"x": np.zeros(3)}, "has no array 'x_train'; it has x"),
        ({"x_train": np.zeros((1, 2))}, "'y_train' .* is missing; it must hold whole numbers"),
        ({"x_train": np.zeros((1, 2)), "y_train": np.zeros(1)}, "holds float64; it must hold whole numbers"),
        ({"x_train": np.zeros((1, 3)), "y_train": np.zeros(1, int)}, r"have shape \(3,\), .* 'rows' have \(2,\)"),
        ({"x_train": np.zeros((2, 2)), "y_train": np.zeros(1, int)}, "2 inputs but 1 labels"),
        ({"x_train": np.zeros((1, 2)), "y_train": np.full(1, 2)}, r"labels hold 2, the run knows the classes 0\.\.1"),
        ({"x_train": np.full((1, 2), np.nan), "y_train": np.zeros(1, int)}, "hold NaN or infinity"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit(found: dict[str, Any], message: str, tmp_path: Path) -> None:
    arrays(tmp_path / "d.npz", **found)
    with pytest.raises(DataError, match=message):
        load(tmp_path, "npz", ROWS, path="d.npz", test_fraction=0.0)


def test_nothing_is_ever_unpickled(tmp_path: Path) -> None:
    arrays(tmp_path / "d.npz", x_train=np.array([{"a": 1}], dtype=object), y_train=np.zeros(1, int))
    with pytest.raises(DataError, match="cannot be read: ValueError: Object arrays cannot be loaded"):
        load(tmp_path, "npz", ROWS, path="d.npz")


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    x = torch.arange(8, dtype=torch.float32).reshape(4, 2)
    split = Split(x, torch.tensor([0, 1, 0, 1]), {"labelled": torch.tensor([True, False, True, True])})
    save_npz(tmp_path / "d.npz", ROWS.dataset(split, split), [1, 3], [2])
    found = load(tmp_path, "npz", ROWS, path="d.npz")
    assert found.train.inputs.tolist() == [[2.0, 3.0], [6.0, 7.0]]
    assert found.train.extras["labelled"].tolist() == [False, True]
    assert found.test.inputs.tolist() == [[4.0, 5.0]]


# Tables.

TABLE = "a,label,b,split\n1,yes,2,train\n3,0,4.5,test\n5,,6,train\n"


def write_table(folder: Path, kind: str, text: str) -> str:
    if kind == "csv":
        (folder / "t.csv").write_text(text)
        return "t.csv"
    parquet = pytest.importorskip("pyarrow.parquet")
    csv = pytest.importorskip("pyarrow.csv")
    (folder / "raw.csv").write_text(text)
    parquet.write_table(csv.read_csv(folder / "raw.csv"), folder / "t.parquet")
    return "t.parquet"


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables(kind: str, tmp_path: Path) -> None:
    path = write_table(tmp_path, kind, TABLE)
    found = load(tmp_path, kind, ROWS, path=path)
    assert found.train.inputs.tolist() == [[1.0, 2.0], [5.0, 6.0]]
    assert found.train.labels.tolist() == [1, 0]
    assert found.train.extras[LABELLED].tolist() == [True, False]
    assert (found.test.inputs.tolist(), found.test.labels.tolist()) == ([[3.0, 4.5]], [0])
    turned = load(tmp_path, kind, ROWS, path=path, features=["b", "a"])
    assert turned.train.inputs.tolist() == [[2.0, 1.0], [6.0, 5.0]]


def test_pixels_in_a_table_are_an_image(tmp_path: Path) -> None:
    header = ",".join(f"p{i}" for i in range(16))
    (tmp_path / "t.csv").write_text(f"{header},label\n" + ",".join(map(str, range(200, 216))) + ",dog\n")
    found = load(tmp_path, "csv", GREY, path="t.csv", test_fraction=0.0)
    assert found.train.inputs.dtype == torch.uint8
    assert found.train.inputs[0, 0].tolist() == [list(range(r, r + 4)) for r in range(200, 216, 4)]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,b\n1,2\n", {}, "has no column 'label' for the label; it has a, b"),
        ("a,label\n1,0\n", {}, r"has 1 columns of inputs, the run's data 'rows' have 2 values"),
        ("a,b,label\n1,2,0\n", {"features": ["a", "c"]}, "has no column 'c'; correct data.features"),
        ("a,b,label\n1,x,0\n", {}, "The column 'b' of .* holds something that is no number"),
        (
            "a,b,label\n1,2,maybe\n",
            {},
            "The column 'label' of .*: 'maybe' is no class of the run's data 'rows'",
        ),
        ("a,b,label\n1,2\n", {}, "Row 2 of .* has 2 cells, the header has 3"),
        ("a,b,label,split\n1,2,0,later\n", {}, "holds 'later'; it must say train, test, validation"),
        ("a,b,label,split\n1,2,0,test\n", {}, "says 'train' in no row"),
        ("", {}, "has no column 'label'"),
    ],
)
def test_tables_that_do_not_fit(text: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        load(tmp_path, "csv", ROWS, path="t.csv", **options)


def test_the_test_share_is_the_same_every_time_and_none_of_a_single_sample(tmp_path: Path) -> None:
    rows = "".join(f"{i},{i},{i % 2}\n" for i in range(10))
    (tmp_path / "t.csv").write_text(f"a,b,label\n{rows}")
    found = load(tmp_path, "csv", ROWS, path="t.csv", test_fraction=0.3)
    again = load(tmp_path, "csv", ROWS, path="t.csv", test_fraction=0.3)
    train, test = (set(s.inputs[:, 0].tolist()) for s in (found.train, found.test))
    assert (len(train), len(test)) == (7, 3)
    assert train | test == set(range(10))
    assert test == set(again.test.inputs[:, 0].tolist())
    (tmp_path / "t.csv").write_text("a,b,label\n1,2,0\n")
    single = load(tmp_path, "csv", ROWS, path="t.csv", test_fraction=0.3)
    assert (len(single.train), len(single.test)) == (1, 0)


# A class of one's own.


class Sensor:
    """A user's own source of samples."""

    def __init__(self, path: str, samples: int = 2) -> None:
        self.path, self.samples = path, samples

    def load(self, form: DataForm) -> DeviceSplits:
        if self.samples < 0:
            raise OSError("the sensor is off")
        split = Split(
            torch.zeros(self.samples, *form.input_shape), torch.zeros(self.samples, dtype=torch.int64)
        )
        return DeviceSplits(split, split)


class Wrong:
    """A class that returns something else."""

    def load(self, form: DataForm) -> object:
        return ()


HERE = "sensor_data"


@pytest.fixture
def _module(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType(HERE)
    module.Sensor, module.Wrong = Sensor, Wrong  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, HERE, module)


@pytest.mark.usefixtures("_module")
def test_a_class_of_ones_own(tmp_path: Path) -> None:
    assert len(load(tmp_path, f"{HERE}:Sensor", ROWS, path="x", samples=5).train) == 5
    for options, message in [
        ({"path": "x", "samples": -1}, "cannot be read: OSError: the sensor is off"),
        ({"path": "x", "rate": 3}, "does not fit: .*unexpected keyword argument 'rate'"),
    ]:
        with pytest.raises((DataError, ConfigError), match=message):
            load(tmp_path, f"{HERE}:Sensor", ROWS, **options)
    with pytest.raises(DataError, match="returned tuple; it must return DeviceSplits"):
        load(tmp_path, f"{HERE}:Wrong", ROWS)


def test_unknown_kinds_and_options_list_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Unknown kind of device data 'image'. Did you mean 'images'?"):
        load(tmp_path, "image", ROWS, path="x")
    with pytest.raises(ConfigError, match=r"kind 'npz' has no option 'paht'; it has path, test_fraction"):
        load(tmp_path, "npz", ROWS, paht="x")
    with pytest.raises(ConfigError, match="does not fit: .*missing 1 required positional argument: 'path'"):
        load(tmp_path, "npz", ROWS)
    with pytest.raises(ConfigError, match="data.test_fraction is 1"):
        load(tmp_path, "npz", ROWS, path="x", test_fraction=1)


def test_the_form_of_a_data_set_travels_as_plain_values() -> None:
    split = Split(torch.zeros(2, 2), torch.tensor([0, 1]))
    form = DataForm.of(ROWS.dataset(split, split))
    assert form == ROWS
    assert DataForm.from_plain(form.plain()) == ROWS
