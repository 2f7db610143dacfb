"""Devices that differ: partial work, compressed replies, limits, who is asked, and failures of every kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch.nn import functional as F

from flowerbed import messages
from flowerbed.clients.gradient_weight import gradient_weight
from flowerbed.clients.local_round import Clock
from flowerbed.clients.params import LocalParams
from flowerbed.clients.store import MemoryStore
from flowerbed.errors import ConfigError, RunError
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.parts import Parts, build_parts
from flowerbed.experiments.simulation import make_federation, open_grid, resume, simulate
from flowerbed.server.device_params import DeviceParams
from flowerbed.server.devices import RECEIPT, TICKET, Device, DeviceLink, simulated, survey
from flowerbed.server.grids.inprocess import InProcessGrid
from flowerbed.server.loop import RunResult
from flowerbed.server.replies import check_replies
from flowerbed.server.sampling import Draws, make_sampler
from flowerbed.strategies.base import ClientReply
from flowerbed.strategies.fednova import FedNova


def parts_of(strategy: Any = "fedavg", devices: Mapping[str, Any] | None = None, **sections: Any) -> Parts:
    base: dict[str, Any] = {
        "strategy": strategy,
        "model": {"name": "mlp", "hidden": [16]},
        "partition": {"name": "dirichlet", "alpha": 0.5},
        "federation": {"clients": 4, "rounds": 2},
        "local": {"batch_size": 128, "lr": 0.1},
        "evaluation": {"every": 0},
        "grid": {"device": "cpu"},
        "devices": devices or {},
        "seed": 3,
    }
    for name, value in sections.items():
        base[name] = (
            {**base.get(name, {}), **value} if isinstance(value, dict) and "name" not in value else value
        )
    return build_parts(Simulation.of(base))


def run(parts: Parts) -> RunResult:
    with open_grid(parts, MemoryStore()) as grid:
        return make_federation(parts, grid).run()


def same(one: RunResult, other: RunResult) -> bool:
    return all(torch.equal(value, other.model[name]) for name, value in one.model.items())


def up(result: RunResult) -> list[int]:
    return [record.bytes_up for record in result.history if record.phase == "train"]


# Compression.

WHOLE = {"compression": "top-k", "keep": 1.0}


@pytest.mark.parametrize(
    "strategy",
    [
        "fedavg",
        "scaffold",
        "fednova",
        "fedadam",
        {"name": "krum", "f": 0},
        {"name": "flower", "flower": "FedAvg"},
    ],
    ids=str,
)
def test_keeping_everything_changes_no_bit_of_any_strategy(strategy: Any) -> None:
    streams = ["arrays", "control"] if strategy == "scaffold" else ["arrays"]
    plain = run(parts_of(strategy))
    packed = run(parts_of(strategy, {**WHOLE, "streams": streams}))
    assert not packed.failures
    assert same(plain, packed)


def test_the_bytes_of_compressed_replies_are_counted_as_they_travel() -> None:
    plain, packed = run(parts_of()), run(parts_of("fedavg", {"compression": "top-k", "keep": 0.01}))
    total = sum(value.numel() for value in plain.model.values())
    saved = up(plain)[0] - up(packed)[0]
    k = round(0.01 * total)
    payload = 8 * k + len("\n".join(plain.model))
    names = sum(len(name) for name in plain.model)
    # Four arrays become three (names, indices, values), each with its overhead; "arrays" becomes "packed arrays".
    before = len("arrays") + names + 4 * messages.ARRAY_OVERHEAD_BYTES + 4 * total
    after = (
        len("packed arrays")
        + len("names" + "values" + "indices")
        + 3 * messages.ARRAY_OVERHEAD_BYTES
        + payload
    )
    assert saved == 4 * (before - after)
    # What is agreed travels to each of the four clients.
    settings = "compress-keep" + "compress-bits" + "compress-feedback" + "compress-streams"
    agreed = len("agreed") + len(settings) + 8 + 8 + 1 + len("arrays")
    down = [record.bytes_down for record in packed.history if record.phase == "train"]
    assert down == [r.bytes_down + 4 * agreed for r in plain.history if r.phase == "train"]


def test_feedback_is_kept_by_clients_and_the_same_seed_gives_the_same_bits() -> None:
    devices = {"compression": "top-k-int8", "keep": 0.05}
    one, again = run(parts_of("fedavg", devices)), run(parts_of("fedavg", devices))
    assert same(one, again)
    assert not same(one, run(parts_of("fedavg", {**devices, "feedback": False})))


def test_only_slow_links_compress() -> None:
    devices = {"compression": "int8", "weak": 0.5, "weak_mbit": 1.0, "slow_mbit": 2.0}
    plain, mixed, every = (
        run(parts_of()),
        run(parts_of("fedavg", devices)),
        run(parts_of("fedavg", {**devices, "slow_mbit": 0})),
    )
    saved_by_two, saved_by_four = up(plain)[0] - up(mixed)[0], up(plain)[0] - up(every)[0]
    assert saved_by_four == 2 * saved_by_two > 0


def test_masks_and_compression_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"secure\.enabled masks every number"):
        parts_of("fedavg", {"compression": "int8"}, secure={"enabled": True})


def test_a_stream_that_the_server_does_not_send_is_refused_by_name() -> None:
    result = parts_of("fedproto", {"compression": "int8", "streams": ["prototypes"]})
    sent = {name for name in result.strategy.broadcast(1)}
    if "prototypes" in sent:
        pytest.skip("the strategy sends them")
    with pytest.raises(RunError, match=r"cannot be compressed, because the server sends none"):
        run(result)


# Partial work.


def test_a_weak_client_makes_the_first_steps_of_its_round() -> None:
    assert list(Clock(1, 2, 8).all_steps) == list(range(8))
    assert list(Clock(2, 2, 8, work=0.25).all_steps) == [8, 9]
    assert list(Clock(2, 2, 8, work=0.01).all_steps) == [8]
    assert list(Clock(2, 2, 0, work=0.5).all_steps) == []


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (LocalParams(lr=0.5), 0.5 * 2),
        # Momentum rho = 0.5: the gradients of two steps count 1 + 0.5 and 1 times.
        (LocalParams(lr=0.5, momentum=0.5), 0.5 * 2.5),
    ],
)
def test_the_weight_of_a_part_of_the_round(params: LocalParams, expected: float) -> None:
    assert gradient_weight(params, Clock(3, 5, 8, work=0.25)) == pytest.approx(expected, rel=1e-15)


def test_fednova_weighs_partial_work_as_worked_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clients of 4 and 1 full-batch steps; server: w - (sum p A) sum p (w - w_k) / A, A = eta steps."""
    parts = parts_of(
        "fednova",
        {"work": "speed", "weak": 0.5, "weak_speed": 0.25},
        federation={"clients": 2, "rounds": 1},
        local={"batch_size": 0, "steps": 4, "lr": 0.2},
        partition={"name": "iid"},
    )
    assert parts.link is not None
    made = [4 if device.speed == 1 else 1 for device in parts.link.devices]
    assert sorted(made) == [1, 4]
    seen: list[ClientReply] = []
    aggregate = FedNova.aggregate

    def spy(self: FedNova, server_round: int, current: Any, replies: list[ClientReply]) -> Any:
        seen.extend(replies)
        return aggregate(self, server_round, current, replies)

    monkeypatch.setattr(FedNova, "aggregate", spy)
    result = run(parts)
    assert [reply.metrics["gradient-weight"] for reply in seen] == pytest.approx([0.2 * n for n in made])
    assert [reply.metrics["optimizer-steps"] for reply in seen] == made

    start = {n: v.double() for n, v in parts.model.items()}
    ends = [_gradient_descent(parts, client, made[client], 0.2) for client in range(2)]
    sizes = [len(parts.train.indices(client)) for client in range(2)]
    p = [size / sum(sizes) for size in sizes]
    work = [0.2 * n for n in made]
    together = p[0] * work[0] + p[1] * work[1]
    for name, w in start.items():
        directions = [(w - end[name].double()) / a for end, a in zip(ends, work, strict=True)]
        expected = w - together * (p[0] * directions[0] + p[1] * directions[1])
        assert torch.allclose(result.model[name].double(), expected, atol=2e-6), name


