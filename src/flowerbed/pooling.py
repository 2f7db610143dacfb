"""Replies of many clients as sums: what a grid may bring back in the place of a message from each client.

A sum is taken along a fixed tree. The cohort, in the order of asking, is cut into blocks (``blocks``); the
clients of a block are added one after another, and blocks are added in pairs, pairs of pairs and so on. The
tree depends on the size of the cohort alone, so the bits of a mean do not depend on who adds up which part,
in which order the parts are done, or whether clients answered by messages. Tensors add up in float64, metrics
exactly.
"""

from __future__ import annotations

import cmath
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from typing import Any, Final

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from flowerbed.errors import RunError
from flowerbed.messages import ARRAY_OVERHEAD_BYTES
from flowerbed.storage import Tensors

Metric = int | float | list[int] | list[float]
Streams = Mapping[str, Mapping[str, Tensor]]

EXAMPLES: Final = "examples"
"""Weight of a client in a mean: its number of samples, the metric ``num-examples``."""
UNIFORM: Final = "uniform"
"""Weight of a client in a mean: one."""
WEIGHT: Final = "num-examples"
METRICS: Final = "metrics"
"""The record of a reply that holds its metrics."""


@dataclass(frozen=True)
class Mean:
    """A mean that a strategy takes: of which stream of the replies, and what a client weighs in it."""

    stream: str
    weight: str = EXAMPLES
    """``EXAMPLES`` or ``UNIFORM``."""


Pooling = Mapping[str, Mean]
"""All that a strategy takes from the replies of a round, by a name of its own choice."""

FEW, MOST, LARGEST = 32, 128, 32
SMALL: Final = 1 << 17


def block_size(cohort: int) -> int:
    """Return how many clients of a cohort are added one after another.

    There are at most 32 blocks as long as their clients are no more than 32, then at most 128: enough for
    as many workers, and a bounded number of sums.
    """
    return max(-(-cohort // MOST), min(-(-cohort // FEW), LARGEST), 1)


def blocks(cohort: int, size: int = 0) -> list[range]:
    """Return the places of the clients in every block; ``size`` replaces ``block_size``."""
    size = size or block_size(cohort)
    return [range(start, min(start + size, cohort)) for start in range(0, cohort, size)]


@dataclass(frozen=True)
class Layout:
    """What replies must have in common to be added up: names, shapes and types, and the names of metrics."""

    streams: tuple[tuple[str, tuple[tuple[str, tuple[int, ...], torch.dtype], ...]], ...]
    """Sorted by name, and so are the tensors of each."""
    metrics: frozenset[str]

    @classmethod
    def of(cls, streams: Streams, metrics: Mapping[str, Metric]) -> Layout:
        """Return the layout of a reply."""
        return cls(
            tuple(
                (stream, tuple((n, tuple(tensors[n].shape), tensors[n].dtype) for n in sorted(tensors)))
                for stream, tensors in sorted(streams.items())
            ),
            frozenset(metrics),
        )

    def __reduce__(self) -> tuple[type[Layout], tuple[Any, ...]]:
        # Without what is cached: the hash of a string is another one in every process.
        return Layout, (self.streams, self.metrics)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.streams, self.metrics))

    @cached_property
    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The shape of every tensor, by stream and name."""
        return {stream: {name: shape for name, shape, _ in rows} for stream, rows in self.streams}

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the tensors in a message, counted as ``flowerbed.messages.nbytes`` does."""
        return sum(
            len(stream)
            + sum(len(n) + ARRAY_OVERHEAD_BYTES + math.prod(shape) * kind.itemsize for n, shape, kind in rows)
            for stream, rows in self.streams
        )

    @cached_property
    def plans(self) -> dict[str, _Plan]:
        """Which tensors of every stream add up and which do not."""
        return {stream: _Plan.of(rows) for stream, rows in self.streams}


