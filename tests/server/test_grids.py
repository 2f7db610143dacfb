"""The contract that both simulation grids keep, with the in-process grid as the reference for Ray."""

from __future__ import annotations

import inspect
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from flowerbed.errors import ConfigError, RunError
from flowerbed.messages import array_record, tensors
from flowerbed.seeds import global_streams
from flowerbed.server.grids import flower_compat
from flowerbed.server.grids.base import FIRST_NODE_ID, SimulationGrid
from flowerbed.server.grids.inprocess import InProcessGrid

ROUND = [7, 2, 9, 0, 4]


def ask(grid: Grid, partitions: list[int], **config: Any) -> list[Message]:
    """Return one train message per partition, all with the same content object."""
    content = RecordDict(
        {
            "arrays": array_record({"w": torch.arange(4.0), "b": torch.tensor(1.5)}),
            "config": ConfigRecord(config),
        }
    )
    return [Message(content, FIRST_NODE_ID + p, "train", group_id="r1") for p in partitions]


def metric(reply: Message, name: str) -> Any:
    return reply.content["about"][name]


@pytest.fixture
def single(toy: Callable[[], ClientApp]) -> InProcessGrid:
    return InProcessGrid(toy, 10, run_config={"lr": 0.1})


@pytest.fixture(params=["inprocess", "ray"])
def grid(request: pytest.FixtureRequest) -> SimulationGrid:
    found: SimulationGrid = request.getfixturevalue({"inprocess": "single", "ray": "ray_pair"}[request.param])
    return found


def test_node_ids_are_fixed_and_ordered(grid: SimulationGrid) -> None:
    assert grid.get_node_ids() == list(range(1000, 1010))
    assert [node.node_id for node in grid.get_nodes()] == grid.get_node_ids()
    assert [grid.partition_id(n) for n in grid.get_node_ids()] == list(range(10))
    with pytest.raises(RunError, match="no node 3: this federation has the nodes 1000 to 1009"):
        grid.send_and_receive([Message(RecordDict(), 3, "train")])


def test_replies_come_in_send_order_and_answer_their_message(grid: SimulationGrid) -> None:
    messages = ask(grid, ROUND, do="add")
    seen: list[Message] = []
    grid.on_reply = seen.append
    replies = grid.send_and_receive(messages)
    grid.on_reply = None
    assert isinstance(replies, list)
    assert {id(r) for r in seen} == {id(r) for r in replies}
    for partition, message, reply in zip(ROUND, messages, replies, strict=True):
        assert reply.metadata.src_node_id == message.metadata.dst_node_id == FIRST_NODE_ID + partition
        assert reply.metadata.reply_to_message_id == message.metadata.message_id != ""
        assert (reply.metadata.group_id, reply.metadata.message_type) == ("r1", "train")
        assert reply.metadata.run_id == grid.run.run_id
        received = tensors(reply.content["arrays"])
        assert torch.equal(received["w"], torch.arange(4.0) + partition)
        assert received["b"].shape == ()
    assert len({m.metadata.message_id for m in messages}) == len(messages)


def test_one_client_twice_in_a_round_answers_twice(grid: SimulationGrid) -> None:
    assert [metric(r, "partition") for r in grid.send_and_receive(ask(grid, [3, 3, 5], do="about"))] == [
        3,
        3,
        5,
    ]


def test_contexts_name_the_partition(grid: SimulationGrid) -> None:
    replies = grid.send_and_receive(ask(grid, ROUND, do="about"))
    assert [(metric(r, "partition"), metric(r, "of")) for r in replies] == [(p, 10) for p in ROUND]


def test_a_client_that_takes_records_out_harms_nobody(grid: SimulationGrid) -> None:
    messages = ask(grid, ROUND, do="pop")
    replies = grid.send_and_receive(messages)
    assert all(list(r.content) == ["arrays"] and list(r.content["arrays"]) == ["b"] for r in replies)
    assert list(messages[0].content) == ["arrays", "config"]
    assert list(messages[0].content["arrays"]) == ["w", "b"]
    assert len({id(r.content["arrays"]) for r in replies}) == len(replies)


