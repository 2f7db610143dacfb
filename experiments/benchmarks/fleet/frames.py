"""Messages on a socket: a length, a line of JSON, and records as safetensors; nothing is ever unpickled."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any, Final

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors.numpy import load, save

from flowerbed.messages import LazyArray

LENGTH: Final = struct.Struct("!Q")
MOST_BYTES: Final = 2**28
"""A longer frame is refused before it is read."""
KINDS: Final = {"metric": MetricRecord, "config": ConfigRecord}


class FrameError(Exception):
    """What arrived is no frame."""


def send(connection: socket.socket, header: dict[str, Any], content: RecordDict | None = None) -> None:
    """Write one frame."""
    connection.sendall(packed(header, content))


def packed(header: dict[str, Any], content: RecordDict | None = None) -> bytes:
    """Return the bytes of a frame."""
    arrays: dict[str, Any] = {}
    records: list[list[Any]] = []
    for name, record in (content or {}).items():
        if isinstance(record, ArrayRecord):
            keys = []
            for key, array in record.items():
                keys.append([key, str(len(arrays))])
                # Also what is not contiguous must arrive as it is.
                arrays[keys[-1][1]] = np.ascontiguousarray(array.numpy()).reshape(array.shape)
            records.append([name, "array", keys])
        else:
            kind = "metric" if isinstance(record, MetricRecord) else "config"
            records.append([name, kind, dict(record.items())])
    head = json.dumps({**header, "records": records}).encode()
    body = save(arrays)
    return LENGTH.pack(LENGTH.size + len(head) + len(body)) + LENGTH.pack(len(head)) + head + body


def receive(connection: socket.socket) -> tuple[dict[str, Any], RecordDict] | None:
    """Read one frame; None at the end of the connection. Raises ``FrameError`` for anything else."""
    size = _exactly(connection, LENGTH.size)
    if size is None:
        return None
    (length,) = LENGTH.unpack(size)
    if not LENGTH.size <= length <= MOST_BYTES:
        raise FrameError(f"a frame of {length} bytes")
    data = _exactly(connection, length)
    if data is None:
        return None
    try:
        (split,) = LENGTH.unpack(data[: LENGTH.size])
        header = json.loads(data[LENGTH.size : LENGTH.size + split])
        arrays = load(data[LENGTH.size + split :])
        content = RecordDict()
        for name, kind, values in header.pop("records"):
            if kind == "array":
                record = ArrayRecord()
                for key, place in values:
                    record[key] = LazyArray(arrays[place])
                content[name] = record
            else:
                content[name] = KINDS[kind](values)
    except Exception as error:  # A peer may send anything.
        raise FrameError(f"{type(error).__name__}: {error}") from error
    return header, content


def _exactly(connection: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        piece = connection.recv(min(count - len(data), 1 << 20))
        if not piece:
            return None
        data += piece
    return bytes(data)
