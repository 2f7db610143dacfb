"""Each file format through the real source: tiny files are written as the originals are and read back."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flowerbed.datasets import pacs, sources
from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.datasets.files import Found, Remote, Search
from flowerbed.datasets.shakespeare import speeches
from flowerbed.datasets.sources import DATASETS, load_dataset
from flowerbed.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
IDX = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]


def random_images(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def write_idx(folder: Path, packed: bool = True) -> list[np.ndarray]:
    arrays = [random_images(6, 28, 28), np.arange(6, dtype=np.uint8)]
    arrays += [random_images(3, 28, 28), np.array([9, 0, 9], dtype=np.uint8)]
    folder.mkdir(parents=True)
    for name, array in zip(IDX, arrays):
        header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        data = header + array.tobytes()
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / name).write_bytes(data)
    return arrays


def write_sheets(
    folder: Path, images: dict[str, np.ndarray], labels: dict[str, np.ndarray], **meta: Any
) -> None:
    """Pack images (N, h, w[, 3]) two to a row and four to a sheet, the last one padded with black."""
    folder.mkdir(parents=True)
    for prefix, stack in images.items():
        height, width = stack.shape[1:3]
        for number in range(-(-len(stack) // 4)):
            sheet = np.zeros((2 * height, 2 * width, *stack.shape[3:]), dtype=np.uint8)
            for place, image in enumerate(stack[4 * number : 4 * number + 4]):
                top, left = place // 2 * height, place % 2 * width
                sheet[top : top + height, left : left + width] = image
            Image.fromarray(sheet).save(folder / f"{prefix}-{number:02}.png")
        meta[f"{prefix}_labels"] = labels[prefix].astype(np.uint8)
    np.savez(folder / "meta.npz", tile=(height, width), cols=2, per_sheet=4, **meta)


def cifar_bytes(batch: dict[bytes, Any]) -> bytes:
    return pickle.dumps(batch, protocol=2)


def write_cifar10(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    data, labels = random_images(12, 3072), RNG.integers(0, 10, 12)
    folder.mkdir(parents=True)
    for number in range(6):
        name = f"data_batch_{number + 1}" if number < 5 else "test_batch"
        rows = slice(2 * number, 2 * number + 2)
        batch = {b"data": data[rows], b"labels": labels[rows].tolist(), b"batch_label": b"a batch"}
        (folder / name).write_bytes(cifar_bytes(batch))
    (folder / "batches.meta").write_bytes(cifar_bytes({b"label_names": [b"airplane"]}))
    return data, labels


def tar_folder(folder: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)


def same(split: Split, images: np.ndarray, labels: np.ndarray) -> bool:
    return np.array_equal(split.inputs.numpy(), images) and split.labels.tolist() == labels.tolist()


def test_digits_need_no_files_and_have_a_fixed_split() -> None:
    from sklearn.datasets import load_digits

    data = load_dataset("digits", download=False)
    levels = load_digits().data
    assert (len(data.train), len(data.test), data.input_shape, data.num_classes) == (1437, 360, (1, 8, 8), 10)
    rows = torch.cat([data.train.inputs, data.test.inputs]).flatten(1).double() * 16 / 255
    assert sorted(rows.round().long().tolist()) == sorted(levels.astype(int).tolist())
    prepared = data.prepare(data.train.inputs)
    assert float(prepared.mean()) == pytest.approx(0, abs=1e-5)
    assert float(prepared.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert data.train.labels[:5].tolist() == load_dataset("digits").train.labels[:5].tolist()


@pytest.mark.parametrize(
    ("name", "folder", "packed"),
    [
        ("mnist", "mnist", True),
        ("mnist", "MNIST/raw", False),
        ("fashion_mnist", "fashion_mnist", True),
        ("fashion_mnist", "FashionMNIST/raw", False),
    ],
)
def test_idx(tmp_path: Path, name: str, folder: str, packed: bool) -> None:
    arrays = write_idx(tmp_path / "data" / folder, packed)
    data = load_dataset(name, data_dir=tmp_path / "data", download=False)
    assert data.name == name
    assert same(data.train, arrays[0][:, None], arrays[1])
    assert same(data.test, arrays[2][:, None], arrays[3])


def test_fashion_mnist_from_debians_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = write_idx(tmp_path / "debian")
    monkeypatch.setattr("flowerbed.datasets.images._DEBIAN_FASHION", tmp_path / "debian")
    assert same(load_dataset("fashion_mnist", download=False).test, arrays[2][:, None], arrays[3])


def test_the_environment_variable_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(tmp_path / "data" / "mnist")
    monkeypatch.setenv("FLOWERBED_DATA", str(tmp_path / "data"))
    assert len(load_dataset("mnist").train) == 6


def test_sheets_of_grey_tiles(tmp_path: Path) -> None:
    images = {"train": random_images(7, 16, 16), "test": random_images(4, 16, 16)}
    labels = {"train": np.arange(7), "test": np.arange(4)}
    write_sheets(tmp_path / "usps", images, labels, classes=np.array(list("0123456789")))
    data = load_dataset("usps", data_dir=tmp_path)
    assert same(data.train, images["train"][:, None], labels["train"])
    assert same(data.test, images["test"][:, None], labels["test"])
    assert data.mean[0] == pytest.approx(images["train"].mean() / 255)
    assert data.std[0] == pytest.approx((images["train"] / 255).std())


@pytest.mark.parametrize("kind", ["fine", "coarse"])
def test_sheets_of_colour_tiles_with_superclasses(tmp_path: Path, kind: str) -> None:
    images = {"train": random_images(5, 32, 32, 3), "test": random_images(2, 32, 32, 3)}
    labels = {"train": np.array([0, 1, 2, 2, 1]), "test": np.array([2, 0])}
    write_sheets(
        tmp_path / "cifar100",
        images,
        labels,
        classes=np.array(["ant", "bee", "cat"]),
        superclasses=np.array(["insect", "mammal"]),
        fine_to_coarse=np.array([0, 0, 1], dtype=np.uint8),
    )
    # The extra lossless sheet of the packed set is not part of the split.
    Image.fromarray(random_images(64, 64, 3)).save(tmp_path / "cifar100" / "test-lossless-00.png")
    data = load_dataset("cifar100", data_dir=tmp_path, labels=kind)
    expected = labels if kind == "fine" else {"train": np.array([0, 0, 1, 1, 0]), "test": np.array([1, 0])}
    assert same(data.train, images["train"].transpose(0, 3, 1, 2), expected["train"])
    assert same(data.test, images["test"].transpose(0, 3, 1, 2), expected["test"])
    assert data.classes == (("ant", "bee", "cat") if kind == "fine" else ("insect", "mammal"))


def test_a_missing_sheet_is_named_and_another_sets_sheets_are_left_alone(tmp_path: Path) -> None:
    images = {"train": random_images(7, 16, 16), "test": random_images(4, 16, 16)}
    write_sheets(tmp_path / "usps", images, {"train": np.arange(7), "test": np.arange(4)})
    with pytest.raises(DataError, match="not available"):
        load_dataset("cifar10", data_dir=tmp_path / "usps")
    (tmp_path / "usps" / "train-01.png").unlink()
    with pytest.raises(DataError, match="1 sheets 'train-NN' for 7 images"):
        load_dataset("usps", data_dir=tmp_path)


@pytest.mark.parametrize("place", ["cifar-10-batches-py", "cifar10", "archive"])
def test_cifar10_batches(tmp_path: Path, place: str) -> None:
    folder = tmp_path / ("cifar-10-batches-py" if place == "archive" else place)
    pixels, labels = write_cifar10(folder)
    data_dir = tmp_path
    if place == "archive":
        data_dir = tmp_path / "only"
        data_dir.mkdir()
        tar_folder(folder, data_dir / "cifar-10-python.tar.gz")
    data = load_dataset("cifar10", data_dir=data_dir, download=False)
    images = pixels.reshape(-1, 3, 32, 32)
    assert same(data.train, images[:10], labels[:10])
    assert same(data.test, images[10:], labels[10:])


def test_a_replaced_batch_is_noticed(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "cifar10")
    load_dataset("cifar10", data_dir=tmp_path)
    pixels = random_images(3, 3072)
    batch = {b"data": pixels, b"labels": [1, 2, 3]}
    (tmp_path / "cifar10" / "test_batch").write_bytes(cifar_bytes(batch))
    test = load_dataset("cifar10", data_dir=tmp_path).test
    assert same(test, pixels.reshape(3, 3, 32, 32), np.array([1, 2, 3]))


@pytest.mark.parametrize("kind", ["fine", "coarse"])
def test_cifar100_batches(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = {"train": random_images(4, 3072), "test": random_images(2, 3072)}
    for name, data in pixels.items():
        batch = {b"data": data, b"fine_labels": [2] * len(data), b"coarse_labels": [1] * len(data)}
        (folder / name).write_bytes(cifar_bytes(batch))
    names = {b"fine_label_names": [b"a", b"b", b"c"], b"coarse_label_names": [b"x", b"y"]}
    (folder / "meta").write_bytes(cifar_bytes(names))
    loaded = load_dataset("cifar100", data_dir=tmp_path, labels=kind)
    assert same(loaded.train, pixels["train"].reshape(-1, 3, 32, 32), np.full(4, 2 if kind == "fine" else 1))
    assert loaded.classes == (("a", "b", "c") if kind == "fine" else ("x", "y"))


def test_a_batch_written_by_python_2_is_understood(tmp_path: Path) -> None:
    """The opcodes of the official files: byte strings as BINSTRING, numpy.core.multiarray as the module."""
    pixels = random_images(1, 3072)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        b"(I1\n(I1\nI3072\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
        b"I00\nT" + struct.pack("<i", 3072) + pixels.tobytes() + b"tb"
    )
    batch = b"(dS'data'\n" + array + b"sS'labels'\n(lI7\nas."
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder)
    (folder / "test_batch").write_bytes(batch)
    test = load_dataset("cifar10", data_dir=tmp_path).test
    assert same(test, pixels.reshape(1, 3, 32, 32), np.array([7]))


def test_a_hostile_batch_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder)
    (folder / "data_batch_3").write_bytes(pickle.dumps({b"data": Hostile()}, protocol=2))
    with pytest.raises(DataError, match="mkdir, which is not part of a data batch"):
        load_dataset("cifar10", data_dir=tmp_path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("packed", [True, False])
def test_usps_libsvm(tmp_path: Path, packed: bool) -> None:
    lines = {"usps": b"1 1:-1 2:1 256:0.5\n10 3:0\n", "usps.t": b"3 1:1\n"}
    for name, text in lines.items():
        path = tmp_path / (f"{name}.bz2" if packed else name)
        path.write_bytes(bz2.compress(text) if packed else text)
    data = load_dataset("usps", data_dir=tmp_path)
    assert data.train.labels.tolist() == [0, 9]
    assert data.test.labels.tolist() == [2]
    first = data.train.inputs[0].flatten().tolist()
    # round(127.5 (x + 1)): -1 -> 0, 1 -> 255, .5 -> 191, an absent entry (0) -> 128
    assert (first[0], first[1], first[255], first[2]) == (0, 255, 191, 128)


def write_pacs_folders(root: Path, per_cell: int = 5, side: int = 8) -> None:
    for domain in pacs.DOMAINS:
        for label in pacs.CLASSES:
            folder = root / domain / label
            folder.mkdir(parents=True)
            for number in range(per_cell):
                value = 20 * pacs.CLASSES.index(label) + number
                image = np.full((side, side, 3), value, dtype=np.uint8)
                Image.fromarray(image).save(folder / f"pic_{number:03}.png")


def test_pacs_folders(tmp_path: Path) -> None:
    write_pacs_folders(tmp_path / "PACS" / "kfold")
    data = load_dataset("pacs", data_dir=tmp_path, image_size=4, test_fraction=0.2)
    assert (data.input_shape, data.domains, data.classes) == ((3, 4, 4), pacs.DOMAINS, pacs.CLASSES)
    for split, per_cell in ((data.train, 4), (data.test, 1)):
        cells = torch.bincount(split.extras["domain"] * 7 + split.labels, minlength=28)
        assert cells.tolist() == [per_cell] * 28
        assert torch.equal(split.inputs[:, 0, 0, 0].long() // 20, split.labels)
    both = torch.cat([data.train.inputs, data.test.inputs])[:, 0, 0, 0]
    assert sorted(both.tolist()) == sorted(
        4 * [20 * label + number for label in range(7) for number in range(5)]
    )


@pytest.mark.parametrize("side", [8, 4])
def test_pacs_sheets_and_a_domain_left_out(tmp_path: Path, side: int) -> None:
    images = {domain: random_images(7, 8, 8, 3) for domain in pacs.DOMAINS}
    labels = {domain: np.arange(7) for domain in pacs.DOMAINS}
    write_sheets(tmp_path / "pacs", images, labels)
    data = load_dataset("pacs", data_dir=tmp_path, image_size=side, leave_out="cartoon")
    assert data.test.extras["domain"].tolist() == [1] * 7
    assert data.train.extras["domain"].tolist() == [0] * 7 + [2] * 7 + [3] * 7
    assert data.input_shape == (3, side, side)
    if side == 8:
        assert np.array_equal(data.test.inputs.numpy(), images["cartoon"].transpose(0, 3, 1, 2))


def test_pacs_from_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def png(value: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    import datasets

    cells = [(domain, label) for domain in pacs.DOMAINS for label in range(7) for _ in range(2)]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "domain": datasets.Value("string"),
            "label": datasets.ClassLabel(names=list(pacs.CLASSES)),
        }
    )
    rows = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": png(label), "path": None} for _, label in cells],
            "domain": [domain for domain, _ in cells],
            "label": [label for _, label in cells],
        },
        features=features,
    )
    asked = []

    def load(name: str, split: str) -> Any:
        asked.append((name, split))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = load_dataset("pacs", image_size=8, test_fraction=0.5)
    assert torch.equal(data.train.inputs[:, 0, 0, 0].long(), data.train.labels)
    assert (len(data.train), len(data.test)) == (28, 28)
    # The images are kept as files, so that later runs need neither the package nor the network.
    load_dataset("pacs", image_size=8, test_fraction=0.5, download=False)
    assert asked == [("flwrlabs/pacs", "train")]


TEXT = "ANN:\nabcdef\nghij\n\nBOB:\nxy\n\nANN:\nklmnop\n\nand more\n\nCAT:\nzzzzzzzzz\n"


def test_speeches_are_joined_by_speaker() -> None:
    assert speeches(TEXT) == {"ANN": "abcdef\nghij\nklmnop\nand more", "BOB": "xy", "CAT": "zzzzzzzzz"}


@pytest.mark.parametrize("name", ["tinyshakespeare.txt.gz", "input.txt"])
def test_shakespeare(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "shakespeare"
    folder.mkdir()
    content = TEXT.encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    data = load_dataset("shakespeare", data_dir=tmp_path, seq_len=4, test_fraction=0.3)
    assert data.task == "next-token"
    assert data.classes == tuple(sorted(set(TEXT)))
    assert data.domains == ("ANN", "CAT")  # Bob has less than one sequence

    def text(ids: torch.Tensor) -> list[str]:
        return ["".join(data.classes[i] for i in row) for row in ids.tolist()]

    # Ann has 27 characters: 6 windows, of which round(.3 * 6) = 2 are for the test; Cat 9: 2 windows, 1.
    assert text(data.train.inputs) == ["abcd", "ef\ng", "hij\n", "klmn", "zzzz"]
    assert text(data.train.labels) == ["bcde", "f\ngh", "ij\nk", "lmno", "zzzz"]
    assert text(data.test.inputs) == ["op\na", "nd m", "zzzz"]
    assert data.train.extras["domain"].tolist() == [0, 0, 0, 0, 1]
    assert data.test.extras["domain"].tolist() == [0, 0, 1]
    with pytest.raises(DataError, match="lower seq_len"):
        load_dataset("shakespeare", data_dir=tmp_path, seq_len=40)


def test_npz_images_features_and_tokens(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    images = random_images(4, 6, 5, 3)
    np.savez(path, x_train=images, y_train=[0, 1, 1, 0], x_test=images[:1], y_test=[1], classes=["no", "yes"])
    data = load_dataset(f"npz:{path}", layout="nhwc")
    assert same(data.train, images.transpose(0, 3, 1, 2), np.array([0, 1, 1, 0]))
    assert (data.name, data.classes) == ("own", ("no", "yes"))
    assert data.mean == pytest.approx((images / 255).mean(axis=(0, 1, 2)).tolist())

    features = np.array([[1.0, 5.0], [3.0, 5.0]])
    np.savez(
        path,
        x_train=features,
        y_train=[0, 1],
        x_test=features,
        y_test=[1, 0],
        domains=["a"],
        domain_train=[0, 0],
    )
    os.utime(path, ns=(1, 1))
    data = load_dataset(f"npz:{path}")
    assert data.prepare(data.train.inputs).tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    assert (data.domains, data.train.extras["domain"].tolist()) == (("a",), [0, 0])

    np.savez(path, x_train=[[0, 1, 2]], y_train=[[1, 2, 0]], x_test=[[2, 2, 2]], y_test=[[2, 2, 3]])
    os.utime(path, ns=(2, 2))
    data = load_dataset(f"npz:{path}")
    assert (data.task, data.num_classes, data.input_shape) == ("next-token", 4, (3,))


def test_npz_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_dataset(f"npz:{tmp_path}/none.npz")
    path = tmp_path / "bad.npz"
    np.savez(path, x_train=[[1.0]], y_train=[0])
    with pytest.raises(DataError, match="no array 'x_test'"):
        load_dataset(f"npz:{path}")
    np.savez(path, x_train=[[1.0]], y_train=[0.5], x_test=[[1.0]], y_test=[0])
    with pytest.raises(DataError, match="must hold integers"):
        load_dataset(f"npz:{path}")
    np.savez(path, x_train=np.array([{}], dtype=object), y_train=[0], x_test=[[1.0]], y_test=[0])
    with pytest.raises(DataError, match="cannot be read as npz"):
        load_dataset(f"npz:{path}")


def test_a_users_factory_by_import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Split(torch.zeros(2, 3), torch.tensor([0, 1]))

    def factory(width: float = 1.0) -> Dataset:
        return Dataset("own", rows, rows, ("a", "b"), (0.0,), (width,))

    class Source:
        def locate(self, search: Search) -> Found:
            return Found("made")

        def read(self, found: Found) -> Dataset:
            return factory(5.0)

    module = types.ModuleType("someones_data")
    module.factory, module.Source = factory, Source  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "someones_data", module)
    assert load_dataset("someones_data:factory", width=2.0).std == (2.0,)
    assert load_dataset("someones_data:Source").std == (5.0,)
    with pytest.raises(ConfigError, match="Known: width"):
        load_dataset("someones_data:factory", height=2.0)
    with pytest.raises(ConfigError, match="someones_data"):
        load_dataset("someones_data:nothing")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cifar11", {}, "Did you mean 'cifar100?'"),
        ("mnist", {"labels": "fine"}, r"Known: \(none\)"),
        ("cifar100", {"label": "fine"}, "Known: labels"),
        ("cifar100", {"labels": "super"}, "'fine' or 'coarse'"),
        ("pacs", {"leave_out": "clipart"}, "art_painting"),
        ("pacs", {"test_fraction": 1.0}, "between 0 and 1"),
        ("shakespeare", {"seq_len": 0}, "at least 1"),
    ],
)
def test_unknown_names_and_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_dataset(name, **options)


def test_missing_data_says_what_to_do(tmp_path: Path) -> None:
    for name in ("mnist", "cifar10", "cifar100", "usps", "pacs", "shakespeare"):
        with pytest.raises(DataError, match=r"FLOWERBED_DATA is not set and downloads .* Put .* FOLDER"):
            load_dataset(name, download=False)
    with pytest.raises(DataError, match=r"no download succeeded .*no network in tests.* Put cifar-10-python"):
        load_dataset("cifar10", data_dir=tmp_path)
    with pytest.raises(DataError, match="correct data_dir or FLOWERBED_DATA"):
        load_dataset("cifar10", data_dir=tmp_path / "nowhere")


def test_missing_fashion_mnist_names_debians_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowerbed.datasets.images._DEBIAN_FASHION", tmp_path / "none")
    with pytest.raises(DataError, match="dataset-fashion-mnist"):
        load_dataset("fashion_mnist", download=False)


def remote_of(path: Path, digest: str | None = None) -> Remote:
    import hashlib

    right = hashlib.md5(path.read_bytes()).hexdigest()
    return Remote((f"file://{path}.gone", f"file://{path}"), "md5", digest or right)


def test_a_download_is_verified_kept_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = tmp_path / "server"
    arrays = write_idx(server)
    files = [server / f"{name}.gz" for name in IDX]
    # The first address of each fails, the second serves under the same name.
    remotes = tuple(
        Remote((f"{r.urls[0][:-5]}", r.urls[1]), r.algorithm, r.digest) for r in map(remote_of, files)
    )
    monkeypatch.setattr("flowerbed.datasets.images._MNIST_REMOTES", remotes)
    seen: list[tuple[str, int, int | None]] = []
    data = load_dataset("mnist", progress=lambda *step: seen.append(step))
    assert same(data.train, arrays[0][:, None], arrays[1])
    assert seen[0] == (files[0].name, files[0].stat().st_size, files[0].stat().st_size)
    for file in files:
        file.unlink()
    assert same(load_dataset("mnist", download=False).train, arrays[0][:, None], arrays[1])


def test_a_wrong_checksum_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = tmp_path / "cifar-10-python.tar.gz"
    served.write_bytes(b"not the archive")
    monkeypatch.setattr("flowerbed.datasets.images._CIFAR10_REMOTE", remote_of(served, digest="0" * 32))
    with pytest.raises(DataError, match=r"instead of 000.*not kept"):
        load_dataset("cifar10")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_the_cache_is_used_and_follows_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = write_idx(tmp_path / "data" / "mnist")
    calls = []
    real = sources._read

    def counting(*arguments: Any) -> Dataset:
        calls.append(arguments[0])
        return real(*arguments)

    monkeypatch.setattr(sources, "_read", counting)
    first = load_dataset("mnist", data_dir=tmp_path / "data")
    second = load_dataset("mnist", data_dir=tmp_path / "data")
    assert len(calls) == 1
    assert same(second.train, arrays[0][:, None], arrays[1])
    assert (second.mean, second.classes, second.task) == (first.mean, first.classes, first.task)
    # A write by mistake stays in this process: neither a crash nor a change of the file.
    second.train.inputs.zero_()
    assert same(load_dataset("mnist", data_dir=tmp_path / "data").train, arrays[0][:, None], arrays[1])
    os.utime(tmp_path / "data" / "mnist" / f"{IDX[0]}.gz", ns=(1, 1))
    load_dataset("mnist", data_dir=tmp_path / "data")
    assert len(calls) == 2
    load_dataset("mnist", data_dir=tmp_path / "data", cache_dir=tmp_path / "other")
    assert len(calls) == 3


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "facts", "garbage"])
def test_a_damaged_cache_is_rebuilt(tmp_path: Path, damage: str) -> None:
    arrays = write_idx(tmp_path / "data" / "mnist")
    load_dataset("mnist", data_dir=tmp_path / "data")
    (file,) = (tmp_path / "cache" / "decoded").glob("*/train-inputs.npy")
    content = file.read_bytes()
    if damage == "truncate":
        file.write_bytes(content[:-100])
    elif damage == "flip":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "remove":
        file.unlink()
    elif damage == "garbage":
        file.write_bytes(b"garbage")
    else:
        (file.parent / "facts.json").write_text("{")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_dataset("mnist", data_dir=tmp_path / "data")
    assert same(data.train, arrays[0][:, None], arrays[1])
    assert any("is damaged and is rebuilt" in str(entry.message) for entry in caught) == (damage != "remove")
    assert file.read_bytes() == content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_dataset("mnist", data_dir=tmp_path / "data")
    assert len(list((tmp_path / "cache" / "decoded").iterdir())) == 1


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "mnist"
    write_idx(folder)
    (folder / f"{IDX[0]}.gz").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"'mnist' in .*mnist cannot be read as idx: BadGzipFile"):
        load_dataset("mnist", data_dir=tmp_path)
    (folder / f"{IDX[0]}.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x05abc"))
    with pytest.raises(DataError, match="holds 3 bytes"):
        load_dataset("mnist", data_dir=tmp_path)


def test_an_unwritable_cache_still_gives_data(tmp_path: Path) -> None:
    arrays = write_idx(tmp_path / "data" / "mnist")
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="could not be cached"):
        data = load_dataset("mnist", data_dir=tmp_path / "data", cache_dir=tmp_path / "file")
    assert same(data.train, arrays[0][:, None], arrays[1])


def test_processes_that_store_at_once_all_succeed(tmp_path: Path) -> None:
    write_idx(tmp_path / "data" / "mnist")
    code = (
        "import sys; from flowerbed.datasets.sources import load_dataset\n"
        "sys.stdin.readline()\n"
        "print(int(load_dataset('mnist', data_dir=sys.argv[1], download=False).train.inputs.long().sum()))"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "data")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    runs = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
        for _ in range(2)
    ]
    answers = []
    for run in runs:
        assert run.stdin is not None
        run.stdin.write("go\n")
        run.stdin.flush()
    for run in runs:
        answers.append(run.communicate(timeout=120)[0])
        assert run.returncode == 0
    assert len(set(answers)) == 1
    folders = [path.name for path in (tmp_path / "cache" / "decoded").iterdir()]
    assert len(folders) == 1


def test_importing_the_room_pulls_in_nothing_optional() -> None:
    code = (
        "import sys\n"
        "import flowerbed.datasets.sources, flowerbed.datasets.partitions\n"
        "import flowerbed.datasets.subsets, flowerbed.datasets.augment\n"
        "heavy = {'sklearn', 'PIL', 'datasets', 'flwr_datasets', 'flwr', 'ray', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_the_registry_lists_all_sets() -> None:
    assert set(DATASETS.names()) >= {
        *("digits", "cifar10", "cifar100", "mnist", "usps", "fashion_mnist", "pacs", "shakespeare"),
    }