@pytest.mark.parametrize(
    ("do", "reason"),
    [
        ("raise", "ValueError: client 2 says no\n"),
        ("exit", "SystemExit: 3\n"),
        ("nothing", "TypeError: the client returned NoneType where a Message is due\n"),
    ],
)
def test_a_failing_client_becomes_an_error_reply(grid: SimulationGrid, do: str, reason: str) -> None:
    replies = grid.send_and_receive(ask(grid, ROUND, do=do, only=[2]))
    assert [r.has_error() for r in replies] == [False, True, False, False, False]
    assert replies[1].error.code == 2
    assert replies[1].error.reason is not None
    assert replies[1].error.reason.startswith(reason)
    assert "in obey\n" in replies[1].error.reason or do == "nothing"


def test_unknown_actions_are_the_clients_error(grid: SimulationGrid) -> None:
    (reply,) = grid.send_and_receive([Message(RecordDict(), 1001, "query")])
    assert reply.error.reason is not None
    assert reply.error.reason.startswith("ValueError: No query function")


def test_push_and_pull_give_each_reply_once(grid: SimulationGrid) -> None:
    ids = grid.push_messages(ask(grid, ROUND, do="about"))
    got: list[Message] = []
    while len(got) < len(ids):
        got += grid.pull_messages(ids)
    assert sorted(metric(r, "partition") for r in got) == sorted(ROUND)
    assert grid.pull_messages(ids) == []
    assert grid.pull_messages(["no such id"]) == []


def test_a_pushed_message_survives_another_round(grid: SimulationGrid) -> None:
    (early,) = grid.push_messages(ask(grid, [1], do="about"))
    assert len(grid.send_and_receive(ask(grid, ROUND, do="about"))) == len(ROUND)
    got: list[Message] = []
    while not got:
        got = grid.pull_messages([early])
    assert metric(got[0], "partition") == 1


def test_create_message_and_identity(grid: SimulationGrid) -> None:
    grid.set_run(flower_compat.RunHandle(7))
    message = grid.create_message(RecordDict(), "train", 1000, "g", ttl=5.0)
    grid.set_run(flower_compat.RunHandle(1))
    assert message.metadata.run_id == 7
    assert message.metadata.src_node_id == flower_compat.SERVER_NODE_ID
    assert (message.metadata.group_id, message.metadata.ttl) == ("g", 5.0)


def test_states_persist_per_client_and_do_not_change_on_failure(grid: SimulationGrid) -> None:
    def calls(partitions: list[int], **config: Any) -> list[int]:
        replies = grid.send_and_receive(ask(grid, partitions, do="count", **config))
        return [r.content["seen"]["calls"] for r in replies if r.has_content()]

    first = calls([1, 2, 3])
    assert calls([3, 1]) == [first[2] + 1, first[0] + 1]
    assert calls([2, 3], **{"then-raise": True}) == []
    assert calls([1, 2, 3]) == [first[0] + 2, first[1] + 1, first[2] + 2]


def stock_factory() -> Callable[[], ClientApp]:
    def factory() -> ClientApp:
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Any) -> Message:
            state = message.content["arrays"].to_torch_state_dict()
            partition = context.node_config["partition-id"]
            generator = torch.Generator().manual_seed(partition)
            state = {k: 0.9 * v + torch.randn(v.shape, generator=generator) for k, v in state.items()}
            metrics = MetricRecord({"num-examples": 10 + partition, "loss": 1.0 / (1 + partition)})
            return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)

        @app.evaluate()
        def evaluate(message: Message, context: Any) -> Message:
            total = sum(float(a.numpy().sum()) for a in message.content["arrays"].values())
            metrics = MetricRecord({"num-examples": 1, "sum": total})
            return Message(RecordDict({"metrics": metrics}), reply_to=message)

        return app

    return factory


