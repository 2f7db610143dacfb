"""The SuperNode process: Flower's own, looking for work as often as ``node.toml`` says.

Flower waits 3 seconds between two questions to the server, half a second between two looks for the reply of its own
process, and has no setting for either, so its clock is replaced where it waits. A device that lost power counts as
connected, and cannot connect anew, until it has missed two heartbeats of 30 seconds; ours are shorter. A message whose
run is stopped while it is being fetched stays behind with Flower, half of it missing; much later it is answered with an
error, which goes out in place of the reply to the message of that time, and that one is waited for in vain. Here it is
dropped as any other that cannot be fetched.

Run as ``python -m flowerbed.experiments.deploy.supernode POLL_SECONDS ...`` with ``flower-supernode``'s own arguments.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from flowerbed.offline import offline_defaults

Fetch = Callable[..., Any]

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
    """Shorten the waits of the SuperNode that this process is about to be, and have it drop what it has half of."""
    offline_defaults()
    from flwr.supercore import heartbeat
    from flwr.supernode import fleet_http_connection, start_client_internal

    theirs: Any = start_client_internal
    theirs.time = ShortWaits(poll)
    for module in (heartbeat, fleet_http_connection):
        beating: Any = module
        beating.HEARTBEAT_DEFAULT_INTERVAL = HEARTBEAT
    theirs._pull_and_store_message = _whole_or_not_at_all(theirs._pull_and_store_message)


def _whole_or_not_at_all(pull: Callable[..., Any]) -> Callable[..., Any]:
    """Return Flower's function for fetching a message, which drops those whose run is stopped meanwhile."""

    def pull_whole(*, pull_object: Fetch, confirm_message_received: Fetch, **given: Any) -> Any:
        return pull(
            pull_object=_failing(pull_object),
            confirm_message_received=_failing(confirm_message_received),
            **given,
        )

    return pull_whole


def _failing(fetch: Fetch) -> Fetch:
    """Return ``fetch``, failing as it does elsewhere if the run is stopped."""
    from flwr.supercore.run import RunNotRunningException

    def fetched(*given: Any) -> Any:
        try:
            return fetch(*given)
        except RunNotRunningException as stopped:
            # It is no Exception, so it would pass by what Flower does where fetching fails.
            raise RuntimeError("its run was stopped") from stopped

    return fetched


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
