"""A device's own samples: where they lie, and how they become what a run trains on.

``kind`` of the configuration file names one of ``DEVICE_DATA`` or a class of the user's, ``package.module:Class``,
which is made from the options beside it and has one method, ``load``. What every sample must look like comes from the
server (``DataForm``); a device never learns it from its own few samples.
"""

from __future__ import annotations

import csv
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from flowerbed.clients.data import CLEAN, LABELLED, UNLABELLED
from flowerbed.datasets import cache
from flowerbed.datasets.dataset import Dataset, Split, as_tensor
from flowerbed.datasets.files import Found
from flowerbed.datasets.form import DataForm
from flowerbed.datasets.formats import read_image
from flowerbed.errors import ConfigError, DataError, FlowerbedError, require
from flowerbed.registry import Registry
from flowerbed.seeds import numpy_rng

PARTS = ("train", "test", "validation")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
NO_LABEL = "unlabelled"
"""Folder of images, or cell of a table, of samples whose label nobody knows."""
COPIES = 3
"""Decoded copies that are kept."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class DeviceSplits:
    """What a device has: raw samples to train on, and perhaps to test on and to choose settings by.

    A label of ``UNLABELLED`` (-1) says that nobody knows it; only semi-supervised strategies use such samples.
    """

    train: Split
    test: Split
    validation: Split | None = None


class DeviceData(Protocol):
    """Something that reads one device's samples."""

    def load(self, form: DataForm) -> DeviceSplits:
        """Return the samples in the form that the run asks for; raises ``DataError`` where that is impossible."""
        ...


DEVICE_DATA: Registry[type[DeviceData]] = Registry("kind of device data")


@DEVICE_DATA.register("images")
@dataclass(frozen=True)
class ImageFolder:
    """Pictures in ``CLASS/*.png`` (or jpg, bmp, webp, tiff), or in ``train/CLASS/*`` and ``test/CLASS/*``.

    Folders are called as the run's classes, or by their numbers; one called ``unlabelled`` holds samples without label.
    Pictures are resized to the run's size (Lanczos) and made grey or coloured as it needs. Reading them needs Pillow.
    """

    path: str
    test_fraction: float = 0.2
    """Share of the samples that is kept for testing where there is no folder ``test``; rounded down."""

    def __post_init__(self) -> None:
        _require_share(self.test_fraction)

    def load(self, form: DataForm) -> DeviceSplits:
        if not form.images:
            raise DataError(
                f"data.kind is images, but the run's data '{form.name}' are inputs of shape {form.input_shape}."
            )
        root = _folder(self.path)
        parts = {part: root / part for part in PARTS if (root / part).is_dir()}
        if parts and "train" not in parts:
            raise DataError(f"{root} has a folder '{next(iter(parts))}' but no folder 'train'; add it.")
        found = {part: self._read(folder, form) for part, folder in (parts or {"train": root}).items()}
        return _divided(found, form, self.test_fraction)

    def files(self) -> Iterator[Path]:
        """Yield every file that is read, for noticing that one changed."""
        yield from (path for path in sorted(_folder(self.path).rglob("*")) if path.suffix.lower() in IMAGES)

    def _read(self, folder: Path, form: DataForm) -> Split:
        channels, height, width = form.input_shape
        if height != width:
            raise DataError(
                f"The run's images are {height} by {width} pixels and a folder of images is read as squares; store "
                "the samples in an npz file."
            )
        pictures, labels = [], []
        for directory in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
            label = _label(directory.name, form, f"The folder {directory}")
            for path in sorted(p for p in directory.rglob("*") if p.suffix.lower() in IMAGES):
                pictures.append(_picture(path, height, channels))
                labels.append(label)
        if not pictures:
            raise DataError(
                f"{folder} holds no pictures; put them into one folder for each class, such as "
                f"{folder / form.classes[0]}/1.png."
            )
        return _split(np.stack(pictures), labels)


