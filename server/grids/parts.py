"""A cohort cut into parts for workers, and the sums of the parts put together again, along the cohort's tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from flowerbed.pooling import Ladder, Pool

# A part carries at most this share of what one worker has to do in a round (a fifth): so little that workers
# finish together, so much that its overhead does not count.
PARTS_PER_WORKER: Final = 5


@dataclass(frozen=True)
class Part:
    """The blocks ``start`` to ``start + 2 ** level``: a whole branch of the tree, so one sum speaks for it."""

    start: int
    level: int = 0
    load: float = field(default=0.0, compare=False)

    @property
    def blocks(self) -> range:
        """The numbers of its blocks."""
        return range(self.start, self.start + 2**self.level)


def cut(loads: Sequence[float], workers: int) -> list[Part]:
    """Return parts that cover all blocks, given how long each takes, in the order in which to hand them out.

    The longest come first, and none is longer than a worker's fifth unless it is one block: handing the next part
    to whoever is idle then keeps all workers busy to the end.
    """
    sums = [0.0]
    for load in loads:
        sums.append(sums[-1] + load)

    def part(start: int, level: int) -> Part:
        return Part(start, level, sums[start + 2**level] - sums[start])

    most = sums[-1] / (workers * PARTS_PER_WORKER)
    pending: list[Part] = []
    start = 0
    while start < len(loads):
        # The largest power of two first, so that all are aligned.
        level = (len(loads) - start).bit_length() - 1
        pending.append(part(start, level))
        start += 2**level
    found: list[Part] = []
    while pending:
        whole = pending.pop()
        if whole.level and whole.load > most:
            half = whole.level - 1
            pending += [part(whole.start, half), part(whole.start + 2**half, half)]
        else:
            found.append(whole)
    return sorted(found, key=lambda p: (-p.load, p.start))


class Branches:
    """Sums of parts that come in any order; two that make up a larger branch are merged at once."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int], Pool] = {}

    def put(self, part: Part, pool: Pool) -> None:
        """Add the sum of a part."""
        start, level = part.start, part.level
        while (sibling := (start ^ 2**level, level)) in self._found:
            other = self._found.pop(sibling)
            earlier, later = (pool, other) if start < sibling[0] else (other, pool)
            earlier.merge(later)
            start, level, pool = min(start, sibling[0]), level + 1, earlier
        self._found[start, level] = pool

    def top(self) -> Pool:
        """Return the sum of all parts."""
        ladder = Ladder()
        for (_, level), pool in sorted(self._found.items(), key=lambda item: item[0]):
            ladder.push(pool, level)
        return ladder.top()
