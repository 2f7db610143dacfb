"""A device's warm process: libraries loaded once, and a fork of it for every message.

Flower starts a new Python for each message, which spends seconds of a small device's time on imports. It also
lets somebody else start the processes (``--isolation process``), and this is that somebody. A fork still has nothing
but its message and the disk, as Flower's own process.

Run as ``python -m flowerbed.experiments.deploy.worker ADDRESS SECRET_FILE``; ends with its parent.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from flowerbed.offline import offline_defaults

IDLE = 0.05
"""Seconds between two questions for work, on this machine."""
ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
LOG = logging.getLogger(__name__)


def serve(address: str, secret: bytes, parent: int) -> None:
    """Fork a process for each task of the SuperNode at ``address``, until the process ``parent`` is gone."""
    client, request = _runtime(address, secret)
    while os.getppid() == parent:
        try:
            task = client.AcquireTask(request)
        except Exception as error:  # noqa: BLE001 - the SuperNode may be starting or restarting
            LOG.info("The SuperNode at %s does not answer: %s", address, error)
            time.sleep(1)
            continue
        if task.HasField("task") and task.token:
            _fork(address, task.token)
        else:
            time.sleep(IDLE)


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


def _fork(address: str, token: str) -> None:
    """Run one task in a process of its own and wait for it."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code:
            LOG.warning("The process of a message ended with %s.", code)
        return
    code = 1
    try:
        from flwr.supernode.runtime.run_clientapp import run_clientapp

        run_clientapp(
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

    import flowerbed.experiments.deploy.client_app  # noqa: F401

    serve(address, secret, parent)


if __name__ == "__main__":
    main()
