"""The SuperLink process: Flower's own, behind a guard.

Flower serves devices, operators and the run's server process on one port, and asks operators for nothing: whoever
reaches the port may register a node's key and start a run. The guard lets everybody but this machine see no more than
what devices need. It also refuses requests of more than a piece of a model, and a node that answers for another, and it
tells a node whose key is not registered so: Flower's answer to it is that to a node which is connected already.

Run as ``python -m flowerbed.experiments.deploy.superlink LIMIT_BYTES ...`` with ``flower-superlink``'s own arguments.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from flowerbed.offline import offline_defaults

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

FLEET = "/v1/fleet/"
HEALTH = "/health"


class Guard:
    """ASGI middleware in front of everything that Flower serves."""

    def __init__(self, app: App, limit: int) -> None:
        """``limit`` is the largest body of a device's request, in bytes."""
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = str(scope.get("path", ""))
        if scope["type"] == "http" and path.startswith(FLEET):
            length = dict(scope["headers"]).get(b"content-length", b"")
            # The server behind reads no more than content-length says.
            if not length.isdigit():
                await _refuse(send, 411, "A request without content-length is refused.")
                return
            if int(length) > self._limit:
                await _refuse(send, 413, f"A request of more than {self._limit} bytes is refused.")
                return
        elif scope["type"] != "lifespan" and path != HEALTH and not _from_here(scope):
            await _refuse(send, 404, "Only devices are served here; operators work on the server's machine.")
            return
        await self._app(scope, receive, send)


def _from_here(scope: Scope) -> bool:
    """Return whether the other end is on this machine: then its address is ours, or a loopback one."""
    client, server = scope.get("client"), scope.get("server")
    if client is None:
        return False
    address = ipaddress.ip_address(client[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback or (server is not None and client[0] == server[0])


async def _refuse(send: Send, status: int, reason: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": reason.encode()})


def install(limit: int) -> None:
    """Put the guard into the SuperLink that this process is about to serve."""
    offline_defaults()
    from fastapi import HTTPException
    from flwr.superlink import extensions
    from flwr.superlink.servicer.fleet import fleet_handlers
    from starlette.middleware import Middleware

    extensions.get_middleware = lambda: (Middleware(Guard, limit=limit),)
    push = fleet_handlers.push_messages

    def push_own(request: Any, state: Any) -> Any:
        # The signature proves who sends the request; who sent the reply in it is only claimed.
        if any(m.metadata.src_node_id != request.node.node_id for m in request.messages_list):
            raise HTTPException(403, "A node answers for itself only.")
        return push(request=request, state=state)

    activate = fleet_handlers.activate_node

    def activate_known(request: Any, state: Any) -> Any:
        if state.get_node_id_by_public_key(request.public_key) is None:
            raise HTTPException(404, "This key is not registered.")
        return activate(request=request, state=state)

    fleet_handlers.push_messages = push_own
    fleet_handlers.activate_node = activate_known


def main() -> None:
    """Serve."""
    limit = int(sys.argv[1])
    sys.argv = ["flower-superlink", *sys.argv[2:]]
    install(limit)
    from flwr.superlink.cli.flower_superlink import flower_superlink

    flower_superlink()


if __name__ == "__main__":
    main()
