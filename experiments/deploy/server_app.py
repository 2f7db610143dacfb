"""The server side of a deployment's Flower app: the run that was submitted, in its directory, on real devices."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from flowerbed.clients.store import ClientStore
from flowerbed.errors import ConfigError, RunError
from flowerbed.experiments.deploy.device import RUN_KEY, Expectations
from flowerbed.experiments.deploy.folder import Deployment
from flowerbed.experiments.deploy.submission import ROOT, Submission, folder_name
from flowerbed.experiments.parts import Parts
from flowerbed.experiments.progress import Lines
from flowerbed.experiments.simulation import run_simulation
from flowerbed.server.devices import Device, survey
from flowerbed.server.grids.deployed import DeployedGrid, Patience

LOCK = ".server"
"""File in a run's directory that its server process holds a lock on, so that no two work in it."""
JOURNEY = 60.0
"""Seconds that a message may take beside ``federation.time_limit``."""

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what was submitted under the name in the run configuration, or go on with it where it has a checkpoint."""
    root = os.environ.get(ROOT)
    if root is None:
        raise ConfigError(f"{ROOT} is not set; start the server with: flowerbed deploy server DIR")
    deployment = Deployment.load(Path(root))
    name = folder_name(Expectations.loads(str(context.run_config[RUN_KEY])).run)
    directory = deployment.run(name)
    submission = Submission.read(directory)
    with locked(directory):
        if context.run_id not in submission.run_ids:
            # Submitted by Flower's own command, or before whoever submitted it has written that down.
            submission = submission.attempted(context.run_id)
            submission.write(directory)
        settings = deployment.settings
        limit = submission.simulation.federation.time_limit
        reply = min(settings.patience, limit + JOURNEY) if limit else settings.patience
        patience = Patience(reply, settings.join_wait, settings.reconnect, settings.poll)

        deployed = DeployedGrid(grid, [node.node_id for node in deployment.nodes], patience)

        @contextlib.contextmanager
        def opened(parts: Parts, store: ClientStore) -> Iterator[Grid]:
            yield deployed

        result = run_simulation(
            submission.simulation,
            callbacks=[Lines(lambda text: print(text, flush=True))],
            resume=submission.begun(directory),
            opened=opened,
            devices=introduced(deployed),
            secret=submission.secret,
        )
    print(f"{result.status} {result.reason}".strip(), flush=True)


def introduced(grid: DeployedGrid) -> list[Device]:
    """Ask all devices what they are; return it by client number. Who does not answer is taken as it comes.

    A device that takes itself for another client than the one that was registered is asked nothing more, and fails in
    every round with this as the reason: it would train with that one's seeds, and perhaps with its state.
    """
    told = survey(grid, list(grid.nodes), distinct=False)
    for number, node in enumerate(grid.nodes):
        if node in told and told[node][0] != number:
            grid.refuse(
                number,
                f"the device says that it is client {told[node][0]}; correct client= in its device.toml and node.toml, "
                "or give it the folder that was made for it",
            )
    return [told[node][1] if node in told else Device() for node in grid.nodes]


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[Any]:
    """Hold the run's lock; raises ``RunError`` if another process works in the directory."""
    with open(directory / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"Another process works in {directory}; wait for it, or stop it.") from error
        yield file


def is_locked(directory: Path) -> bool:
    """Return whether a server process works in the run's directory."""
    try:
        with locked(directory):
            return False
    except RunError:
        return True
