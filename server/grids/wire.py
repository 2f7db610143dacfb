"""Records as plain tuples of numpy arrays: what travels between the server's process and its workers.

Pickling Flower's record objects costs more than the values in them, and ``numpy.save`` bytes are copied at
every step. A packed record is built from tuples, dicts and numpy arrays only; with pickle protocol 5 the
arrays' memory travels out of band. Unpacked arrays are ``LazyArray`` over that memory, read-only.
"""

from __future__ import annotations

import io
from typing import Any, Final

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from flowerbed.messages import LazyArray
from flowerbed.pooling import Layout, Mean, Pool, Refused, Sums, Tally

PackedRecord = tuple[type, tuple[str, ...], list[Any]]
PackedContent = list[tuple[str, PackedRecord]]
PackedPool = tuple[
    list[tuple[Layout, dict[Mean, Any], dict[str, dict[str, Any]], Tally, list[int]]], list[Refused], int
]

# Up to this size, copying serialised bytes is cheaper than reading their header to find the values in them.
SMALL_BYTES: Final = 1 << 16


def pack(record: ArrayRecord | MetricRecord | ConfigRecord) -> PackedRecord:
    """Return ``record`` as (its class, its names, its values); later changes to the record do not show."""
    if isinstance(record, ArrayRecord):
        return ArrayRecord, tuple(record), [_pack_array(array) for array in record.values()]
    return type(record), tuple(record), list(record.values())


def unpack(packed: PackedRecord) -> ArrayRecord | MetricRecord | ConfigRecord:
    """Return the record of which ``packed`` was made, equal in names, order and values."""
    kind, names, values = packed
    if kind is ArrayRecord:
        values = [LazyArray(value) if isinstance(value, np.ndarray) else Array(*value) for value in values]
    record: ArrayRecord | MetricRecord | ConfigRecord = kind()
    for name, value in zip(names, values, strict=True):
        record[name] = value
    return record


def pack_content(content: RecordDict) -> PackedContent:
    """Return every record of ``content`` packed."""
    return [(name, pack(record)) for name, record in content.items()]


def unpack_content(packed: PackedContent) -> RecordDict:
    """Return the content of which ``packed`` was made."""
    content = RecordDict()
    for name, record in packed:
        content[name] = unpack(record)
    return content


def pack_pool(pool: Pool) -> PackedPool:
    """Return ``pool`` with numpy arrays for tensors, whose memory travels out of band."""
    sums = [
        (
            layout,
            {mean: row.numpy() for mean, row in found.rows.items()},
            {s: {n: value.numpy() for n, value in tensors.items()} for s, tensors in found.largest.items()},
            found.tally,
            found.places,
        )
        for layout, found in pool.sums.items()
    ]
    return sums, pool.refused, pool.nbytes


def unpack_pool(packed: PackedPool) -> Pool:
    """Return the pool of which ``packed`` was made, with memory of its own: what arrives is read-only."""
    sums, refused, size = packed
    found = {
        layout: Sums(
            {mean: torch.from_numpy(np.array(row)) for mean, row in rows.items()},
            {s: {n: torch.from_numpy(np.array(v)) for n, v in ts.items()} for s, ts in largest.items()},
            tally,
            places,
        )
        for layout, rows, largest, tally, places in sums
    }
    return Pool(found, refused, size)


def _pack_array(array: Array) -> Any:
    if isinstance(array, LazyArray):
        return array.view()
    if array.stype == "numpy.ndarray" and len(array.data) > SMALL_BYTES:
        return _values_in(array.data)
    return array.dtype, tuple(array.shape), array.stype, array.data


def _values_in(data: bytes) -> Any:
    """Return the array that ``numpy.save`` wrote to ``data``, as a read-only view of ``data``."""
    stream = io.BytesIO(data)  # Shares the bytes.
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    flat = np.frombuffer(data, dtype=dtype, offset=stream.tell())
    return flat.reshape(shape, order="F" if fortran else "C")
