"""The server's side of the node processes: a Flower grid over loopback sockets."""

from __future__ import annotations

import contextlib
import queue
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from flwr.app import Error, Message, RecordDict

from flowerbed.errors import ConfigError, RunError
from flowerbed.experiments.benchmarks.fleet import frames
from flowerbed.experiments.benchmarks.fleet.nodes import GOOD, REPLAY, SILENT, Plan, misbehaves
from flowerbed.pooling import Pool, Pooling
from flowerbed.server.grids import flower_compat
from flowerbed.server.grids.base import Answered, SimulationGrid

MOST_NODES: Final = 64
START_SECONDS: Final = 240.0
Arrived = tuple[int, dict[str, Any] | None, RecordDict]
"""The node, the header of its frame (None if the connection is gone), and the content."""


class LoopbackGrid(SimulationGrid):
    """Nodes are processes of this machine, one a device, and one more for each message that a device answers.

    Replies are handed on as they arrive, also those to messages of an earlier exchange: to tell them apart is the
    server's business, here as with any grid. An exchange ends when all have answered but those that are planned not to
    (``nodes.SILENT``): what a server's patience does, without depending on how fast the machine is.
    """

    def __init__(
        self,
        configs: Sequence[Path],
        run_config: Mapping[str, str],
        behaviours: Sequence[str] = (),
        parallel: int = 2,
    ) -> None:
        """Start the nodes and wait until all are connected; ``behaviours`` as in ``nodes``, by default all good."""
        if len(configs) > MOST_NODES:
            raise ConfigError(
                f"{len(configs)} node processes are too many for one machine; at most {MOST_NODES}."
            )
        super().__init__(_no_app, len(configs), run_config=dict(run_config))
        self._instructions: dict[str, Message] = {}
        """The messages of this exchange and the one before, by their ids."""
        self._open: set[str] = set()
        """Those of this exchange that have not been answered."""
        self._last: dict[str, Message] = {}
        self._silent: set[int] = set()
        """Nodes that will not answer in this exchange."""
        self._due: set[int] = set()
        """Those of them that will send something else: what was due before."""
        self._gone: set[int] = set()
        self._arrived: queue.Queue[Arrived] = queue.Queue()
        self._connections: dict[int, socket.socket] = {}
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=MOST_NODES)
        plan = Plan(
            self._listener.getsockname()[1],
            secrets.token_hex(16),
            [str(path) for path in configs],
            list(behaviours) or [GOOD] * len(configs),
            dict(run_config),
            parallel,
        )
        self._behaviours = {self.node_id(k): behaviour for k, behaviour in enumerate(plan.behaviours)}
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "plan.json"
        plan.write(path)
        self.process = subprocess.Popen([sys.executable, "-m", f"{__package__}.nodes", str(path)])
        try:
            self._connect(plan.token)
        except BaseException:
            self.close()
            raise

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send the messages without waiting."""
        accepted = self._accept(messages)
        unanswered = {self._last[number].metadata.dst_node_id for number in self._open}
        before, self._last = self._last, {message.metadata.message_id: message for message in accepted}
        bad = {message.metadata.dst_node_id for message in accepted if misbehaves(message)}
        self._silent = {node for node in bad if self._behaviours[node] in SILENT}
        self._due = {n for n in self._silent if self._behaviours[n] == REPLAY or n in unanswered}
        self._instructions, self._open = {**before, **self._last}, set(self._last)
        for message in accepted:
            # A node that is still at the message before does not read, and must not keep the others waiting.
            threading.Thread(target=self._send, args=(message,), daemon=True).start()
        return [message.metadata.message_id for message in accepted]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return what has arrived."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found += self._read(self._arrived.get_nowait())
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send all messages and return what arrives until all have been answered or ``timeout`` seconds are over."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self.push_messages(messages)
        replies: list[Message] = []
        while self._due or any(
            self._last[number].metadata.dst_node_id not in self._silent for number in self._open
        ):
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                arrived = self._arrived.get(timeout=left)
            except queue.Empty:
                break
            replies += self._read(arrived)
        order = {node: place for place, node in enumerate(self.nodes)}
        return sorted(replies, key=lambda reply: order.get(reply.metadata.src_node_id, -1))

    def run_cohort(
        self, content: RecordDict, nodes: Sequence[int], pooling: Pooling, answered: Answered | None = None
    ) -> Pool:
        """Devices answer with messages only."""
        raise RunError("Node processes answer with messages, not with sums.")

    def close(self) -> None:
        """End all nodes."""
        self._listener.close()
        for connection in self._connections.values():
            connection.close()
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait()
        self._folder.cleanup()

    def _connect(self, token: str) -> None:
        self._listener.settimeout(1.0)
        deadline = time.monotonic() + START_SECONDS
        while len(self._connections) < self.num_clients:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RunError(f"Only {len(self._connections)} of {self.num_clients} node processes came up.")
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listener.accept()
                connection.settimeout(30.0)
                self._admit(connection, token)

    def _admit(self, connection: socket.socket, token: str) -> None:
        try:
            found = frames.receive(connection)
        except (frames.FrameError, OSError):
            found = None
        header = found[0] if found else {}
        number = header.get("node")
        known = isinstance(number, int) and 0 <= number < self.num_clients
        if not known or not secrets.compare_digest(str(header.get("token")), token):
            connection.close()
            return
        connection.settimeout(None)
        node = self.node_id(int(header["node"]))
        self._connections[node] = connection
        threading.Thread(target=self._listen, args=(node, connection), daemon=True).start()

    def _listen(self, node: int, connection: socket.socket) -> None:
        try:
            while (found := frames.receive(connection)) is not None:
                self._arrived.put((node, *found))
        except (frames.FrameError, OSError):
            # Whoever sends what is no frame cannot be followed any further.
            connection.close()
        self._gone.add(node)
        self._arrived.put((node, None, RecordDict()))

    def _send(self, message: Message) -> None:
        node, metadata = message.metadata.dst_node_id, message.metadata
        header = {"id": metadata.message_id, "type": metadata.message_type, "node": node}
        try:
            if node in self._gone:
                raise ConnectionError
            frames.send(self._connections[node], header, message.content)
        except OSError:
            self._arrived.put((node, None, RecordDict()))

    def _read(self, arrived: Arrived) -> list[Message]:
        node, header, content = arrived
        if header is None:
            self._due.discard(node)
            lost = [self._last[n] for n in sorted(self._open) if self._last[n].metadata.dst_node_id == node]
            self._open -= {message.metadata.message_id for message in lost}
            error = Error(flower_compat.NODE_UNAVAILABLE, "the node is gone: its connection was closed")
            return [self._announce(flower_compat.reply_with(message, error)) for message in lost]
        self._due.discard(node)
        message = self._instructions.get(str(header.get("to")))
        if message is None or message.metadata.dst_node_id != node:
            return []
        self._open.discard(message.metadata.message_id)
        reason = header.get("error")
        outcome = content if reason is None else Error(flower_compat.CLIENT_RAISED, str(reason))
        return [self._announce(flower_compat.reply_with(message, outcome))]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _no_app() -> Any:
    raise RunError("The clients are in processes of their own.")