def _gradient_descent(parts: Parts, client: int, steps: int, lr: float) -> dict[str, torch.Tensor]:
    """Return the model after plain full-batch gradient descent on one client's samples."""
    rows = torch.from_numpy(np.array(parts.train.indices(client)))
    x, y = parts.dataset.prepare(parts.dataset.train.inputs[rows]), parts.dataset.train.labels[rows]
    model = parts.spec.model.build(parts.simulation.seed)
    for _ in range(steps):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= lr * parameter.grad
    return {n: v.detach() for n, v in model.state_dict().items()}


def test_the_round_says_how_much_was_worked_and_how_long_it_takes() -> None:
    parts = parts_of(
        "fedavg",
        {"work": "speed", "weak": 0.25, "weak_speed": 0.5, "weak_mbit": 8.0, "step_seconds": 2.0},
        local={"steps": 4},
    )
    (record, _) = [r for r in run(parts).history if r.phase == "train"]
    assert record.metrics["work"] == pytest.approx((0.5 + 3) / 4)
    values = sum(v.numel() for v in parts.model.values())
    # Strong: 4 steps of 2 s. Weak: 2 steps of 4 s, then 4 bytes a number at a megabyte a second.
    assert record.metrics["device-seconds"] == pytest.approx(8 + 4 * values / 1e6)