@dataclass(frozen=True)
class _Plan:
    """The tensors of a stream: ``summed`` in one flat row, of the others the largest value is kept."""

    summed: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    others: tuple[str, ...]
    numbers: int
    """Real numbers in the flat row."""
    common: torch.dtype
    """The narrowest type that holds all summed tensors."""
    simple: bool
    """Whether all summed tensors have the common type, and are so few numbers that a fresh row costs nothing."""

    @classmethod
    def of(cls, rows: Sequence[tuple[str, tuple[int, ...], torch.dtype]]) -> _Plan:
        summed = tuple(row for row in rows if row[2].is_floating_point or row[2].is_complex)
        kinds = {kind.to_real() for _, _, kind in summed} or {torch.float64}
        common = kinds.pop()
        for kind in kinds:
            common = torch.promote_types(common, kind)
        numbers = sum(math.prod(shape) * (1 + kind.is_complex) for _, shape, kind in summed)
        others = tuple(name for name, _, kind in rows if not (kind.is_floating_point or kind.is_complex))
        simple = numbers <= SMALL and all(kind == common for _, _, kind in summed)
        return cls(summed, others, numbers, common, simple)

    def flat(self, tensors: Mapping[str, Tensor], rows: dict[_Plan, Tensor]) -> Tensor:
        """Return the summed tensors one after another in the common type; ``rows`` keeps the room for that."""
        if self.simple:
            parts = [tensors[name] for name, _, _ in self.summed]
            row: Tensor = _flatten_dense_tensors(parts)  # type: ignore[no-untyped-call]
            return row
        parts = [_real(tensors[name]).reshape(-1) for name, _, _ in self.summed]
        if self not in rows:
            rows[self] = torch.empty(self.numbers, dtype=self.common, device=parts[0].device)
        return torch.cat(parts, out=rows[self])

    def parted(self, row: Tensor) -> Tensors:
        """Return the tensors of a flat row of float64, each in its own type and shape."""
        found: Tensors = {}
        start = 0
        for name, shape, kind in self.summed:
            size = math.prod(shape) * (1 + kind.is_complex)
            part = row[start : start + size]
            if kind.is_complex:
                part = torch.view_as_complex(part.reshape(-1, 2))
            found[name] = part.to(kind).reshape(shape).clone(memory_format=torch.contiguous_format)
            start += size
        return found


def _real(value: Tensor) -> Tensor:
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


class Exact:
    """A sum of numbers without any rounding, so that the order of adding does not matter (Shewchuk 1997)."""

    __slots__ = ("parts", "special", "whole")

    def __init__(self) -> None:
        self.whole = 0
        """The sum of the integers."""
        self.special = 0.0
        """The sum of what is not finite; 0 if everything was."""
        self.parts: list[float] = []
        """Numbers that do not overlap, and whose sum is that of all other numbers."""

    def add(self, x: float) -> None:
        """Add one number."""
        if type(x) is int:
            self.whole += x
            return
        if not math.isfinite(x):
            self.special += x
            return
        kept = 0
        for y in self.parts:
            if abs(x) < abs(y):
                x, y = y, x
            high = x + y
            low = y - (high - x)
            if low:
                self.parts[kept] = low
                kept += 1
            x = high
        self.parts[kept:] = [x]

    def merge(self, other: Exact) -> None:
        """Add another sum."""
        self.whole += other.whole
        self.special += other.special
        for part in other.parts:
            self.add(part)

    @property
    def value(self) -> int | float:
        """The sum, rounded once; an integer if all numbers were."""
        if self.special:
            return self.special
        return math.fsum([self.whole, *self.parts]) if self.parts else self.whole


