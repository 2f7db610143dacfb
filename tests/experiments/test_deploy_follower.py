"""Who follows a run tells the truth about its end, and starts it again only where its server went away."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from flowerbed.errors import RunError
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.deploy import folder, operate
from flowerbed.experiments.deploy.flower import FlowerRun, ServerAway
from flowerbed.experiments.deploy.folder import ServerSettings
from flowerbed.experiments.deploy.server_app import is_locked, locked
from flowerbed.experiments.deploy.submission import Submission
from flowerbed.server.callbacks import MetricsLog, Record


class Played:
    """A SuperLink on a clock of its own: ``status(run_id, now)`` is what it says, None while it is away."""

    def __init__(self, status: Callable[[int, float], FlowerRun | None]) -> None:
        self._status = status
        self.now = 0.0
        self.started: list[float] = []
        self.stopped: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, app: Path, config: dict[str, str]) -> int:
        self.started.append(self.now)
        return len(self.started)

    def stop(self, run_id: int) -> None:
        self.stopped.append(run_id)

    def runs(self) -> dict[int, FlowerRun]:
        found = {i: self._status(i, self.now) for i in range(1, len(self.started) + 1)}
        if None in found.values():
            raise ServerAway("away")
        return {i: run for i, run in found.items() if run is not None}

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < 1000, "nobody ends this"


def run(run_id: int, status: str, details: str = "") -> FlowerRun:
    return FlowerRun(run_id, status, details)


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    fed = folder.create(tmp_path / "fed", ServerSettings("x"), ["a"], [], 30)
    directory = fed.runs / "first"
    directory.mkdir(parents=True)
    (directory / "summary.json").write_text(
        json.dumps({"status": "completed", "rounds": 2, "failures": {"total": 1}})
    )
    said: list[str] = []

    def follow(status: Callable[[int, float], FlowerRun | None]) -> tuple[Played, Callable[[], int]]:
        link = Played(status)
        monkeypatch.setattr(operate, "connect", lambda _: link)
        monkeypatch.setattr(operate, "time", SimpleNamespace(sleep=link.sleep, monotonic=lambda: link.now))
        submission = Submission(Simulation.of({}), "{}")
        follower = operate.Follower(fed, directory, submission, said.append)
        follower.start()
        return link, follower.follow

    return SimpleNamespace(follow=follow, directory=directory, said=said)


def test_only_a_completed_run_is_a_success(play: Any) -> None:
    log = MetricsLog(play.directory / "metrics.jsonl")

    def status(run_id: int, now: float) -> FlowerRun:
        if now == 2.0:
            log.append(Record(1, "train", {"loss": 0.5}, asked=3, answered=2, failed=1, seconds=1.0))
        return run(run_id, "running" if now < 5 else "finished:completed")

    _, follow = play.follow(status)
    assert follow() == 0
    assert any(line.startswith("round 1  train  loss 0.5  2 of 3 devices") for line in play.said)
    assert "completed: 2 rounds, 1 failures" in play.said[-1]


@pytest.mark.parametrize(
    ("status", "details", "word"),
    [
        (
            "finished:failed",
            "ServerApp failed with exception: Round 3: no quorum.",
            "first failed: Round 3: no quorum",
        ),
        ("finished:failed", "", "first failed: finished:failed"),
        ("finished:stopped", "", "first was stopped"),
        ("unknown", "", "first failed: unknown"),
    ],
)
def test_any_other_end_is_none(play: Any, status: str, details: str, word: str) -> None:
    link, follow = play.follow(lambda run_id, now: run(run_id, "running" if now < 3 else status, details))
    with pytest.raises(RunError, match=word):
        follow()
    assert len(link.started) == 1, "a run that failed by itself is not started again"


def test_a_run_whose_server_was_killed_goes_on(play: Any) -> None:
    def status(run_id: int, now: float) -> FlowerRun | None:
        if 10 <= now < 30:
            return None
        if run_id == 1:
            return run(1, "running")
        return run(2, "running" if now < 60 else "finished:completed")

    link, follow = play.follow(status)
    assert follow() == 0
    assert link.stopped == [1]
    # Left alone for a while, in case its process is but slow.
    assert link.started[0] == 0
    assert 30 + operate.ORPHANED <= link.started[1] < 40
    assert Submission.read(play.directory).run_ids == (1, 2)


def test_a_run_that_flower_found_dead_meanwhile_goes_on_too(play: Any) -> None:
    def status(run_id: int, now: float) -> FlowerRun | None:
        if 10 <= now < 30:
            return None
        if run_id == 1 and now >= 30:
            return run(1, "finished:failed")
        return run(run_id, "running" if now < 60 else "finished:completed")

    link, follow = play.follow(status)
    assert follow() == 0
    assert (len(link.started), link.stopped) == (2, [])


def test_a_server_that_goes_away_again_while_the_run_is_started_again_is_waited_for(play: Any) -> None:
    def status(run_id: int, now: float) -> FlowerRun | None:
        if 10 <= now < 30 or 36 <= now < 50:
            return None
        return run(run_id, "running" if now < 80 else "finished:completed")

    link, follow = play.follow(status)
    start = link.start

    def start_or_not(app: Path, config: dict[str, str]) -> int:
        if 35 <= link.now < 50:
            raise ServerAway("away")
        return start(app, config)

    link.start = start_or_not
    assert follow() == 0
    assert len(link.started) == 2
    assert link.started[1] >= 50


def test_a_run_whose_server_only_stuttered_is_left_alone(play: Any) -> None:
    with locked(play.directory):
        link, follow = play.follow(
            lambda run_id, now: (
                None if 10 <= now < 12 else run(run_id, "running" if now < 60 else "finished:completed")
            )
        )
        assert is_locked(play.directory)
        assert follow() == 0
    assert not is_locked(play.directory)
    assert len(link.started) == 1


def test_a_server_that_dies_in_every_round_is_given_up(play: Any) -> None:
    def status(run_id: int, now: float) -> FlowerRun | None:
        return None if now % 20 < 5 else run(run_id, "running")

    link, follow = play.follow(status)
    with pytest.raises(RunError, match=f"{operate.ATTEMPTS} times without getting further"):
        follow()
    assert len(link.started) == 1 + operate.ATTEMPTS


def test_two_processes_never_work_in_one_run(play: Any) -> None:
    with locked(play.directory), contextlib.suppress(RunError), locked(play.directory):
        raise AssertionError("both have it")
    with locked(play.directory):
        pass