def test_full_work_and_no_compression_is_no_link_at_all() -> None:
    assert parts_of("fedavg", {"weak": 0.5}).link is None
    assert parts_of("fedavg", {"work": "speed", "weak": 0.5}).link is not None


def test_identities_of_before_stay_what_they_were() -> None:
    base = {"strategy": "fedavg", "seed": 1}
    assert Simulation.of(base).identity == Simulation.of({**base, "devices": {}}).identity
    assert Simulation.of(base).identity != Simulation.of({**base, "devices": {"work": "speed"}}).identity


# Who is asked.


def test_devices_that_are_able() -> None:
    params = DeviceParams(deadline=10.0, step_seconds=1.0, ram_mb=1000)
    assert Device().able(params, steps=10, values=10**6)
    assert not Device(speed=0.9).able(params, steps=10, values=0)
    assert not Device(ram_mb=999).able(params, steps=1, values=0)
    # 4 MB at 3.2 Mbit/s take 10 s.
    slow = Device(bandwidth_mbit=3.2)
    assert not slow.able(params, steps=1, values=10**6)
    packing = DeviceParams(deadline=10.0, step_seconds=1.0, compression="int8")
    assert slow.able(packing, steps=7, values=10**6)
    assert Device(speed=0.5).able(DeviceParams(deadline=10.0, step_seconds=1.0, work="speed"), 10, 0)


def test_the_sampler_asks_able_clients_only_all_alike() -> None:
    able = np.array([True, False, True, True, False, True])
    sampler = make_sampler("able", Draws(0, 2, able=lambda: able))
    drawn = [sampler.train(t, range(1000, 1006)) for t in range(1, 401)]
    counts = np.bincount([node - 1000 for round_ in drawn for node in round_], minlength=6)
    assert counts[~able].sum() == 0
    assert all(len(set(round_)) == 2 for round_ in drawn)
    # 800 draws over 4 clients: 200 each, standard deviation 10.
    assert np.abs(counts[able] - 200).max() < 50
    assert sampler.evaluate(1, range(1000, 1006)) == list(range(1000, 1006))


