"""Any set of images or numbers of Hugging Face, by its name on the hub or from a folder: ``hf:NAME``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.datasets.files import Found, Search
from flowerbed.datasets.npz import statistics
from flowerbed.errors import DataError, require
from flowerbed.seeds import global_streams, numpy_rng

PREFIX = "hf:"
_USUAL = {"image": ("image", "img", "features", "x"), "label": ("label", "labels", "target", "y")}
_GREY = ("1", "L")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class HuggingFace:
    """A data set of Hugging Face's ``datasets``, by its name on the hub or from a folder.

    ``name`` is tried as a folder, then as a folder below ``data.dir`` (or FLOWERBED_DATA), then on the hub. A folder
    holds what ``save_to_disk`` wrote or what ``datasets.load_dataset(folder)`` reads: Parquet, JSON or CSV files, or
    images in folders by class. Images become uint8 ``(N, C, H, W)``, with one channel where all are grey; lists of
    numbers become float32 features of their shape. Both are normalised with the statistics of the training split, per
    channel or feature. Labels are whole numbers from 0, or texts, which are numbered in alphabetical order.
    """

    name: str
    image: str | None = None
    """Column of the inputs, images or lists of numbers; None takes the only image column, or one of a usual name."""
    label: str | None = None
    """Column of the labels; None takes the only column of class labels, or one of a usual name."""
    domain: str | None = None
    """Column that says which domain a sample comes from, for partition=domain; None for none."""
    subset: str | None = None
    """Configuration of a set that has several."""
    revision: str | None = None
    """Commit, tag or branch on the hub; only a commit makes the run repeatable."""
    train: str = "train"
    """Split to train on."""
    test: str | None = None
    """Split to test on; None takes the one called test or, where there is none, keeps test_share from training."""
    test_share: float = 0.2
    """Share of the training split that is the test set where there is none, the same samples for every seed."""
    side: int | None = None
    """Height and width that images are resized to; None needs images of one size."""

    def __post_init__(self) -> None:
        require(bool(self.name), "Name a data set after 'hf:', for example dataset=hf:ylecun/mnist.")
        require(
            0 < self.test_share < 1, f"dataset.test_share is {self.test_share}; give a share between 0 and 1."
        )
        require(self.side is None or self.side >= 1, f"dataset.side is {self.side}; give 1 or more.")
        require(self.train != self.test, f"dataset.train and dataset.test are both '{self.train}'.")

    def locate(self, search: Search) -> Found:
        """Return the Arrow files in which ``datasets`` keeps the set: those to train on, then those to test on.

        Raises ``DataError`` with the remedy if the set is neither here nor to be had, or has no such split.
        """
        splits = self._load(search)
        test = self.test or ("test" if "test" in splits else None)
        parts = []
        for option, split in (("train", self.train), ("test", test)):
            if split is None:
                continue
            if split not in splits:
                raise DataError(
                    f"'{PREFIX}{self.name}' has no split '{split}' but {', '.join(splits)}; set dataset.{option}."
                )
            parts.append([Path(file["filename"]) for file in splits[split].cache_files])
        # How many of the files are to train on is part of how they are read.
        return Found(f"Arrow {len(parts[0])}", tuple(path for part in parts for path in part))

    def read(self, found: Found) -> Dataset:
        """Decode the columns; raises ``DataError`` for a column that is missing or holds something else."""
        datasets = _datasets()
        count = int(found.form.split()[1])
        tables = [
            datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in part])
            for part in (found.files[:count], found.files[count:])
            if part
        ]
        features = tables[0].features
        image = self._column("image", features, datasets.Image)
        label = self._column("label", features, datasets.ClassLabel)
        if isinstance(features[image], datasets.Image):
            inputs = self._images([table[image] for table in tables])
        else:
            inputs = [self._numbers(image, table.with_format("numpy")[image][:]) for table in tables]
        classes, labels = self._numbered(label, features[label], [table[label][:] for table in tables])
        domains: tuple[str, ...] = ()
        extras: list[dict[str, Tensor]] = [{} for _ in tables]
        if self.domain is not None:
            column = self._column("domain", features, None)
            domains, places = self._numbered(column, features[column], [table[column][:] for table in tables])
            extras = [{"domain": place} for place in places]
        splits = [Split(torch.from_numpy(x), y, extra) for x, y, extra in zip(inputs, labels, extras)]
        train, test = splits if len(splits) == 2 else self._divided(splits[0])
        mean, std = statistics(train.inputs)
        return Dataset(Path(self.name).name, train, test, classes, mean, std, domains)

    def _load(self, search: Search) -> Mapping[str, Any]:
        """Return the splits by name, as ``datasets`` loads them."""
        datasets = _datasets()
        candidates = [Path(self.name).expanduser()]
        if search.data_dir is not None:
            candidates.append(search.data_dir / self.name)
        folder = next((path.resolve() for path in candidates if path.is_dir()), None)
        try:
            if folder is None:
                with _network(datasets, search.download):
                    found = datasets.load_dataset(self.name, self.subset, revision=self.revision)
            elif any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
                found = datasets.load_from_disk(str(folder))
            else:
                cache = search.download_dir / "hugging_face"
                found = datasets.load_dataset(str(folder), self.subset, cache_dir=str(cache))
        except Exception as error:
            # The library raises errors of a dozen kinds, each in its own words.
            raise self._missing(folder, search, error) from error
        return found if isinstance(found, dict) else {self.train: found}

    def _missing(self, folder: Path | None, search: Search, error: Exception) -> DataError:
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if folder is not None:
            return DataError(
                f"The folder {folder} cannot be read as a data set ({why}); it must hold what save_to_disk wrote, or "
                "Parquet, JSON or CSV files, or images in folders by class."
            )
        switched = "" if search.download else " and data.download=false allows no download"
        return DataError(
            f"The data set '{PREFIX}{self.name}' is no folder, and not to be had from the hub{switched} ({why}). Where "
            f"there is a network, run: hf download --repo-type dataset {self.name} --local-dir DIR; bring DIR here and "
            f"give dataset={PREFIX}DIR. Set HF_HUB_OFFLINE=1 to use only what an earlier run has downloaded."
        )

    def _column(self, option: str, features: Mapping[str, Any], kind: type | None) -> str:
        """Return the column to use: the one asked for, the only one of its kind, or the one of a usual name."""
        asked = getattr(self, option)
        if asked is not None:
            candidates = [asked] if asked in features else []
        else:
            candidates = [name for name, feature in features.items() if kind and isinstance(feature, kind)]
            usual = [name for name in _USUAL[option] if name in features]
            candidates = candidates or usual[:1]
        if len(candidates) == 1:
            return str(candidates[0])
        what = (
            f"no column '{asked}'"
            if asked
            else f"{len(candidates) or 'no'} columns that could be the {option}"
        )
        raise DataError(
            f"'{PREFIX}{self.name}' has {what}; set dataset.{option} to one of {', '.join(features)}."
        )

    def _images(self, columns: Sequence[Any]) -> list[Array]:
        """Return each column of pictures as uint8 ``(N, C, H, W)``."""
        pictures = [[self._pixels(picture) for picture in column] for column in columns]
        grey = all(pixels.ndim == 2 for part in pictures for pixels in part)
        sizes = {pixels.shape[:2] for part in pictures for pixels in part}
        if len(sizes) != 1:
            some = ", ".join(f"{height}x{width}" for height, width in sorted(sizes)[:3])
            raise DataError(
                f"The images of '{PREFIX}{self.name}' are of {len(sizes)} sizes ({some}, ...); set dataset.side."
            )
        return [_stacked(part, grey) for part in pictures]

    def _pixels(self, picture: Any) -> Array:
        """Return a picture as uint8, ``(H, W)`` if it is grey, else ``(H, W, 3)``."""
        from PIL import Image

        if picture is None:
            raise DataError(f"A sample of '{PREFIX}{self.name}' has no image; leave it out.")
        picture = picture.convert("L" if picture.mode in _GREY else "RGB")
        if self.side is not None and picture.size != (self.side, self.side):
            picture = picture.resize((self.side, self.side), Image.Resampling.LANCZOS)
        return np.asarray(picture)

    def _numbers(self, column: str, values: Array) -> Array:
        """Return a column of lists of numbers as float32 features ``(N, F)``, or ``(N, C, H, W)``."""
        if values.dtype == object or not np.issubdtype(values.dtype, np.number) or values.ndim < 2:
            raise DataError(
                f"The column '{column}' of '{PREFIX}{self.name}' holds neither images nor lists of numbers, all of one "
                "length; choose another with dataset.image."
            )
        values = values[:, None] if values.ndim == 3 else values
        return np.ascontiguousarray(values, dtype=np.float32)

    def _numbered(
        self, column: str, feature: Any, values: Sequence[Sequence[Any]]
    ) -> tuple[tuple[str, ...], list[Tensor]]:
        """Return the names of a column's values and their numbers, int64 ``(N,)``, for each of the splits."""
        together = {value for part in values for value in part}
        if all(isinstance(value, str) for value in together):
            names = sorted(together)
            numbers = {name: number for number, name in enumerate(names)}
            return tuple(names), [torch.tensor([numbers[value] for value in part]) for part in values]
        if not all(isinstance(value, int) and value >= 0 for value in together):
            strange = next(v for v in together if not (isinstance(v, int) and v >= 0))
            raise DataError(
                f"The column '{column}' of '{PREFIX}{self.name}' holds {strange!r}, which is no class (a test split "
                "without labels?); choose another column, or another split with dataset.test."
            )
        known = getattr(feature, "names", None) or [str(number) for number in range(max(together) + 1)]
        return tuple(known), [torch.tensor([int(value) for value in part]) for part in values]

    def _divided(self, whole: Split) -> tuple[Split, Split]:
        """Return the samples to train on and those to test on, drawn from one split."""
        order = torch.from_numpy(numpy_rng(0, "datasets.hugging_face.split").permutation(len(whole)))
        tested = max(1, round(self.test_share * len(whole)))
        return _rows(whole, order[tested:].sort().values), _rows(whole, order[:tested].sort().values)


