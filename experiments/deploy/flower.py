"""Every private Flower name of the deployment tools, in one place, beside ``flowerbed.server.grids.flower_compat``.

Flower's public surface for a deployment are its commands. They answer in coloured text, start anew for each question
(seconds), and ``flwr run --stream`` exits with 0 when the run has failed. So the operator's questions go to the
Control API itself. What is used of it has moved before; a contract test looks for every name.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from flowerbed.errors import RunError
from flowerbed.offline import offline_defaults

RUNNING = ("pending", "starting", "running")
COMPLETED = "finished:completed"


@dataclass(frozen=True)
class FlowerRun:
    """A run as the SuperLink knows it."""

    run_id: int
    status: str
    """pending, starting, running, finished:completed, finished:failed or finished:stopped."""
    details: str


@dataclass(frozen=True)
class FlowerNode:
    """A node as the SuperLink knows it."""

    node_id: int
    status: str
    """registered (never seen), online, offline or unregistered."""
    public_key: bytes
    activated: str
    """When it last connected, ISO 8601; "" if never."""


def environment(home: Path, **further: str) -> dict[str, str]:
    """Return the environment of a Flower process: off the network, its files below ``home``."""
    offline_defaults()
    # Flower starts its own commands by name.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {
        **os.environ,
        "PATH": path,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # Nothing is installed when a run starts: Flower would ask a package index for the app's dependencies.
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        **further,
    }


class Control:
    """The operator's side of a SuperLink, over TLS."""

    def __init__(self, address: str, authority: Path) -> None:
        """``address`` is host:port on this machine."""
        offline_defaults()
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        self._address = address
        self._client = ControlHttpClient.from_server_address(
            server_address=address,
            insecure=False,
            root_certificates=authority.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, app: Path, config: Mapping[str, str]) -> int:
        """Submit a Flower app with settings for its run configuration; return the run's id."""
        from flwr.cli.build import build_fab_from_disk
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        bundle = build_fab_from_disk(app)
        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        request = StartRunRequest(
            fab=fab_to_proto(fab),
            override_config=user_config_to_proto(dict(config)),
            federation="",
            app_spec="",
        )
        answer = self._asked(lambda: self._client.StartRun(request))
        if not answer.HasField("run_id"):
            raise RunError("The server did not accept the run; see its log.")
        return int(answer.run_id)

    def runs(self) -> dict[int, FlowerRun]:
        """Return all runs by id."""
        from flwr.common.serde import run_from_proto
        from flwr.proto.control_pb2 import ListRunsRequest

        answer = self._asked(lambda: self._client.ListRuns(ListRunsRequest()))
        found = {}
        for run_id, proto in answer.run_dict.items():
            status = run_from_proto(proto).status
            text = f"{status.status}:{status.sub_status}" if status.sub_status else status.status
            found[int(run_id)] = FlowerRun(int(run_id), text, status.details)
        return found

    def stop(self, run_id: int) -> None:
        """Stop a run."""
        from flwr.proto.control_pb2 import StopRunRequest

        self._asked(lambda: self._client.StopRun(StopRunRequest(run_id=run_id)))

    def logs(self, run_id: int) -> Iterator[str]:
        """Yield what the run's server side logged, and go on until the run is over."""
        from flwr.proto.control_pb2 import StreamLogsRequest

        request = StreamLogsRequest(run_id=run_id, after_timestamp=0.0)
        for answer in self._asked(lambda: self._client.StreamLogs(request)):
            yield answer.log_output

    def register(self, public_key: bytes, name: str) -> int:
        """Register a node's public key; return the node's id."""
        from flwr.proto.control_pb2 import RegisterNodeRequest

        request = RegisterNodeRequest(public_key=public_key, name=name)
        return int(self._asked(lambda: self._client.RegisterNode(request)).node_id)

    def unregister(self, node_id: int) -> None:
        """Let a node in no longer."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        self._asked(lambda: self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id)))

    def nodes(self) -> list[FlowerNode]:
        """Return all nodes that are or were registered."""
        from flwr.proto.control_pb2 import ListNodesRequest

        answer = self._asked(lambda: self._client.ListNodes(ListNodesRequest()))
        return [
            FlowerNode(int(n.node_id), n.status, n.public_key, n.last_activated_at) for n in answer.nodes_info
        ]

    def _asked(self, call: Any) -> Any:
        import httpx
        from flwr.supercore.error import FlowerError

        try:
            return call()
        except httpx.HTTPStatusError as error:
            known = FlowerError.from_json(error.response.text)
            raise RunError(
                f"The server at {self._address} refused: "
                + (known.message if known else f"HTTP {error.response.status_code}")
            ) from error
        except httpx.TransportError as error:
            raise ServerAway(
                f"The server at {self._address} does not answer ({error}); start it with: flowerbed deploy server DIR"
            ) from error


class ServerAway(RunError):
    """The SuperLink cannot be reached."""


def age(moment: str) -> str:
    """Return how long ago an ISO 8601 moment was, in words; "never" for ""."""
    if not moment:
        return "never"
    then = datetime.datetime.fromisoformat(moment)
    seconds = int((datetime.datetime.now(datetime.UTC) - then).total_seconds())
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{max(0, seconds)} s ago"