@pytest.mark.parametrize(("cohort", "able"), [(3, [True, True, False]), (0, [True, True]), (1, [False])])
def test_too_few_able_clients_are_refused(cohort: int, able: list[bool]) -> None:
    with pytest.raises(ConfigError, match=r"sampling=able asks .* have the memory"):
        make_sampler("able", Draws(0, cohort, able=lambda: np.array(able)))
    with pytest.raises(ConfigError, match="needs to know what the clients' devices can"):
        make_sampler("able", Draws(0, 1))


def test_a_run_over_able_clients() -> None:
    devices = {"weak": 0.5, "weak_ram_mb": 100, "ram_mb": 200}
    parts = parts_of("fedavg", devices, federation={"cohort": 2, "sampling": "able"})
    strong = [
        k for k, d in enumerate(simulated(parts.simulation.devices, parts.train.sizes, 3)) if not d.ram_mb
    ]
    assert parts.strategy.setting is not None
    assert sorted(parts.strategy.setting.sampler.train(1, range(4))) == strong
    assert not run(parts).failures


# Limits, tickets, and replies that are not what they should be.


def link_and_messages(
    params: DeviceParams, tickets: bool = False
) -> tuple[DeviceLink, list[Message], dict[int, int]]:
    grid = InProcessGrid(lambda: lambda message, context: message, 2)
    content = RecordDict({"arrays": messages.array_record({"w": torch.zeros(1000)})})
    asked = [Message(content=content, dst_node_id=node, message_type="train") for node in grid.get_node_ids()]
    clients = {node: i for i, node in enumerate(grid.get_node_ids())}
    link = DeviceLink(params, [Device(), Device()], tickets=tickets)
    return link, link.outgoing(grid._accept(asked), clients), clients


def reply_to(message: Message, values: int = 1000, **records: Any) -> Message:
    content = RecordDict(
        {
            "arrays": messages.array_record({"w": torch.zeros(values)}),
            "metrics": MetricRecord({"num-examples": 1}),
            **records,
        }
    )
    return Message(content, reply_to=message)


def reasons(
    link: DeviceLink, asked: list[Message], replies: list[Message], clients: dict[int, int]
) -> list[str]:
    found = link.incoming(asked, replies, clients)
    return [reply.error.reason.partition(":")[0] if reply.has_error() else "" for reply in found]


def test_a_reply_must_show_the_ticket_of_its_own_message() -> None:
    link, asked, clients = link_and_messages(DeviceParams(), tickets=True)
    tickets = [str(messages.settings(message.content)[TICKET]) for message in asked]
    assert len(set(tickets)) == 2
    good = reply_to(asked[0], **{RECEIPT: ConfigRecord({TICKET: tickets[0]})})
    old = reply_to(asked[1], **{RECEIPT: ConfigRecord({TICKET: tickets[0]})})
    assert reasons(link, asked, [good, old], clients) == ["", "replayed"]
    assert RECEIPT not in good.content
    none, number = reply_to(asked[0]), reply_to(asked[1], **{RECEIPT: MetricRecord({TICKET: 1})})
    assert reasons(link, asked, [none, number], clients) == ["replayed", "replayed"]
    # The next exchange has new ones, so that a whole round cannot be sent again.
    again = link.outgoing(asked, clients)
    assert str(messages.settings(again[0].content)[TICKET]) not in tickets


def test_an_old_reply_takes_no_place_of_the_good_one() -> None:
    link, asked, clients = link_and_messages(DeviceParams(), tickets=True)
    old = reply_to(asked[0], **{RECEIPT: ConfigRecord({TICKET: "of before"})})
    old.metadata.__dict__["_reply_to_message_id"] = "0"
    good = [reply_to(m, **{RECEIPT: ConfigRecord({TICKET: _ticket(m)})}) for m in asked]
    checked = check_replies(asked, link.incoming(asked, [old, *good], clients), clients, 5)
    assert [m.metadata.src_node_id for m in checked.usable] == [1000, 1001]
    assert [(f.client, f.kind) for f in checked.failures] == [(0, "replayed")]


