"""What one phase of a round costs on real devices before anything is computed: processes, polling, TLS.

The same SuperLink database, certificates, keys and messages three times: Flower's own commands as they come (*stock*),
the same with the one interval that Flower lets one set (*switch*), and what ``flowerbed deploy`` starts (*ours*).
Clients answer at once, but load what every client of flowerbed loads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from flowerbed.errors import RunError, require
from flowerbed.experiments.benchmarks import machine
from flowerbed.experiments.deploy import flower, folder, operate
from flowerbed.experiments.deploy.folder import KEY, Deployment, ServerSettings
from flowerbed.experiments.deploy.node import free_port, preflight
from flowerbed.server.grids.deployed import DeployedGrid, Patience

WAYS = ("stock", "switch", "ours")
CONFIG = "config"
OUT = "out"
"""Key of the run configuration: the file for the seconds of every phase."""
WAIT = 300.0
"""Seconds after which something that should happen will not."""
FIRST = 1
"""Phases that are thrown away: the first installs the app on every device."""

app = ServerApp()
client_app = ClientApp()


@app.main()
def main_app(grid: Grid, context: Context) -> None:
    """Exchange messages with all devices, phase after phase, and write down how long each took."""
    told = context.run_config
    ids = [int(text) for text in str(told["nodes"]).split(",")]
    way, phases = str(told["way"]), int(told["phases"])
    if way == "ours":
        settings = ServerSettings("127.0.0.1")
        used: Grid = DeployedGrid(grid, ids, Patience(poll=settings.poll))
    else:
        used = grid
    while len(list(grid.get_node_ids())) < len(ids):
        time.sleep(0.5)
    seconds = []
    for phase in range(phases):
        content = RecordDict({CONFIG: ConfigRecord({"phase": phase})})
        asked = [Message(content, node, "train") for node in used.get_node_ids()]
        begin = time.perf_counter()
        replies = list(used.send_and_receive(asked))
        seconds.append(time.perf_counter() - begin)
        if len(replies) != len(ids) or any(reply.has_error() for reply in replies):
            raise RunError(f"Phase {phase}: not every device answered.")
    Path(str(told[OUT])).write_text(json.dumps(seconds))


@client_app.train()
def answer(message: Message, context: Context) -> Message:
    """Answer at once."""
    # What a real client cannot do without.
    import flowerbed.experiments.deploy.device  # noqa: F401

    return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)


def measure(way: str, nodes: int, phases: int, root: Path) -> list[float]:
    """Return the seconds of every phase but the first."""
    settings = ServerSettings("127.0.0.1", free_port(), "127.0.0.1")
    deployment = folder.create(root / way, settings, [f"node-{i}" for i in range(nodes)], [], 10)
    _use_own_app(deployment)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_server(deployment, way))
        _until(lambda: _answers(deployment), "the server answers")
        deployment = operate.register(deployment, [], lambda text: None)
        for node in deployment.nodes:
            stack.enter_context(_node(deployment, way, node.name, node.client))
        _until(lambda: _online(deployment) == nodes, "all devices are connected")
        out = root / f"{way}.json"
        ids = ",".join(str(node.node_id) for node in deployment.nodes)
        config = {OUT: str(out), "way": way, "nodes": ids, "phases": str(phases + FIRST)}
        with operate.connect(deployment) as control:
            run_id = control.start(deployment.app, config)
            _until(
                lambda: control.runs()[run_id].status not in flower.RUNNING,
                "the run ends",
                WAIT * (1 + phases),
            )
            found = control.runs()[run_id]
        if found.status != flower.COMPLETED:
            raise RunError(f"The benchmark's run ended as {found.status}: {found.details}")
    seconds: list[float] = json.loads(out.read_text())
    return seconds[FIRST:]


def _use_own_app(deployment: Deployment) -> None:
    path = deployment.app / "pyproject.toml"
    text = path.read_text()
    here = "flowerbed.experiments.benchmarks.deployment"
    text = text.replace("flowerbed.experiments.deploy.server_app:app", f"{here}:app")
    text = text.replace("flowerbed.experiments.deploy.client_app:app", f"{here}:client_app")
    text = text.partition("[tool.flwr.app.config]")[0]
    keys = "".join(f'{key} = ""\n' for key in (OUT, "way", "nodes", "phases"))
    path.write_text(f"{text}[tool.flwr.app.config]\n{keys}")


@contextlib.contextmanager
def _server(deployment: Deployment, way: str) -> Iterator[None]:
    if way == "ours":
        with _process(_ours("server", deployment.root), dict(os.environ), deployment.root / "server.log"):
            yield
        return
    folder_ = deployment.certificates
    command = ["flower-superlink", "--ssl-ca-certfile", str(folder_ / "ca.crt")]
    command += ["--ssl-certfile", str(folder_ / "server.crt"), "--ssl-keyfile", str(folder_ / "server.key")]
    command += ["--enable-supernode-auth", "--host", "127.0.0.1", "--port", str(deployment.settings.port)]
    command += ["--database", str(deployment.root / "server.db"), "--disable-runtime-dependency-installation"]
    with _process(command, _environment(deployment.root / "flower", way), deployment.root / "server.log"):
        yield


@contextlib.contextmanager
def _node(deployment: Deployment, way: str, name: str, client: int) -> Iterator[None]:
    bundle = deployment.bundle(name)
    if way == "ours":
        with _process(_ours("node", bundle), dict(os.environ), bundle / "node.log"):
            yield
        return
    command = [
        "flower-supernode",
        "--root-certificates",
        str(bundle / "ca.crt"),
        "--superlink",
        deployment.here,
    ]
    command += [
        "--auth-supernode-private-key",
        str(bundle / KEY),
        "--host",
        "127.0.0.1",
        "--port",
        str(free_port()),
    ]
    command += ["--node-config", f"partition-id={client} num-partitions={len(deployment.nodes)}"]
    with _process(command, _environment(bundle / "flower", way), bundle / "node.log"):
        yield


def _environment(home: Path, way: str) -> dict[str, str]:
    home.mkdir(exist_ok=True)
    switch = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": operate.TASK_POLL} if way == "switch" else {}
    return flower.environment(home, **switch)


def _ours(action: str, directory: Path) -> list[str]:
    return [sys.executable, "-m", "flowerbed.experiments.cli", "deploy", action, str(directory)]


@contextlib.contextmanager
def _process(command: list[str], environment: dict[str, str], log: Path) -> Iterator[None]:
    with open(log, "wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(deployment: Deployment) -> bool:
    try:
        preflight(deployment.here, deployment.authority)
    except ConnectionError:
        return False
    return True


def _online(deployment: Deployment) -> int:
    return sum(node["status"] == "online" for node in operate.status(deployment).nodes)


def _until(done: Any, what: str, seconds: float = WAIT) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise RunError(f"{what}: not within {seconds:.0f} s.")
        time.sleep(0.2)


def main(arguments: Sequence[str]) -> int:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(prog="flowerbed bench deployment", description=__doc__)
    parser.add_argument("--nodes", type=int, default=2, help="devices (2)")
    parser.add_argument("--phases", type=int, default=5, help="phases that count (5)")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"which of {', '.join(WAYS)}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args(list(arguments))
    ways = asked.ways.split(",")
    for way in ways:
        require(way in WAYS, f"--ways names '{way}'; choose from {', '.join(WAYS)}.")
    require(asked.nodes > 0 and asked.phases > 0, "Give at least one node and one phase.")
    with tempfile.TemporaryDirectory() as folder_:
        found = {way: measure(way, asked.nodes, asked.phases, Path(folder_)) for way in ways}
    if asked.json:
        print(json.dumps({"nodes": asked.nodes, "seconds": found, "machine": machine.stamp("cpu")}))
        return 0
    print(
        f"seconds per phase that trains nothing; {asked.nodes} devices, {asked.phases} phases after the first"
    )
    for way, seconds in found.items():
        median = statistics.median(seconds)
        print(f"{way:8} median {median:6.2f}   least {min(seconds):6.2f}   most {max(seconds):6.2f}")
    return 0
