"""What processes have cost: CPU seconds of a tree of them, and peak memory. Reads ``/proc``, so Linux only."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from flowerbed.errors import ConfigError

PROC = Path("/proc")


def require_proc() -> None:
    """Raise ``ConfigError`` where there is no ``/proc``, without which nothing can be counted."""
    if not (PROC / "self" / "stat").exists():
        raise ConfigError("The benchmarks count CPU time in /proc, which only Linux has; run them there.")


def tree_cpu_seconds(root: int | None = None) -> float:
    """Return the CPU seconds, user and system, of process ``root``, its descendants and those they have buried.

    ``root`` is by default this process. The kernel counts in ticks, usually of 10 ms.
    """
    spent = {process: sum(map(int, fields[11:15])) for process, fields in _tree(root or os.getpid())}
    return sum(spent.values()) / os.sysconf("SC_CLK_TCK")


def kill_tree(root: int) -> None:
    """Kill process ``root`` and its descendants."""
    for process, _ in _tree(root):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def cpu_seconds(tree: bool) -> float:
    """Return the CPU seconds of this process: finely, all its threads, or with all its descendants."""
    return tree_cpu_seconds() if tree else time.process_time()


def own_bytes(process: int) -> int:
    """Return the memory of a process that lies in RAM and is neither a file's nor shared; 0 if it is gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in (PROC / str(process) / "status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


class PeakWatch:
    """Samples the memory of another process while the block runs; ``peak`` is the most that was seen, in bytes.

    The kernel keeps a peak of its own, but it counts the pages of libraries, which come and go with the load of
    the machine.
    """

    def __init__(self, process: int, interval: float = 0.005) -> None:
        """``interval``: seconds between samples."""
        self.process, self.interval, self.peak = process, interval, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.peak = max(self.peak, own_bytes(self.process))

    def _sample(self) -> None:
        while not self._over.wait(self.interval):
            self.peak = max(self.peak, own_bytes(self.process))


def _tree(root: int) -> Iterator[tuple[int, list[str]]]:
    """Yield process ``root`` and its descendants, parents first, as they are now, with the fields of their state."""
    found = dict(_stats())
    children: dict[int, list[int]] = {}
    for process, fields in found.items():
        children.setdefault(int(fields[1]), []).append(process)
    todo = [root] if root in found else []
    while todo:
        process = todo.pop()
        yield process, found[process]
        todo += children.get(process, [])


def _stats() -> Iterator[tuple[int, list[str]]]:
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The second field, the command's name in brackets, may contain anything.
            yield int(entry.name), (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
