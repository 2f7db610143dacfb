"""What an operator does on the server's machine: serve, let devices in, and run experiments."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from flowerbed.errors import ConfigError, RunError
from flowerbed.experiments.deploy import certificates, flower
from flowerbed.experiments.deploy.flower import COMPLETED, RUNNING, Control, FlowerRun, ServerAway
from flowerbed.experiments.deploy.folder import FLOWER_HOME, KEY, PLAN, RUN_NAME, Deployment
from flowerbed.experiments.deploy.node import require_free

if TYPE_CHECKING:
    from flowerbed.experiments.deploy.device import Expectations
    from flowerbed.experiments.deploy.submission import Submission
    from flowerbed.experiments.parts import Parts

TASK_POLL = "0.1"
"""Seconds between two questions of Flower's launcher on the server for a run to start."""
LOOK = 0.5
"""Seconds between two looks at a run."""
STARTING = 60.0
"""Seconds in which a server should have started."""
STOPPING = 60.0
"""Seconds in which a run's server process should have ended after it was told to."""
ORPHANED = 5.0
"""Seconds that a run may be without a server process after the server was away, before it is started again."""
CONNECTION = "deployment"
"""What Flower's own commands call this server (``flwr run APP deployment``)."""
ATTEMPTS = 3
"""How often a run is started again without having got a round further."""

Say = Callable[[str], None]


def connect(deployment: Deployment) -> Control:
    """Return the operator's connection to the deployment's server."""
    # Flower looks for its own files at import, and fails for a user without a home, as in a container.
    os.environ.setdefault("FLWR_HOME", str(deployment.root / FLOWER_HOME))
    return Control(deployment.here, deployment.authority)


def serve(deployment: Deployment, say: Say) -> NoReturn:
    """Become the server; raises ``ConfigError`` for what would keep devices away."""
    settings, folder = deployment.settings, deployment.certificates
    certificates.check_server(folder)
    require_free(settings.bind, settings.port)
    home = deployment.root / FLOWER_HOME
    home.mkdir(mode=0o700, exist_ok=True)
    deployment.runs.mkdir(exist_ok=True)
    environment = flower.environment(
        home, FLWR_SUPEREXEC_TASK_POLL_INTERVAL=TASK_POLL, FLOWERBED_DEPLOYMENT=str(deployment.root)
    )
    limit = str(int(settings.request_mb * 10**6))
    command = [sys.executable, "-m", "flowerbed.experiments.deploy.superlink", limit]
    command += ["--ssl-ca-certfile", str(folder / "ca.crt"), "--ssl-certfile", str(folder / "server.crt")]
    command += ["--ssl-keyfile", str(folder / "server.key"), "--enable-supernode-auth"]
    command += ["--host", settings.bind, "--port", str(settings.port)]
    command += ["--database", str(deployment.root / "server.db"), "--disable-runtime-dependency-installation"]
    say(f"serving {settings.address}:{settings.port} for {len(deployment.nodes)} devices")
    # Keys, states and what devices sent are nobody else's.
    os.umask(0o077)
    # In place of this process, so that whoever started it stops the server itself.
    os.execve(sys.executable, command, environment)


def register(deployment: Deployment, names: Sequence[str], say: Say) -> Deployment:
    """Let devices in, by default all of the deployment; a key that changed takes the place of the old one."""
    known = {node.name: node for node in deployment.nodes}
    for name in names:
        if name not in known:
            raise ConfigError(f"There is no device '{name}'; the deployment has {', '.join(known)}.")
    ids: dict[str, int] = {}
    with connect(deployment) as control:
        _wait_for_start(control, say)
        present = {n.public_key: n.node_id for n in control.nodes() if n.status != "unregistered"}
        for name in names or known:
            key = certificates.read_public_key(deployment.bundle(name) / f"{KEY}.pub")
            old = known[name].node_id
            if key in present:
                ids[name] = present[key]
            else:
                if old and old in present.values():
                    control.unregister(old)
                ids[name] = control.register(key, name)
            say(f"{name}: client {known[name].client}, node {ids[name]}")
    return deployment.with_node_ids(ids)


def _wait_for_start(control: Control, say: Say) -> None:
    """Wait for a server that was only just started."""
    deadline = time.monotonic() + STARTING
    told = False
    while True:
        try:
            control.nodes()
        except ServerAway:
            if time.monotonic() >= deadline:
                raise
            if not told:
                say(f"waiting up to {STARTING:.0f} s for the server")
            told = True
            time.sleep(LOOK)
        else:
            return


