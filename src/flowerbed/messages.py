"""Tensors in Flower messages without paying for serialisation until somebody needs bytes.

Flower's ``Array`` holds ``numpy.save`` bytes, so every tensor is copied and encoded when a message is built
and decoded again at every read. Inside one machine nobody looks at those bytes. ``LazyArray`` is a Flower
``Array`` that keeps the numpy array and writes the bytes on first request, hence everything that Flower does
with an ``Array`` (protocol buffers, object ids, deflate and inflate, ``numpy()``) works unchanged and gives
the same bytes, while our own code reads the values in place.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from flowerbed.errors import ConfigError

AnyArray = npt.NDArray[Any]

EARLIER = "earlier-rounds"
"""Setting of a message: rounds of the run before the first that ``server-round`` counts (a preparatory phase)."""

# numpy.save writes a header padded to a multiple of 64 bytes, 128 for every array of fewer than about ten
# dimensions; together with its name that is what one array costs on a wire beyond its values.
ARRAY_OVERHEAD_BYTES = 128


class LazyArray(Array):
    """A Flower ``Array`` over a numpy array, serialised only if ``data``, an object id or chunks are asked for.

    The values are held by reference: the caller promises not to change them afterwards. An array that is
    contiguous in neither C nor Fortran order is copied into C order. The object is immutable; to change a
    record, assign a new array to its key.

    Equality is that of Flower (same dtype, shape and serialised values; bitwise, so NaN equals itself), also
    with a plain ``Array``.
    """

    def __init__(self, array: AnyArray) -> None:
        """Hold ``array``, of any shape and any numpy dtype but ``object`` (``ConfigError``)."""
        if array.dtype.hasobject:
            raise ConfigError(f"An array of dtype {array.dtype} cannot be sent; convert it to numbers first.")
        flags = array.flags
        held = array.view() if flags.c_contiguous or flags.f_contiguous else array.copy(order="C")
        held.flags.writeable = False
        # Straight into __dict__: Array.__setattr__ does bookkeeping for changes that cannot happen here.
        self.__dict__.update(
            dtype=_dtype_name(held.dtype), shape=held.shape, stype="numpy.ndarray", _held=held
        )

    def view(self) -> AnyArray:
        """Return the held array itself, read-only, without copying."""
        held: AnyArray = self.__dict__["_held"]
        return held

    def numpy(self) -> AnyArray:
        """Return a fresh writable copy, as ``Array.numpy`` promises."""
        return self.view().copy(order="K")

    def plain(self) -> Array:
        """Return the same values as a plain Flower ``Array``; made once, then kept."""
        plain: Array | None = self.__dict__.get("_plain")
        if plain is None:
            plain = Array.from_numpy_ndarray(self.view())
            self.__dict__["_plain"] = plain
        return plain

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The ``numpy.save`` bytes."""
        return self.plain().data

    @property
    def children(self) -> Any:
        """The chunks of ``data`` by object id, as Flower uploads them."""
        return self.plain().children

    def slice_array(self) -> Any:
        """Return the chunks of ``data`` with their object ids, in order."""
        return self.plain().slice_array()

    def deflate(self) -> bytes:
        """Return Flower's content-addressed form. It names its class, which must read ``Array`` everywhere."""
        return self.plain().deflate()

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Array):
            return NotImplemented
        if isinstance(other, LazyArray):
            mine, theirs = self.view(), other.view()
            same_layout = mine.flags.c_contiguous and theirs.flags.c_contiguous
            if self.dtype != other.dtype or self.shape != other.shape:
                return False
            if same_layout:
                return mine.tobytes() == theirs.tobytes()
        fields = (other.dtype, other.shape, other.stype, other.data)
        return (self.dtype, self.shape, self.stype, self.data) == fields

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type[LazyArray], tuple[AnyArray]]:
        # Only the numpy array travels; with pickle protocol 5 its buffer is out of band, which is what lets
        # Ray place it in shared memory and hand it to readers without a copy.
        return LazyArray, (self.view(),)

    def __repr__(self) -> str:
        return f"LazyArray(dtype={self.dtype!r}, shape={self.shape})"


