"""Run directories written by hand, byte by byte, and a ``flowerbed watch`` that serves them."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import yaml

from flowerbed.experiments.watch import index
from flowerbed.experiments.watch.index import Index
from flowerbed.experiments.watch.server import WatchServer
from flowerbed.server.callbacks import SERVER


def line(round_: int, phase: str = "train", failures: int = 0, **metrics: Any) -> str:
    failed = [{"round": round_, "client": k, "kind": "died", "reason": "x"} for k in range(failures)]
    about = {"asked": 4, "answered": 4 - min(failures, 4), "failed": failures, "seconds": 0.5}
    record = {"round": round_, "phase": phase, "metrics": metrics, **about, "failures": failed}
    return json.dumps(record) + "\n"


def make_run(
    folder: Path, rounds: int = 3, summary: dict[str, Any] | None = None, *, ended: bool = True, **config: Any
) -> Path:
    """Write a run directory as another program would."""
    folder.mkdir(parents=True)
    plain = {
        "strategy": {"name": "fedavg", "server_lr": 1.0},
        "dataset": {"name": "digits"},
        "seed": 3,
        "federation": {"clients": 4, "rounds": 3},
        **config,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    text = "".join(
        line(r, loss=1 / r) + line(r, SERVER, accuracy=r / 10, loss=2 / r) for r in range(1, rounds + 1)
    )
    (folder / "metrics.jsonl").write_text(text)
    if ended:
        final = {"accuracy": rounds / 10, "loss": 2 / rounds}
        given = {"status": "completed", "reason": "", "rounds": rounds, "final": final, **(summary or {})}
        (folder / "summary.json").write_text(json.dumps(given))
        later(folder / "summary.json")
    return folder


def later(path: Path, seconds: float = 10) -> None:
    """Give a file a time after now, as if the rest had been written before."""
    now = time.time() + seconds
    os.utime(path, (now, now))


def scanned(*roots: Path, now: float | None = None) -> Index:
    found = Index([root.resolve() for root in roots], (lambda: now) if now is not None else time.time)
    found.scan()
    return found


class Asked:
    """Asks a server as a browser would."""

    def __init__(self, served: WatchServer) -> None:
        self.served = served

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.served.server_port, timeout=10)
        sent = {
            "Authorization": f"Bearer {self.served.token}",
            **{k.replace("_", "-"): v for k, v in headers.items()},
        }
        connection.request(method, path, headers={k: v for k, v in sent.items() if v})
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, body

    def json(self, path: str) -> Any:
        status, _, body = self.get(path)
        assert status == 200, body
        return json.loads(body)

    def entry(self, directory: Path) -> Any:
        return self.json(f"/api/entry?id={index.identifier(directory.resolve())}")

    def raw(self, data: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.served.server_port), timeout=10) as link:
            link.sendall(data)
            link.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := link.recv(65536):
                answer += piece
        return answer


class serving:
    """A server with an index, as a context."""

    def __init__(self, found: Index) -> None:
        self._server = WatchServer(0, found, "0123456789abcdef" * 3, interval=0.02)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> Asked:
        self._thread.start()
        return Asked(self._server)

    def __exit__(self, *about: object) -> None:
        self._server.stop.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