def unregister(deployment: Deployment, names: Sequence[str], say: Say) -> Deployment:
    """Let devices in no longer."""
    known = {node.name: node for node in deployment.nodes}
    with connect(deployment) as control:
        for name in names:
            if name not in known or not known[name].node_id:
                raise ConfigError(f"There is no registered device '{name}'.")
            control.unregister(known[name].node_id)
            say(f"{name}: not let in any more")
    return deployment.with_node_ids(dict.fromkeys(names, 0))


# Runs.


def planned(deployment: Deployment, overrides: Sequence[str], name: str) -> tuple[Parts, Expectations]:
    """Compose, build and check what is to be run; return its parts and what devices are told of it."""
    from flowerbed.experiments.composition import compose_simulations
    from flowerbed.experiments.deploy.device import Expectations
    from flowerbed.experiments.deploy.submission import unique_name
    from flowerbed.experiments.parts import build_parts

    count = len(deployment.nodes)
    (simulation,) = compose_simulations([f"federation.clients={count}", *overrides])
    if simulation.federation.clients != count:
        raise ConfigError(
            f"federation.clients is {simulation.federation.clients} and the deployment has {count} devices; leave it "
            "out."
        )
    if simulation.grid.name != "inprocess":
        raise ConfigError(
            f"grid={simulation.grid.name} is for simulations; devices are the grid here, so leave it out."
        )
    directory = str(deployment.runs / name)
    simulation = replace(simulation, run=replace(simulation.run, dir=directory, progress=False))
    parts = build_parts(simulation)
    return parts, Expectations.of(parts.simulation, parts.dataset, parts.model, unique_name(name))


def write_plan(deployment: Deployment, expectations: Expectations) -> None:
    """Put what a run expects of devices into their folders, for ``deploy node --dry-run``."""
    for node in deployment.nodes:
        (deployment.bundle(node.name) / PLAN).write_text(expectations.dumps() + "\n")


def share(deployment: Deployment, parts: Parts) -> None:
    """Give every device's folder the samples that its client has in the simulation: for a rehearsal."""
    from flowerbed.clients.device_data import save_npz

    for node in deployment.nodes:
        train, test = parts.train.indices(node.client), parts.test.indices(node.client)
        save_npz(deployment.bundle(node.name) / "data.npz", parts.dataset, train, test)


def run(deployment: Deployment, overrides: Sequence[str], name: str | None, detach: bool, say: Say) -> int:
    """Submit an experiment and follow it to its end; return an exit code that says how it ended."""
    directory = _new_directory(deployment, name)
    # Before anything is built: is the server there?
    with connect(deployment) as control:
        control.runs()
    submission = _described(deployment, overrides, directory)
    say(f"running in {directory}")
    return _submit(deployment, directory, submission, detach, say)


def prepare(deployment: Deployment, overrides: Sequence[str], name: str | None, say: Say) -> Path:
    """Describe an experiment for ``flwr run``, which submits it in place of ``run``; return its directory."""
    from flowerbed.experiments.deploy.device import RUN_KEY

    directory = _new_directory(deployment, name)
    submission = _described(deployment, overrides, directory)
    settings = directory / "flwr.toml"
    # JSON's escapes are TOML's.
    settings.write_text(f"{RUN_KEY} = {json.dumps(submission.expectations)}\n")
    home = deployment.root / FLOWER_HOME
    home.mkdir(mode=0o700, exist_ok=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f"address = {json.dumps(deployment.here)}\nroot-certificates = {json.dumps(str(deployment.authority))}\n"
    )
    say(f"FLWR_HOME={home} flwr run {deployment.app} --run-config {settings} --stream")
    return directory


def _new_directory(deployment: Deployment, name: str | None) -> Path:
    """Return where a new run will be; raises ``ConfigError`` if there can be none of that name, or none at all."""
    name = name or f"{datetime.now():%Y%m%d-%H%M%S}"
    if RUN_NAME.fullmatch(name) is None:
        raise ConfigError(f"'{name}' cannot be a run's name; use letters, digits, '.', '_' and '-'.")
    if (deployment.runs / name).exists():
        raise ConfigError(
            f"There is a run '{name}' already; give --name, or go on with it: flowerbed deploy resume."
        )
    unknown = [node.name for node in deployment.nodes if not node.node_id]
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)} of this deployment are not registered; run: flowerbed deploy register "
            f"{deployment.root}"
        )
    return deployment.runs / name


def _described(deployment: Deployment, overrides: Sequence[str], directory: Path) -> Submission:
    """Compose a run and write its directory, and for the devices what it expects of them."""
    from flowerbed.experiments.deploy.submission import Submission

    parts, expectations = planned(deployment, overrides, directory.name)
    write_plan(deployment, expectations)
    directory.mkdir(parents=True)
    rounds = parts.simulation.federation.rounds
    further = sum(phase.rounds for phase in parts.strategy.phases(rounds)) - rounds
    submission = Submission(parts.simulation, expectations.dumps(), further_rounds=further)
    submission.write(directory)
    return submission


