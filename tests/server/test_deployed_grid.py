"""The grid of real devices, on a Flower grid that is played: devices that vanish, restart, come late or lie."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from flowerbed.errors import RunError
from flowerbed.server.grids import flower_compat
from flowerbed.server.grids.base import FIRST_NODE_ID
from flowerbed.server.grids.deployed import DeployedGrid, Patience

IDS = (900719925474099, 17, 4242)
"""Ids as a SuperLink gives them: in no order."""
PATIENCE = Patience(reply=100.0, join=30.0, reconnect=20.0, poll=1.0)


@dataclass
class PlayedFlower(Grid):
    """A SuperLink on a clock of its own. ``plan[t]`` is done when the clock passes t."""

    online: dict[int, str] = field(default_factory=lambda: dict.fromkeys(IDS, "t0"))
    now: float = 0.0
    sent: list[Message] = field(default_factory=list)
    replies: dict[str, Message] = field(default_factory=dict)
    plan: dict[float, Any] = field(default_factory=dict)
    answers: bool = True
    """Whether devices that are online answer at once."""
    kept: dict[str, str] = field(default_factory=dict)
    """What has been sent and not been answered, with its id."""

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for moment in sorted(t for t in self.plan if t <= self.now):
            self.plan.pop(moment)()

    def reply(self, number: int, text: str = "") -> None:
        """Let the reply to the message sent as number ``number`` arrive."""
        message = self.sent[number]
        content = RecordDict({"said": ConfigRecord({"text": text or f"from {message.metadata.dst_node_id}"})})
        answer = flower_compat.reply_with(message, content)
        self.replies.setdefault(message.metadata.message_id, answer)

    def unavailable(self, number: int) -> None:
        """Let the SuperLink answer for a device whose heartbeat it misses."""
        error = Error(flower_compat.NODE_UNAVAILABLE, "node_unavail")
        message = self.sent[number]
        self.replies[message.metadata.message_id] = flower_compat.reply_with(message, error)

    @property
    def run(self) -> Any:
        return SimpleNamespace(run_id=7)

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.online)

    def get_nodes(self) -> list[Any]:
        return [SimpleNamespace(node_id=n, last_activated_at=t) for n, t in self.online.items()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            # Flower's id is a hash of message and metadata; one that it has already it takes for the same, delivered.
            flower_compat.set_message_id(message, "")
            same = message.object_id
            if same in self.kept:
                ids.append(self.kept[same])
                continue
            flower_compat.set_message_id(message, f"m{len(self.sent)}")
            self.kept[same] = message.metadata.message_id
            self.sent.append(message)
            ids.append(message.metadata.message_id)
            if message.metadata.dst_node_id not in self.online:
                # The SuperLink takes the message and answers for the device.
                self.unavailable(len(self.sent) - 1)
            elif self.answers:
                self.reply(len(self.sent) - 1)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        # In an order of its own, and with something that nobody asked for.
        wanted = sorted(set(message_ids), reverse=True)
        found = [self.replies.pop(i) for i in wanted if i in self.replies]
        answered = {reply.metadata.reply_to_message_id for reply in found}
        self.kept = {same: i for same, i in self.kept.items() if i not in answered}
        return found + [r for i, r in self.replies.items() if i.startswith("stray")]


def grid(flower: PlayedFlower, patience: Patience = PATIENCE) -> DeployedGrid:
    flower_compat.set_identity(7)
    return DeployedGrid(flower, IDS, patience, clock=flower.clock, sleep=flower.sleep)


def asked(*clients: int) -> list[Message]:
    content = RecordDict({"asked": ConfigRecord({"round": 1})})
    flower_compat.set_identity(7)
    return [Message(content, FIRST_NODE_ID + client, "train") for client in clients]


def said(replies: list[Message]) -> list[tuple[int, str]]:
    return [
        (r.metadata.src_node_id - FIRST_NODE_ID, str(r.content["said"]["text"]))  # type: ignore[index]
        for r in replies
    ]


def test_clients_have_the_ids_of_a_simulation_and_replies_come_in_the_order_of_asking() -> None:
    flower = PlayedFlower()
    deployed = grid(flower)
    assert list(deployed.nodes) == deployed.get_node_ids() == [1000, 1001, 1002]
    replies = deployed.send_and_receive(asked(2, 0, 1))
    assert said(replies) == [(2, "from 4242"), (0, "from 900719925474099"), (1, "from 17")]
    assert [m.metadata.dst_node_id for m in flower.sent] == [4242, 900719925474099, 17]
    # A round's messages share one content, which must stay as the strategy made it.
    assert [m.metadata.ttl for m in flower.sent] == [PATIENCE.reply] * 3


def test_a_device_that_is_not_there_yet_is_waited_for() -> None:
    flower = PlayedFlower()
    flower.online.pop(17)
    flower.plan = {25.0: lambda: flower.online.update({17: "t1"})}
    assert [client for client, _ in said(grid(flower).send_and_receive(asked(0, 1)))] == [0, 1]
    assert 25 <= flower.now < 30


def test_who_does_not_join_in_time_is_left_out_and_waited_for_shorter_later() -> None:
    flower = PlayedFlower()
    flower.online.pop(17)
    deployed = grid(flower)
    assert [client for client, _ in said(deployed.send_and_receive(asked(0, 1)))] == [0]
    assert 30 <= flower.now < 32
    assert len(flower.sent) == 1
    deployed.send_and_receive(asked(0, 1))
    assert 50 <= flower.now < 53


def test_a_restarted_device_gets_its_message_again_and_answers_once() -> None:
    flower = PlayedFlower(answers=False)
    flower.plan = {
        1.0: lambda: flower.reply(0),
        5.0: lambda: flower.online.pop(17),
        9.0: lambda: flower.online.update({17: "t1"}),
        20.0: lambda: flower.reply(2, "after the restart"),
    }
    replies = grid(flower).send_and_receive(asked(0, 1))
    assert said(replies) == [(0, "from 900719925474099"), (1, "after the restart")]
    assert [m.metadata.dst_node_id for m in flower.sent] == [900719925474099, 17, 17]


def test_a_message_that_flower_gave_up_is_sent_again_when_the_device_is_back() -> None:
    flower = PlayedFlower(answers=False)
    flower.plan = {
        3.0: lambda: (flower.online.pop(17), flower.unavailable(0)),
        8.0: lambda: flower.online.update({17: "t0"}),
        15.0: lambda: flower.reply(1, "second"),
    }
    assert said(grid(flower).send_and_receive(asked(1))) == [(1, "second")]


def test_a_device_that_stays_away_is_given_up_without_holding_the_others() -> None:
    flower = PlayedFlower(answers=False)
    flower.plan = {2.0: lambda: flower.online.pop(17), 4.0: lambda: flower.reply(0)}
    replies = grid(flower).send_and_receive(asked(0, 1))
    assert [client for client, _ in said(replies)] == [0]
    assert 22 <= flower.now < 27, "twenty seconds after it went"


def test_a_device_that_loses_every_message_is_given_up() -> None:
    flower = PlayedFlower(answers=False)
    flower.plan = {float(t): (lambda t=t: flower.online.update({17: f"t{t}"})) for t in range(5, 60, 5)}
    assert grid(flower).send_and_receive(asked(1)) == []
    assert len(flower.sent) == 3
    assert flower.now < 60


def test_a_slow_device_costs_patience_and_no_more() -> None:
    flower = PlayedFlower(answers=False)
    flower.plan = {1.0: lambda: flower.reply(0), 150.0: lambda: flower.reply(1)}
    deployed = grid(flower)
    assert [client for client, _ in said(deployed.send_and_receive(asked(0, 1)))] == [0]
    assert 100 <= flower.now < 102
    # What it sends afterwards answers no question any more.
    flower.sleep(60)
    flower.plan = {162.0: lambda: flower.reply(2, "of the next round")}
    assert said(deployed.send_and_receive(asked(1))) == [(1, "of the next round")]


def test_a_reply_that_nobody_asked_for_or_that_comes_twice_is_not_taken() -> None:
    flower = PlayedFlower(answers=False)
    flower.plan = {1.0: lambda: flower.reply(0, "first"), 2.0: lambda: flower.reply(1, "other")}
    deployed = grid(flower)
    stray = flower_compat.reply_with(asked(0)[0], RecordDict({"said": ConfigRecord({"text": "forged"})}))
    flower.replies["stray"] = stray
    assert said(deployed.send_and_receive(asked(0, 1))) == [(0, "first"), (1, "other")]


def test_asynchronous_messages_come_back_once() -> None:
    flower = PlayedFlower(answers=False)
    deployed = grid(flower)
    ids = deployed.push_messages(asked(0, 2))
    assert deployed.pull_messages(ids) == []
    flower.reply(1)
    assert said(deployed.pull_messages(ids)) == [(2, "from 4242")]
    flower.reply(0)
    assert said(deployed.pull_messages(ids)) == [(0, "from 900719925474099")]
    assert deployed.pull_messages(ids) == []


def test_replies_are_announced() -> None:
    heard: list[int] = []
    flower = PlayedFlower()
    deployed = grid(flower)
    deployed.on_reply = lambda reply: heard.append(reply.metadata.src_node_id)
    deployed.send_and_receive(asked(0, 1, 2))
    assert sorted(heard) == [1000, 1001, 1002]


def test_a_refused_device_is_asked_nothing_and_fails_with_the_reason() -> None:
    flower = PlayedFlower()
    deployed = grid(flower)
    deployed.refuse(1, "it lies")
    first, second, third = deployed.send_and_receive(asked(0, 1, 2))
    assert second.has_error()
    assert (second.metadata.src_node_id, second.error.reason) == (1001, "it lies")
    assert said([first, third]) == [(0, "from 900719925474099"), (2, "from 4242")]
    assert 17 not in [m.metadata.dst_node_id for m in flower.sent]
    # Nobody waits for it either.
    flower.online.pop(17)
    deployed.send_and_receive(asked(0, 1))
    assert flower.now == 0


def test_an_error_of_a_device_is_its_reply() -> None:
    flower = PlayedFlower(answers=False)

    def fail() -> None:
        message = flower.sent[0]
        error = Error(flower_compat.CLIENT_RAISED, "no samples")
        flower.replies[message.metadata.message_id] = flower_compat.reply_with(message, error)

    flower.plan = {1.0: fail}
    (reply,) = grid(flower).send_and_receive(asked(1))
    assert reply.has_error()
    assert (reply.metadata.src_node_id, reply.error.reason) == (1001, "no samples")


@pytest.mark.parametrize(("ids", "word"), [((5, 0), "not registered"), ((5, 5), "same node id")])
def test_ids_that_cannot_be_used(ids: tuple[int, ...], word: str) -> None:
    with pytest.raises(RunError, match=word):
        DeployedGrid(PlayedFlower(), ids)


def test_a_node_that_does_not_exist_is_refused() -> None:
    with pytest.raises(RunError, match="There is no node 1003"):
        grid(PlayedFlower()).send_and_receive(asked(3))


def test_tensors_survive_the_copy_of_the_message() -> None:
    from flowerbed import messages

    flower = PlayedFlower()
    content = RecordDict({"arrays": messages.array_record({"w": torch.arange(3.0)})})
    grid(flower).send_and_receive([Message(content, FIRST_NODE_ID, "train")])
    assert messages.tensors(flower.sent[0].content["arrays"])["w"].tolist() == [0.0, 1.0, 2.0]  # type: ignore[arg-type]
