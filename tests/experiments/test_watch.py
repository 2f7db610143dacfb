"""``flowerbed watch``: what it finds and follows, and whom it answers. Runs are written here by hand, byte by byte."""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from watched import Asked, later, line, make_run, scanned, serving

from flowerbed import __version__
from flowerbed.experiments import cli
from flowerbed.experiments.simulation import simulate
from flowerbed.experiments.watch import command, follow, index, server
from flowerbed.experiments.watch.follow import Follower, missing_rounds
from flowerbed.experiments.watch.index import Index
from flowerbed.experiments.watch.server import WatchServer
from flowerbed.server.callbacks import SERVER, MetricsLog

SECRET = "not for this page"


def rows(found: Index, **asked: Any) -> dict[str, dict[str, Any]]:
    return {Path(row["path"]).name: row for row in found.page(**asked)["rows"]}


# Following one file.


@given(
    st.lists(st.tuples(st.integers(0, 50), st.one_of(st.floats(), st.none())), max_size=12),
    st.lists(st.integers(0, 2000), max_size=8),
)
@settings(max_examples=60, deadline=None)
def test_wherever_writing_is_cut_the_same_is_read(
    tmp_path_factory: pytest.TempPathFactory, written: list[tuple[int, float | None]], cuts: list[int]
) -> None:
    text = "".join(line(r) if v is None else line(r, accuracy=v) for r, v in written).encode()
    path = tmp_path_factory.mktemp("follow") / "metrics.jsonl"
    follower = Follower(path)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, end in pairwise(places):
        with open(path, "ab") as file:
            file.write(text[start:end])
        follower.refresh()
    # The oracle parses the whole file at once.
    expected = [r["metrics"].get("accuracy") for r in map(json.loads, text.decode().splitlines())]
    finite = [v if v is not None and math.isfinite(v) else None for v in expected]
    whole = follower.whole()["phases"].get("train", {"rounds": [], "columns": {}})
    assert whole["rounds"] == [r for r, _ in written]
    if any(v is not None for v in expected):
        assert whole["columns"]["accuracy"] == finite
    assert follower.generation == 0


def test_every_byte_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    class Counting:
        def __init__(self, path: Path, mode: str) -> None:
            self._file = open(path, mode)  # noqa: SIM115

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *about: object) -> None:
            self._file.close()

        def read(self, count: int) -> bytes:
            nonlocal read
            data: bytes = self._file.read(count)
            read += len(data)
            return data

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    monkeypatch.setattr(follow, "open", Counting, raising=False)
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    size = looks = 0
    for round_ in range(1, 201):
        with open(path, "a") as file:
            size += file.write(line(round_, accuracy=0.5, padding="x" * 500))
        follower.refresh()
        looks += 1
    assert len(follower.whole()["phases"]["train"]["rounds"]) == 200
    # Beside the content, each look rereads the few bytes that recognise a replaced file.
    assert size <= read <= size + looks * follow.REMEMBERED


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_a_run_that_goes_on_from_a_checkpoint_starts_anew(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    path.write_text("".join(line(r, accuracy=0.1) for r in range(1, 6)))
    follower = Follower(path)
    follower.refresh()
    log.rewind(keep)
    with open(path, "a") as file:
        file.writelines(line(r, accuracy=0.9) for r in range(keep + 1, 8))
    follower.refresh()
    train = follower.whole()["phases"]["train"]
    assert train["rounds"] == [*range(1, 8)]
    assert train["columns"]["accuracy"] == [0.1] * keep + [0.9] * (7 - keep)
    assert follower.generation == 1


def test_a_file_rewritten_in_place_with_the_same_length_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1, accuracy=0.1))
    follower = Follower(path)
    follower.refresh()
    with open(path, "r+") as file:
        file.write(line(1, accuracy=0.2))
    follower.refresh()
    assert follower.whole()["phases"]["train"]["columns"]["accuracy"] == [0.2]