@DEVICE_DATA.register("npz")
@dataclass(frozen=True)
class NpzArrays:
    """Plain arrays in one ``.npz`` file (nothing is unpickled).

    ``x_train`` and ``y_train`` are needed; ``x_test`` with ``y_test`` and ``x_validation`` with ``y_validation`` are
    optional. Inputs are ``(N, *input_shape)``; images ``(N, H, W)`` get their one channel. Further arrays with one row
    for each sample are extras: ``domain_train``, ``labelled_train`` ...
    """

    path: str
    test_fraction: float = 0.2
    """Share of the samples that is kept for testing where the file has none; rounded down."""

    def __post_init__(self) -> None:
        _require_share(self.test_fraction)

    def load(self, form: DataForm) -> DeviceSplits:
        path = _file(self.path)
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        found = {part: self._split(arrays, part, form) for part in PARTS if f"x_{part}" in arrays}
        if "train" not in found:
            raise DataError(f"{path} has no array 'x_train'; it has {', '.join(sorted(arrays)) or 'none'}.")
        return _divided(found, form, self.test_fraction)

    def _split(self, arrays: Mapping[str, npt.NDArray[Any]], part: str, form: DataForm) -> Split:
        inputs, labels = arrays[f"x_{part}"], arrays.get(f"y_{part}")
        if labels is None or not np.issubdtype(labels.dtype, np.integer):
            has = "is missing" if labels is None else f"holds {labels.dtype}"
            raise DataError(f"The array 'y_{part}' of {self.path} {has}; it must hold whole numbers.")
        if form.images and inputs.ndim == 3:
            inputs = inputs[:, None]
        extras = {
            name.removesuffix(f"_{part}"): values
            for name, values in arrays.items()
            if name.endswith(f"_{part}") and name not in (f"x_{part}", f"y_{part}")
        }
        return _split(_typed(inputs, form), labels, extras)


@dataclass(frozen=True)
class _Table:
    """What tables have in common: one row for each sample, a column with the label, the others are the input."""

    path: str
    label: str = "label"
    """Column of the label: the name of a class or its number; an empty cell is a sample without label."""
    features: Sequence[str] = ()
    """Columns of the input, in order; () means all but the label and the split."""
    split: str = "split"
    """Column that says train, test or validation, where there is one."""
    test_fraction: float = 0.2
    """Share of the samples that is kept for testing where there is no such column; rounded down."""

    def __post_init__(self) -> None:
        _require_share(self.test_fraction)

    def columns(self) -> dict[str, Sequence[Any]]:
        """Return the table by column."""
        raise NotImplementedError

    def load(self, form: DataForm) -> DeviceSplits:
        columns = self.columns()
        if self.label not in columns:
            raise DataError(
                f"{self.path} has no column '{self.label}' for the label; it has {', '.join(columns)}. Name the right "
                "one with data.label."
            )
        names = list(self.features) or [c for c in columns if c not in (self.label, self.split)]
        missing = [name for name in names if name not in columns]
        if missing:
            raise DataError(
                f"{self.path} has no column '{missing[0]}'; correct data.features. It has {', '.join(columns)}."
            )
        if len(names) != form.values:
            raise DataError(
                f"{self.path} has {len(names)} columns of inputs, the run's data '{form.name}' have {form.values} "
                f"values {form.input_shape}; choose the columns with data.features."
            )
        rows = np.stack([self._numbers(name, columns[name]) for name in names], axis=1)
        inputs = _typed(rows.reshape(-1, *form.input_shape), form)
        where = f"The column '{self.label}' of {self.path}"
        labels = np.array([_label(_text(v), form, where) for v in columns[self.label]], dtype=np.int64)
        if self.split not in columns:
            return _divided({"train": _split(inputs, labels)}, form, self.test_fraction)
        parts = np.array([_text(v) for v in columns[self.split]])
        strange = sorted(set(parts.tolist()) - set(PARTS))
        if strange:
            raise DataError(
                f"The column '{self.split}' of {self.path} holds '{strange[0]}'; it must say {', '.join(PARTS)}."
            )
        found = {p: _split(inputs[parts == p], labels[parts == p]) for p in PARTS if bool((parts == p).any())}
        if "train" not in found:
            raise DataError(f"The column '{self.split}' of {self.path} says 'train' in no row.")
        return _divided(found, form, self.test_fraction)

    def files(self) -> Iterator[Path]:
        """Yield every file that is read, for noticing that one changed."""
        yield _file(self.path)

    def _numbers(self, name: str, values: Sequence[Any]) -> Floats:
        try:
            return np.array([float(value) for value in values], dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"The column '{name}' of {self.path} holds something that is no number ({error}); leave it out with "
                "data.features, or convert it."
            ) from error


