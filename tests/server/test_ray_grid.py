"""What only the Ray grid does: sharing, death, quarantine, limits, affinity, and its own runtime."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from flowerbed.errors import ConfigError, RunError
from flowerbed.messages import array_record
from flowerbed.server.grids import flower_compat, ray_grid
from flowerbed.server.grids.base import FIRST_NODE_ID
from flowerbed.server.grids.ray_grid import RayGrid

ALL = list(range(10))


def ask(partitions: list[int], size: int = 4, **config: Any) -> list[Message]:
    """Return one message per partition: own content objects around one common array record."""
    arrays = array_record({"w": torch.arange(float(size))})
    return [
        Message(RecordDict({"arrays": arrays, "config": ConfigRecord(config)}), FIRST_NODE_ID + p, "train")
        for p in partitions
    ]


def about(replies: list[Message], name: str) -> list[Any]:
    return [reply.content["about"][name] for reply in replies]


def test_a_large_record_is_put_once(ray_pair: RayGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    ray_pair.send_and_receive(ask(ALL))  # Starts the workers, to whom the app is put as well.
    puts: list[object] = []
    put = ray.put
    monkeypatch.setattr(ray, "put", lambda value: (puts.append(value), put(value))[1])
    replies = ray_pair.send_and_receive(ask(ALL, size=100_000))
    assert len(puts) == 1
    # The echoes are read in place: nobody serialised or copied them on the way.
    assert all(not reply.content["arrays"]["w"].view().flags.owndata for reply in replies)
    assert all(reply.content["arrays"]["w"].view()[-1] == 99_999 for reply in replies)
    ray_pair.send_and_receive(ask(ALL, size=100))
    assert len(puts) == 1


def test_a_record_changed_between_pushes_is_sent_anew(ray_pair: RayGrid) -> None:
    messages = ask([0, 1], size=100_000)
    ids = ray_pair.push_messages(messages[:1])
    messages[1].content["arrays"]["w"] = array_record({"w": torch.zeros(2)})["w"]
    ids += ray_pair.push_messages(messages[1:])
    got: list[Message] = []
    while len(got) < 2:
        got += ray_pair.pull_messages(ids)
    sizes = {reply.metadata.src_node_id: reply.content["arrays"]["w"].shape for reply in got}
    assert sizes == {1000: (100_000,), 1001: (2,)}


def test_both_workers_work(ray_pair: RayGrid) -> None:
    # Not at once: a worker may start later than the other, and clients whose pace is not known yet, or who
    # are so quick that one call carries them all, may go to one worker.
    give_up = time.monotonic() + 60
    pids: set[int] = set()
    while len(pids) < 2 and time.monotonic() < give_up:
        pids = set(about(ray_pair.send_and_receive(ask(ALL, do="sleep", seconds=0.03)), "pid"))
    assert len(pids) == 2


def test_a_worker_killed_in_mid_round_loses_nothing(ray_pair: RayGrid) -> None:
    import ray

    ray_pair.send_and_receive(ask(ALL, do="count"))
    before = ray_pair.send_and_receive(ask(ALL, do="count"))
    answered: list[Message] = []

    def kill_after_three(reply: Message) -> None:
        answered.append(reply)
        if len(answered) == 3:
            ray.kill(ray_pair._pool[0].actor)

    ray_pair.on_reply = kill_after_three
    replies = ray_pair.send_and_receive(ask(ALL, do="sleep", seconds=0.05))
    ray_pair.on_reply = None
    assert about(replies, "partition") == ALL
    assert ray_pair.quarantined == set()
    after = ray_pair.send_and_receive(ask(ALL, do="count"))
    calls = [
        (b.content["seen"]["calls"], a.content["seen"]["calls"]) for b, a in zip(before, after, strict=True)
    ]
    assert all(a == b + 1 for b, a in calls)


def test_a_client_that_kills_its_worker_once_is_answered(ray_pair: RayGrid, tmp_path: Path) -> None:
    replies = ray_pair.send_and_receive(ask(ALL, do="die-once", only=[6], marker=str(tmp_path / "died")))
    assert [reply.has_content() for reply in replies] == [True] * 10
    assert ray_pair.quarantined == set()


def test_killers_are_quarantined_and_the_overdue_stopped(
    ray_runtime: None, toy: Callable[[], ClientApp]
) -> None:
    with RayGrid(toy, 10, workers=2, time_limit=1.0) as grid:
        late = grid.send_and_receive(ask(ALL, do="sleep", seconds=60.0, only=[0]))
        assert [reply.has_error() for reply in late] == [True] + [False] * 9
        assert late[0].error.reason == "time limit of 1 s exceeded"
        assert late[0].error.code == flower_compat.NO_REPLY
        assert grid.quarantined == set()
        replies = grid.send_and_receive(ask(ALL, do="die", only=[4]))
        assert [reply.has_error() for reply in replies] == [p == 4 for p in ALL]
        assert replies[4].error.code == flower_compat.CLIENT_CRASHED
        assert replies[4].error.reason is not None
        assert replies[4].error.reason.startswith("WorkerDied: ")
        assert grid.quarantined == {1004}
        (reply,) = grid.send_and_receive(ask([4], do="about"))
        assert reply.error.reason is not None
        assert reply.error.reason.startswith("quarantined")
        assert about(grid.send_and_receive(ask([3, 5], do="about")), "partition") == [3, 5]
    with pytest.raises(RunError, match="closed"):
        grid.send_and_receive(ask([1]))


def test_stateful_clients_stay_with_their_worker(ray_runtime: None, toy: Callable[[], ClientApp]) -> None:
    with RayGrid(toy, 10, workers=2, stateful=True) as grid:
        first = about(grid.send_and_receive(ask(ALL, do="about")), "pid")
        again = about(grid.send_and_receive(ask([9, 1, 3, 5, 7, 0], do="about")), "pid")
        assert again == [first[p] for p in (9, 1, 3, 5, 7, 0)]
        assert len(set(first)) == 2
        pids = set(first)
    give_up = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids if sys.platform == "linux")


def test_a_timeout_leaves_the_grid_usable(ray_pair: RayGrid) -> None:
    ray_pair.send_and_receive(ask([0], do="about"))
    late = ray_pair.send_and_receive(ask(ALL, do="sleep", seconds=0.5), timeout=0.1)
    assert len(late) < 10
    assert about(ray_pair.send_and_receive(ask([8, 2], do="about")), "partition") == [8, 2]
    assert ray_pair._replies == {}


def test_starting_ray_leaves_pythons_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not with a real start: the threads of a runtime that is up may draw from the generator at any time.
    class Runtime:
        is_initialized = staticmethod(lambda: False)
        cluster_resources = staticmethod(lambda: {"CPU": 2.0})

    monkeypatch.setattr(ray_grid, "_own_runtime", False)
    monkeypatch.setattr(ray_grid, "import_ray", Runtime)
    monkeypatch.setattr(ray_grid, "_start_runtime", lambda *_: random.seed(1))
    before = random.getstate()
    ray_grid.ensure_runtime(None, workers=2, gpus_per_worker=0.0)
    assert random.getstate() == before


def test_workers_get_their_environment(ray_runtime: None) -> None:
    def factory() -> Any:
        import os

        import torch
        from flwr.app import Message, MetricRecord, RecordDict

        def app(message: Message, context: Any) -> Message:
            record = MetricRecord(
                {
                    "omp": int(os.environ["OMP_NUM_THREADS"]),
                    "torch": torch.get_num_threads(),
                    "pid": os.getpid(),
                }
            )
            return Message(RecordDict({"about": record}), reply_to=message)

        return app

    with RayGrid(factory, 1, workers=1, threads=2) as grid:
        replies = grid.send_and_receive([Message(RecordDict(), 1000, "train")])
    assert (about(replies, "omp"), about(replies, "torch")) == ([2], [2])
    assert about(replies, "pid") != [os.getpid()]


def test_an_app_that_cannot_be_built_raises_its_own_error(ray_runtime: None) -> None:
    def broken() -> Any:
        raise ConfigError("no such model 'resnet'")

    with RayGrid(broken, 2, workers=1) as grid, pytest.raises(ConfigError, match="no such model 'resnet'"):
        grid.send_and_receive(ask([0]))


def test_an_app_that_cannot_be_sent_is_refused(ray_runtime: None) -> None:
    import threading

    lock = threading.Lock()
    with RayGrid(lambda: lock, 2) as grid, pytest.raises(ConfigError, match="must be picklable"):
        grid.send_and_receive(ask([0]))


def test_what_does_not_fit_is_refused(ray_runtime: None, toy: Callable[[], ClientApp]) -> None:
    with (
        RayGrid(toy, 2, workers=1, gpus_per_worker=99.0) as grid,
        pytest.raises(ConfigError, match="1 workers need 99 GPUs and Ray has 0"),
    ):
        grid.send_and_receive(ask([0]))
    for wrong in ({"workers": 0}, {"time_limit": 0.0}, {"gpus_per_worker": -1.0}):
        with pytest.raises(ConfigError, match="not "):
            RayGrid(toy, 2, **wrong)  # type: ignore[arg-type]


def test_without_ray_the_error_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, toy: Callable[[], ClientApp]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install flowerbed\[simulation\]"):
        RayGrid(toy, 2)


def test_a_foreign_runtime_is_used_and_left_running(
    ray_runtime: None, monkeypatch: pytest.MonkeyPatch, toy: Callable[[], ClientApp]
) -> None:
    import ray

    monkeypatch.setattr(ray_grid, "_own_runtime", False)
    ray_grid.ensure_runtime("auto", workers=1, gpus_per_worker=0.0)
    ray_grid.shutdown()
    assert ray.is_initialized()
