"""What the server knows of the devices, and what it makes of it: partial work, compressed replies, limits.

``DeviceLink`` stands between the round loop and any grid: it adds to every message what was agreed with that device,
and turns every reply back into what the device would have sent without it, so that no strategy knows of it. A reply
that is too large, answers another message, or cannot be read becomes an error reply, which the loop counts as a
failure of its client like any other.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from flowerbed import messages, seeds
from flowerbed.compression import BITS, FEEDBACK, KEEP, STREAMS, Scheme, UnpackError, unpacked
from flowerbed.errors import RunError
from flowerbed.server.device_params import NONE, DeviceParams
from flowerbed.server.grids import flower_compat

MEGABYTE = 10**6
HELLO = "device"
"""The phase of a query that asks a device what it is (see ``flowerbed.experiments.deploy.device``)."""
TICKET, RECEIPT = "ticket", "receipt"
WORK = "work"
AGREED = "agreed"
"""The record of a message that says what was agreed with its device."""


@dataclass(frozen=True)
class Device:
    """What one client has told about itself; the defaults are those of a device that needs no consideration."""

    speed: float = 1.0
    bandwidth_mbit: float = 0.0
    """Upload bandwidth in Mbit/s; 0 means unknown or ample."""
    ram_mb: int = 0
    """0 means unknown or ample."""
    gpu: bool = False
    examples: int = 0
    """Training samples."""

    def work(self, params: DeviceParams) -> float:
        """Return the share of a round's steps that it makes."""
        if params.work == "full":
            return 1.0
        return min(1.0, max(params.least_work, self.speed))

    def compresses(self, params: DeviceParams) -> bool:
        """Return whether its replies are compressed."""
        if params.compression == NONE:
            return False
        return not params.slow_mbit or 0 < self.bandwidth_mbit < params.slow_mbit

    def seconds(self, params: DeviceParams, steps: int, values: int) -> float:
        """Return about how long a round takes: its share of ``steps``, and sending ``values`` float32 numbers."""
        scheme = Scheme(params.top_k, params.bits) if self.compresses(params) else Scheme()
        made = max(1, round(self.work(params) * steps)) if steps else 0
        upload = 8 * scheme.nbytes(values) / (self.bandwidth_mbit * MEGABYTE) if self.bandwidth_mbit else 0.0
        return made * params.step_seconds / self.speed + upload

    def able(self, params: DeviceParams, steps: int, values: int) -> bool:
        """Return whether it has the memory and, by the estimate, keeps the deadline."""
        if params.ram_mb and 0 < self.ram_mb < params.ram_mb:
            return False
        return not params.deadline or self.seconds(params, steps, values) <= params.deadline


def simulated(
    params: DeviceParams, examples: Sequence[int] | npt.NDArray[np.int64], seed: int
) -> list[Device]:
    """Return the devices of simulated clients, given their numbers of samples: a share of them is weak."""
    clients = len(examples)
    weak = np.zeros(clients, dtype=bool)
    order = seeds.numpy_rng(seed, "weak devices").permutation(clients)
    weak[order[: round(params.weak * clients)]] = True
    return [
        Device(params.weak_speed, params.weak_mbit, params.weak_ram_mb, examples=int(count))
        if is_weak
        else Device(examples=int(count))
        for is_weak, count in zip(weak.tolist(), examples, strict=True)
    ]


def survey(
    grid: Grid, nodes: Sequence[int], timeout: float | None = None, *, distinct: bool = True
) -> dict[int, tuple[int, Device]]:
    """Ask nodes what they are; return client number and device by node id, without those that do not answer.

    Raises ``RunError`` if two nodes say that they are the same client, unless ``distinct`` is False: for grids that
    know who is who, where what a node says must not end a run.
    """
    content = RecordDict({AGREED: ConfigRecord({"phase": HELLO})})
    asked = [Message(content=content, dst_node_id=node, message_type="query") for node in nodes]
    found: dict[int, tuple[int, Device]] = {}
    for reply in grid.send_and_receive(asked, timeout=timeout):
        if not reply.has_content():
            continue
        told = messages.metrics(reply.content)
        numbers = {name: value for name, value in told.items() if isinstance(value, int | float)}
        if "client" not in numbers:
            continue
        found[reply.metadata.src_node_id] = (
            int(numbers["client"]),
            Device(
                speed=float(numbers.get("speed", 1.0)),
                bandwidth_mbit=float(numbers.get("bandwidth-mbit", 0.0)),
                ram_mb=int(numbers.get("ram-mb", 0)),
                gpu=bool(numbers.get("gpu", 0)),
                examples=int(numbers.get("num-examples", 0)),
            ),
        )
    owners: dict[int, int] = {}
    for node, (client, _) in sorted(found.items()):
        if distinct and client in owners:
            raise RunError(
                f"The nodes {owners[client]} and {node} both say that they are client {client}; give each device a "
                "number of its own (client in its configuration, or its partition-id)."
            )
        owners[client] = node
    return found


