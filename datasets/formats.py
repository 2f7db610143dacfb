"""Decoders of the file formats in which the sets are published; each returns plain numpy arrays."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import math
import pickle
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from flowerbed.errors import DataError

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]


def read_idx(path: Path) -> Bytes:
    """Return the array of an IDX file of unsigned bytes (the MNIST format), plain or ``.gz``."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise DataError(f"{path} is not an IDX file of unsigned bytes; replace it by the original file.")
    rank = data[3]
    shape = tuple(np.frombuffer(data, ">u4", rank, offset=4).tolist())
    content = np.frombuffer(data, np.uint8, offset=4 + 4 * rank)
    if len(content) != math.prod(shape):
        raise DataError(f"{path} holds {len(content)} bytes where its header says {shape}; replace it.")
    return content.reshape(shape)


_Reconstruct = np.empty(0).__reduce__()[0]
_HARMLESS: dict[tuple[str, str], Any] = {
    # The name differs between numpy 1 and 2, the function is the same.
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    # How Python 3 writes bytes in the old protocols.
    ("_codecs", "encode"): codecs.encode,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles containers, strings, numbers and numpy arrays, and refuses everything that could act."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the few harmless globals; raises ``DataError`` for any other."""
        try:
            return _HARMLESS[module, name]
        except KeyError:
            raise DataError(
                f"The pickle asks for {module}.{name}, which is not part of a data batch: the file is not the "
                "original and was not loaded. Replace it by the official file."
            ) from None


def read_pickle(data: bytes) -> dict[bytes, Any]:
    """Return the dictionary of a CIFAR python batch without running any code that the file may contain."""
    content = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    if not isinstance(content, dict):
        raise DataError("The pickle is not a CIFAR batch: it holds no dictionary.")
    return content


def read_members(files: Sequence[Path], names: Sequence[str]) -> list[bytes]:
    """Return the contents of ``files``, or, if that is a tar archive, of its members called ``names``.

    Members are read, never extracted, and go by the last part of their path.
    """
    if len(files) == len(names):
        return [path.read_bytes() for path in files]
    contents = {}
    with tarfile.open(files[0]) as archive:
        for member in archive:
            name = member.name.rsplit("/", 1)[-1]
            reader = archive.extractfile(member) if name in names else None
            if reader is not None:
                contents[name] = reader.read()
    if missing := [name for name in names if name not in contents]:
        raise DataError(f"{files[0]} lacks {missing[0]}; replace it by the official archive.")
    return [contents[name] for name in names]


def read_libsvm(path: Path, features: int) -> tuple[npt.NDArray[np.float64], Integers]:
    """Return ``(values (N, features), labels (N,))`` of a libsvm text file, plain or ``.bz2``."""
    data = bz2.decompress(path.read_bytes()) if path.suffix == ".bz2" else path.read_bytes()
    lines = data.decode("ascii").splitlines()
    values = np.zeros((len(lines), features))
    labels = np.empty(len(lines), dtype=np.int64)
    for row, line in enumerate(lines):
        label, *entries = line.split()
        labels[row] = int(float(label))
        for entry in entries:
            column, value = entry.split(":")
            values[row, int(column) - 1] = float(value)
    return values, labels


def find_sheets(folder: Path, prefixes: Sequence[str]) -> tuple[Path, ...] | None:
    """Return ``meta.npz`` and the sheets of all prefixes in a packed folder, or ``None`` if it is not one."""
    meta = folder / "meta.npz"
    if not meta.is_file():
        return None
    found = [_sheets_of(list(folder.iterdir()), prefix) for prefix in prefixes]
    return (meta, *(path for sheets in found for path in sheets)) if all(found) else None


def _sheets_of(files: Sequence[Path], prefix: str) -> list[Path]:
    pattern = re.compile(rf"{re.escape(prefix)}-(\d+)\.(?:jpg|png)")
    numbered = [(int(match[1]), path) for path in files if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def read_meta(files: Sequence[Path]) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays of a packed folder's ``meta.npz``, the first of ``files``."""
    with np.load(files[0], allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def read_sheets(files: Sequence[Path], prefix: str) -> tuple[Bytes, Integers]:
    """Return ``(images uint8 (N, C, H, W), labels (N,))`` of one prefix of a packed folder.

    A sheet is one picture that holds a grid of equal tiles, row by row; ``meta.npz`` says the tile's size
    (``tile``), the tiles per row (``cols``), the images per sheet (``per_sheet``) and the labels
    (``<prefix>_labels``). The last sheet may be padded. Needs Pillow.
    """
    meta = read_meta(files)
    labels = meta[f"{prefix}_labels"].astype(np.int64)
    height, width = (int(side) for side in meta["tile"])
    cols, per_sheet = int(meta["cols"]), int(meta["per_sheet"])
    sheets = _sheets_of(files, prefix)
    if len(sheets) != math.ceil(len(labels) / per_sheet):
        raise DataError(
            f"{files[0].parent} has {len(sheets)} sheets '{prefix}-NN' for {len(labels)} images of {per_sheet} "
            "a sheet; copy the folder again."
        )
    tiles = []
    for path in sheets:
        sheet = read_image(path)
        rows = sheet.shape[0] // height
        # (rows, h, cols, w, C) -> (rows, cols, C, h, w)
        grid = sheet.reshape(rows, height, cols, width, -1).transpose(0, 2, 4, 1, 3)
        tiles.append(grid.reshape(rows * cols, -1, height, width)[:per_sheet])
    return np.concatenate(tiles)[: len(labels)], labels


def read_image(path: Path, side: int | None = None, colour: bool = False) -> Bytes:
    """Return a picture as uint8 ``(H, W)`` or ``(H, W, 3)``, resized to ``(side, side)`` if given.

    ``colour`` makes a grey picture RGB. Resizing is Lanczos. Raises ``DataError`` without Pillow.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            f"Reading {path} needs Pillow, which is not installed; install it with: pip install pillow"
        ) from error
    with Image.open(path) as opened:
        image: Image.Image = opened.convert("RGB") if colour or opened.mode not in ("L", "RGB") else opened
        if side is not None and image.size != (side, side):
            image = image.resize((side, side), Image.Resampling.LANCZOS)
        return cast(Bytes, np.asarray(image, dtype=np.uint8))
