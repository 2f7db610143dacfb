"""``load_dataset``: a data set by name, decoded once and then mapped from a cache."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowerbed.datasets import cache
from flowerbed.datasets.dataset import Dataset
from flowerbed.datasets.digits import Digits
from flowerbed.datasets.excerpt import Excerpt, NoisyLabels
from flowerbed.datasets.files import Busy, Found, Progress, Search
from flowerbed.datasets.hugging_face import PREFIX as HUGGING_FACE
from flowerbed.datasets.hugging_face import HuggingFace
from flowerbed.datasets.images import Cifar10, Cifar100, FashionMnist, Mnist, Usps
from flowerbed.datasets.npz import NpzFile
from flowerbed.datasets.pacs import Pacs
from flowerbed.datasets.restyled import Restyled
from flowerbed.datasets.shakespeare import Shakespeare
from flowerbed.datasets.source import DataSource
from flowerbed.errors import ConfigError, DataError, FlowerbedError
from flowerbed.registry import Registry

DATASETS: Registry[Callable[..., DataSource | Dataset]] = Registry("dataset")
"""Name -> factory. A factory takes the set's options by keyword and returns a source, or a ready set."""

DATASETS.add("digits", Digits)
DATASETS.add("mnist", Mnist)
DATASETS.add("fashion_mnist", FashionMnist)
DATASETS.add("usps", Usps)
DATASETS.add("cifar10", Cifar10)
DATASETS.add("cifar100", Cifar100)
DATASETS.add("pacs", Pacs)
DATASETS.add("restyled", Restyled)
DATASETS.add("shakespeare", Shakespeare)
DATASETS.add("excerpt", Excerpt)
DATASETS.add("noisy_labels", NoisyLabels)

_NPZ = "npz:"


def load_dataset(
    name: str,
    *,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    download: bool = True,
    progress: Progress | None = None,
    busy: Busy = contextlib.nullcontext,
    **options: Any,
) -> Dataset:
    """Return the data set called ``name``.

    ``name`` is one of ``DATASETS``, ``npz:PATH`` (see ``NpzFile``), ``hf:NAME`` (see ``HuggingFace``), or
    ``package.module:factory``, where the factory takes ``options`` and returns a ``Dataset`` or a
    ``DataSource``. Files are looked for in ``data_dir`` (default: the environment variable
    ``FLOWERBED_DATA``), then downloaded from the official place if ``download`` allows it. The decoded set is
    kept in ``cache_dir`` (default: ``FLOWERBED_CACHE``, else the user's cache folder). ``progress`` and
    ``busy`` hear of downloads and of decoding. ``options`` are the
    source's own, for example ``labels="coarse"``.

    Raises ``ConfigError`` for an unknown name or option, ``DataError`` with the remedy for data that is
    missing, damaged or fails its checksum.
    """
    source = _build(name, options)
    if isinstance(source, Dataset):
        return source
    cache_root = Path(cache_dir).expanduser() if cache_dir is not None else cache.default_cache_dir()
    given = data_dir if data_dir is not None else os.environ.get("FLOWERBED_DATA") or None
    search = Search(
        name=name,
        data_dir=None if given is None else Path(given).expanduser(),
        download_dir=cache_root / "downloads",
        download=download,
        progress=progress,
    )
    found = source.locate(search)
    if not found.files:
        return _read(name, source, found)
    folder = cache_root / "decoded" / cache.cache_key(name, _options(source), found)
    cached = cache.load(folder)
    if cached is not None:
        return cached
    with busy(f"decoding {name}"):
        return cache.store(folder, _read(name, source, found))


def _build(name: str, options: dict[str, Any]) -> DataSource | Dataset:
    factory: Callable[..., DataSource | Dataset]
    if name.startswith(_NPZ):
        factory = functools.partial(NpzFile, name.removeprefix(_NPZ))
    elif name.startswith(HUGGING_FACE):
        factory = functools.partial(HuggingFace, name.removeprefix(HUGGING_FACE))
    else:
        factory = DATASETS.get(name)
    signature = inspect.signature(factory)
    try:
        signature.bind(**options)
    except TypeError as error:
        known = ", ".join(signature.parameters) or "(none)"
        raise ConfigError(f"The options of data set '{name}' do not fit: {error}. Known: {known}.") from error
    return factory(**options)


def _options(source: object) -> dict[str, Any]:
    if dataclasses.is_dataclass(source) and not isinstance(source, type):
        return dataclasses.asdict(source)
    return {}


def _read(name: str, source: DataSource, found: Found) -> Dataset:
    try:
        return source.read(found)
    except FlowerbedError:
        raise
    except Exception as error:
        # Decoders meet damaged files with errors of every kind; the user needs the file's name.
        where = found.files[0].parent if found.files else found.form
        raise DataError(
            f"The files of '{name}' in {where} cannot be read as {found.form}: "
            f"{type(error).__name__}: {error}. Replace them by intact copies."
        ) from error
