"""A deployment on this machine's loopback: a real SuperLink with TLS and keys, and real device processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from flowerbed.experiments.config import Simulation
from flowerbed.experiments.deploy import folder, operate
from flowerbed.experiments.deploy.folder import Deployment, ServerSettings
from flowerbed.experiments.deploy.node import free_port, preflight
from flowerbed.experiments.deploy.submission import Submission
from flowerbed.experiments.simulation import run_simulation
from flowerbed.server.callbacks import MetricsLog, Record

PATIENT = 240.0
"""Seconds after which something that should happen will not; machines that run tests are busy."""


class Loopback:
    """A server and devices that can be started, killed and asked, one folder for all."""

    def __init__(self, root: Path, nodes: int, *, reconnect: float = 120.0, patience: float = 600.0) -> None:
        settings = ServerSettings(
            "127.0.0.1", free_port(), "127.0.0.1", reconnect=reconnect, patience=patience
        )
        self.root = root / "fed"
        names = [f"node-{i}" for i in range(nodes)]
        self.deployment = folder.create(self.root, settings, names, [], 10)
        self.lines: list[str] = []
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def server(self) -> None:
        """Start the server and wait until it answers."""
        self._start("server", "server", self.root)
        ca = self.deployment.authority

        def answers() -> bool:
            assert self._processes["server"].poll() is None, self.log("server")
            try:
                preflight(self.deployment.here, ca)
            except ConnectionError:
                return False
            return True

        wait_until(answers, "the server answers")

    def register(self) -> None:
        """Let all devices in."""
        self.deployment = operate.register(self.deployment, [], self.lines.append)

    def share(self, overrides: Sequence[str]) -> None:
        """Give every device what its client has in the simulation."""
        parts, expectations = operate.planned(self.deployment, overrides, "rehearsal")
        operate.share(self.deployment, parts)
        operate.write_plan(self.deployment, expectations)

    def node(self, number: int) -> None:
        """Start a device."""
        name = f"node-{number}"
        self._start(name, "node", self.deployment.bundle(name))

    def run(self, overrides: Sequence[str], name: str) -> int:
        """Run an experiment to its end."""
        return operate.run(self.deployment, overrides, name, False, self.lines.append)

    def kill(self, name: str) -> None:
        """Kill a process as a power cut does, and what is left of its children by their own watching of it."""
        process = self._processes.pop(name)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    def online(self) -> list[str]:
        """Return the devices that are connected."""
        return [n["name"] for n in operate.status(self.deployment).nodes if n["status"] == "online"]

    def records(self, name: str) -> list[Record]:
        """Return a run's records so far."""
        return MetricsLog(self.deployment.runs / name / "metrics.jsonl").records()

    def model(self, name: str) -> dict[str, Tensor]:
        """Return the model that a run delivered."""
        found: dict[str, Tensor] = load_file(self.deployment.runs / name / "model.safetensors")
        return found

    def log(self, name: str) -> str:
        """Return what a process printed."""
        return (self.root.parent / f"{name}.log").read_text(errors="replace")

    def stop(self) -> None:
        """End everything that was started."""
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()

    def _start(self, name: str, action: str, directory: Path) -> None:
        command = [sys.executable, "-m", "flowerbed.experiments.cli", "deploy", action, str(directory)]
        with open(self.root.parent / f"{name}.log", "ab") as log:
            self._processes[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


@contextlib.contextmanager
def loopback(root: Path, nodes: int = 3, **settings: float) -> Iterator[Loopback]:
    """Start a server with devices that it knows, none of which runs yet."""
    made = Loopback(root, nodes, **settings)
    try:
        made.server()
        made.register()
        yield made
    finally:
        made.stop()


def simulated(
    deployment: Deployment, name: str, grid: dict[str, object] | None = None, rounds: int = 0
) -> dict[str, Tensor]:
    """Return the model of the same experiment as a run's, simulated, with another number of rounds if given."""
    plain = Submission.read(deployment.runs / name).simulation.plain()
    if rounds:
        plain["federation"]["rounds"] = rounds
    run = {**plain["run"], "dir": None, "figures": False}
    if grid is not None:
        run["dir"] = str(deployment.root.parent / f"{name}-simulated")
    return run_simulation(
        Simulation.of({**plain, "run": run, "grid": {**plain["grid"], **(grid or {})}})
    ).model


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare two models bit by bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.equal(found[name]), f"'{name}' differs by {(value - found[name]).abs().max()}"


def wait_until(done: Callable[[], bool], what: str, seconds: float = PATIENT) -> None:
    """Wait for something; fail if it does not happen."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.1)


class Meanwhile(threading.Thread):
    """Does something beside the test and hands on what it raised."""

    def __init__(self, action: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._action = action
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._action()
        except BaseException as error:  # noqa: BLE001 - raised again by ``done``
            self.error = error

    def done(self) -> None:
        """Wait for the end; raise what was raised."""
        self.join(PATIENT)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