def test_of_two_replies_to_one_message_the_first_is_used() -> None:
    _, asked, clients = link_and_messages(DeviceParams())
    first, second, other = reply_to(asked[0]), reply_to(asked[0]), reply_to(asked[1])
    checked = check_replies(asked, [first, second, other], clients, 5)
    assert checked.usable[0] is first
    assert [(f.client, f.kind) for f in checked.failures] == [(0, "replayed")]


def _ticket(message: Message) -> str:
    return str(messages.settings(message.content)[TICKET])


def test_oversized_replies_and_quotas() -> None:
    link, asked, clients = link_and_messages(DeviceParams(reply_mb=0.005))
    assert reasons(link, asked, [reply_to(asked[0]), reply_to(asked[1], 2000)], clients) == ["", "oversized"]
    link, asked, clients = link_and_messages(DeviceParams(quota_mb=0.009))
    spent = [reasons(link, asked, [reply_to(asked[0])], clients)[0] for _ in range(3)]
    assert spent == ["", "", "quota"]
    assert reasons(link, asked, [reply_to(asked[1])], clients) == [""]


def test_garbage_in_a_compressed_reply_is_one_failure() -> None:
    link, asked, clients = link_and_messages(DeviceParams(compression="top-k"))
    bad = reply_to(asked[0], **{"packed arrays": messages.array_record({"values": torch.zeros(3)})})
    assert reasons(link, asked, [bad, reply_to(asked[1])], clients) == ["garbage", ""]


def test_messages_that_agree_on_the_same_share_one_content() -> None:
    _, asked, _ = link_and_messages(DeviceParams(compression="int8"))
    assert asked[0].content is asked[1].content
    assert messages.settings(asked[0].content)["compress-bits"] == 8
    _, asked, _ = link_and_messages(DeviceParams())
    assert messages.settings(asked[0].content) == {}


class Misbehaving:
    """An app that runs the simulated clients and then spoils the replies of some, from the second round on."""

    def __init__(self, parts: Parts, spoil: Mapping[int, Callable[[Message, Message], Message]]) -> None:
        self.app, self.spoil = parts.spec(), spoil

    def __call__(self, message: Message, context: Context) -> Message:
        reply = self.app(message, context)
        spoil = self.spoil.get(int(context.node_config["partition-id"]))
        if spoil is None or messages.settings(message.content)["server-round"] == 1:
            return reply
        return spoil(message, reply)


def garbage(message: Message, reply: Message) -> Message:
    reply.content["packed arrays"] = messages.array_record({"values": torch.zeros(3)})
    return reply


def too_much(message: Message, reply: Message) -> Message:
    reply.content["more"] = messages.array_record({"w": torch.zeros(10**6)})
    return reply


def not_finite(message: Message, reply: Message) -> Message:
    found = messages.tensors(reply.content.array_records["arrays"])
    reply.content["arrays"] = messages.array_record({n: v * float("nan") for n, v in found.items()})
    return reply


def test_each_kind_of_failure_is_counted_and_the_run_goes_on_without_it() -> None:
    parts = parts_of("fedavg", {"reply_mb": 1.0}, federation={"quorum": 0.2})
    app = Misbehaving(parts, {1: garbage, 2: too_much, 3: not_finite})
    with InProcessGrid(lambda: app, 4) as grid:
        result = make_federation(parts, grid).run()
    assert [(f.round, f.client, f.kind) for f in result.failures] == [
        (2, 1, "garbage"),
        (2, 2, "oversized"),
        (2, 3, "non-finite"),
    ]
    # The second round is client 0's alone: the same as a run in which nobody else answers.
    silent = Misbehaving(parts, dict.fromkeys((1, 2, 3), _fails))
    other = parts_of("fedavg", {"reply_mb": 1.0}, federation={"quorum": 0.2})
    with InProcessGrid(lambda: silent, 4) as grid:
        alone = make_federation(other, grid).run()
    assert same(result, alone)


def _fails(message: Message, reply: Message) -> Message:
    raise OSError("gone")