def test_what_is_wrong_with_metrics_is_said(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    text = line(1, accuracy=0.1, loss=float("nan")) + "{not json}\n" + '{"round": 2}\n'
    text += line(2, loss=float("inf")) + line(3, accuracy=0.3, loss=1.0) + line(6, accuracy=0.4, loss=1.0)
    path.write_text(text + '{"round": 7, "pha')
    follower = Follower(path)
    follower.refresh()
    whole = follower.whole()
    assert whole["phases"]["train"]["columns"]["loss"] == [None, None, 1.0, 1.0]
    assert whole["phases"]["train"]["columns"]["accuracy"] == [0.1, None, 0.3, 0.4]
    assert whole["notes"] == [
        "metrics.jsonl: 2 lines cannot be read and left out",
        "train/loss is not finite (NaN or infinite) 2 times: gaps in its curve",
        "train: no record of rounds 4 to 5",
        "train/accuracy is missing in 1 of 4 records",
    ]
    # Every JSON parser must read what is sent; Python's own lets NaN pass unless it is told not to.
    json.loads(server.dumped(whole), parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        ([], ""),
        ([0], ""),
        ([0, 1, 2, 3], ""),
        ([0, 10, 20, 30, 37], ""),
        ([1, 2, 3, 5, 6], "4"),
        ([5, 10, 25, 30, 35], "15 to 20"),
        # Spaced by powers: no distance is the usual one.
        ([1, 2, 4, 8, 16, 32], ""),
        ([1, 1, 2, 2, 3], ""),
    ],
)
def test_missing_rounds_by_hand(rounds: list[int], said: str) -> None:
    assert missing_rounds(rounds) == said


def test_long_runs_are_thinned_out_and_keep_their_last_round(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line(r, accuracy=r / 1e5) for r in range(1, 9_990)))
    follower = Follower(path)
    follower.refresh()
    whole = follower.whole()["phases"]["train"]
    assert whole["step"] == 5
    assert len(whole["rounds"]) <= follow.POINTS
    assert whole["rounds"][-1] == 9_989
    assert whole["columns"]["accuracy"] == [r / 1e5 for r in whole["rounds"]]
    # What comes after is sent whole.
    _, counts = follower.cursor()
    with open(path, "a") as file:
        file.write(line(9_990, accuracy=1.0))
    follower.refresh()
    assert follower.since(counts)["phases"]["train"]["rounds"] == [9_990]


def test_ten_thousand_clients_fail_and_the_last_fifty_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "huge", ended=False)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(line(4, failures=10_000, loss=0.1))
    follower = Follower(run / "metrics.jsonl")
    follower.refresh()
    whole = follower.whole()
    assert whole["failed"] == {"died": 10_000}
    assert [one["client"] for one in whole["failures"]] == [*range(9_950, 10_000)]
    # The last line is longer than the piece of the file that the list looks at first.
    assert (run / "metrics.jsonl").stat().st_size > 4 * index.TAIL
    (row,) = rows(scanned(tmp_path)).values()
    assert (row["round"], row["accuracy"]) == (4, 0.3)


# Finding runs.