def run_fedavg(grid: Grid) -> tuple[list[bytes], dict[int, Any]]:
    start = ArrayRecord({"w": torch.zeros(50, 400), "b": torch.zeros(3)})
    strategy = FedAvg(fraction_train=0.5, fraction_evaluate=0.3)
    with global_streams(3, "test"):
        result = strategy.start(grid=grid, initial_arrays=start, num_rounds=3, timeout=60)
    metrics = {r: dict(m) for r, m in result.evaluate_metrics_clientapp.items()}
    return [a.data for a in result.arrays.values()], metrics


def test_stock_fedavg_gives_the_same_bits_on_both_grids(ray_runtime: None) -> None:
    from flowerbed.server.grids.ray_grid import RayGrid

    reference = run_fedavg(InProcessGrid(stock_factory(), 8))
    assert reference[1][3] != reference[1][2]
    for workers in (1, 2):
        with RayGrid(stock_factory(), 8, workers=workers) as grid:
            assert run_fedavg(grid) == reference


def test_a_federation_of_one() -> None:
    with InProcessGrid(stock_factory(), 1) as grid:
        strategy = FedAvg(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
        result = strategy.start(grid=grid, initial_arrays=ArrayRecord({"w": torch.ones(2)}), num_rounds=1)
    expected = 0.9 * torch.ones(2) + torch.randn(2, generator=torch.Generator().manual_seed(0))
    assert np.allclose(result.arrays["w"].numpy(), expected.numpy())


# The in-process grid alone.


def test_in_process_pull_runs_one_client_at_a_time(single: InProcessGrid) -> None:
    ids = single.push_messages(ask(single, ROUND, do="about"))
    assert [metric(single.pull_messages(ids)[0], "partition") for _ in ROUND] == ROUND
    late = single.push_messages(ask(single, [1, 2], do="about"))
    assert [metric(r, "partition") for r in single.pull_messages(late[1:])] == [2]


def test_in_process_timeout_begins_no_more_clients(single: InProcessGrid) -> None:
    replies = single.send_and_receive(ask(single, ROUND, do="sleep", seconds=0.05), timeout=0.02)
    assert [metric(r, "partition") for r in replies] == ROUND[:1]


def test_torch_threads_are_set_for_clients_only() -> None:
    seen: list[int] = []

    def app(message: Message, context: Any) -> Message:
        seen.append(torch.get_num_threads())
        return Message(message.content, reply_to=message)

    before = torch.get_num_threads()
    InProcessGrid(lambda: app, 2, threads=3).send_and_receive([Message(RecordDict(), 1000, "train")])
    assert seen == [3]
    assert torch.get_num_threads() == before


def test_the_app_is_built_once_and_its_failure_is_raised() -> None:
    built: list[int] = []

    def app(message: Message, context: Any) -> Message:
        return Message(message.content, reply_to=message)

    def factory() -> Any:
        built.append(1)
        return app

    grid = InProcessGrid(factory, 2)
    assert built == []
    for _ in range(2):
        grid.send_and_receive([Message(RecordDict(), n, "train") for n in grid.get_node_ids()])
    assert built == [1]

    def broken() -> Any:
        raise ConfigError("no such model")

    with pytest.raises(ConfigError, match="no such model"):
        InProcessGrid(broken, 2).send_and_receive([Message(RecordDict(), 1000, "train")])


def test_closed_grids_and_impossible_numbers(toy: Callable[[], ClientApp]) -> None:
    grid = InProcessGrid(toy, 2)
    grid.close()
    grid.close()
    with pytest.raises(RunError, match="closed"):
        grid.send_and_receive(ask(grid, [0]))
    with pytest.raises(ConfigError, match="at least one client, not 0"):
        InProcessGrid(toy, 0)
    with pytest.raises(ConfigError, match="at least one thread, not 0"):
        InProcessGrid(toy, 1, threads=0)


# Flower's private names: an upgrade that moves one must fail here.


def test_private_flower_names_are_where_we_look_for_them() -> None:
    from flwr.app import metadata as public_metadata
    from flwr.common import constant
    from flwr.supercore.task_identity import TaskIdentity

    assert flower_compat.TaskIdentity is TaskIdentity
    assert {"task_id", "run_id", "node_id"} <= set(vars(type(TaskIdentity)))
    codes = constant.ErrorCode
    assert codes.LOAD_CLIENT_APP_EXCEPTION == flower_compat.LOAD_FAILED
    assert codes.CLIENT_APP_RAISED_EXCEPTION == flower_compat.CLIENT_RAISED
    assert codes.REPLY_MESSAGE_UNAVAILABLE == flower_compat.NO_REPLY
    assert codes.NODE_UNAVAILABLE == flower_compat.NODE_UNAVAILABLE
    assert codes.CLIENT_APP_CRASHED == flower_compat.CLIENT_CRASHED
    assert constant.SUPERLINK_NODE_ID == flower_compat.SERVER_NODE_ID
    assert "metadata" in inspect.signature(Message.__init__).parameters
    assert public_metadata.Metadata.message_id.fget is not None
    needed = {"set_run", "run", "create_message", "get_node_ids", "push_messages", "pull_messages"}
    assert needed | {"send_and_receive"} == set(Grid.__abstractmethods__)


def test_messages_are_rebuilt_field_by_field() -> None:
    flower_compat.set_identity(5)
    content = RecordDict({"c": ConfigRecord({"x": 1})})
    message = Message(content, 1003, "train.special", ttl=9.0, group_id="4")
    flower_compat.set_message_id(message, "77")
    assert message.metadata.message_id == "77"
    other = RecordDict()
    for again in (
        flower_compat.message_copy(message, other),
        flower_compat.message_from_fields(flower_compat.fields_of(message), other),
    ):
        assert again.metadata == message.metadata
        assert again.metadata is not message.metadata
        assert again.content is other


def test_nothing_but_the_compat_module_imports_private_names() -> None:
    from flowerbed.server import grids

    public = ("flwr.app", "flwr.serverapp", "flwr.clientapp")
    for folder in grids.__path__:
        for file in Path(folder).glob("*.py"):
            lines = [ln.strip() for ln in file.read_text().splitlines()]
            imported = [ln.split()[1] for ln in lines if ln.startswith(("from flwr", "import flwr"))]
            allowed = public + (("flwr.supercore.task_identity",) if file.name == "flower_compat.py" else ())
            assert [m for m in imported if m not in allowed and not m.startswith("flwr.serverapp.")] == []


def test_importing_the_grids_imports_no_ray_and_sets_the_offline_switches() -> None:
    program = (
        "import os, sys\n"
        "import flowerbed.server.grids.ray_grid, flowerbed.server.grids.inprocess, flowerbed.messages\n"
        "assert not any(m.split('.')[0] in ('ray', 'hydra', 'wandb') for m in sys.modules)\n"
        "print(*(os.environ[n] for n in ('FLWR_TELEMETRY_ENABLED', 'FLWR_DISABLE_UPDATE_CHECK',"
        " 'RAY_USAGE_STATS_ENABLED', 'WANDB_MODE')))"
    )
    switches = ("FLWR_", "RAY_", "WANDB_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(switches)}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "HOME": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "1", "0", "offline"]


def test_a_wandb_key_keeps_wandb_online(monkeypatch: pytest.MonkeyPatch) -> None:
    from flowerbed.offline import offline_defaults

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    offline_defaults()
    assert "WANDB_MODE" not in os.environ
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "1"


def test_the_global_generator_is_not_consumed_by_a_round(single: InProcessGrid) -> None:
    before = random.getstate()
    single.send_and_receive(ask(single, ROUND))
    assert random.getstate() == before
