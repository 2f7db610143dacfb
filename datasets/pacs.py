"""PACS: one set of seven objects in four styles, the usual test of domain shift."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.datasets.files import Found, Search
from flowerbed.datasets.formats import Bytes, Integers, find_sheets, read_image, read_sheets
from flowerbed.errors import ConfigError, DataError
from flowerbed.seeds import numpy_rng

DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
_HUGGING_FACE = "flwrlabs/pacs"
_SUFFIXES = {".jpg", ".jpeg", ".png"}


@dataclass(frozen=True)
class Pacs:
    """9,991 colour images in 4 domains and 7 classes (Li et al. 2017), resized to ``image_size`` (Lanczos).

    ``extras["domain"]`` holds the domain. The set has no official test half. With ``leave_out`` naming a
    domain, that domain is the test split and the three others the train split (domain generalisation).
    Otherwise ``test_fraction`` of every domain and class is the test split, by one fixed permutation of
    each (stream ``datasets.pacs.split``, seed 0), at least one image. Normalised with ImageNet's statistics.
    """

    image_size: int = 64
    test_fraction: float = 0.2
    leave_out: str | None = None

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ConfigError(f"pacs image_size must be at least 1, not {self.image_size}.")
        if not 0 < self.test_fraction < 1:
            raise ConfigError(f"pacs test_fraction must lie between 0 and 1, not {self.test_fraction}.")
        if self.leave_out is not None and self.leave_out not in DOMAINS:
            raise ConfigError(f"pacs leave_out is one of {', '.join(DOMAINS)}; not '{self.leave_out}'.")

    def locate(self, search: Search) -> Found:
        """Return packed sheets, folders ``domain/class/*.jpg``, or a download from Hugging Face."""
        for folder in search.folders("pacs", "PACS", "PACS/kfold"):
            if sheets := find_sheets(folder, DOMAINS):
                return Found("sheets", sheets)
            if all((folder / domain).is_dir() for domain in DOMAINS):
                return Found("folders", _images(folder))
        wanted = "the folders art_painting, cartoon, photo, sketch (each CLASS/*.jpg) into FOLDER/pacs"
        if not search.download:
            raise search.missing("downloads are switched off (download=false)", wanted)
        try:
            rows = _hugging_face_rows()
            _write_folders(rows, search.download_dir / search.name)
        except ImportError as error:
            why = "the package 'datasets' that would download it is not installed (pip install datasets)"
            raise search.missing(why, wanted) from error
        except Exception as error:
            # The Hub's client raises errors of several libraries.
            raise search.missing(f"{_HUGGING_FACE} could not be downloaded ({error})", wanted) from error
        return Found("folders", _images(search.download_dir / search.name))

    def read(self, found: Found) -> Dataset:
        """Decode the files."""
        if found.form == "sheets":
            parts = [_resized(*read_sheets(found.files, domain), self.image_size) for domain in DOMAINS]
            images = np.concatenate([part[0] for part in parts])
            labels = np.concatenate([part[1] for part in parts])
            domains = np.repeat(np.arange(len(DOMAINS)), [len(part[1]) for part in parts])
        else:
            pictures = [read_image(path, self.image_size, colour=True) for path in found.files]
            images = np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2))
            labels = np.array([CLASSES.index(path.parent.name) for path in found.files], dtype=np.int64)
            domains = np.array([DOMAINS.index(path.parent.parent.name) for path in found.files])
        test = self._is_test(labels, domains)
        splits = []
        for rows in (np.flatnonzero(~test), np.flatnonzero(test)):
            extras = {"domain": torch.from_numpy(domains[rows].astype(np.int64))}
            splits.append(Split(torch.from_numpy(images[rows]), torch.from_numpy(labels[rows]), extras))
        return Dataset(
            name="pacs",
            train=splits[0],
            test=splits[1],
            classes=CLASSES,
            domains=DOMAINS,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        )

    def _is_test(self, labels: Integers, domains: Integers) -> np.ndarray[Any, np.dtype[np.bool_]]:
        if self.leave_out is not None:
            left_out: np.ndarray[Any, np.dtype[np.bool_]] = domains == DOMAINS.index(self.leave_out)
            return left_out
        test = np.zeros(len(labels), dtype=bool)
        for domain in range(len(DOMAINS)):
            for label in range(len(CLASSES)):
                cell = np.flatnonzero((domains == domain) & (labels == label))
                count = max(1, round(self.test_fraction * len(cell)))
                order = numpy_rng(0, "datasets.pacs.split", domain, label).permutation(len(cell))
                test[cell[order[:count]]] = True
        return test


def _images(folder: Path) -> tuple[Path, ...]:
    """Return the images below ``folder/domain/class`` in the order domain, class, file name."""
    paths = []
    for domain in DOMAINS:
        for label in CLASSES:
            found = sorted((folder / domain / label).glob("*"))
            images = [path for path in found if path.suffix.lower() in _SUFFIXES]
            if not images:
                raise DataError(f"PACS in {folder} has no images in {domain}/{label}; copy the folder again.")
            paths += images
    return tuple(paths)


def _resized(images: Bytes, labels: Integers, side: int) -> tuple[Bytes, Integers]:
    if images.shape[-1] == side:
        return images, labels
    from PIL import Image

    pictures = [
        np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))
        for image in images.transpose(0, 2, 3, 1)
    ]
    return np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2)), labels


def _hugging_face_rows() -> Iterable[Mapping[str, Any]]:
    """Yield ``domain`` and ``label`` as names and the encoded bytes of ``image``."""
    import datasets

    rows = datasets.load_dataset(_HUGGING_FACE, split="train")
    domain_feature, label_feature = rows.features["domain"], rows.features["label"]
    for row in rows.cast_column("image", datasets.Image(decode=False)):
        domain, label = row["domain"], row["label"]
        yield {
            "domain": domain if isinstance(domain, str) else domain_feature.int2str(domain),
            "label": label if isinstance(label, str) else label_feature.int2str(label),
            "image": row["image"]["bytes"],
        }


def _write_folders(rows: Iterable[Mapping[str, Any]], folder: Path) -> None:
    """Write the images as ``folder/domain/class/NNNNN.jpg``, all or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for number, row in enumerate(rows):
            if row["domain"] not in DOMAINS or row["label"] not in CLASSES:
                raise DataError(f"there is an unknown domain or class: {row['domain']}, {row['label']}")
            place = temporary / row["domain"] / row["label"]
            place.mkdir(parents=True, exist_ok=True)
            # Pillow goes by the content, not by the suffix.
            (place / f"{number:05}.jpg").write_bytes(row["image"])
        if folder.exists():
            return  # another process was faster
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