def array_record(tensors: Mapping[str, torch.Tensor | AnyArray]) -> ArrayRecord:
    """Return an ``ArrayRecord`` of the tensors, by reference where they are on the CPU and contiguous.

    The caller promises that the tensors are not changed afterwards: a client that goes on training the model
    it sends, or whose worker trains the next client in it, sends clones. Gradients are detached and tensors
    on a GPU are copied to the CPU.

    Raises ``ConfigError`` naming the tensor if numpy, and hence Flower, has no such type (``bfloat16``,
    ``float8``, quantised).
    """
    record = ArrayRecord()
    for name, value in tensors.items():
        record[name] = LazyArray(value if isinstance(value, np.ndarray) else _to_numpy(name, value))
    return record


def tensors(record: ArrayRecord) -> dict[str, torch.Tensor]:
    """Return the arrays of ``record`` as CPU tensors with their names, shapes and types, in order.

    The tensors of a ``LazyArray`` share its memory and must only be read (writing into them is undefined:
    they may lie in memory that other processes read); those of a plain ``Array`` are fresh.
    """
    return {
        name: torch.from_numpy(array.view() if isinstance(array, LazyArray) else array.numpy())
        for name, array in record.items()
    }


def array_records(content: RecordDict) -> dict[str, ArrayRecord]:
    """Return the array records of a message by name. Flower's views of the same name check every entry anew."""
    return {name: record for name, record in content.items() if isinstance(record, ArrayRecord)}


def metrics(content: RecordDict) -> dict[str, int | float | list[int] | list[float]]:
    """Return the entries of all metric records of a message together."""
    merged: dict[str, int | float | list[int] | list[float]] = {}
    for record in content.values():
        if isinstance(record, MetricRecord):
            merged.update(record.items())
    return merged


def settings(content: RecordDict) -> dict[str, Any]:
    """Return the entries of all config records of a message together."""
    merged: dict[str, Any] = {}
    for record in content.values():
        if isinstance(record, ConfigRecord):
            merged.update(record.items())
    return merged


def nbytes(content: RecordDict) -> int:
    """Return the payload of ``content`` in bytes, without serialising anything.

    Counted are the raw bytes of every array plus ``ARRAY_OVERHEAD_BYTES``, 8 bytes per number, 1 per boolean,
    the length of strings and bytes, and the length of every name. Framing by protocol buffers and HTTP is not
    included; it is below one percent for any message whose size matters.
    """
    return sum(len(name) + record_nbytes(record) for name, record in content.items())


def record_nbytes(record: ArrayRecord | MetricRecord | ConfigRecord) -> int:
    """Return the payload of one record in bytes; see ``nbytes`` for what is counted."""
    if isinstance(record, ArrayRecord):
        return sum(len(name) + ARRAY_OVERHEAD_BYTES + _values_nbytes(array) for name, array in record.items())
    return sum(len(name) + _scalar_nbytes(value) for name, value in record.items())


def _values_nbytes(array: Array) -> int:
    if isinstance(array, LazyArray):
        return array.view().nbytes
    if array.stype == "numpy.ndarray":
        return math.prod(array.shape) * np.dtype(array.dtype).itemsize
    return len(array.data)


def _scalar_nbytes(value: object) -> int:
    if isinstance(value, list):
        return sum(_scalar_nbytes(item) for item in value)
    if isinstance(value, bool):
        return 1
    return len(value) if isinstance(value, str | bytes) else 8


@functools.cache
def _dtype_name(dtype: np.dtype[Any]) -> str:
    # numpy takes microseconds to spell a dtype, more than everything else that a LazyArray does.
    return str(dtype)


def _to_numpy(name: str, tensor: torch.Tensor) -> AnyArray:
    try:
        array: AnyArray = tensor.numpy(force=True)
    except (TypeError, RuntimeError) as error:
        raise ConfigError(
            f"Tensor '{name}' of type {tensor.dtype} cannot be put in a message: {error}. "
            "Send a type that numpy has, for example tensor.float()."
        ) from error
    return array


def _spend_read_only_warning() -> None:
    """Let torch give its warning about read-only numpy arrays now, unheard: it gives it once per process.

    ``tensors`` documents that its result is read-only; filtering the warning at each call would change the
    process-wide filters on the hot path.
    """
    array = np.zeros(1, dtype=np.float32)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.from_numpy(array)


_spend_read_only_warning()
