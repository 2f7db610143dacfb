"""The grid of real devices: Flower's own, with node ids, waiting and resending as the rest of the platform expects.

Strategies, samplers and transforms know nodes by client number, so this grid has the node ids of a simulation and
translates them to those that the SuperLink gave. Beside that it does what Flower leaves open: a device that is away is
waited for, one that was restarted while it had a message gets the message again, and nobody is waited for without end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Error, Message
from flwr.serverapp import Grid

from flowerbed.errors import RunError, require
from flowerbed.server.grids import flower_compat
from flowerbed.server.grids.base import FIRST_NODE_ID, ClientGrid

LOG = logging.getLogger(__name__)
LOOK = 2.0
"""Seconds between two looks at who is connected."""
RESENDS = 2
"""How often a message is sent again to a device that has lost it."""


@dataclass(frozen=True)
class Patience:
    """How long devices are waited for, in seconds."""

    reply: float = 3600.0
    """For a reply to a message; what has not come by then counts as no reply."""
    join: float = 300.0
    """For devices that are not connected when the first message of a run is to be sent."""
    reconnect: float = 60.0
    """For a device that was connected before and has gone."""
    poll: float = 0.2
    """Between two looks for replies."""

    def __post_init__(self) -> None:
        require(self.reply > 0 and self.poll > 0, "A device's patience is a number of seconds above 0.")
        require(self.join >= 0 and self.reconnect >= 0, "Seconds to wait for a device cannot be negative.")


@dataclass
class _Pending:
    """A message that a device has not answered."""

    place: int
    """In the order of asking."""
    message: Message
    """As the strategy made it."""
    client: int
    message_id: str = ""
    """Flower's; "" while no message of it is under way."""
    session: str = ""
    """When its device had last connected as it was sent: a later connection has lost it."""
    sent: int = 0
    gone: float | None = None
    """Since when the device is not there."""


