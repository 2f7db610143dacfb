"""The parent's end of a race: contestants in processes of their own, who train in turns, and their times.

In each turn every contestant trains for at least ``least`` seconds, one after the other, in an order that
rotates; so a machine that is slower for a while is slower for all. Compared are the costs of a round within the
same turn: the ratio of two contestants is the median over the turns of the ratios, with the exact interval for a
median from order statistics, which assumes nothing about the distribution.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from flowerbed.experiments.benchmarks import accounting

WARM_ROUNDS = 2
MOST_ROUNDS = 1000
MOST_WORDS = 300
"""Characters of an error that a report quotes."""
LEVEL = 0.95
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """Who takes part: a name, and the specification that ``contestant`` reads."""

    name: str
    specification: Mapping[str, Any]
    path: str | None = None
    """Folder of packages that this process alone sees, before all others."""


@dataclass(frozen=True)
class Turn:
    """What one contestant's turn has cost, per round."""

    rounds: int
    cpu: float
    """CPU seconds, of all processes of the contestant."""
    wall: float


@dataclass
class Result:
    """What a contestant has shown; ``failure`` says why the race has no turns of it."""

    name: str
    turns: list[Turn] = field(default_factory=list)
    failure: str = ""
    ready_cpu: float = 0.0
    """CPU seconds of all its processes until it was built."""
    built_bytes: int = 0
    """Memory of its first process when built, without files and shared memory."""
    peak_bytes: int = 0
    """The most of it that was seen in a round, the first one included; only if the race watches memory."""
    first_round_cpu: float = 0.0
    """CPU seconds of all its processes until the first round was over."""
    facts: dict[str, Any] = field(default_factory=dict)
    used: float | None = None
    """Mean utilisation of the GPU during its turns, in percent."""

    @property
    def round_bytes(self) -> int:
        """The memory that rounds have added at most."""
        return max(0, self.peak_bytes - self.built_bytes)

    def median(self, quantity: str) -> float:
        """Return the median over the turns of ``cpu`` or ``wall``."""
        return float(median(getattr(turn, quantity) for turn in self.turns))