@dataclass
class Tally:
    """Metrics of many replies: of every number the weighted and the plain sum, of lists the plain sums."""

    weight: Exact = field(default_factory=Exact)
    """The sum of ``num-examples``."""
    weighted: dict[str, Exact] = field(default_factory=dict)
    plain: dict[str, Exact] = field(default_factory=dict)
    lists: dict[str, list[Exact]] = field(default_factory=dict)
    counts: dict[str, list[int]] = field(default_factory=dict)
    """Lists that have held integers only, which are most of them and added up faster."""

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Add the metrics of a reply."""
        weight = number(metrics[WEIGHT])
        self.weight.add(weight)
        for name, value in metrics.items():
            if isinstance(value, list):
                self._add_list(name, value)
                continue
            if name not in self.plain:
                self.plain[name], self.weighted[name] = Exact(), Exact()
            self.plain[name].add(value)
            self.weighted[name].add(weight * value)

    def merge(self, other: Tally) -> None:
        """Add another tally."""
        self.weight.merge(other.weight)
        for mine, theirs in ((self.weighted, other.weighted), (self.plain, other.plain)):
            for name, total in theirs.items():
                mine.setdefault(name, Exact()).merge(total)
        for name, values in other.counts.items():
            self._add_list(name, values)
        for name, totals in other.lists.items():
            for total, further in zip(self._exact(name, len(totals)), totals, strict=True):
                total.merge(further)

    def _add_list(self, name: str, values: Sequence[float]) -> None:
        whole = name not in self.lists and all(type(v) is int for v in values)
        if whole:
            before = self.counts.get(name) or [0] * len(values)
            self.counts[name] = [int(b + v) for b, v in zip(before, values, strict=True)]
        else:
            for total, value in zip(self._exact(name, len(values)), values, strict=True):
                total.add(value)

    def _exact(self, name: str, length: int) -> list[Exact]:
        if name not in self.lists:
            self.lists[name] = [Exact() for _ in range(length)]
            for total, count in zip(self.lists[name], self.counts.pop(name, [0] * length), strict=True):
                total.add(count)
        return self.lists[name]

    @property
    def names(self) -> list[str]:
        """The names of all metrics that some reply had."""
        return [*self.plain, *self.counts, *self.lists]

    def sum_of(self, name: str) -> Metric:
        """Return the plain sum of a metric."""
        if name in self.plain:
            return self.plain[name].value
        return self.counts[name] if name in self.counts else [total.value for total in self.lists[name]]

    def mean_of(self, name: str) -> float:
        """Return the mean of a metric that is one number, weighted by ``num-examples``."""
        return self.weighted[name].value / (float(self.weight.value) or 1.0)


@dataclass
class Sums:
    """The sum of the replies that have one layout."""

    rows: dict[Mean, Tensor]
    """For every mean the weighted sum of its stream's tensors, one flat row of float64."""
    largest: dict[str, Tensors]
    """The largest values of the tensors that do not add up, by stream."""
    tally: Tally
    places: list[int]
    """Which clients are in it, by their place in the order of asking."""

    def merge(self, later: Sums) -> None:
        """Add the sum of clients that were asked later."""
        for mean, row in later.rows.items():
            self.rows[mean].add_(row)
        _keep_larger(self.largest, later.largest)
        self.tally.merge(later.tally)
        self.places += later.places

    def total(self, mean: Mean) -> float:
        """Return the sum of the weights."""
        return float(self.tally.weight.value) if mean.weight == EXAMPLES else float(len(self.places))


@dataclass(frozen=True)
class Refused:
    """A client whose reply is not in the sum."""

    place: int
    kind: str
    """As in ``flowerbed.server.replies.Failure``; "" where the reason says it."""
    reason: str


@dataclass
class Pool:
    """What some clients of a round answered: a sum for each layout that occurred, and who is in none."""

    sums: dict[Layout, Sums] = field(default_factory=dict)
    refused: list[Refused] = field(default_factory=list)
    nbytes: int = 0
    """Bytes of all replies, counted as if each had been a message."""

    def merge(self, later: Pool) -> None:
        """Add what clients answered that were asked later; ``later`` is used up."""
        for layout, sums in later.sums.items():
            if layout in self.sums:
                self.sums[layout].merge(sums)
            else:
                self.sums[layout] = sums
        self.refused += later.refused
        self.nbytes += later.nbytes

    def on_cpu(self) -> Pool:
        """Return the pool with its tensors on the CPU."""
        for sums in self.sums.values():
            sums.rows = {mean: row.cpu() for mean, row in sums.rows.items()}
            sums.largest = {
                s: {n: v.cpu() for n, v in tensors.items()} for s, tensors in sums.largest.items()
            }
        return self


