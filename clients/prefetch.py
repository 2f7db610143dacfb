"""Preparing the data of the clients that come next while the present one trains."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from flowerbed.clients.data import ClientData, ViewCache

HEAVY = 0.1
"""Share of a worker's time above which preparing data is worth a thread of its own."""
LONG = 5e-3
"""Seconds that preparing a client's data must take on average: shorter calls cost more in changes of thread."""
DEPTH = 2
"""Clients whose data are prepared ahead: their views are the only memory that this takes."""

Key = tuple[int, str]
"""A client, and the split its view is of."""
Made = tuple[ClientData, float]
"""A view, and the seconds that making it took."""


class Prefetch:
    """A cache of views whose coming ones are made in a thread, once making them has been found heavy.

    Reading and decoding from disk, computing embeddings and copying to a GPU run without Python's lock, so beside a
    GPU or a spare core they cost no time. What is made is the same in either thread. An error is raised to whoever asks
    for the view.
    """

    def __init__(self, views: ViewCache, make: Callable[[Key], ClientData]) -> None:
        self._views, self._make = views, make
        self._coming: deque[Key] = deque()
        self._futures: dict[Key, Future[Made]] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._making = 0.0
        self._made = 0
        self._busy = 0.0

    @property
    def heavy(self) -> bool:
        """Whether making views takes long, and more than the share ``HEAVY`` of the time spent in blocks."""
        return self._making > max(HEAVY * self._busy, LONG * self._made)

    def get(self, key: Key) -> ClientData:
        """Return the view of ``key``: kept, made ahead, or made now."""
        future = self._taken(key)
        self._ask()

        def make() -> ClientData:
            view, seconds = self._timed(key) if future is None else future.result()
            self._making += seconds
            self._made += 1
            return view

        return self._views.get(key, make)

    @contextmanager
    def ahead(self, keys: Iterable[Key]) -> Iterator[None]:
        """Within the context, views of ``keys`` are about to be asked for in this order."""
        begin = time.perf_counter()
        if self.heavy:
            self._coming.extend(key for key in keys if key not in self._views)
            self._ask()
        try:
            yield
        finally:
            self._coming.clear()
            while self._futures:
                self._futures.popitem()[1].cancel()
            self._busy += time.perf_counter() - begin

    def _taken(self, key: Key) -> Future[Made] | None:
        """Return the view being made for ``key``, if it is; those before it, whose clients failed, are dropped."""
        while key in self._futures:
            first = next(iter(self._futures))
            future = self._futures.pop(first)
            if first == key:
                return future
            future.cancel()
        if key in self._coming:
            self._coming.remove(key)
        return None

    def _ask(self) -> None:
        while self._coming and len(self._futures) < DEPTH:
            self._thread = self._thread or ThreadPoolExecutor(1, "prefetch")
            key = self._coming.popleft()
            self._futures[key] = self._thread.submit(self._timed, key)

    def _timed(self, key: Key) -> Made:
        begin = time.perf_counter()
        return self._make(key), time.perf_counter() - begin