def resume(deployment: Deployment, name: str | None, overrides: Sequence[str], detach: bool, say: Say) -> int:
    """Go on with a run after its newest checkpoint; return an exit code that says how it ended."""
    from flowerbed.experiments.composition import compose_resumed
    from flowerbed.experiments.deploy.server_app import is_locked
    from flowerbed.experiments.deploy.submission import Submission

    directory = deployment.run(name)
    submission = Submission.read(directory)
    # A process that was told to stop needs a moment.
    deadline = time.monotonic() + STOPPING
    while is_locked(directory):
        if time.monotonic() >= deadline:
            raise ConfigError(f"{directory.name} is still running; follow it with: flowerbed deploy logs -f")
        time.sleep(LOOK)
    if overrides:
        if not Submission.begun(directory):
            raise ConfigError(
                f"{directory.name} has no checkpoint, so there is nothing to change; start a new run."
            )
        submission = replace(submission, simulation=compose_resumed(directory, overrides))
    return _submit(deployment, directory, submission, detach, say)


def _submit(deployment: Deployment, directory: Path, submission: Submission, detach: bool, say: Say) -> int:
    follower = Follower(deployment, directory, submission, say)
    try:
        follower.start()
    except Exception:
        if not follower.submission.run_ids:
            # It never began, so the name is free again.
            shutil.rmtree(directory)
        raise
    if detach:
        say(f"follow it with: flowerbed deploy logs {deployment.root} {directory.name} -f")
        return 0
    try:
        return follower.follow()
    except KeyboardInterrupt:
        say(f"\nThe run goes on; stop it with: flowerbed deploy stop {deployment.root} {directory.name}")
        raise


@dataclass
class Follower:
    """Follows one run, and starts it again where its server went away and came back."""

    deployment: Deployment
    directory: Path
    submission: Submission
    say: Say
    _run_id: int = 0
    _seen: int = 0
    _away: bool = False
    _orphaned: float | None = None
    _attempts: int = 0
    _reached: int = 0

    def start(self) -> None:
        """Submit the run, or what is left of it."""
        from flowerbed.experiments.deploy.device import RUN_KEY

        config = {RUN_KEY: self.submission.expectations}
        with connect(self.deployment) as control:
            self._run_id = control.start(self.deployment.app, config)
        self.submission = self.submission.attempted(self._run_id)
        self.submission.write(self.directory)
        self._away, self._orphaned = False, None

    def follow(self) -> int:
        """Print what happens until the run is over; return 0 only if it came to its end."""
        while True:
            self._show()
            try:
                with connect(self.deployment) as control:
                    found = control.runs().get(self._run_id) or FlowerRun(self._run_id, "unknown", "")
                if found.status == COMPLETED:
                    self._show()
                    self._conclude()
                    return 0
                if found.status in RUNNING:
                    self._revive(found)
                elif not (self._away and self._again("its server process ended with the server")):
                    self._show()
                    raise RunError(self._why(found))
            except ServerAway:
                if not self._away:
                    self.say("The server does not answer; waiting for it.")
                self._away = True
            time.sleep(LOOK)

    def _revive(self, found: FlowerRun) -> None:
        """Start the run again if its server process went with the server."""
        if not self._is_orphan():
            return
        with connect(self.deployment) as control:
            control.stop(found.run_id)
        if not self._again("the server was away"):
            raise RunError(f"{self.directory.name} was started {ATTEMPTS} times without getting further.")

    def _is_orphan(self) -> bool:
        """Return whether the run has had no server process for a while since the server was away."""
        from flowerbed.experiments.deploy.server_app import is_locked

        if not self._away or is_locked(self.directory):
            self._orphaned = None
            return False
        self._orphaned = time.monotonic() if self._orphaned is None else self._orphaned
        return time.monotonic() - self._orphaned >= ORPHANED

    def _again(self, reason: str) -> bool:
        reached = max(_checkpoints(self.directory), default=0)
        self._attempts = 1 if reached > self._reached else self._attempts + 1
        self._reached = reached
        if self._attempts > ATTEMPTS:
            return False
        where = f"after round {reached}" if reached else "from the start"
        self.say(f"The run goes on {where}: {reason}.")
        self.start()
        return True

    def _why(self, found: FlowerRun) -> str:
        reason = found.details.strip().splitlines()[-1] if found.details.strip() else found.status
        reason = reason.removeprefix("ServerApp failed with exception: ")
        if found.status == "finished:stopped":
            return f"{self.directory.name} was stopped."
        return f"{self.directory.name} failed: {reason}"

    def _show(self) -> None:
        records = read_records(self.directory)
        for record in records[self._seen :]:
            self.say(describe(record))
        # A run that goes on rewrites the records after its checkpoint.
        self._seen = len(records)

    def _conclude(self) -> None:
        summary = json.loads((self.directory / "summary.json").read_text())
        failed = summary["failures"]["total"]
        self.say(f"{summary['status']}: {summary['rounds']} rounds, {failed} failures, {self.directory}")