def test_the_list_says_what_a_real_run_says(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "real"
    result = simulate(
        federation={"clients": 2, "rounds": 2},
        model={"name": "mlp", "hidden": [8]},
        partition={"name": "dirichlet", "alpha": 0.5},
        run={"dir": str(run)},
        seed=5,
    )
    found = scanned(tmp_path)
    (row,) = rows(found).values()
    assert row["status"] == "completed"
    assert (row["strategy"], row["dataset"], row["seed"], row["clients"]) == ("fedavg", "digits", 5, 2)
    assert (row["round"], row["rounds"]) == (2, 2)
    assert row["accuracy"] == result.final()["accuracy"]
    assert row["notes"] == []
    follower = Follower(run / "metrics.jsonl")
    follower.refresh()
    whole = follower.whole()
    assert whole["notes"] == []
    for phase, part in whole["phases"].items():
        records = [r for r in result.history if r.phase == phase]
        assert part["rounds"] == [r.round for r in records]
        for name in records[0].metrics:
            if not isinstance(records[0].metrics[name], list):
                assert part["columns"][name] == [r.metrics[name] for r in records]
    assert set(index.pictures(run)) == {"accuracy.png", "partition.png"}


def test_a_running_run_is_told_from_a_silent_one_by_its_pace(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", ended=False)
    slow = make_run(tmp_path / "slow", ended=False)
    with open(slow / "metrics.jsonl", "a") as file:
        file.write(line(4).replace('"seconds": 0.5', '"seconds": 100'))
    written = (run / "metrics.jsonl").stat().st_mtime
    for passed, states in (
        (30, ("running", "running")),
        (90, ("silent", "running")),
        (600, ("silent", "silent")),
    ):
        found = rows(scanned(tmp_path, now=written + passed))
        assert (found["a"]["status"], found["slow"]["status"]) == states
        assert found["a"]["accuracy"] == 0.3
        assert found["slow"]["round"] == 4


def test_a_resumed_run_is_no_longer_what_its_old_summary_says(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", summary={"status": "interrupted"})
    found = scanned(tmp_path)
    assert rows(found)["run"]["status"] == "interrupted"
    with open(run / "metrics.jsonl", "a") as file:
        file.write(line(4, SERVER, accuracy=0.7))
    later(run / "metrics.jsonl", 20)
    found.scan()
    row = rows(found)["run"]
    assert (row["status"], row["round"], row["accuracy"]) == ("running", 4, 0.7)


def test_half_written_and_foreign_runs_are_listed_with_what_is_missing(tmp_path: Path) -> None:
    started = tmp_path / "started"
    started.mkdir()
    (started / "config.yaml").write_text("seed: 1\nfederation:\n  rounds: 9\n  clients: 2\n")
    torn = make_run(tmp_path / "torn")
    (torn / "summary.json").write_text('{"status": "compl')
    headless = make_run(tmp_path / "headless")
    (headless / "config.yaml").unlink()
    broken = make_run(tmp_path / "broken")
    (broken / "config.yaml").write_text("strategy: [unclosed\n")
    older = make_run(tmp_path / "older", summary={"versions": {"flowerbed": "0.0.1"}, "final": None})
    (older / "config.yaml").write_text("strategy: fedavg\ndataset: {name: digits, more: 1}\nseed: one\n")
    diverged = make_run(tmp_path / "diverged", summary={"final": {"accuracy": 0.1, "loss": float("nan")}})
    found = scanned(tmp_path)
    listed = rows(found)
    assert set(listed) == {"started", "torn", "headless", "broken", "older", "diverged"}
    assert (listed["started"]["round"], listed["started"]["rounds"], listed["started"]["seed"]) == (0, 9, 1)
    assert "is cut off or damaged" in listed["torn"]["notes"][0]
    assert listed["torn"]["accuracy"] == 0.3
    assert listed["headless"]["notes"] == ["config.yaml is missing"]
    assert listed["broken"]["notes"][0].startswith("config.yaml cannot be read")
    assert (listed["older"]["strategy"], listed["older"]["dataset"], listed["older"]["seed"]) == (
        "fedavg",
        "digits",
        None,
    )
    assert listed["diverged"]["loss"] == "nan"
    with serving(found) as asked:
        older_one = asked.entry(older)
        assert (
            f"made by flowerbed 0.0.1; this is {__version__}, and shows what it knows of"
            in older_one["notes"]
        )
        assert "metrics.jsonl is not there: no round is complete yet" in asked.entry(started)["notes"]
        assert asked.entry(diverged)["summary"]["final"]["loss"] == "nan"
        for folder in (torn, headless, broken):
            assert asked.entry(folder)["notes"]


def test_only_what_has_changed_is_described_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(5):
        make_run(tmp_path / f"run-{i}", ended=i > 0)
    found = scanned(tmp_path)
    described: list[str] = []
    real = index.describe

    def counting(id_: str, kind: str, directory: Path, *rest: Any) -> Any:
        described.append(directory.name)
        return real(id_, kind, directory, *rest)

    monkeypatch.setattr(index, "describe", counting)
    monkeypatch.setattr(index, "read_config", lambda path: pytest.fail("the configuration has not changed"))
    version = found.version
    found.scan()
    assert described == []
    assert found.version == version
    with open(tmp_path / "run-0" / "metrics.jsonl", "a") as file:
        file.write(line(4, SERVER, accuracy=0.6))
    found.scan()
    assert described == ["run-0"]
    assert found.version > version
    assert rows(found)["run-0"]["accuracy"] == 0.6
    (tmp_path / "run-1" / "config.yaml").unlink()
    (tmp_path / "run-1" / "metrics.jsonl").unlink()
    (tmp_path / "run-1" / "summary.json").unlink()
    found.scan()
    assert "run-1" not in rows(found)


def test_results_of_every_kind_are_found_where_they_lie(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "a")
    attack = run / "attacks" / "ig"
    attack.mkdir(parents=True)
    (attack / "attack.json").write_text('{"of": "another version"}')
    sweep = tmp_path / "multirun"
    make_run(sweep / "0")
    make_run(sweep / "1")
    jobs = [{"status": "completed"}, {"status": "failed"}]
    (sweep / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs) + "{torn")
    # Neither of these is a result of its own.
    make_run(run / "checkpoints" / "x")
    make_run(run / "somewhere")
    found = scanned(tmp_path)
    listed = {row["path"].removeprefix(f"{tmp_path}/"): row for row in found.page()["rows"]}
    assert {path: row["kind"] for path, row in listed.items()} == {
        "runs/a": "run",
        "runs/a/attacks/ig": "attack",
        "multirun": "sweep",
        "multirun/0": "run",
        "multirun/1": "run",
    }
    assert listed["multirun"]["about"] == "2 jobs: 1 completed, 1 failed"
    assert "another form than this version" in listed["runs/a/attacks/ig"]["notes"][0]
    with serving(found) as asked:
        assert [Path(row["path"]).name for row in asked.entry(sweep)["inside"]] == ["0", "1"]
        assert [Path(row["path"]).name for row in asked.entry(run)["inside"]] == ["ig"]


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside = make_run(tmp_path / "outside" / "run")
    (outside / "secret.png").write_text(SECRET)
    shown = tmp_path / "shown"
    inside = make_run(shown / "run")
    (shown / "linked").symlink_to(outside, target_is_directory=True)
    (inside / "figures").symlink_to(outside, target_is_directory=True)
    (inside / "direct.png").symlink_to(outside / "secret.png")
    # Files as well: what a run directory points to outside is not shown.
    (tmp_path / "outside.yaml").write_text(
        f"strategy: {SECRET}\ndataset: {SECRET}\nseed: 1\nfederation: {{}}\n"
    )
    (tmp_path / "outside.jsonl").write_text(line(1, **{SECRET: 1.0}))
    (tmp_path / "outside.json").write_text(json.dumps({"status": SECRET}))
    files = {"config.yaml": "outside.yaml", "metrics.jsonl": "outside.jsonl", "summary.json": "outside.json"}
    for kept in files:
        faked = make_run(shown / f"faked {kept}", ended=kept == "summary.json")
        for name, target in files.items():
            if name != kept:
                (faked / name).unlink(missing_ok=True)
                (faked / name).symlink_to(tmp_path / target)
    found = scanned(shown)
    assert set(rows(found)) == {"run", *(f"faked {kept}" for kept in files)}
    assert index.pictures(inside) == {}
    with serving(found) as asked:
        for folder in shown.iterdir():
            if not folder.is_symlink():
                assert SECRET not in json.dumps(asked.entry(folder))


def test_pages_sorts_and_searches(tmp_path: Path) -> None:
    for i in range(25):
        make_run(
            tmp_path / f"run-{i}",
            summary={"final": {"accuracy": float("nan") if i == 7 else i / 100}},
            strategy={"name": "fedprox" if i % 5 == 0 else "fedavg"},
        )
    found = scanned(tmp_path)

    def names(**asked: Any) -> list[str]:
        return [Path(row["path"]).name for row in found.page(**asked)["rows"]]

    everything = names(sort="path", descending=False)
    assert everything == [f"run-{i}" for i in range(25)]
    assert names(sort="path", descending=False, offset=10, limit=10) == everything[10:20]
    best = names(sort="accuracy")
    assert best[:3] == ["run-24", "run-23", "run-22"]
    # What cannot be ordered comes last in both directions.
    assert best[-1] == names(sort="accuracy", descending=False)[-1] == "run-7"
    assert names(search="FedProx run-1", sort="path", descending=False) == ["run-10", "run-15"]
    assert found.page(search="fedprox")["matching"] == 5
    assert found.page(status="failed")["matching"] == 0
    assert found.page(kind="run", limit=3)["total"] == 25


# The server.


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[Asked]:
    (tmp_path / "secret.png").write_text(SECRET)
    (tmp_path / "secret.txt").write_text(SECRET)
    run = make_run(tmp_path / "runs" / "<img src=x onerror=alert(1)>")
    (run / "figures").mkdir()
    (run / "figures" / "accuracy.png").write_bytes(b"\x89PNG picture")
    with serving(scanned(tmp_path / "runs")) as found:
        yield found


def test_the_server_listens_on_loopback_only(asked: Asked) -> None:
    assert asked.served.server_address[0] == "127.0.0.1"
    assert asked.served.socket.getsockname()[0] == "127.0.0.1"


def test_the_page_is_there_and_nothing_else_without_the_token(asked: Asked) -> None:
    status, headers, body = asked.get("/", Authorization="")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert b"onerror" not in body
    for asset in ("/watch.js", "/watch.css"):
        assert asked.get(asset, Authorization="")[0] == 200
    id_ = asked.json("/api/list")["rows"][0]["id"]
    for path in (
        "/api/list",
        f"/api/entry?id={id_}",
        f"/api/events?id={id_}",
        "/api/events",
        "/nothing",
        "/api/",
    ):
        for wrong in ("", "Bearer ", "Bearer x", f"Bearer {asked.served.token}0", asked.served.token, "Basic eDp4",
                      f"Bearer {asked.served.token[:-1]}", "Bearer \u00e9"):  # fmt: skip
            status, _, body = asked.get(path, Authorization=wrong)
            assert status == 401, (path, wrong)
            assert b"onerror" not in body
        # The token counts in no other place.
        status, _, _ = asked.get(
            f"{path}{'&' if '?' in path else '?'}token={asked.served.token}", Authorization=""
        )
        assert status == 401
        assert asked.get(path, Authorization="", Cookie=f"token={asked.served.token}")[0] == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:8377", 200),
        ("localhost:9", 200),
        ("LOCALHOST", 200),
        ("[::1]:1", 200),
        ("evil.example", 421),
        ("evil.example:8377", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example:1", 421),
        ("127.0.0.1:8377@evil.example", 421),
        ("127.0.0.2", 421),
        ("", 421),
    ],
)
def test_only_this_machine_may_be_the_host(asked: Asked, host: str, status: int) -> None:
    for path in ("/", "/api/list"):
        text = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {asked.served.token}\r\n\r\n"
        assert asked.raw(text.encode()).split(b" ", 2)[1] == str(status).encode()


def test_a_second_or_missing_host_is_refused(asked: Asked) -> None:
    both = b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
    assert b" 421 " in asked.raw(both).splitlines()[0]
    assert b" 421 " in asked.raw(b"GET / HTTP/1.0\r\n\r\n").splitlines()[0]


def test_other_pages_are_refused(asked: Asked) -> None:
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
        assert asked.get("/api/list", Sec_Fetch_Site=site)[0] == status
    _, headers, _ = asked.get("/api/list", Origin="http://evil.example")
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"])
def test_only_get_is_answered(asked: Asked, method: str) -> None:
    text = f"{method} /api/list HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {asked.served.token}\r\n"
    answer = asked.raw(f"{text}Content-Length: 4\r\n\r\nGET ".encode())
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert b"\r\nAllow: GET\r\n" in answer
    # What came along is not taken for another request.
    assert answer.count(b"HTTP/1.1") == 1
    assert (method == "HEAD") == answer.endswith(b"\r\n\r\n")


def test_a_get_with_a_body_and_requests_that_are_none_are_refused(asked: Asked) -> None:
    assert (
        b" 400 "
        in asked.raw(b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc").splitlines()[0]
    )
    for text in (b"BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /\xff HTTP/9.9\r\n\r\n",
                 b"GET / <script> HTTP/1.1\r\n\r\n", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n"):  # fmt: skip
        answer = asked.raw(text)
        assert b"<script>" not in answer
        assert b"Content-Security-Policy: default-src 'none'" in answer
        assert 400 <= int(answer.split(b" ", 2)[1]) <= 505


def test_no_address_reaches_a_file(asked: Asked) -> None:
    id_ = asked.json("/api/list")["rows"][0]["id"]
    up = ["../secret.txt", "..%2fsecret.txt", "%2e%2e/secret.txt", "..%5csecret.txt", "....//secret.txt", "/etc/passwd",
          "../../secret.png", "figures/../../../secret.png", "%2e%2e%2f%2e%2e%2fsecret.png", "..%252fsecret.png",
          "/" + "../" * 12 + "etc/passwd", "accuracy.png%00", "config.yaml", "watch.py", "../server.py"]  # fmt: skip
    for name in up:
        for path in (f"/{name}", f"/api/{name}", f"//{name}", f"/watch.js/../{name}",
                     f"/api/picture?id={id_}&name={name}", f"/api/picture?id={name}&name=secret.png",
                     f"/api/entry?id={name}", f"/api/events?id={name}"):  # fmt: skip
            text = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {asked.served.token}\r\n"
            answer = asked.raw(f"{text}Connection: close\r\n\r\n".encode())
            assert answer.startswith(b"HTTP/1.1 404 "), (path, answer[:100])
            assert SECRET.encode() not in answer
            assert b"root:" not in answer
    status, headers, body = asked.get(f"/api/picture?id={id_}&name=accuracy.png")
    assert (status, headers["content-type"], body) == (200, "image/png", b"\x89PNG picture")


def test_every_answer_brings_its_rules(asked: Asked) -> None:
    for path, method in (
        ("/", "GET"),
        ("/api/list", "GET"),
        ("/nothing", "GET"),
        ("/", "POST"),
        ("/watch.js", "GET"),
    ):
        for key in ("", f"Bearer {asked.served.token}"):
            _, headers, _ = asked.get(path, method, Authorization=key)
            rules = headers["content-security-policy"]
            assert rules.startswith("default-src 'none'; script-src 'self';")
            assert "unsafe" not in rules
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "no-referrer"
            assert headers["cache-control"] == "no-store"
            assert "set-cookie" not in headers


def test_what_comes_from_runs_is_never_markup() -> None:
    text = (server.PAGE / "watch.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|srcdoc", text)
    page = (server.PAGE / "index.html").read_text()
    assert not re.search(r"<script>|<style|style=|\son\w+=|https?:", page)
    assert not re.search(r"@import|url\(", (server.PAGE / "watch.css").read_text())


@pytest.mark.parametrize(
    "query", ["offset=-1", "offset=x", "limit=1e3", "limit=9999999999", "sort=directory"]
)
def test_bad_queries_are_refused(asked: Asked, query: str) -> None:
    assert asked.get(f"/api/list?{query}")[0] == 400
    assert asked.get("/api/list?" + "&".join(f"a{i}=1" for i in range(30)))[0] == 400


def test_a_page_of_the_list_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST_ROWS", 3)
    for i in range(5):
        make_run(tmp_path / f"{i}")
    with serving(scanned(tmp_path)) as found:
        page = found.json("/api/list?limit=1000&sort=path&order=ascending")
        assert [Path(row["path"]).name for row in page["rows"]] == ["0", "1", "2"]
        assert (page["matching"], page["total"], page["folders"]) == (5, 5, [str(tmp_path)])


class Events:
    """Reads server-sent events."""

    def __init__(self, asked: Asked, query: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", asked.served.server_port, timeout=10)
        self._connection.request(
            "GET", f"/api/events{query}", headers={"Authorization": f"Bearer {asked.served.token}"}
        )
        self.answer = self._connection.getresponse()

    def next(self) -> tuple[str, Any]:
        name = ""
        while True:
            text = self.answer.readline().decode().rstrip("\n")
            if text.startswith("event: "):
                name = text.removeprefix("event: ")
            elif text.startswith("data: "):
                return name, json.loads(text.removeprefix("data: "))

    def close(self) -> None:
        self.answer.close()
        self._connection.close()


def test_an_open_page_gets_new_records_then_the_end(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ended=False)
    found = scanned(tmp_path)
    with serving(found) as asked:
        events = Events(asked, f"?id={index.identifier(run.resolve())}")
        assert events.answer.getheader("Content-Type") == "text/event-stream; charset=utf-8"
        name, content = events.next()
        assert name == "entry"
        assert content["row"]["status"] == "running"
        assert content["phases"]["train"]["rounds"] == [1, 2, 3]
        with open(run / "metrics.jsonl", "a") as file:
            file.write(line(4, loss=0.25))
        name, added = events.next()
        assert name == "records"
        assert added["counts"] == {"train": 4, SERVER: 3}
        assert added["phases"] == {
            "train": {
                "rounds": [4],
                "columns": {"answered": [4], "asked": [4], "loss": [0.25], "seconds": [0.5]},
                "step": 1,
                "lists": {},
            }
        }
        # A crash: the run goes on from its checkpoint, and the page must forget what it was sent.
        MetricsLog(run / "metrics.jsonl").rewind(2)
        while content["phases"].get("train", {}).get("rounds") != [1]:
            name, content = events.next()
            assert name == "entry"
        (run / "summary.json").write_text(
            json.dumps({"status": "completed", "rounds": 1, "final": {"accuracy": 0.5}})
        )
        later(run / "summary.json")
        found.scan()
        while content["row"]["status"] != "completed":
            name, content = events.next()
        assert content["row"]["accuracy"] == 0.5
        for path in run.iterdir():
            path.unlink()
        found.scan()
        while name != "gone":
            name, _ = events.next()
        events.close()


def test_records_that_come_while_a_page_is_answered_are_sent_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", rounds=1, ended=False)
    real, written, turn = server.content, [1], threading.Lock()

    def write() -> None:
        # The server's thread and this one both write: a line each, in the order of its number.
        with turn:
            written.append(written[-1] + 1)
            with open(run / "metrics.jsonl", "a") as file:
                file.write(line(written[-1], loss=1.0))

    def content(served: WatchServer, entry: index.Entry) -> dict[str, Any]:
        # The worst moment: after it was seen how many there are, before they are read.
        write()
        return real(served, entry)

    monkeypatch.setattr(server, "content", content)
    with serving(scanned(tmp_path)) as asked:
        events = Events(asked, f"?id={index.identifier(run.resolve())}")
        got: list[int] = []
        for _ in range(10):
            write()
            name, value = events.next()
            new = value["phases"]["train"]["rounds"]
            got = new if name == "entry" else got + new
            assert got == [*range(1, len(got) + 1)]
        events.close()


def test_the_list_says_when_it_has_changed(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    found = scanned(tmp_path)
    with serving(found) as asked:
        events = Events(asked, "")
        _, first = events.next()
        make_run(tmp_path / "b")
        found.scan()
        _, second = events.next()
        assert second["version"] > first["version"]
        events.close()


def test_more_pages_than_threads_are_refused_and_closed_ones_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "STREAMS", 2)
    monkeypatch.setattr(server, "BEAT", 0.05)
    with serving(scanned(tmp_path)) as asked:
        open_ones = [Events(asked, "") for _ in range(2)]
        for events in open_ones:
            events.next()
        assert asked.get("/api/events")[0] == 503
        assert asked.get("/api/list")[0] == 200
        open_ones[0].close()
        for _ in range(200):
            again = Events(asked, "")
            if again.answer.status == 200:
                break
            again.close()
            time.sleep(0.02)
        assert again.answer.status == 200
        for events in (again, open_ones[1]):
            events.close()


# The command.


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "flowerbed" / "watch-token"


def test_the_token_stays_and_is_nobody_elses(state: Path, tmp_path: Path) -> None:
    first = command.token()
    assert len(first) == 48
    assert state.stat().st_mode & 0o777 == 0o600
    assert command.token() == first
    second = command.token(new=True)
    assert second not in ("", first)
    state.chmod(0o640)
    third = command.token()
    assert third != second, "others could have read it"
    assert state.stat().st_mode & 0o777 == 0o600
    state.write_text("short\n")
    fourth = command.token()
    assert len(fourth) == 48
    # Somebody's link is not written through.
    target = tmp_path / "target"
    target.write_text("x" * 48)
    target.chmod(0o600)
    state.unlink()
    state.symlink_to(target)
    assert command.token() not in (fourth, "x" * 48)
    assert not state.is_symlink()
    assert target.read_text() == "x" * 48


def test_without_a_place_to_keep_it_the_token_is_this_processs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert command.token() != command.token()


def test_bad_arguments(state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["watch", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is no folder; name one that holds runs." in capsys.readouterr().err
    assert cli.main(["watch", str(tmp_path), "--port", "70000"]) == 2
    assert "--port 70000 is no port" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert cli.main(["watch", str(tmp_path), "--port", str(taken.getsockname()[1])]) == 2
    assert "is taken" in capsys.readouterr().err


def test_the_command_serves_ends_and_comes_back_with_the_same_address(state: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "a")
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    addresses = []
    port = "0"
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-m", "flowerbed.experiments.cli", "watch", "--json", "--port", port],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            said = json.loads(process.stdout.readline())
            addresses.append(said["url"])
            found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/#token=([0-9a-f]{48})", said["url"])
            assert found is not None
            assert said["folders"] == [str(tmp_path / "runs"), str(tmp_path / "multirun")]
            port = found[1]
            for _ in range(500):
                connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=10)
                connection.request("GET", "/api/list", headers={"Authorization": f"Bearer {found[2]}"})
                page = json.loads(connection.getresponse().read())
                connection.close()
                if page["complete"]:
                    break
                time.sleep(0.02)
            assert [row["path"] for row in page["rows"]] == ["runs/a"]
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
    assert addresses[0] == addresses[1]


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, flowerbed.experiments.watch.command\n"
        "print([n for n in ('torch', 'ray', 'flwr', 'hydra', 'numpy', 'rich', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
