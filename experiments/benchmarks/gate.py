"""A contestant's end of the race: it trains only when it is its turn, and says what each turn has cost.

Every contestant is a process of its own, so that none is helped or hurt by what another sets (matrix
precision, allocator, threads), and the races interleave all the same: between turns each one waits at its gate.
"""

from __future__ import annotations

import cProfile
import io
import json
import os
import pstats
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from flowerbed.experiments.benchmarks import accounting

HOTTEST = 20


class Finished(BaseException):
    """Ends a contestant's endless run; no error, so that nothing on the way takes it for one."""


class Gate:
    """Where a contestant's run calls ``open`` before its first round and ``passed`` after each one.

    The parent's lines are ``go N`` (run N rounds) and ``stop``; the answers are lines of JSON.
    """

    def __init__(
        self,
        replies: TextIO,
        commands: TextIO = sys.stdin,
        *,
        tree: bool = False,
        limit: int = 0,
        synchronise: Callable[[], None] | None = None,
        profile: cProfile.Profile | None = None,
        unseen: int = 0,
    ) -> None:
        """``tree``: the contestant has processes of its own, whose CPU time counts as well.

        ``limit``: the rounds after which the run ends by itself; 0 means that only ``stop`` ends it.
        ``synchronise`` waits for the device before a time is taken. ``profile`` sees the turns
        after the first ``unseen`` rounds, and nothing else.
        """
        self._replies, self._commands = replies, commands
        self._tree, self._limit = tree, limit
        self._synchronise = synchronise or (lambda: None)
        self._profile, self._unseen = profile, unseen
        self._done = self._left = self._turn = 0
        self._cpu = self._wall = 0.0

    def open(self) -> None:
        """Report that everything is built, and wait for the first turn."""
        self._tell("ready", cpu=accounting.tree_cpu_seconds())
        self._await()

    def passed(self) -> None:
        """Count a round; after the last one of a turn, report the turn and wait for the next.

        Raises ``Finished`` when the race is over.
        """
        self._done += 1
        self._left -= 1
        if self._left:
            return
        if self._profile is not None:
            self._profile.disable()
        self._synchronise()
        # The CPU time was read last at the start and is read first here, so that its stretch lies within the wall's.
        cpu = accounting.cpu_seconds(self._tree) - self._cpu
        wall = time.perf_counter() - self._wall
        self._tell(
            "turn",
            rounds=self._turn,
            cpu=cpu,
            wall=wall,
            since_start=accounting.tree_cpu_seconds(),
        )
        if self._done != self._limit:
            self._await()

    def end(self, **facts: Any) -> None:
        """Report what the contestant has to say when all is over, and where the time went if there is a profile."""
        if self._profile is not None:
            facts["profile"] = _hottest(self._profile)
        self._tell("end", **facts)

    def _await(self) -> None:
        words = self._commands.readline().split()
        if words[:1] != ["go"]:
            raise Finished
        self._left = self._turn = int(words[1])
        self._wall, self._cpu = time.perf_counter(), accounting.cpu_seconds(self._tree)
        if self._profile is not None and self._done >= self._unseen:
            self._profile.enable()

    def _tell(self, kind: str, **facts: Any) -> None:
        print(json.dumps({"kind": kind, **facts}), file=self._replies, flush=True)


def _hottest(profile: cProfile.Profile) -> str:
    """Return the functions that took most time themselves, without the folders of their files."""
    text = io.StringIO()
    pstats.Stats(profile, stream=text).strip_dirs().sort_stats("tottime").print_stats(HOTTEST)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip())


def private_replies() -> TextIO:
    """Return what stdout was, and let everything else that is printed go to stderr.

    For child processes of a contestant as well, hence by file descriptor.
    """
    sys.stdout.flush()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def digest(tensors: Mapping[str, Any]) -> str:
    """Return the SHA-256 of named torch tensors, by which two processes compare models bit for bit."""
    import hashlib

    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