def stop(deployment: Deployment, name: str | None, say: Say) -> None:
    """Stop a run; its checkpoints stay."""
    from flowerbed.experiments.deploy.submission import Submission

    directory = deployment.run(name)
    ids = Submission.read(directory).run_ids
    with connect(deployment) as control:
        runs = control.runs()
        going = [i for i in ids if i in runs and runs[i].status in RUNNING]
        if not going:
            raise RunError(f"{directory.name} is not running.")
        for run_id in going:
            control.stop(run_id)
    say(
        f"{directory.name} is stopped; go on with it: flowerbed deploy resume {deployment.root} {directory.name}"
    )


def logs(deployment: Deployment, name: str | None, follow: bool, say: Say) -> int:
    """Print what a run's server process logged; with ``follow``, go on until it ends, and return how."""
    from flowerbed.experiments.deploy.submission import Submission

    submission = Submission.read(deployment.run(name))
    if not submission.run_ids:
        raise RunError(f"{deployment.run(name).name} was never started.")
    run_id = submission.run_ids[-1]
    with connect(deployment) as control:
        for text in control.logs(run_id):
            say(text.rstrip("\n"))
            if not follow:
                break
        if not follow:
            return 0
        found = control.runs().get(run_id)
    return 0 if found is not None and found.status == COMPLETED else 1


@dataclass(frozen=True)
class Status:
    """The state of a deployment, as plain values."""

    nodes: list[dict[str, Any]]
    strangers: int
    """Nodes at the server that are none of this deployment's."""
    runs: list[dict[str, Any]] = field(default_factory=list)


def status(deployment: Deployment) -> Status:
    """Return who is connected, and how far the runs are."""
    from flowerbed.experiments.deploy.submission import Submission

    with connect(deployment) as control:
        found = {n.node_id: n for n in control.nodes() if n.status != "unregistered"}
        runs = control.runs()
    nodes = []
    for node in deployment.nodes:
        at = found.pop(node.node_id, None)
        state = at.status if at is not None else "not registered"
        since = flower.age(at.activated) if at is not None else "never"
        nodes.append({"name": node.name, "client": node.client, "status": state, "connected": since})
    told = []
    for name in deployment.run_names():
        directory = deployment.runs / name
        submission = Submission.read(directory)
        ids = submission.run_ids
        at_flower = runs.get(ids[-1]) if ids else None
        records = read_records(directory)
        failures = [f for record in records for f in record.failures]
        last = failures[-1] if failures else None
        error = at_flower.details.strip().splitlines()[-1] if at_flower and at_flower.details.strip() else ""
        told.append(
            {
                "name": name,
                "status": at_flower.status if at_flower else "not started",
                "attempts": len(ids),
                "round": max((record.round for record in records), default=0),
                "rounds": submission.rounds,
                "failures": dict(Counter(f.kind for f in failures)),
                "last_error": error
                or (
                    f"round {last.round}, client {last.client}: {last.kind}, {last.reason.splitlines()[0]}"
                    if last
                    else ""
                ),
            }
        )
    return Status(nodes, len(found), told)


def read_records(directory: Path) -> list[Any]:
    """Return the records of a run so far."""
    from flowerbed.server.callbacks import MetricsLog

    return MetricsLog(directory / "metrics.jsonl").records()


def describe(record: Any) -> str:
    """Return one line about a record."""
    shown = [
        f"{name} {record.metrics[name]:.4g}"
        for name in ("accuracy", "loss")
        if isinstance(record.metrics.get(name), int | float)
    ]
    parts = [f"round {record.round}", record.phase, *shown]
    if record.asked:
        parts.append(f"{record.answered} of {record.asked} devices")
        parts.append(f"{(record.bytes_down + record.bytes_up) / 1e6:.3g} MB")
    parts.append(f"{record.seconds:.1f} s")
    failures = "".join(
        f"\n  client {f.client}: {f.kind}, {f.reason.strip().splitlines()[0]}" for f in record.failures
    )
    return "  ".join(parts) + failures


def _checkpoints(directory: Path) -> list[int]:
    found = (re.fullmatch(r"round-(\d+)", p.name) for p in (directory / "checkpoints").glob("round-*"))
    return [int(match[1]) for match in found if match]