@DEVICE_DATA.register("csv")
@dataclass(frozen=True)
class CsvTable(_Table):
    """A comma-separated table with a header line."""

    def columns(self) -> dict[str, Sequence[Any]]:
        path = _file(self.path)
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            rows = [row for row in reader if row]
        for line, row in enumerate(rows, start=2):
            if len(row) != len(header):
                raise DataError(f"Row {line} of {path} has {len(row)} cells, the header has {len(header)}.")
        cells = zip(*rows, strict=True) if rows else ([] for _ in header)
        return dict(zip(header, map(list, cells), strict=True))


@DEVICE_DATA.register("parquet")
@dataclass(frozen=True)
class ParquetTable(_Table):
    """A Parquet file; reading it needs pyarrow."""

    def columns(self) -> dict[str, Sequence[Any]]:
        path = _file(self.path)
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise DataError(
                f"Reading {path} needs pyarrow, which is not installed; install it with: pip install pyarrow"
            ) from error
        try:
            table = parquet.read_table(path)
        except (ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read as Parquet: {error}") from error
        return {name: table.column(name).to_pylist() for name in table.column_names}


def open_data(kind: str, options: Mapping[str, Any], folder: Path) -> DeviceData:
    """Return the data of that kind; its relative ``path`` counts from ``folder``.

    Raises ``ConfigError`` for an unknown kind or option.
    """
    made: Any = DEVICE_DATA.get(kind)
    options = dict(options)
    if isinstance(options.get("path"), str):
        options["path"] = str(folder / Path(options["path"]).expanduser())
    if is_dataclass(made):
        known = [f.name for f in fields(made)]
        for name in options:
            if name not in known:
                raise ConfigError(
                    f"[data] of kind '{kind}' has no option '{name}'; it has {', '.join(known)}."
                )
    try:
        opened: DeviceData = made(**options)
        return opened
    except TypeError as error:
        raise ConfigError(f"[data] of kind '{kind}' does not fit: {error}.") from error


def load_data(kind: str, options: Mapping[str, Any], folder: Path, form: DataForm, kept: Path) -> Dataset:
    """Return a device's samples as a data set of that form; raises ``DataError`` where they have another one.

    Pictures and tables are decoded once and kept below ``kept``, because every message to a device may be answered by
    a process of its own; a changed file is noticed.
    """
    data = open_data(kind, options, folder)
    files = getattr(data, "files", None)
    target: Path | None = None
    if kind in DEVICE_DATA.names() and files is not None:
        found = Found(kind, tuple(files()))
        target = kept / cache.cache_key(f"{kind}:", {**options, "form": form.plain()}, found)
        known = cache.load(target)
        if known is not None:
            return known
    try:
        # A user's class may return anything, and nobody else checks it.
        splits: Any = data.load(form)
    except FlowerbedError:
        raise
    except Exception as error:
        # Decoders and users' own classes fail in every way; who runs the device needs to know where.
        raise DataError(
            f"The data of kind '{kind}' ({dict(options)}) cannot be read: {type(error).__name__}: {error}."
        ) from error
    if not isinstance(splits, DeviceSplits):
        raise DataError(f"{kind}.load returned {type(splits).__name__}; it must return DeviceSplits.")
    train, test, validation = splits.train, splits.test, splits.validation
    dataset = form.dataset(_marked(train), _marked(test), None if validation is None else _marked(validation))
    if target is None:
        return dataset
    found_again = cache.store(target, dataset)
    # Copies of files that have changed since, or of other runs, would fill the disk.
    copies = sorted(kept.glob("[!.]*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in copies[COPIES:]:
        shutil.rmtree(old, ignore_errors=True)
    return found_again


def save_npz(path: Path, dataset: Dataset, train: npt.ArrayLike, test: npt.ArrayLike = ()) -> None:
    """Write some samples of a data set, by number, as the file that data of kind ``npz`` reads.

    With a client's indices it gives a device exactly what that client has in a simulation.
    """
    arrays: dict[str, Any] = {}
    for part, split, chosen in (("train", dataset.train, train), ("test", dataset.test, test)):
        rows = torch.from_numpy(np.array(chosen, dtype=np.int64))
        arrays[f"x_{part}"] = split.inputs[rows].numpy()
        arrays[f"y_{part}"] = split.labels[rows].numpy()
        arrays |= {f"{name}_{part}": values[rows].numpy() for name, values in split.extras.items()}
    np.savez(path, **arrays)


def _marked(split: Split) -> Split:
    """Return the split with the extra ``labelled`` if some labels are unknown; those count as class 0 then."""
    if split.labels.dim() != 1 or not bool((split.labels == UNLABELLED).any()):
        return split
    known = split.labels != UNLABELLED
    extras = {**split.extras, LABELLED: known, CLEAN: split.labels}
    return replace(split, labels=split.labels.clamp_min(0), extras=extras)


def _divided(found: Mapping[str, Split], form: DataForm, test_fraction: float) -> DeviceSplits:
    """Return the parts that were found; without a test part, a fixed random share of the training samples is one."""
    train, validation = found["train"], found.get("validation")
    if "test" in found:
        return DeviceSplits(train, found["test"], validation)
    kept = int(len(train) * test_fraction)
    order = numpy_rng(0, "device data.test share").permutation(len(train))
    return DeviceSplits(_rows(train, np.sort(order[kept:])), _rows(train, np.sort(order[:kept])), validation)


def _rows(split: Split, rows: npt.NDArray[np.int64]) -> Split:
    index = torch.from_numpy(rows)
    return Split(split.inputs[index], split.labels[index], {n: v[index] for n, v in split.extras.items()})


def _split(
    inputs: npt.NDArray[Any], labels: npt.ArrayLike, extras: Mapping[str, npt.NDArray[Any]] | None = None
) -> Split:
    found = {}
    for name, values in (extras or {}).items():
        kind = np.float32 if np.issubdtype(values.dtype, np.floating) else np.int64
        found[name] = as_tensor(values if values.dtype == bool else values.astype(kind))
    whole = np.ascontiguousarray(np.asarray(labels, dtype=np.int64))
    return Split(as_tensor(np.ascontiguousarray(inputs)), as_tensor(whole), found)


def _typed(inputs: npt.NDArray[Any], form: DataForm) -> npt.NDArray[Any]:
    """Return numbers in the type of the run's inputs, where that loses nothing."""
    if form.dtype == "int64":
        return inputs.astype(np.int64) if np.all(inputs == np.floor(inputs)) else inputs.astype(np.float32)
    if form.dtype == "uint8" and inputs.dtype != np.uint8:
        # Pixels up to 255 are told from images in [0, 1] by their size: none of the latter has a whole number above 1.
        whole = bool(np.all(inputs == np.floor(inputs)))
        pixels = whole and inputs.size > 0 and 1 < inputs.max() <= 255 and inputs.min() >= 0
        return inputs.astype(np.uint8 if pixels else np.float32)
    return inputs if inputs.dtype == np.uint8 else inputs.astype(np.float32)


def _label(text: str, form: DataForm, where: str) -> int:
    if text in ("", NO_LABEL):
        return UNLABELLED
    try:
        return form.class_number(text)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _text(value: object) -> str:
    """Return a cell of a table as text; whole numbers without a fraction, and nothing for what is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _picture(path: Path, side: int, channels: int) -> npt.NDArray[np.uint8]:
    """Return a picture as uint8 ``(channels, side, side)``."""
    try:
        pixels = read_image(path, side, colour=channels == 3)
    except OSError as error:
        raise DataError(f"The picture {path} cannot be read: {error}. Remove or replace it.") from error
    if channels == 1 and pixels.ndim == 3:
        # Grey by the weights of ITU-R BT.601, as every image library has it.
        pixels = np.rint(pixels @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _folder(path: str) -> Path:
    if not Path(path).is_dir():
        raise DataError(f"The data folder {path} does not exist; correct data.path.")
    return Path(path)


def _file(path: str) -> Path:
    if not Path(path).is_file():
        raise DataError(f"The data file {path} does not exist; correct data.path.")
    return Path(path)


def _require_share(share: float) -> None:
    require(0 <= share < 1, f"data.test_fraction is {share}; give a share from 0 to below 1.")