@dataclass
class DeviceLink:
    """Messages and replies of a run over devices that differ.

    The same devices and messages give the same model in every bit, with tickets or without.
    """

    params: DeviceParams
    devices: Sequence[Device]
    """By client number; clients beyond its end need no consideration."""
    tickets: bool = False
    """Whether every message carries a random ticket that its reply has to show. Devices do; simulated clients, which
    nobody could impersonate, know nothing of it."""
    steps: Sequence[int] = ()
    """Steps of a full round by client number; the estimate of a round's duration needs them."""
    values: int = 0
    """Numbers in the model."""
    used: dict[int, int] = field(default_factory=dict)
    """Bytes of replies by client."""
    _trained: list[int] = field(default_factory=list)
    """The clients of the last training exchange."""

    def outgoing(self, asked: Sequence[Message], clients: Mapping[int, int]) -> list[Message]:
        """Add what was agreed with every device to the messages; ``clients`` maps node ids to client numbers.

        Messages that shared one content and agree on the same still share one.
        """
        contents: dict[tuple[int, tuple[object, ...]], RecordDict] = {}
        result = []
        numbers = [clients[message.metadata.dst_node_id] for message in asked]
        if asked and _trains(asked[0]):
            self._trained = numbers
        for message, client in zip(asked, numbers, strict=True):
            agreed = self._agreed(message, client)
            if agreed:
                key = id(message.content), tuple((k, str(v)) for k, v in agreed.items())
                if key not in contents:
                    contents[key] = RecordDict({**message.content, AGREED: agreed})
                # The message itself is the strategy's; another one with its content may be on its way.
                message.content = contents[key]
            result.append(message)
        return result

    def incoming(
        self, asked: Sequence[Message], replies: Sequence[Message], clients: Mapping[int, int]
    ) -> list[Message]:
        """Return the replies as their devices would have sent them uncompressed; errors for what is refused."""
        questions = {message.metadata.dst_node_id: message for message in asked}
        result = []
        for reply in replies:
            question = questions.get(reply.metadata.src_node_id)
            # A reply to another message is refused by the loop, and takes no place of the one that is waited for.
            if question is not None and reply.has_content() and _answers(reply, question):
                client = clients[reply.metadata.src_node_id]
                problem = self._opened(question, reply, client)
                if problem is not None:
                    reply = flower_compat.reply_with(question, Error(flower_compat.CLIENT_RAISED, problem))
            result.append(reply)
        return result

    def able(self) -> npt.NDArray[np.bool_]:
        """Return whether each device may be asked, by client number, bool ``(clients,)``."""
        found = zip(self.devices, self.steps, strict=True)
        return np.array([device.able(self.params, steps, self.values) for device, steps in found])

    def metrics(self) -> dict[str, float]:
        """Return, of the last training exchange, the mean share of work and the estimate of its slowest device."""
        found = [(self._device(client), client) for client in self._trained]
        seconds = [d.seconds(self.params, self.steps[k] if self.steps else 0, self.values) for d, k in found]
        return {
            "work": sum(device.work(self.params) for device, _ in found) / max(1, len(found)),
            "device-seconds": max(seconds, default=0.0),
        }

    def _device(self, client: int) -> Device:
        return self.devices[client] if 0 <= client < len(self.devices) else Device()

    def _agreed(self, message: Message, client: int) -> ConfigRecord:
        agreed = ConfigRecord()
        if _trains(message):
            device, params = self._device(client), self.params
            if (work := device.work(params)) != 1.0:
                agreed[WORK] = work
            if device.compresses(params):
                agreed[KEEP], agreed[BITS] = params.top_k, params.bits
                agreed[FEEDBACK], agreed[STREAMS] = params.feedback, list(params.streams)
        if self.tickets:
            agreed[TICKET] = secrets.token_hex(16)
        return agreed

    def _opened(self, question: Message, reply: Message, client: int) -> str | None:
        """Make the reply's content whole; return why it is refused, or None."""
        size = messages.nbytes(reply.content)
        self.used[client] = self.used.get(client, 0) + size
        limit, quota = self.params.reply_mb * MEGABYTE, self.params.quota_mb * MEGABYTE
        if 0 < limit < size:
            return f"oversized: the reply has {size / MEGABYTE:.2f} MB, devices.reply_mb={self.params.reply_mb:g}"
        if 0 < quota < self.used[client]:
            return (
                f"quota: the client has sent more than devices.quota_mb={self.params.quota_mb:g} in this run"
            )
        ticket = messages.settings(question.content).get(TICKET)
        if ticket is not None:
            receipt = reply.content.pop(RECEIPT, None)
            if not isinstance(receipt, ConfigRecord) or receipt.get(TICKET) != ticket:
                return "replayed: the reply does not show the ticket of the message that it should answer"
        try:
            reply.content = unpacked(reply.content, question.content)
        except UnpackError as error:
            return f"garbage: the compressed update cannot be read: {error}"
        return None


def _trains(message: Message) -> bool:
    return message.metadata.message_type.partition(".")[0] == "train"


def _answers(reply: Message, question: Message) -> bool:
    number = question.metadata.message_id
    return not number or reply.metadata.reply_to_message_id in ("", number)
