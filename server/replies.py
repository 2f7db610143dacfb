"""Which replies may be used. What is not usable is counted and named, never averaged in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from flwr.app import ArrayRecord, Message, RecordDict

from flowerbed import messages, pooling
from flowerbed.pooling import WEIGHT, Layout, Metric, Pool, Refused, Sums

T = TypeVar("T", bound=Hashable)
Shapes = dict[str, dict[str, tuple[int, ...]]]
"""Shape of every array, by stream and name."""


@dataclass(frozen=True)
class Failure:
    """One client's failure in one round."""

    round: int
    client: int
    kind: str
    """raised, died, time-limit, quarantined, no-reply, non-finite, wrong-shape, missing-metric,
    missing-stream, replayed, oversized, quota, garbage, or rejected (by the strategy)."""
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
) -> Checked:
    """Sort replies into usable ones and failures.

    ``clients`` maps node ids to client numbers. A usable reply has no error, the streams, shapes and metrics
    that most replies of this exchange have (a stream that was sent and comes back must keep the shapes it
    was sent with), a finite weight that is not negative, and finite numbers only. A reply to another message than
    the one that was sent in this exchange, and any further reply of a client, is refused.
    """
    failures: list[Failure] = []
    answered: list[Message] = []

    def fail(node: int, kind: str, reason: str) -> None:
        failures.append(Failure(server_round, clients.get(node, node), kind, reason))

    by_node: dict[int, Message] = {}
    numbers = {message.metadata.dst_node_id: message.metadata.message_id for message in asked}
    nodes = {number: node for node, number in numbers.items() if number}
    for arrived in replies:
        number = arrived.metadata.reply_to_message_id
        node = arrived.metadata.src_node_id
        if arrived.has_error():
            # Flower itself answers for a node that is away, in its own name.
            node = nodes.get(number, node)
        if node not in numbers or (numbers[node] and number and number != numbers[node]):
            fail(node, "replayed", "the reply answers no message of this exchange")
        elif node in by_node:
            fail(node, "replayed", "a second reply came to the same message; the first one is used")
        else:
            by_node[node] = arrived
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
    sent = sent_shapes(asked[0].content) if asked else {}
    read = [_Read.of(reply) for reply in answered]
    usual_metrics = _most_common((frozenset(r.metrics), 1) for r in read) or frozenset()
    usual = _usual_shapes([(r.shapes, 1) for r in read])
    usable: list[Message] = []
    for one in read:
        problem = (
            _missing_problem(frozenset(one.metrics), usual_metrics)
            or pooling.metric_problem(one.metrics)
            or _shape_problem(one.shapes, sent, usual)
            or _number_problem(one.streams)
        )
        if problem is None:
            usable.append(one.message)
        else:
            fail(one.message.metadata.src_node_id, *problem)
    return Checked(usable, failures)


@dataclass(frozen=True)
class Settled:
    """The outcome of an exchange in which the grid added up the replies."""

    layout: Layout | None
    """What most replies have in common; None if none is usable."""
    sums: Sums
    """Of the usable replies."""
    failures: list[Failure]

    @property
    def count(self) -> int:
        """How many replies are usable."""
        return len(self.sums.places)


def settle_pool(pool: Pool, sent: Shapes, clients: Sequence[int], server_round: int) -> Settled:
    """Decide which of the sums that a grid brought back are usable, by the rules of ``check_replies``.

    ``sent`` are the shapes of the streams that were sent, ``clients`` the numbers of the clients that were asked.
    Replies were added up by layout, so that those which differ from most can still be left out.
    """
    found = sorted(pool.sums.items(), key=lambda item: min(item[1].places))
    usual_metrics = _most_common((layout.metrics, len(sums.places)) for layout, sums in found) or frozenset()
    usual = _usual_shapes([(layout.shapes, len(sums.places)) for layout, sums in found])
    refused: list[Refused] = []
    fitting: list[tuple[Layout, Sums]] = []
    for layout, sums in found:
        problem = _missing_problem(layout.metrics, usual_metrics) or _shape_problem(
            layout.shapes, sent, usual
        )
        if problem is None:
            fitting.append((layout, sums))
        else:
            refused += [Refused(place, *problem) for place in sums.places]
    streams = _most_common((layout.streams, len(sums.places)) for layout, sums in fitting)
    chosen: tuple[Layout, Sums] | None = None
    for layout, sums in fitting:
        if layout.streams != streams:
            problem = "wrong-shape", "its tensors have other types than those of most replies"
            refused += [Refused(place, *problem) for place in sums.places]
        elif chosen is None:
            chosen = Layout(streams, usual_metrics), sums
        else:
            chosen[1].merge(sums)
    refused += pool.refused
    # As where replies are messages: first who did not answer, then who answered what is of no use.
    refused.sort(key=lambda r: (bool(r.kind), r.place))
    failures = [
        Failure(server_round, clients[r.place], r.kind or _error_kind(r.reason), r.reason) for r in refused
    ]
    if chosen is None:
        return Settled(None, Sums({}, {}, pooling.Tally(), []), failures)
    return Settled(*chosen, failures)


def first_non_finite(record: ArrayRecord) -> str | None:
    """Return the name of the first array that holds NaN or infinity, or None."""
    return pooling.first_non_finite(messages.tensors(record))


def sent_shapes(content: RecordDict) -> Shapes:
    """Return the shape of every array of a message, by stream and name."""
    return _shapes(messages.array_records(content))


def _error_kind(reason: str) -> str:
    lowered = reason.lower()
    for kind, sign in (
        ("quarantined", "quarantined"),
        ("time-limit", "time limit"),
        ("died", "died"),
        ("replayed", "replayed:"),
        ("oversized", "oversized:"),
        ("garbage", "garbage:"),
        ("quota", "quota:"),
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


def _usual_shapes(found: Sequence[tuple[Shapes, int]]) -> Shapes:
    """Return the shapes that most replies have, given shapes and how many replies have them, in order of asking."""
    if all(shapes == found[0][0] for shapes, _ in found):
        return found[0][0] if found else {}
    keys = [
        frozenset((s, n, shape) for s, a in shapes.items() for n, shape in a.items()) for shapes, _ in found
    ]
    common = _most_common((key, votes) for key, (_, votes) in zip(keys, found, strict=True))
    return next(shapes for (shapes, _), key in zip(found, keys, strict=True) if key == common)


def _most_common(votes: Iterable[tuple[T, int]]) -> T | None:
    """Return the value with most votes, given values and votes in the order of asking; None if there is none."""
    # Counter keeps the order of first appearance among equals, so a tie goes to the client asked first.
    count: Counter[T] = Counter()
    for value, number in votes:
        count[value] += number
    return count.most_common(1)[0][0] if count else None


def _missing_problem(found: frozenset[str], usual: frozenset[str]) -> tuple[str, str] | None:
    missing = sorted((usual | {WEIGHT}) - found)
    return ("missing-metric", f"metric '{missing[0]}' is missing") if missing else None


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
    problems = (pooling.number_problem(name, messages.tensors(record)) for name, record in streams.items())
    return next((problem for problem in problems if problem is not None), None)