class Adder:
    """Adds up replies one by one; keeps the memory that it needs for that."""

    def __init__(self, pooling: Pooling, *, checked: bool = True) -> None:
        """Without ``checked`` everything is added as it is, and only the streams of ``pooling`` matter."""
        self.pooling = pooling
        self._checked = checked
        self._means: dict[str, list[Mean]] = {}
        for mean in dict.fromkeys(pooling.values()):
            self._means.setdefault(mean.stream, []).append(mean)
        self._rows: defaultdict[str, dict[_Plan, Tensor]] = defaultdict(dict)
        # By stream, because all streams of a reply are read before any is added.
        self._free: dict[tuple[int, torch.device], list[Tensor]] = {}
        self._last: tuple[Layout, tuple[Any, ...]] | None = None

    @torch.no_grad()
    def add(self, pool: Pool, place: int, streams: Streams, metrics: Mapping[str, Metric]) -> bool:
        """Add a reply to ``pool`` unless something in it cannot be used; return whether it was added.

        The tensors are only read, and only now.
        """
        if not self._checked:
            streams = {stream: streams[stream] for stream in self._means}
            metrics = {WEIGHT: metrics.get(WEIGHT, 0)}
        layout = self._layout(streams, metrics)
        pool.nbytes += layout.nbytes + metrics_nbytes(metrics)
        problem = metric_problem(metrics) if self._checked else None
        rows: dict[str, Tensor] = {}
        for stream, plan in layout.plans.items():
            if problem is None:
                problem = self._read(stream, plan, streams[stream], rows)
        if problem is not None:
            pool.refused.append(Refused(place, *problem))
            return False
        sums = self._sums(pool, layout)
        for stream, row in rows.items():
            for mean in self._means[stream]:
                self._accumulate(sums, mean, row, number(metrics[WEIGHT]) if mean.weight == EXAMPLES else 1)
        self._finish(sums, layout, streams, metrics, place)
        return True

    @torch.no_grad()
    def add_block(
        self,
        pool: Pool,
        places: Sequence[int],
        streams: Mapping[str, Tensors],
        metrics: Sequence[Mapping[str, Metric]],
    ) -> list[bool]:
        """Add the replies of K clients whose tensors are stacked, ``(K, ...)``; return which were added.

        The clients of the block are added in their tensors' own type and only the sum in float64: about one
        part in a million away from adding them one by one.
        """
        views = [
            {s: {n: v[k] for n, v in ts.items()} for s, ts in streams.items()} for k in range(len(places))
        ]
        if len(places) == 1:
            return [self.add(pool, places[0], views[0], metrics[0])]
        finite = _finite_rows(streams, len(places))
        used: list[int] = []
        for k, own in enumerate(metrics):
            if finite[k] and metric_problem(own) is None and own.keys() == metrics[0].keys():
                used.append(k)
            else:
                self.add(pool, places[k], views[k], own)
        if used:
            both = [(places[k], views[k], metrics[k]) for k in used]
            self._add_used(pool, _taken(streams, used), both)
        kept = set(used)
        return [k in kept for k in range(len(places))]

    def _add_used(
        self,
        pool: Pool,
        streams: Mapping[str, Tensors],
        replies: Sequence[tuple[int, Streams, Mapping[str, Metric]]],
    ) -> None:
        """Add ``replies``, views of the stacked ``streams``, which are all of one layout."""
        layout = self._layout(*replies[0][1:])
        sums = self._sums(pool, layout)
        for stream, means in self._means.items():
            plan = layout.plans.get(stream)
            if plan is None:
                continue
            for mean in means:
                weights = [number(m[WEIGHT]) if mean.weight == EXAMPLES else 1 for _, _, m in replies]
                summed = {n: _weighted(streams[stream][n], weights) for n, _, _ in plan.summed}
                self._accumulate(sums, mean, plan.flat(summed, self._rows[stream]), 1)
        for place, own, metrics in replies:
            pool.nbytes += layout.nbytes + metrics_nbytes(metrics)
            self._finish(sums, layout, own, metrics, place)

    def recycle(self, merged: Iterable[Sums]) -> None:
        """Take back the memory of sums that were added to others."""
        for sums in merged:
            for row in sums.rows.values():
                self._free.setdefault((row.numel(), row.device), []).append(row)

    def _layout(self, streams: Streams, metrics: Mapping[str, Metric]) -> Layout:
        """Return the layout of a reply, the last one itself if it is the same."""
        key = (
            *metrics,
            *((stream, *((n, t.shape, t.dtype) for n, t in ts.items())) for stream, ts in streams.items()),
        )
        if self._last is None or self._last[1] != key:
            self._last = Layout.of(streams, metrics), key
        return self._last[0]

    def _read(
        self, stream: str, plan: _Plan, tensors: Mapping[str, Tensor], rows: dict[str, Tensor]
    ) -> tuple[str, str] | None:
        """Put the flat row of a stream that adds up into ``rows``, or return what is wrong with its numbers."""
        if stream not in self._means:
            return number_problem(stream, tensors)
        if plan.numbers:
            row = rows[stream] = plan.flat(tensors, self._rows[stream])
            if self._checked and not math.isfinite(row.sum().item()):
                return number_problem(stream, tensors)
        return None

    def _sums(self, pool: Pool, layout: Layout) -> Sums:
        if layout not in pool.sums:
            pool.sums[layout] = Sums({}, {}, Tally(), [])
        return pool.sums[layout]

    def _accumulate(self, sums: Sums, mean: Mean, row: Tensor, weight: float) -> None:
        # Widened first: one operation on two types would make a wide copy of its own every time.
        free = self._free.setdefault((row.numel(), row.device), [])
        wide = free.pop() if free else torch.empty(row.numel(), dtype=torch.float64, device=row.device)
        wide.copy_(row)
        if mean in sums.rows:
            sums.rows[mean].add_(wide, alpha=weight)
            free.append(wide)
        else:
            sums.rows[mean] = wide.mul_(weight) if weight != 1 else wide

    def _finish(
        self, sums: Sums, layout: Layout, streams: Streams, metrics: Mapping[str, Metric], place: int
    ) -> None:
        for stream in self._means:
            plan = layout.plans.get(stream)
            if plan is not None and plan.others:
                _keep_larger(sums.largest, {stream: {n: streams[stream][n] for n in plan.others}})
        sums.tally.add(metrics)
        sums.places.append(place)


