"""A device's warm process: libraries loaded once, and a fork of it for every message.

Flower starts a new Python for each message, which spends seconds of a small device's time on imports. It also
lets somebody else start the processes (``--isolation process``), and this is that somebody. A fork still has nothing
but its message and the disk, as Flower's own process.

Flower installs and runs whatever app the server sends. Here an app with code in it is refused: the code of a device is
what its owner has installed.

Run as ``python -m flowerbed.experiments.deploy.worker ADDRESS SECRET_FILE``; ends with its parent.
"""

from __future__ import annotations

import io
import logging
import math
import os
import signal
import sys
import time
import tomllib
import traceback
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from flowerbed.errors import ClientError
from flowerbed.offline import offline_defaults

IDLE = 0.05
"""Seconds between two questions for work, on this machine."""
GRACE = 20.0
"""Seconds that a process may go on after its device has been given another message."""
ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
HARMLESS = (".toml", ".md")
PLAIN = (".info/CONTENT", "LICENSE")
"""What else a bundle may hold: Flower's own list of its files, and a licence."""
LOG = logging.getLogger(__name__)


def require_no_code(bundle: bytes) -> None:
    """Raise ``ClientError`` unless an app (a FAB) has no code, and names the client of an installed flowerbed."""
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        for name in archive.namelist():
            if PurePosixPath(name).suffix not in HARMLESS and name not in PLAIN:
                raise ClientError(
                    f"the server sent an app that holds '{name}'; this device runs no code of the server"
                )
        told = tomllib.loads(archive.read("pyproject.toml").decode())
    client = told["tool"]["flwr"]["app"]["components"]["clientapp"]
    if not client.startswith("flowerbed."):
        raise ClientError(
            f"the server sent an app whose client is '{client}'; this device runs flowerbed's only"
        )


def serve(address: str, secret: bytes, parent: int) -> None:
    """Fork a process for each task of the SuperNode at ``address``, until the process ``parent`` is gone.

    A SuperNode has one message at a time. So a process that is still there some time after the next task came is of no
    use to anybody (it may wait for the rest of a message of a run that was stopped meanwhile) and is ended.
    """
    client, request = _runtime(address, secret)
    ends: dict[int, float] = {}
    while os.getppid() == parent:
        _reap(ends)
        try:
            task = client.AcquireTask(request)
        except Exception as error:  # noqa: BLE001 - the SuperNode may be starting or restarting
            LOG.info("The SuperNode at %s does not answer: %s", address, error)
            time.sleep(1)
            continue
        if task.HasField("task") and task.token:
            latest = time.monotonic() + GRACE
            ends = {pid: min(end, latest) for pid, end in ends.items()}
            ends[_fork(address, task.token)] = math.inf
        else:
            time.sleep(IDLE)


def _reap(ends: dict[int, float]) -> None:
    """Take note of processes that have ended, and end those that should have."""
    for pid, end in list(ends.items()):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            del ends[pid]
            code = os.waitstatus_to_exitcode(status)
            if code:
                LOG.warning("The process of a message ended with %s.", code)
        elif time.monotonic() >= end:
            os.kill(pid, signal.SIGKILL)


def _runtime(address: str, secret: bytes) -> tuple[Any, Any]:
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.constant import TaskType
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient

    client = RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,
        root_certificates=None,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({ACQUIRE})),
        ],
    )
    return client, AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])


def _fork(address: str, token: str) -> int:
    """Run one task in a process of its own; return its id."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        from flwr.supernode.runtime import run_clientapp

        flower: Any = run_clientapp
        install = flower.install_from_fab

        def install_checked(fab: bytes, *args: Any, **kwargs: Any) -> Any:
            require_no_code(fab)
            return install(fab, *args, **kwargs)

        flower.install_from_fab = install_checked
        flower.run_clientapp(
            runtime_api_address=address,
            token=token,
            insecure=True,
            parent_pid=parent,
            runtime_dependency_install=False,
        )
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001 - nothing above this frame may run in the child
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Load what messages need, then serve."""
    parent = os.getppid()
    offline_defaults()
    address, secret = sys.argv[1], Path(sys.argv[2]).read_bytes()
    # What takes long to load; none of it starts a thread, which a fork would lose.
    import flwr.supernode.runtime.run_clientapp  # noqa: F401

    import flowerbed.experiments.deploy.client_app
    import flowerbed.experiments.transforms  # noqa: F401
    from flowerbed.strategies.loader import load_all

    load_all()
    serve(address, secret, parent)


if __name__ == "__main__":
    main()