class Contestant:
    """One contestant's process."""

    def __init__(self, entry: Entry) -> None:
        """Start the process; it builds while the parent goes on."""
        self.result = Result(entry.name)
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed by stop().
        paths = [entry.path, *sys.path] if entry.path else sys.path
        environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = [sys.executable, "-m", "flowerbed.experiments.benchmarks.contestant"]
        self._process = subprocess.Popen(
            [*command, json.dumps(entry.specification)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )

    @property
    def alive(self) -> bool:
        """Whether it can take another turn."""
        return not self.result.failure

    def ready(self) -> None:
        """Wait until it is built."""
        answer = self._answer("ready")
        if answer is not None:
            self.result.ready_cpu = answer["cpu"]
            self.result.built_bytes = accounting.own_bytes(self._process.pid)

    def turn(self, rounds: int, *, watch_memory: bool = False) -> Turn | None:
        """Let it train for ``rounds`` rounds; None if it failed."""
        self._tell(f"go {rounds}")
        if watch_memory:
            with accounting.PeakWatch(self._process.pid) as watch:
                answer = self._answer("turn")
            self.result.peak_bytes = max(self.result.peak_bytes, watch.peak)
        else:
            answer = self._answer("turn")
        if answer is None:
            return None
        self.result.first_round_cpu = self.result.first_round_cpu or answer["since_start"]
        return Turn(rounds, answer["cpu"] / rounds, answer["wall"] / rounds)

    def stop(self) -> None:
        """End the process and all that it has started."""
        if self.alive:
            self._tell("stop")
            answer = self._answer("end")
            if answer is not None:
                self.result.facts = {name: value for name, value in answer.items() if name != "kind"}
        with contextlib.suppress(OSError):  # Closing writes what is left, which the dead do not read.
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            accounting.kill_tree(self._process.pid)
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def _tell(self, line: str) -> None:
        with contextlib.suppress(OSError):  # If it is dead, the answer will show it.
            assert self._process.stdin is not None
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _answer(self, kind: str) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            assert answer["kind"] == kind, (answer, kind)
            return answer
        self._process.wait()
        self._errors.seek(0)
        lines = [text for text in self._errors.read().splitlines() if text.strip()]
        self.result.failure = (
            lines[-1].strip()[:MOST_WORDS] if lines else f"ended with status {self._process.returncode}"
        )
        return None


def race(
    entries: Sequence[Entry],
    *,
    turns: int,
    warm: int = WARM_ROUNDS,
    least: float = 0.5,
    watch: Callable[[], Callable[[], float | None]] | None = None,
    watch_memory: bool = False,
    say: Say = lambda text: None,
) -> list[Result]:
    """Let the entries train in turns and return what they have shown, in their order.

    ``warm`` rounds of each are thrown away. Then each takes ``turns`` turns of so many rounds that a turn takes
    about ``least`` seconds (one round if that is 0). ``watch()`` starts to observe the device and returns what
    ends it and tells the mean utilisation; ``watch_memory`` samples the memory of the first process. A
    contestant that fails is left out from there on.
    """
    accounting.require_proc()
    contestants: list[Contestant] = []
    try:
        for entry in entries:
            say(f"starting {entry.name}")
            # One after the other: building is heavy, and so is the first round of those that start Ray.
            contestants.append(Contestant(entry))
            contestants[-1].ready()
        rounds = {contestant: 1 for contestant in contestants}
        for contestant in contestants:
            for _ in range(warm):
                found = contestant.turn(1, watch_memory=watch_memory) if contestant.alive else None
                if found is not None and least:
                    rounds[contestant] = min(MOST_ROUNDS, math.ceil(least / max(found.wall, 1e-6)))
        used: dict[Contestant, list[float]] = {contestant: [] for contestant in contestants}
        for turn in range(turns):
            say(f"turn {turn + 1} of {turns}")
            for i in range(len(contestants)):
                contestant = contestants[(turn + i) % len(contestants)]
                if not contestant.alive:
                    continue
                ended = watch() if watch is not None else None
                found = contestant.turn(rounds[contestant], watch_memory=watch_memory)
                share = ended() if ended is not None else None
                if found is not None:
                    contestant.result.turns.append(found)
                if share is not None:
                    used[contestant].append(share)
        for contestant in contestants:
            seen = used[contestant]
            contestant.result.used = sum(seen) / len(seen) if seen else None
    finally:
        for contestant in contestants:
            contestant.stop()
    for contestant in contestants:
        if contestant.result.failure:
            contestant.result.turns.clear()
            say(f"{contestant.result.name}: {contestant.result.failure}")
    return [contestant.result for contestant in contestants]


@dataclass(frozen=True)
class Ratio:
    """A median with its interval, which is None where there are too few turns for one."""

    median: float
    low: float | None
    high: float | None


def ratio(numerator: Result, denominator: Result, quantity: str = "cpu") -> Ratio | None:
    """Return by how much more of ``quantity`` the one needs; None if one of them has no turns."""
    pairs = list(zip(numerator.turns, denominator.turns, strict=False))
    if not pairs:
        return None
    return median_interval([getattr(a, quantity) / max(getattr(b, quantity), 1e-9) for a, b in pairs])


def median_interval(values: Sequence[float]) -> Ratio:
    """Return the median and the narrowest interval of order statistics that covers it in 95 % of all cases.

    ``(x_(k), x_(n+1-k))`` with the largest k for which P(Binomial(n, 1/2) < k) <= 2.5 %; below 6 values there is
    none.
    """
    ordered, n = sorted(values), len(values)
    below, k = 0.0, 0
    while below + math.comb(n, k) / 2**n <= (1 - LEVEL) / 2:
        below += math.comb(n, k) / 2**n
        k += 1
    middle = float(median(ordered))
    return Ratio(middle, ordered[k - 1], ordered[n - k]) if k else Ratio(middle, None, None)


def scratch() -> tempfile.TemporaryDirectory[str]:
    """Return a folder for the arrays of a race, on disk rather than in memory that is counted."""
    return tempfile.TemporaryDirectory(prefix="flowerbed-bench-", ignore_cleanup_errors=True)


def repository() -> Path:
    """Return the root of the checkout that this file lies in."""
    return Path(__file__).resolve().parents[2]