class Ladder:
    """Merges pools of blocks that come in order, along the tree, keeping few at a time."""

    def __init__(self, adder: Adder | None = None) -> None:
        self._adder = adder
        self._steps: list[tuple[int, Pool]] = []

    def push(self, pool: Pool, level: int = 0) -> None:
        """Add the pool of the next ``2 ** level`` blocks."""
        while self._steps and self._steps[-1][0] == level:
            pool = self._merged(self._steps.pop()[1], pool)
            level += 1
        self._steps.append((level, pool))

    def top(self) -> Pool:
        """Return the pool of all blocks so far."""
        found = self._steps.pop()[1] if self._steps else Pool()
        while self._steps:
            found = self._merged(self._steps.pop()[1], found)
        return found

    def _merged(self, one: Pool, later: Pool) -> Pool:
        both = [sums for layout, sums in later.sums.items() if layout in one.sums]
        one.merge(later)
        if self._adder is not None:
            self._adder.recycle(both)
        return one


@dataclass(frozen=True)
class Pooled:
    """The outcome of a round: the means of the clients that can be used together, and their metrics."""

    means: Mapping[str, Tensors]
    """By the names of the ``Pooling``."""
    tally: Tally
    metrics: frozenset[str]
    count: int

    @classmethod
    def of(cls, pooling: Pooling, layout: Layout, sums: Sums) -> Pooled:
        """Divide the sums by their weights; raises ``RunError`` if the weights are zero."""
        found: dict[Mean, Tensors] = {}
        for mean in pooling.values():
            if mean in found:
                continue
            if mean.stream not in layout.plans:
                raise RunError(f"The strategy averages stream '{mean.stream}', which no client sends.")
            total = sums.total(mean)
            require_weight(total)
            plan = layout.plans[mean.stream]
            summed = plan.parted(sums.rows[mean] / total) if plan.summed else {}
            both = {**summed, **sums.largest.get(mean.stream, {})}
            order = [name for name, _, _ in dict(layout.streams)[mean.stream]]
            found[mean] = {name: both[name] for name in order}
        means = {name: found[mean] for name, mean in pooling.items()}
        return cls(means, sums.tally, layout.metrics, len(sums.places))


def require_weight(total: float) -> None:
    """Raise ``RunError`` unless the replies weigh something together."""
    if not total > 0:
        raise RunError(
            "All replies weigh nothing (zero examples); give the clients data, or use uniform weighting."
        )


