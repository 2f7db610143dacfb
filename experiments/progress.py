"""What a person sees while a run goes on: a live display on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

from flowerbed.experiments.text import duration, size
from flowerbed.server.callbacks import CLIENTS, SERVER, Callback, Record

LINES = 10
"""Plain lines that a run prints, about."""
SHOWN = ("accuracy", "loss")


class Tally(Callback):
    """Counts what has happened since the run started or was resumed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = self._phase_started = clock()
        self._busy = 0.0
        self.rounds = self.first = self.round = self.done = 0
        """All rounds, the first of this session, the one going on, and the last complete one."""
        self.phase = ""
        self.asked_now = self.answered_now = 0
        self.answered_in_all = self.failed_in_all = 0
        self.latest: dict[str, float] = {}

    def started(self, rounds: int, first_round: int) -> None:
        self.rounds, self.first, self.done = rounds, first_round, first_round - 1
        self._started = self._clock()

    def asked(self, server_round: int, phase: str, clients: int) -> None:
        # That the next round starts is how one knows that the last one's evaluations are over.
        self.round, self.phase, self.done = server_round, phase, max(self.done, server_round - 1)
        self.asked_now, self.answered_now = clients, 0
        self._phase_started = self._clock()

    def answered(self, server_round: int, ok: bool) -> None:
        self.answered_now += 1

    def recorded(self, record: Record) -> None:
        if record.phase == SERVER:
            self.latest = {name: record.metrics[name] for name in SHOWN if name in record.metrics}
            return
        if record.phase == CLIENTS:
            return
        self.done = record.round
        self.answered_in_all += record.answered
        self.failed_in_all += record.failed
        self._busy += record.seconds
        self.asked_now = self.answered_now = 0
        if not self.latest and "loss" in record.metrics:
            self.latest = {"loss": record.metrics["loss"]}

    def per_second(self) -> float:
        """Return clients trained per second of training."""
        running = self._clock() - self._phase_started if self.asked_now else 0.0
        seconds = self._busy + running
        return (self.answered_in_all + self.answered_now) / seconds if seconds > 0 else 0.0

    def seconds_left(self) -> float | None:
        """Return an estimate from this session's rounds; None before the first is complete."""
        complete = self.done - self.first + 1
        if complete < 1:
            return None
        return (self._clock() - self._started) / complete * (self.rounds - self.done)

    def text(self) -> str:
        """Return everything but the round and the bar."""
        parts = [f"{name} {value:.4g}" for name, value in self.latest.items()]
        if self.per_second():
            parts.append(f"{self.per_second():.3g} clients/s")
        if self.failed_in_all:
            parts.append(f"{self.failed_in_all} failed")
        left = self.seconds_left()
        if left is not None and self.done < self.rounds:
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)


class Lines(Tally):
    """Prints about ten plain lines a run."""

    def __init__(
        self, write: Callable[[str], Any] = print, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(clock)
        self._write = write

    def recorded(self, record: Record) -> None:
        super().recorded(record)
        # A round's training record is followed by its evaluation where there is one, which is what is shown.
        every = max(1, -(-self.rounds // LINES))
        if (
            record.phase == SERVER
            and record.round
            and (record.round % every == 0 or self.done == self.rounds)
        ):
            self._write(f"round {record.round}/{self.rounds}  {self.text()}")


class Live(Tally):
    """A rich display: rounds, the clients of the round that goes on, figures, speed and time left."""

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        super().__init__()
        console = console or Console()
        self._bars = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            refresh_per_second=5,
        )
        # What comes before the first round: downloads, and whatever else makes one wait.
        self._before = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, Any] = {}

    def download(self, file_name: str, done: int, total: int | None) -> None:
        """Show how far a download is; what the data sets' loader calls."""
        self._before.start()
        if file_name not in self._tasks:
            self._tasks[file_name] = self._before.add_task(f"downloading {file_name}", total=total, note="")
        note = size(done) if total is None else f"{size(done)} of {size(total)}"
        self._before.update(self._tasks[file_name], completed=done, note=note)

    @contextlib.contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Show what one waits for, and for how long already."""
        self._before.start()
        task = self._before.add_task(text, total=None, note="")
        try:
            yield
        finally:
            self._before.remove_task(task)
            if not self._before.tasks:
                self._before.stop()

    def started(self, rounds: int, first_round: int) -> None:
        super().started(rounds, first_round)
        self._before.stop()
        self._tasks = {
            "round": self._bars.add_task("rounds", total=rounds, completed=first_round - 1, note=""),
            "clients": self._bars.add_task("clients", total=None, note="", visible=False),
        }
        self._bars.start()

    def asked(self, server_round: int, phase: str, clients: int) -> None:
        super().asked(server_round, phase, clients)
        self._show()

    def answered(self, server_round: int, ok: bool) -> None:
        super().answered(server_round, ok)
        self._show()

    def recorded(self, record: Record) -> None:
        super().recorded(record)
        self._show()

    def finished(self, status: str) -> None:
        if "clients" in self._tasks:
            self._bars.update(self._tasks["clients"], visible=False)
        self.close()

    def close(self) -> None:
        """Give the terminal back; may be called again."""
        self._before.stop()
        self._bars.stop()

    def _show(self) -> None:
        self._bars.update(self._tasks["round"], completed=self.done, note=self.text())
        self._bars.update(
            self._tasks["clients"],
            total=self.asked_now or None,
            completed=self.answered_now,
            visible=self.asked_now > 0,
            note=f"{self.phase}, round {self.round}",
        )


class Silent(Callback):
    """Shows nothing."""

    @contextlib.contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Show nothing."""
        yield

    def download(self, file_name: str, done: int, total: int | None) -> None:
        """Show nothing."""


def wants_live(progress: bool | None) -> bool:
    """Return what ``run.progress`` asks for; unset, it asks for a display where a person looks at one."""
    return sys.stdout.isatty() if progress is None else progress


@contextlib.contextmanager
def display(progress: bool | None) -> Iterator[Live | Silent]:
    """Open the live display if it is wanted, and give the terminal back whatever happens."""
    if not wants_live(progress):
        yield Silent()
        return
    live = Live()
    try:
        yield live
    finally:
        live.close()


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show on a terminal what one waits for; in a pipe nothing."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


class Steps:
    """Shows a known number of steps on standard error: a bar on a terminal, about ten plain lines elsewhere.

    Called with the step and the number of steps. A number that falls back, or another total, is a new stage.
    """

    def __init__(self, what: str, console: Any = None) -> None:
        self._what, self._console = what, console
        self._bars: Any = None
        self._task: Any = None
        self._last = self._total = 0

    def __enter__(self) -> Self:
        if self._console is not None or sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console or Console(stderr=True),
            )
            self._bars.start()
            self._task = self._bars.add_task(self._what, total=None)
        return self

    def __exit__(self, *about: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, step: int, steps: int) -> None:
        if self._bars is not None:
            if steps != self._total or step < self._last:
                self._bars.reset(self._task, total=steps)
            self._bars.update(self._task, completed=step)
        elif step % max(1, -(-steps // LINES)) == 0 or step == steps:
            print(f"{self._what}: step {step} of {steps}", file=sys.stderr, flush=True)
        self._last, self._total = step, steps
