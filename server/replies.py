"""Which replies may be used. What is not usable is counted and named, never averaged in."""

from __future__ import annotations

import cmath
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from flwr.app import ArrayRecord, Message

from flowerbed import messages

T = TypeVar("T", bound=Hashable)
Metric = int | float | list[int] | list[float]
Shapes = dict[str, dict[str, tuple[int, ...]]]
"""Shape of every array, by stream and name."""


@dataclass(frozen=True)
class Failure:
    """One client's failure in one round."""

    round: int
    client: int
    kind: str
    """raised, died, time-limit, quarantined, no-reply, non-finite, wrong-shape, missing-metric or
    missing-stream."""
    reason: str


@dataclass(frozen=True)
class Checked:
    """The outcome of one exchange with the clients."""

    usable: list[Message]
    """In the order of asking."""
    failures: list[Failure]


def check_replies(
    asked: Sequence[Message],
    replies: Sequence[Message],
    clients: Mapping[int, int],
    server_round: int,
    weight_key: str = "num-examples",
) -> Checked:
    """Sort replies into usable ones and failures.

    ``clients`` maps node ids to client numbers. A usable reply has no error, the streams, shapes and metrics
    that most replies of this exchange have (a stream that was sent and comes back must keep the shapes it
    was sent with), a finite weight that is not negative, and finite numbers only.
    """
    by_node = {reply.metadata.src_node_id: reply for reply in replies}
    failures: list[Failure] = []
    answered: list[Message] = []

    def fail(node: int, kind: str, reason: str) -> None:
        failures.append(Failure(server_round, clients.get(node, node), kind, reason))

    for message in asked:
        node = message.metadata.dst_node_id
        reply = by_node.get(node)
        if reply is None:
            fail(node, "no-reply", "no reply arrived")
        elif reply.has_error():
            reason = reply.error.reason or "no reason given"
            fail(node, _error_kind(reason), reason)
        else:
            answered.append(reply)
    sent = _shapes(messages.array_records(asked[0].content)) if asked else {}
    read = [_Read.of(reply) for reply in answered]
    usual_metrics = _most_common([frozenset(r.metrics) for r in read]) or frozenset()
    usual = _usual_shapes(read)
    usable: list[Message] = []
    for one in read:
        problem = (
            _metric_problem(one.metrics, usual_metrics, weight_key)
            or _shape_problem(one.shapes, sent, usual)
            or _number_problem(one.streams)
        )
        if problem is None:
            usable.append(one.message)
        else:
            fail(one.message.metadata.src_node_id, *problem)
    return Checked(usable, failures)


def first_non_finite(record: ArrayRecord) -> str | None:
    """Return the name of the first array that holds NaN or infinity, or None."""
    for name, tensor in messages.tensors(record).items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        # A sum is finite only if every term is, and costs one pass; where it is not, finite terms may
        # have overflowed, so the terms decide.
        if not cmath.isfinite(tensor.sum().item()) and not torch.isfinite(tensor).all():
            return name
    return None


def _error_kind(reason: str) -> str:
    lowered = reason.lower()
    for kind, sign in (
        ("quarantined", "quarantined"),
        ("time-limit", "time limit"),
        ("died", "died"),
    ):
        if sign in lowered:
            return kind
    return "raised"


@dataclass(frozen=True)
class _Read:
    """A reply with its records read once."""

    message: Message
    streams: dict[str, ArrayRecord]
    shapes: Shapes
    metrics: dict[str, Metric]

    @classmethod
    def of(cls, reply: Message) -> _Read:
        streams = messages.array_records(reply.content)
        return cls(reply, streams, _shapes(streams), messages.metrics(reply.content))


def _shapes(streams: Mapping[str, ArrayRecord]) -> Shapes:
    return {s: {name: tuple(a.shape) for name, a in record.items()} for s, record in streams.items()}


def _usual_shapes(read: Sequence[_Read]) -> Shapes:
    """Return the shapes that most replies have."""
    if all(one.shapes == read[0].shapes for one in read):
        return read[0].shapes if read else {}
    keys = [frozenset((s, n, shape) for s, a in one.shapes.items() for n, shape in a.items()) for one in read]
    common = _most_common(keys)
    return next(one.shapes for one, key in zip(read, keys, strict=True) if key == common)


def _most_common(values: Sequence[T]) -> T | None:
    # Counter keeps the order of first appearance among equals, so a tie goes to the client asked first.
    return Counter(values).most_common(1)[0][0] if values else None


def _metric_problem(
    found: Mapping[str, Metric], usual: frozenset[str], weight_key: str
) -> tuple[str, str] | None:
    missing = sorted((usual | {weight_key}) - found.keys())
    if missing:
        return "missing-metric", f"metric '{missing[0]}' is missing"
    for name, value in found.items():
        numbers = value if isinstance(value, list) else [value]
        if not all(math.isfinite(v) for v in numbers):
            return "non-finite", f"metric '{name}' is {value}"
    weight = found[weight_key]
    if isinstance(weight, list) or weight < 0:
        return "missing-metric", f"metric '{weight_key}' is {weight}, not a number of examples"
    return None


def _shape_problem(found: Shapes, sent: Shapes, usual: Shapes) -> tuple[str, str] | None:
    for stream, shapes in found.items():
        for name, shape in shapes.items():
            expected = sent.get(stream, {}).get(name)
            if expected is not None and shape != expected:
                return "wrong-shape", f"'{name}' has shape {shape}, sent was {expected}"
    for stream, shapes in usual.items():
        if stream not in found:
            return "missing-stream", f"stream '{stream}' is missing"
        for name, shape in shapes.items():
            if found[stream].get(name) != shape:
                return (
                    "wrong-shape",
                    f"'{name}' has shape {found[stream].get(name)}, most replies have {shape}",
                )
        extra = sorted(found[stream].keys() - shapes.keys())
        if extra:
            return "wrong-shape", f"'{extra[0]}' is in no other reply"
    return None


def _number_problem(streams: Mapping[str, ArrayRecord]) -> tuple[str, str] | None:
    for stream, record in streams.items():
        name = first_non_finite(record)
        if name is not None:
            return "non-finite", f"'{name}' of stream '{stream}' holds NaN or infinity"
    return None
