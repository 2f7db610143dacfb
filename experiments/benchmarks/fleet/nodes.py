"""The nodes: ``python -m flowerbed.experiments.benchmarks.fleet.nodes PLAN.json``, started by the grid.

This process imports everything and computes nothing, so that whatever it forks starts with all imports, in memory
that all share.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from flwr.app import ArrayRecord, Context, Message, RecordDict

from flowerbed import messages
from flowerbed.experiments.benchmarks.fleet import frames
from flowerbed.experiments.deploy.device import device_app
from flowerbed.server.grids import flower_compat
from flowerbed.strategies.loader import load_all

GOOD, SLOW, LATE, VANISH, CRASH, GARBAGE, REPLAY, NOISE = (
    "good", "slow", "late", "vanish", "crash", "garbage", "replay", "noise",
)  # fmt: skip
BEHAVIOURS: Final = (GOOD, SLOW, LATE, VANISH, CRASH, GARBAGE, REPLAY, NOISE)
"""slow: answers in time, but later; late: not before the next message has come; vanish: closes its connection; crash:
the process of a message dies; garbage: numbers that are none; replay: sends its first reply again; noise: sends bytes
that are no frame. All but slow from the second training round on: in the first everybody can answer."""
SILENT: Final = (LATE, REPLAY)
"""Who leaves a message without an answer."""
SLOW_SECONDS: Final = 0.3


@dataclass(frozen=True)
class Plan:
    """What the nodes' process is told."""

    port: int
    token: str
    """What a node has to show before it is heard."""
    configs: list[str]
    """The configuration file of each node."""
    behaviours: list[str]
    run_config: dict[str, str]
    parallel: int
    """Clients that compute at the same time, over all nodes."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what ``write`` wrote."""
        return cls(**json.loads(path.read_text()))

    def write(self, path: Path) -> None:
        """Write the plan as JSON, readable for this user alone: it holds the token."""
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(asdict(self), file)


def serve(plan: Plan) -> None:
    """Fork all nodes and wait until they have ended; ends them if this process is ended."""
    load_all()
    import flowerbed.experiments.parts
    import flowerbed.experiments.transforms  # noqa: F401 - so that every node has it.

    flower_compat.set_identity(1)
    turns = multiprocessing.get_context("fork").BoundedSemaphore(plan.parallel)
    children = []
    for number in range(len(plan.configs)):
        child = os.fork()
        if child == 0:
            # The parent's death ends a node: its socket closes with the grid's.
            os._exit(_guarded(lambda number=number: node(plan, number, turns)))  # type: ignore[misc]
        children.append(child)

    def end(*_: object) -> None:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    for child in children:
        os.waitpid(child, 0)


def misbehaves(message: Message) -> bool:
    """Return whether a node that misbehaves does so at this message."""
    return from_now_on(message.metadata.message_type, message.content)


def from_now_on(kind: str, content: RecordDict) -> bool:
    """Return whether a message of that type belongs to the second training round or a later one."""
    return kind == "train" and int(messages.settings(content).get("server-round", 1)) > 1


def node(plan: Plan, number: int, turns: Any) -> None:
    """Answer messages until the server closes the connection, each in a process of its own."""
    behaviour = plan.behaviours[number]
    with socket.create_connection(("127.0.0.1", plan.port)) as connection:
        frames.send(connection, {"token": plan.token, "node": number})
        while (found := frames.receive(connection)) is not None:
            header, content = found
            bad = from_now_on(header["type"], content)
            if bad and behaviour == VANISH:
                return
            child = os.fork()
            if child == 0:
                asked = Asked(plan, number, turns, connection, header, content, bad)
                os._exit(_guarded(asked.answer))
            _, status = os.waitpid(child, 0)
            if status:
                code = os.waitstatus_to_exitcode(status)
                reason = f"the client's process died (exit {code})"
                frames.send(connection, {"to": header["id"], "error": reason})


@dataclass(frozen=True)
class Asked:
    """One message that has come to a node."""

    plan: Plan
    number: int
    turns: Any
    connection: socket.socket
    header: dict[str, Any]
    content: RecordDict
    bad: bool
    """Whether the node misbehaves, if it ever does."""

    def answer(self) -> None:
        """Answer as the node behaves; the reply goes straight to the server."""
        behaviour, train = self.plan.behaviours[self.number], self.header["type"] == "train"
        first = Path(self.plan.configs[self.number]).parent / "first-reply.bin"
        if behaviour == SLOW:
            time.sleep(SLOW_SECONDS)
        if self.bad and behaviour == CRASH:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.bad and behaviour == NOISE:
            self.connection.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(64))
            return
        if self.bad and behaviour == REPLAY:
            self.connection.sendall(first.read_bytes())
            return
        with self.turns:
            data = self._reply()
        if behaviour == REPLAY and train:
            first.write_bytes(data)
        if self.bad and behaviour == LATE:
            # Readable once the next message has come, or the connection is closed.
            select.select([self.connection], [], [])
        self.connection.sendall(data)

    def _reply(self) -> bytes:
        """Return the frame that the device answers with."""
        node, kind, number = self.header["node"], self.header["type"], self.header["id"]
        message = Message(self.content, dst_node_id=node, message_type=kind)
        flower_compat.set_message_id(message, number)
        context = Context(1, node, {"partition-id": self.number}, RecordDict(), dict(self.plan.run_config))
        try:
            reply = device_app(self.plan.configs[self.number])(message, context).content
        except Exception as error:  # noqa: BLE001 - a client's failure is its reply.
            return frames.packed({"to": number, "error": f"{type(error).__name__}: {error}"})
        if self.bad and self.plan.behaviours[self.number] == GARBAGE:
            spoil(reply)
        return frames.packed({"to": number}, reply)


def spoil(reply: RecordDict) -> None:
    """Put something that is no number into the first array of every record."""
    for record in reply.values():
        if isinstance(record, ArrayRecord):
            name, array = next(iter(record.items()))
            values = array.numpy()
            if values.dtype.kind == "f":
                values[...] = np.nan
            else:
                values[...] = 255
            record[name] = messages.LazyArray(values)


def _guarded(work: Callable[[], None]) -> int:
    try:
        work()
    except (BrokenPipeError, ConnectionResetError, ConnectionRefusedError):
        return 0  # The server is gone, and with it whoever could be told.
    except BaseException as error:  # noqa: BLE001 - a forked process must not go on as its parent.
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    serve(Plan.read(Path(sys.argv[1])))
