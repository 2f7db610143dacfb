"""Which replies may be used. What is not usable is counted and named, never averaged in."""

from __future__ import annotations

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
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


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
    sent = _sent_shapes(asked)
    usual_metrics = _most_common([frozenset(_metrics(r)) for r in answered])
    usual_shapes = _most_common([_shapes(r) for r in answered])
    usable: list[Message] = []
    for reply in answered:
        problem = (
            _metric_problem(reply, usual_metrics or frozenset(), weight_key)
            or _shape_problem(reply, sent, usual_shapes or ())
            or _number_problem(reply)
        )
        if problem is None:
            usable.append(reply)
        else:
            fail(reply.metadata.src_node_id, *problem)
    return Checked(usable, failures)


def first_non_finite(record: ArrayRecord) -> str | None:
    """Return the name of the first array that holds NaN or infinity, or None."""
    for name, tensor in messages.tensors(record).items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        # A sum is finite only if every term is, and costs one pass; where it is not, finite terms may
        # have overflowed, so the terms decide.
        if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
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


def _metrics(reply: Message) -> dict[str, Metric]:
    merged: dict[str, Metric] = {}
    for record in reply.content.metric_records.values():
        merged.update(record)
    return merged


def _shapes(reply: Message) -> frozenset[tuple[str, Shapes]]:
    return frozenset((stream, _record_shapes(r)) for stream, r in reply.content.array_records.items())


def _record_shapes(record: ArrayRecord) -> Shapes:
    return tuple((name, tuple(array.shape)) for name, array in record.items())


def _sent_shapes(asked: Sequence[Message]) -> dict[str, dict[str, tuple[int, ...]]]:
    if not asked:
        return {}
    return {s: dict(_record_shapes(r)) for s, r in asked[0].content.array_records.items()}


def _most_common(values: Sequence[T]) -> T | None:
    # Counter keeps the order of first appearance among equals, so a tie goes to the client asked first.
    return Counter(values).most_common(1)[0][0] if values else None


def _metric_problem(reply: Message, usual: frozenset[str], weight_key: str) -> tuple[str, str] | None:
    found = _metrics(reply)
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


def _shape_problem(
    reply: Message,
    sent: Mapping[str, Mapping[str, tuple[int, ...]]],
    usual: frozenset[tuple[str, Shapes]] | tuple[()],
) -> tuple[str, str] | None:
    for stream, record in reply.content.array_records.items():
        for name, shape in _record_shapes(record):
            expected = sent.get(stream, {}).get(name)
            if expected is not None and shape != expected:
                return "wrong-shape", f"'{name}' has shape {shape}, sent was {expected}"
    usual_streams = {stream: dict(shapes) for stream, shapes in usual}
    for stream, shapes in usual_streams.items():
        if stream not in reply.content.array_records:
            return "missing-stream", f"stream '{stream}' is missing"
        found = dict(_record_shapes(reply.content.array_records[stream]))
        for name, shape in shapes.items():
            if found.get(name) != shape:
                return "wrong-shape", f"'{name}' has shape {found.get(name)}, most replies have {shape}"
        extra = sorted(found.keys() - shapes.keys())
        if extra:
            return "wrong-shape", f"'{extra[0]}' is in no other reply"
    return None


def _number_problem(reply: Message) -> tuple[str, str] | None:
    for stream, record in reply.content.array_records.items():
        name = first_non_finite(record)
        if name is not None:
            return "non-finite", f"'{name}' of stream '{stream}' holds NaN or infinity"
    return None