def metric_problem(metrics: Mapping[str, Metric]) -> tuple[str, str] | None:
    """Return kind and reason if a reply's metrics cannot be used."""
    if WEIGHT not in metrics:
        return "missing-metric", f"metric '{WEIGHT}' is missing"
    for name, value in metrics.items():
        if not (all(map(math.isfinite, value)) if isinstance(value, list) else math.isfinite(value)):
            return "non-finite", f"metric '{name}' is {value}"
    weight = metrics[WEIGHT]
    if isinstance(weight, list) or weight < 0:
        return "missing-metric", f"metric '{WEIGHT}' is {weight}, not a number of examples"
    return None


def number_problem(stream: str, tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Return kind and reason if a number in a stream is not finite."""
    name = first_non_finite(tensors)
    return None if name is None else ("non-finite", f"'{name}' of stream '{stream}' holds NaN or infinity")


def first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity, or None."""
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        # A sum is finite only if every term is, and costs one pass; where it is not, finite terms may
        # have overflowed, so the terms decide.
        if not cmath.isfinite(tensor.sum().item()) and not torch.isfinite(tensor).all():
            return name
    return None


def metrics_nbytes(metrics: Mapping[str, Metric]) -> int:
    """Return the bytes of a record of metrics, counted as ``flowerbed.messages.nbytes`` does."""
    values = sum(8 * len(v) if isinstance(v, list) else 8 for v in metrics.values())
    return len(METRICS) + sum(map(len, metrics)) + values


def added(adder: Adder, replies: Iterable[tuple[int, Streams, Mapping[str, Metric]]], cohort: int) -> Pool:
    """Return the pool of ``(place, streams, metrics)``, in whatever order, along the cohort's tree."""
    size = block_size(cohort)
    filled: defaultdict[int, list[tuple[int, Streams, Mapping[str, Metric]]]] = defaultdict(list)
    for reply in sorted(replies, key=itemgetter(0)):
        filled[reply[0] // size].append(reply)
    ladder = Ladder(adder)
    for number in range(len(blocks(cohort))):
        pool = Pool()
        for reply in filled[number]:
            adder.add(pool, *reply)
        ladder.push(pool)
    return ladder.top()


def means(
    replies: Iterable[tuple[int, Streams, Mapping[str, Metric]]], pooling: Pooling, cohort: int
) -> Mapping[str, Tensors]:
    """Return the means of replies ``(place, streams, metrics)``, in whatever order, as they are.

    Raises ``RunError`` if they differ in what they hold or weigh nothing.
    """
    pool = added(Adder(pooling, checked=False), replies, cohort)
    if len(pool.sums) != 1:
        raise RunError("The replies differ in the names, shapes or types of their tensors.")
    ((layout, sums),) = pool.sums.items()
    return Pooled.of(pooling, layout, sums).means


def _keep_larger(mine: dict[str, Tensors], theirs: Mapping[str, Mapping[str, Tensor]]) -> None:
    for stream, tensors in theirs.items():
        kept = mine.setdefault(stream, {})
        for name, value in tensors.items():
            kept[name] = torch.maximum(kept[name], value) if name in kept else value.detach().clone()


def _finite_rows(streams: Mapping[str, Tensors], clients: int) -> list[bool]:
    sums = [
        v.flatten(1).sum(1).isfinite()
        for tensors in streams.values()
        for v in tensors.values()
        if v.is_floating_point() or v.is_complex()
    ]
    found: list[bool] = torch.stack(sums).all(0).tolist() if sums else [True] * clients
    return found


def _taken(streams: Mapping[str, Tensors], rows: list[int]) -> Mapping[str, Tensors]:
    if all(len(v) == len(rows) for tensors in streams.values() for v in tensors.values()):
        return streams
    return {s: {n: v[rows] for n, v in tensors.items()} for s, tensors in streams.items()}


def number(metric: Metric) -> float:
    """Return a metric that must be one number; raises ``RunError`` for a list."""
    if isinstance(metric, list):
        raise RunError(f"Expected one number, got a list of {len(metric)}.")
    return metric


def _weighted(value: Tensor, weights: Sequence[float]) -> Tensor:
    column = torch.tensor(weights, dtype=value.dtype, device=value.device)
    summed: Tensor = torch.tensordot(column, value, 1)
    return summed
