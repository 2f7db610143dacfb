"""Image sets with an official train and test split: CIFAR, MNIST, Fashion-MNIST, USPS."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.datasets.files import Found, Remote, Search
from flowerbed.datasets.formats import (
    Bytes,
    Integers,
    find_sheets,
    read_idx,
    read_libsvm,
    read_members,
    read_meta,
    read_pickle,
    read_sheets,
)
from flowerbed.errors import ConfigError

_SPLITS = ("train", "test")
_DIGITS = tuple("0123456789")
_CIFAR10_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_CIFAR100_FILES = ("train", "test", "meta")
_CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
_FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_IDX_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


def _idx_remotes(bases: Sequence[str], digests: Sequence[str]) -> tuple[Remote, ...]:
    return tuple(
        Remote(tuple(f"{base}{name}.gz" for base in bases), "md5", digest)
        for name, digest in zip(_IDX_NAMES, digests)
    )


# The MD5 sums are those of the official files, as torchvision has listed them for years.
_MNIST_REMOTES = _idx_remotes(
    ["https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"],
    [
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ],
)
_FASHION_REMOTES = _idx_remotes(
    [
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ],
    [
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ],
)
_USPS_BASE = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/multiclass/"
_USPS_REMOTES = (
    Remote((f"{_USPS_BASE}usps.bz2",), "md5", "ec16c51db3855ca6c91edd34d0e9b197"),
    Remote((f"{_USPS_BASE}usps.t.bz2",), "md5", "8ea070ee2aca1ac39742fdd1ef5ed118"),
)


def _cifar_remote(file_name: str, digest: str) -> Remote:
    # The second address is where the group's pages have moved to.
    bases = ("https://www.cs.toronto.edu/~kriz/", "https://cave.cs.toronto.edu/kriz/")
    return Remote(tuple(base + file_name for base in bases), "md5", digest)


_CIFAR10_REMOTE = _cifar_remote("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a")
_CIFAR100_REMOTE = _cifar_remote("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85")


@dataclass(frozen=True)
class Mnist:
    """60,000 + 10,000 handwritten digits 1x28x28 (LeCun et al. 1998); original files are IDX."""

    def locate(self, search: Search) -> Found:
        """Return packed sheets, IDX files (also of torchvision's ``MNIST/raw``), or a download."""
        return _locate_idx(search, search.folders("mnist", "MNIST", "MNIST/raw"), _MNIST_REMOTES)

    def read(self, found: Found) -> Dataset:
        """Decode the files."""
        train, test = _read_idx_or_sheets(found)
        return Dataset("mnist", train, test, _DIGITS, mean=(0.1307,), std=(0.3081,))


@dataclass(frozen=True)
class FashionMnist:
    """60,000 + 10,000 pictures of clothing 1x28x28 (Xiao et al. 2017, MIT licence); IDX files."""

    def locate(self, search: Search) -> Found:
        """Return sheets or IDX files, also those of Debian's package, or a download."""
        folders = [*search.folders("fashion_mnist", "fashion-mnist", "FashionMNIST", "FashionMNIST/raw")]
        return _locate_idx(
            search,
            [*folders, _DEBIAN_FASHION],
            _FASHION_REMOTES,
            otherwise="install Debian's package dataset-fashion-mnist",
        )

    def read(self, found: Found) -> Dataset:
        """Decode the files."""
        train, test = _read_idx_or_sheets(found)
        return Dataset("fashion_mnist", train, test, _FASHION_CLASSES, mean=(0.2860,), std=(0.3530,))


@dataclass(frozen=True)
class Usps:
    """7,291 + 2,007 handwritten digits 1x16x16 (Hull 1994); original files are libsvm text.

    The published values in [-1, 1] are stored as ``round(255 (x + 1) / 2)``.
    """

    def locate(self, search: Search) -> Found:
        """Return packed sheets, ``usps.bz2`` and ``usps.t.bz2`` (or unpacked), or a download."""
        for folder in search.folders("usps", "USPS", "."):
            if sheets := _own_sheets(search, folder):
                return Found("sheets", sheets)
            if files := _all_files(folder, ("usps", "usps.t"), ".bz2"):
                return Found("libsvm", files)
        return Found("libsvm", search.fetch(_USPS_REMOTES, "usps.bz2 and usps.t.bz2 into FOLDER/usps"))

    def read(self, found: Found) -> Dataset:
        """Decode the files."""
        if found.form == "sheets":
            train, test = _read_split_sheets(found.files)
        else:
            train, test = (_read_usps(path) for path in found.files)
        return Dataset("usps", train, test, _DIGITS, *image_statistics(train.inputs))


@dataclass(frozen=True)
class Cifar10:
    """50,000 + 10,000 photographs 3x32x32 in 10 classes (Krizhevsky 2009); original files are pickles."""

    def locate(self, search: Search) -> Found:
        """Return packed sheets, the folder or archive of python batches, or a download."""
        return _locate_cifar(
            search, "cifar-10-batches-py", _CIFAR10_REMOTE, [*_CIFAR10_BATCHES, "test_batch"]
        )

    def read(self, found: Found) -> Dataset:
        """Decode the files."""
        if found.form == "sheets":
            train, test = _read_split_sheets(found.files)
        else:
            members = read_members(found.files, [*_CIFAR10_BATCHES, "test_batch"])
            train, test = _read_cifar(members[:-1], members[-1], b"labels")
        return Dataset(
            "cifar10", train, test, _CIFAR10_CLASSES, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
        )


CifarLabels = Literal["fine", "coarse"]


@dataclass(frozen=True)
class Cifar100:
    """50,000 + 10,000 photographs 3x32x32 in 100 fine or 20 coarse classes (Krizhevsky 2009)."""

    labels: CifarLabels = "fine"

    def __post_init__(self) -> None:
        if self.labels not in get_args(CifarLabels):
            raise ConfigError(f"cifar100 labels are 'fine' or 'coarse', not '{self.labels}'.")

    def locate(self, search: Search) -> Found:
        """Return packed sheets, the folder or archive of python batches, or a download."""
        return _locate_cifar(search, "cifar-100-python", _CIFAR100_REMOTE, _CIFAR100_FILES)

    def read(self, found: Found) -> Dataset:
        """Decode the files."""
        if found.form == "sheets":
            meta = read_meta(found.files)
            train, test = _read_split_sheets(found.files)
            names = meta["classes"].tolist()
            if self.labels == "coarse":
                groups = torch.from_numpy(meta["fine_to_coarse"].astype(np.int64))
                train, test = (Split(split.inputs, groups[split.labels]) for split in (train, test))
                names = meta["superclasses"].tolist()
        else:
            train_file, test_file, meta_file = read_members(found.files, _CIFAR100_FILES)
            train, test = _read_cifar([train_file], test_file, f"{self.labels}_labels".encode())
            names = [name.decode() for name in read_pickle(meta_file)[f"{self.labels}_label_names".encode()]]
        return Dataset(
            "cifar100", train, test, tuple(names), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
        )


def image_statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel of uint8 images, on the scale [0, 1]."""
    # Whole numbers, so that the result does not depend on an order of summation, hence not on threads.
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256).tolist()
        total = sum(counts)
        first = sum(count * value for value, count in enumerate(counts))
        second = sum(count * value * value for value, count in enumerate(counts))
        means.append(first / (255 * total))
        # A channel that never varies is not scaled.
        stds.append(math.sqrt(total * second - first * first) / (255 * total) or 1.0)
    return tuple(means), tuple(stds)


def _split(images: Bytes, labels: Integers) -> Split:
    return Split(torch.from_numpy(np.array(images)), torch.from_numpy(np.array(labels, dtype=np.int64)))


def _read_split_sheets(files: Sequence[Path]) -> list[Split]:
    return [_split(*read_sheets(files, prefix)) for prefix in _SPLITS]


def _locate_idx(
    search: Search, folders: Iterable[Path], remotes: Sequence[Remote], otherwise: str = ""
) -> Found:
    for folder in folders:
        if sheets := find_sheets(folder, _SPLITS):
            return Found("sheets", sheets)
        if files := _all_files(folder, _IDX_NAMES, ".gz"):
            return Found("idx", files)
    wanted = f"the four files {_IDX_NAMES[0]}.gz ... {_IDX_NAMES[3]}.gz into FOLDER/{search.name}"
    return Found("idx", search.fetch(remotes, wanted, otherwise))


def _all_files(folder: Path, names: Sequence[str], packed: str) -> tuple[Path, ...] | None:
    """Return the files called ``names`` or ``names`` + ``packed``, or ``None`` unless all are there."""
    files = []
    for name in names:
        choices = [path for path in (folder / name, folder / f"{name}{packed}") if path.is_file()]
        if not choices:
            return None
        files.append(choices[0])
    return tuple(files)


def _read_idx_or_sheets(found: Found) -> list[Split]:
    if found.form == "sheets":
        return _read_split_sheets(found.files)
    train_images, train_labels, test_images, test_labels = (read_idx(path) for path in found.files)
    return [
        _split(train_images[:, None], train_labels.astype(np.int64)),
        _split(test_images[:, None], test_labels.astype(np.int64)),
    ]


def _read_usps(path: Path) -> Split:
    values, labels = read_libsvm(path, features=256)
    images = np.rint((values + 1) * 127.5).clip(0, 255).astype(np.uint8)
    # The file numbers the digits 0..9 as 1..10.
    return _split(images.reshape(-1, 1, 16, 16), labels - 1)


def _own_sheets(search: Search, folder: Path) -> tuple[Path, ...] | None:
    # Sheets do not say which set they are: those right in the data folder may be another one's.
    return None if folder == search.data_dir else find_sheets(folder, _SPLITS)


def _locate_cifar(search: Search, batches: str, remote: Remote, needed: Sequence[str]) -> Found:
    for folder in search.folders(search.name, "."):
        if sheets := _own_sheets(search, folder):
            return Found("sheets", sheets)
        for unpacked in (folder / batches, folder):
            if all((unpacked / name).is_file() for name in needed):
                return Found("batches", tuple(unpacked / name for name in needed))
        if (archive := folder / remote.file_name).is_file():
            return Found("archive", (archive,))
    return Found("archive", search.fetch([remote], f"{remote.file_name} (or its content) into FOLDER"))


def _read_cifar(train_files: Sequence[bytes], test_file: bytes, key: bytes) -> list[Split]:
    splits = []
    for files in (train_files, [test_file]):
        batches = [read_pickle(data) for data in files]
        images = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([np.asarray(batch[key], dtype=np.int64) for batch in batches])
        splits.append(_split(images, labels))
    return splits
