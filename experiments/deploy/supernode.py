"""The SuperNode process: Flower's own, looking for work as often as ``node.toml`` says.

Flower waits 3 seconds between two questions to the server, half a second between two looks for the reply of its own
process, and has no setting for either, so its clock is replaced where it waits. A device that lost power counts as
connected, and cannot connect anew, until it has missed two heartbeats of 30 seconds; ours are shorter.

Run as ``python -m flowerbed.experiments.deploy.supernode POLL_SECONDS ...`` with ``flower-supernode``'s own arguments.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

from flowerbed.offline import offline_defaults

LOCAL = 0.05
"""Seconds between two looks on this machine."""


HEARTBEAT = 15
"""Seconds that a heartbeat is good for; the server counts two."""


class ShortWaits:
    """The module ``time``, but a sleep of more than a second takes ``poll`` seconds, and another one ``LOCAL``."""

    def __init__(self, poll: float) -> None:
        self._poll = poll

    def sleep(self, seconds: float) -> None:
        time.sleep(min(seconds, self._poll if seconds > 1 else LOCAL))

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def install(poll: float) -> None:
    """Shorten the waits of the SuperNode that this process is about to be."""
    offline_defaults()
    from flwr.supercore import heartbeat
    from flwr.supernode import fleet_http_connection, start_client_internal

    theirs: Any = start_client_internal
    theirs.time = ShortWaits(poll)
    for module in (heartbeat, fleet_http_connection):
        beating: Any = module
        beating.HEARTBEAT_DEFAULT_INTERVAL = HEARTBEAT


def end_with(parent: int) -> None:
    """End this process as soon as ``parent`` is gone, however that was: nobody would look after it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Be a SuperNode."""
    end_with(os.getppid())
    install(float(sys.argv[1]))
    sys.argv = ["flower-supernode", *sys.argv[2:]]
    from flwr.supernode.cli.flower_supernode import flower_supernode

    flower_supernode()


if __name__ == "__main__":
    main()