class DeployedGrid(ClientGrid):
    """Flower's grid of a deployment, seen by client number.

    ``node_ids[k]`` is the SuperLink's id of client k. Replies come in the order in which the messages were sent, one
    for a message at most; a device that fails becomes an error reply or none, as in a simulation.
    """

    def __init__(
        self,
        grid: Grid,
        node_ids: Sequence[int],
        patience: Patience | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Wrap ``grid``; raises ``RunError`` if a client has no node id, or shares one."""
        missing = [client for client, node in enumerate(node_ids) if not node]
        if missing:
            raise RunError(
                f"Client {missing[0]} is not registered at the server; run: flowerbed deploy register DIR"
            )
        if len(set(node_ids)) != len(node_ids):
            raise RunError("Two clients have the same node id; register every device with a key of its own.")
        self._grid, self._ids = grid, list(node_ids)
        self._patience = patience or Patience()
        self._clock, self._sleep = clock, sleep
        self._refused: dict[int, str] = {}
        self._joined = False
        self._looked: tuple[float, dict[int, str]] | None = None
        self._pushed: dict[str, Message] = {}

    @property
    def nodes(self) -> range:
        """The node ids in client order, those of a simulation."""
        return range(FIRST_NODE_ID, FIRST_NODE_ID + len(self._ids))

    @property
    def run(self) -> Any:
        """Flower's run."""
        return self._grid.run

    def set_run(self, run: Any) -> None:
        """Hand the run to Flower's grid."""
        self._grid.set_run(run)

    def get_node_ids(self) -> list[int]:
        """Return the node ids of all registered devices, connected or not: sampling must not depend on who is."""
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages without waiting for anything; an id of "" means that it could not be sent."""
        asked = list(messages)
        ids = self._push(asked)
        self._pushed.update((i, message) for i, message in zip(ids, asked, strict=True) if i)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return, once each, the replies to ``message_ids`` that are in by now, in the order of the ids."""
        wanted = [i for i in message_ids if i in self._pushed]
        found = self._pull(wanted)
        return [self._answer(self._pushed.pop(i), found[i]) for i in wanted if i in found]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send all messages and wait for the replies, ``timeout`` seconds or as long as the grid's patience."""
        replies: dict[int, Message] = {}
        pending: list[_Pending] = []
        for place, message in enumerate(messages):
            client = self._client(message)
            if client in self._refused:
                error = Error(flower_compat.CLIENT_RAISED, self._refused[client])
                replies[place] = flower_compat.reply_with(message, error)
            else:
                pending.append(_Pending(place, message, client))
        connected = self._wait_for({p.client for p in pending})
        deadline = self._clock() + (self._patience.reply if timeout is None else timeout)
        pending = self._send([p for p in pending if p.client in connected], connected)
        while pending:
            found = self._pull([p.message_id for p in pending if p.message_id])
            for p in pending:
                reply = found.get(p.message_id)
                if reply is not None and _unavailable(reply):
                    # The SuperLink misses the device's heartbeat and has answered for it; it may come back. What was
                    # seen of who is connected is older than that.
                    p.message_id, self._looked = "", None
                elif reply is not None:
                    replies[p.place] = self._answer(p.message, reply)
            pending = [p for p in pending if p.place not in replies]
            if not pending or self._clock() >= deadline:
                break
            pending = self._followed(pending)
            if pending:
                self._sleep(self._patience.poll)
        return [replies[place] for place in sorted(replies)]

    def refuse(self, client: int, reason: str) -> None:
        """Ask a client nothing any more; whoever wants to gets an error with the reason in its place."""
        self._refused[client] = reason

    # Who is there.

    def _wait_for(self, clients: set[int]) -> dict[int, str]:
        """Wait until these devices are connected, for as long as patience has it; return who is connected."""
        limit = self._patience.reconnect if self._joined else self._patience.join
        self._joined = True
        started, told = self._clock(), False
        while True:
            connected = self._connected(fresh=True)
            away = sorted(clients - connected.keys())
            if not away:
                return connected
            if self._clock() - started >= limit:
                LOG.warning("The devices %s are not connected; the round goes on without them.", away)
                return connected
            if not told:
                told = True
                LOG.info("Waiting up to %.0f s for the devices %s.", limit, away)
            self._sleep(max(self._patience.poll, 0.5))

    def _connected(self, fresh: bool = False) -> dict[int, str]:
        """Return the clients that are connected, each with when it connected."""
        now = self._clock()
        if fresh or self._looked is None or now - self._looked[0] >= LOOK:
            clients = {node: client for client, node in enumerate(self._ids)}
            found = {
                clients[info.node_id]: str(getattr(info, "last_activated_at", ""))
                for info in self._grid.get_nodes()
                if info.node_id in clients
            }
            self._looked = now, found
        return self._looked[1]

    # Sending.

    def _send(self, pending: Sequence[_Pending], connected: dict[int, str]) -> list[_Pending]:
        """Send messages to devices that are connected; return those that Flower took."""
        ids = self._push([p.message for p in pending])
        for p, message_id in zip(pending, ids, strict=True):
            p.message_id, p.session, p.gone = message_id, connected[p.client], None
            p.sent += 1
        return [p for p in pending if p.message_id]

    def _followed(self, pending: Sequence[_Pending]) -> list[_Pending]:
        """Return what is waited for now: lost messages are sent again, those of devices that stay away given up."""
        now, connected = self._clock(), self._connected()
        kept: list[_Pending] = []
        again: list[_Pending] = []
        for p in pending:
            session = connected.get(p.client)
            if session is not None and (session != p.session or not p.message_id):
                if p.sent > RESENDS:
                    LOG.warning("Device %s has lost a message %s times and is given up.", p.client, p.sent)
                else:
                    LOG.warning("Device %s has connected anew and gets its message again.", p.client)
                    again.append(p)
                continue
            if session is None:
                p.gone = now if p.gone is None else p.gone
                if now - p.gone >= self._patience.reconnect:
                    LOG.warning("Device %s is gone and has not come back.", p.client)
                    continue
            else:
                p.gone = None
            kept.append(p)
        return kept + self._send(again, connected)

    def _push(self, asked: Sequence[Message]) -> list[str]:
        """Hand messages to Flower; return its ids, "" for those that it did not take."""
        if not asked:
            return []
        outgoing = []
        for message in asked:
            copy = flower_compat.message_copy(message, message.content)
            copy.metadata.dst_node_id = self._ids[self._client(message)]
            # The SuperLink knows messages by their hash, and one that it has delivered already it does not deliver
            # again: what is sent once more has to be another message.
            copy.metadata.created_at = time.time()
            # What comes later is of no use, so the SuperLink neither delivers nor takes it then.
            copy.metadata.ttl = self._patience.reply
            outgoing.append(copy)
        # Flower answers nothing at all for what was too large as a whole.
        ids = list(self._grid.push_messages(outgoing)) or [""] * len(outgoing)
        return [message_id or "" for message_id in ids]

    def _pull(self, message_ids: Sequence[str]) -> dict[str, Message]:
        """Return the replies that are in, by the id of the message that each answers; others are none of ours."""
        wanted = set(message_ids)
        found: dict[str, Message] = {}
        if not wanted:
            return found
        for reply in self._grid.pull_messages(message_ids):
            answered = reply.metadata.reply_to_message_id
            if answered in wanted:
                found.setdefault(answered, reply)
        return found

    def _client(self, message: Message) -> int:
        client: int = message.metadata.dst_node_id - FIRST_NODE_ID
        if not 0 <= client < len(self._ids):
            raise RunError(f"There is no node {message.metadata.dst_node_id}: the nodes are {self.nodes}.")
        return client

    def _answer(self, asked: Message, reply: Message) -> Message:
        outcome = reply.error if reply.has_error() else reply.content
        answer = flower_compat.reply_with(asked, outcome)
        if self.on_reply is not None:
            self.on_reply(answer)
        return answer


def _unavailable(reply: Message) -> bool:
    return reply.has_error() and reply.error.code == flower_compat.NODE_UNAVAILABLE
