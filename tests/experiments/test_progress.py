"""Progress is arithmetic on what the loop reports, with a clock that the test turns."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from flowerbed.datasets.sources import load_dataset
from flowerbed.experiments.progress import Lines, Live, Silent, Steps, Tally, display, waiting, wants_live
from flowerbed.experiments.text import duration
from flowerbed.server.callbacks import CLIENTS, SERVER, Record


class Clock:
    """Seconds that pass only when told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def one_round(tally: Tally, clock: Clock, number: int, clients: int = 4, seconds: float = 2.0) -> None:
    tally.asked(number, "train", clients)
    for _ in range(clients):
        tally.answered(number, True)
    clock.now += seconds
    tally.recorded(Record(number, "train", {"loss": 1.0}, clients, clients, 0, seconds))
    tally.recorded(Record(number, SERVER, {"accuracy": 0.1 * number, "loss": 1.0 / number}))


def test_speed_and_time_left_by_hand() -> None:
    clock = Clock()
    tally = Tally(clock)
    tally.started(10, 1)
    assert tally.seconds_left() is None
    assert tally.per_second() == 0.0
    for number in (1, 2):
        one_round(tally, clock, number)
    # 8 clients in 4 s; 2 rounds took 4 s, 8 are left.
    assert tally.per_second() == pytest.approx(2.0)
    assert tally.seconds_left() == pytest.approx(16.0)
    assert tally.text() == "accuracy 0.2  loss 0.5  2 clients/s  0:16 left"


def test_a_round_in_progress_counts_with_its_own_time() -> None:
    clock = Clock()
    tally = Tally(clock)
    tally.started(10, 1)
    one_round(tally, clock, 1)
    tally.asked(2, "train", 4)
    for _ in range(2):
        tally.answered(2, True)
    clock.now += 1.0
    assert (tally.asked_now, tally.answered_now, tally.done) == (4, 2, 1)
    assert tally.per_second() == pytest.approx((4 + 2) / (2 + 1))


def test_a_resumed_run_does_not_count_what_others_did() -> None:
    clock = Clock()
    tally = Tally(clock)
    tally.started(10, 7)
    one_round(tally, clock, 7)
    assert tally.seconds_left() == pytest.approx(3 * 2.0)


def test_failures_are_shown_and_client_evaluations_do_not_count_as_training() -> None:
    clock = Clock()
    tally = Tally(clock)
    tally.started(2, 1)
    tally.recorded(Record(1, "train", {"loss": 3.0}, 4, 3, 1, 1.5))
    tally.recorded(Record(1, CLIENTS, {"loss": 9.0}, 4, 4, 0, 10.0))
    assert tally.per_second() == pytest.approx(2.0)
    assert "1 failed" in tally.text()
    assert "loss 3" in tally.text()


def test_lines_are_about_ten_and_include_the_last_round() -> None:
    for rounds in (1, 3, 10, 25, 200):
        clock, lines = Clock(), list[str]()
        shown = Lines(lines.append, clock)
        shown.started(rounds, 1)
        for number in range(1, rounds + 1):
            one_round(shown, clock, number)
        assert len(lines) == min(rounds, 9 if rounds == 25 else 10)
        assert lines[-1].startswith(f"round {rounds}/{rounds}  accuracy")
        assert "left" not in lines[-1]


def test_the_live_display_shows_rounds_clients_and_figures() -> None:
    out = io.StringIO()
    live = Live(Console(file=out, force_terminal=True, width=120))
    live.download("set.tar.gz", 5, 10)
    live.started(3, 1)
    for number in (1, 2, 3):
        one_round(live, Clock(), number)
    live.finished("completed")
    live.close()
    text = out.getvalue()
    assert "3/3" in text
    assert "accuracy 0.3" in text
    assert "loss 0.3333" in text


def test_a_live_display_is_for_terminals_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert not wants_live(None)
    assert wants_live(True)
    with display(None) as shown:
        assert isinstance(shown, Silent)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert wants_live(None)
    assert not wants_live(False)


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.6, 61, 3600, 7325)] == ["0:00", "1:00", "1:01", "1:00:00", "2:02:05"]


def test_what_one_waits_for_before_the_first_round_is_shown() -> None:
    out = io.StringIO()
    live = Live(Console(file=out, force_terminal=True, width=120))
    with live.busy("preparing data and model"):
        live.download("set.tar.gz", 5_000_000, 10_000_000)
        with live.busy("decoding cifar10"):
            pass
    live.started(1, 1)
    one_round(live, Clock(), 1)
    live.finished("completed")
    text = out.getvalue()
    for shown in ("preparing data and model", "downloading set.tar.gz", "5 MB of 10 MB", "1/1"):
        assert shown in text
    # A failure gives the terminal back: another display can be opened.
    with (
        pytest.raises(ValueError, match="no data"),
        Live(Console(file=out, force_terminal=True)).busy("loading"),
    ):
        raise ValueError("no data")
    with Live(Console(file=out, force_terminal=True)).busy("again"):
        pass
    with Silent().busy("nothing"):
        pass


def test_decoding_is_told_and_a_cached_set_decodes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    arrays = {"x_train": np.zeros((4, 1, 2, 2), np.uint8), "y_train": np.array([0, 1, 0, 1])}
    arrays |= {"x_test": arrays["x_train"][:2], "y_test": arrays["y_train"][:2]}
    np.savez(path, **arrays)
    told: list[str] = []

    @contextlib.contextmanager
    def busy(text: str) -> Iterator[None]:
        told.append(text)
        yield
        told.append("over")

    for _ in range(2):
        load_dataset(f"npz:{path}", cache_dir=tmp_path / "cache", busy=busy)
        assert told == [f"decoding npz:{path}", "over"]


def test_steps_are_ten_plain_lines_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    for steps in (3, 10, 2000, 2001):
        with Steps("attack ig") as show:
            for step in range(1, steps + 1):
                show(step, steps)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == min(steps, 10)
        assert lines[-1] == f"attack ig: step {steps} of {steps}"


def test_steps_are_a_bar_on_a_terminal_and_a_new_stage_starts_it_anew() -> None:
    out = io.StringIO()
    with Steps("attack gifd", Console(file=out, force_terminal=True, width=100)) as show:
        for stage in (20, 20, 30):
            for step in range(1, stage + 1):
                show(step, stage)
    text = out.getvalue()
    assert "attack gifd" in text
    assert "30/30" in text
    assert "step" not in text


def test_waiting_says_nothing_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with waiting("reading"):
        pass
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")
