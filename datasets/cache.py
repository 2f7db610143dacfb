"""Decoded data sets on disk: plain .npy files that are mapped into memory, never unpickled."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flowerbed.datasets.dataset import Dataset, Split, as_tensor
from flowerbed.datasets.files import Found
from flowerbed.errors import DataError

FORMAT_VERSION = 1
"""Part of every key: raise it when what is stored, or how a source decodes, changes."""

_FACTS = "facts.json"


def default_cache_dir() -> Path:
    """Return ``$FLOWERBED_CACHE``, else ``flowerbed`` in the user's XDG cache folder."""
    if given := os.environ.get("FLOWERBED_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowerbed"


def cache_key(name: str, options: Mapping[str, Any], found: Found) -> str:
    """Return the folder name of the decoded copy of these files under these options.

    The files enter with their sizes and modification times, which is cheap and notices a replaced file;
    their contents are not read.
    """
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in found.files]
    facts = json.dumps([FORMAT_VERSION, name, sorted(options.items()), found.form, files], default=str)
    label = name.partition(":")[0]
    return f"{label}-{hashlib.sha256(facts.encode()).hexdigest()[:20]}"


def load(folder: Path) -> Dataset | None:
    """Return the data set stored in ``folder``, or ``None`` if it is absent or damaged.

    Every array is checked against its stored type, shape and CRC-32. Arrays are mapped copy-on-write:
    processes share one copy in memory, and a stray in-place write reaches neither the file nor a fault.
    """
    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in facts["fields"].items()
        }
        fields |= {name: _load_split(folder, name, arrays) for name, arrays in facts["splits"].items()}
        return Dataset(**fields)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, DataError) as error:
        # Whatever is wrong with the copy, the answer is the same: decode the original files again.
        warnings.warn(f"The cached data in {folder} is damaged and is rebuilt: {error}", stacklevel=3)
        return None


def _load_split(folder: Path, name: str, arrays: Mapping[str, Mapping[str, Any]]) -> Split:
    tensors = {}
    for key, facts in arrays.items():
        array = np.load(folder / f"{name}-{key}.npy", mmap_mode="c", allow_pickle=False)
        if _facts(array) != facts:
            raise ValueError(f"{name}-{key}.npy is not what was stored")
        tensors[key] = as_tensor(array)
    extras = {key: tensor for key, tensor in tensors.items() if key not in ("inputs", "labels")}
    return Split(tensors["inputs"], tensors["labels"], extras)


def _facts(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    return {"dtype": str(array.dtype), "shape": list(array.shape), "crc32": zlib.crc32(array.data)}


def store(folder: Path, dataset: Dataset) -> Dataset:
    """Write the data set to ``folder`` in one step and return it mapped from there.

    The files are completed in a temporary folder that is then renamed, so a reader sees all or nothing and
    of several processes that store at once each is served. If the disk refuses (full, read-only), the
    decoded set is returned from memory with a warning.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        return _uncached(dataset, folder, error)
    try:
        _write(temporary, dataset)
        # Mapped before the rename: from here on it does not matter what other processes do to the name.
        mapped = load(temporary)
        _replace(temporary, folder)
        return dataset if mapped is None else mapped
    except OSError as error:
        return _uncached(dataset, folder, error)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _uncached(dataset: Dataset, folder: Path, error: OSError) -> Dataset:
    warnings.warn(
        f"The decoded '{dataset.name}' could not be cached in {folder.parent} ({error}); it is kept in memory "
        "and decoded again next time. Set FLOWERBED_CACHE to a writable folder.",
        stacklevel=4,
    )
    return dataset


def _write(folder: Path, dataset: Dataset) -> None:
    facts: dict[str, Any] = {"splits": {}, "fields": {}}
    for field in dataclasses.fields(dataset):
        value = getattr(dataset, field.name)
        if not isinstance(value, Split):
            facts["fields"][field.name] = value
            continue
        facts["splits"][field.name] = {}
        for key, tensor in {"inputs": value.inputs, "labels": value.labels, **value.extras}.items():
            array = tensor.contiguous().numpy()
            np.save(folder / f"{field.name}-{key}.npy", array, allow_pickle=False)
            facts["splits"][field.name][key] = _facts(array)
    (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")


def _replace(temporary: Path, folder: Path) -> None:
    """Rename ``temporary`` to ``folder``; what was there (a damaged copy, or a rival's good one) goes."""
    if folder.exists():
        stale = Path(tempfile.mkdtemp(prefix=".stale.", dir=folder.parent))
        with contextlib.suppress(FileNotFoundError):  # another process has moved it first
            folder.rename(stale / "old")
        shutil.rmtree(stale, ignore_errors=True)
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.exists():
            raise