def _rows(split: Split, rows: Tensor) -> Split:
    extras = {name: values[rows] for name, values in split.extras.items()}
    return Split(split.inputs[rows], split.labels[rows], extras)


def _stacked(pictures: Sequence[Array], grey: bool) -> Array:
    """Return uint8 pictures as one array ``(N, C, H, W)``; among colours, grey ones get three equal channels."""
    if grey:
        return np.stack(pictures)[:, None]
    colours = [p if p.ndim == 3 else np.repeat(p[:, :, None], 3, axis=2) for p in pictures]
    return np.ascontiguousarray(np.stack(colours).transpose(0, 3, 1, 2))


@contextlib.contextmanager
def _network(datasets: Any, allowed: bool) -> Iterator[None]:
    """Keep ``datasets`` to what it has downloaded before, unless the network is ``allowed``."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or not allowed
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _datasets() -> Any:
    try:
        # Importing it draws from Python's global generator.
        with global_streams(0, "datasets.hugging_face.import"):
            import datasets

            datasets.load_dataset  # noqa: B018 - a folder called datasets is importable as well
    except (ImportError, AttributeError) as error:
        raise DataError(
            "Data sets named hf:NAME need Hugging Face's datasets, which is not installed; install it with: "
            "pip install 'flowerbed[simulation]'."
        ) from error
    return datasets