def test_nobody_waits_for_ever_for_a_device_that_is_gone() -> None:
    class Deaf(InProcessGrid):
        """Delivers to the first two clients; of the others nobody ever hears."""

        waited: Sequence[float | None] = ()

        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
            self.waited = [*self.waited, timeout]
            return super().send_and_receive(list(messages)[:2], timeout=timeout)

    parts = parts_of("fedavg", WHOLE)
    with Deaf(parts.spec, 4) as grid:
        federation = make_federation(parts, grid)
        federation.timeout = 30.0
        result = federation.run()
        assert set(grid.waited) == {30.0}
    assert [(f.client, f.kind) for f in result.failures] == [(2, "no-reply"), (3, "no-reply")] * 2


# What devices tell.


def hello(numbers: Sequence[int]) -> Callable[[Message, Context], Message]:
    def answer(message: Message, context: Context) -> Message:
        assert messages.settings(message.content) == {"phase": "device"}
        node = int(context.node_config["partition-id"])
        if node == 2:
            raise OSError("away")
        told = {
            "num-examples": 10 * node,
            "client": numbers[node],
            "speed": 0.5,
            "bandwidth-mbit": 3.0,
            "ram-mb": 9,
        }
        return Message(RecordDict({"metrics": MetricRecord(told)}), reply_to=message)

    return answer


def test_a_survey_of_devices() -> None:
    with InProcessGrid(lambda: hello([5, 3, 0]), 3) as grid:
        found = survey(grid, grid.get_node_ids())
    expected = Device(speed=0.5, bandwidth_mbit=3.0, ram_mb=9, examples=10)
    assert found[1001] == (3, expected)
    assert {node: client for node, (client, _) in found.items()} == {1000: 5, 1001: 3}


def test_two_devices_of_one_number_are_refused() -> None:
    with (
        InProcessGrid(lambda: hello([4, 4, 0]), 3) as grid,
        pytest.raises(RunError, match=r"1000 and 1001 .* client 4"),
    ):
        survey(grid, grid.get_node_ids())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"work": "half"}, "devices.work is 'half'"),
        ({"compression": "zip"}, "devices.compression is 'zip'"),
        ({"keep": 0}, "devices.keep is 0"),
        ({"least_work": 2}, "devices.least_work is 2"),
        ({"weak": -1}, "devices.weak is -1"),
        ({"weak_speed": 0}, "devices.weak_speed is 0"),
        ({"reply_mb": float("nan")}, "devices.reply_mb is nan"),
        ({"compression": "int8", "streams": []}, "devices.streams is empty"),
        ({"speed": 1}, "Unknown key in devices 'speed'"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Simulation.of({"devices": settings})


DIFFER: dict[str, Any] = {
    "strategy": "scaffold",
    "partition": {"name": "dirichlet", "alpha": 0.3},
    "model": {"name": "mlp", "hidden": [16]},
    "federation": {"clients": 8, "cohort": 6, "rounds": 3},
    "local": {"batch_size": 64},
    "evaluation": {"every": 0},
    "devices": {
        "work": "speed",
        "weak": 0.5,
        "compression": "top-k-int8",
        "keep": 0.1,
        "slow_mbit": 2.0,
        "streams": ["arrays", "control"],
    },
    "grid": {"device": "cpu"},
}


def test_a_resumed_run_owes_what_it_owed(tmp_path: Path) -> None:
    whole = simulate(**DIFFER)
    half = {**DIFFER, "federation": {**DIFFER["federation"], "rounds": 2}}
    simulate(**half, run={"dir": str(tmp_path / "run"), "figures": False})
    assert same(whole, resume(tmp_path / "run", federation={"rounds": 3}))


@pytest.mark.slow
def test_devices_that_differ_are_the_same_bits_on_ray(tmp_path: Path) -> None:
    direct = simulate(**DIFFER)
    grid = {"name": "ray", "workers": 1, "device": "cpu"}
    ray = simulate(**{**DIFFER, "grid": grid}, run={"dir": str(tmp_path / "ray"), "figures": False})
    assert same(direct, ray)
    assert up(direct) == up(ray)
