"""The far end of ``RayGrid``: one long-lived process that runs clients. Imports neither Ray nor the driver."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict, UserConfigValue

from flowerbed.pooling import Adder, Pooling
from flowerbed.server.grids import flower_compat
from flowerbed.server.grids.base import AppFactory, Block, ClientRunner, OpenRound
from flowerbed.server.grids.wire import (
    PackedContent,
    PackedPool,
    PackedRecord,
    pack_content,
    pack_pool,
    unpack,
    unpack_content,
)

# One client call: the message's metadata, and where in the call's table each of its records is.
Call = tuple[dict[str, Any], list[tuple[str, int]]]


class Outcome(NamedTuple):
    """What came of one client call: a packed content or the fields of an error, and how long it took."""

    content: PackedContent | None
    error: tuple[int, str | None] | None
    seconds: float


class ClientWorker:
    """Runs the clients that it is sent, one after another, and remembers their Flower states."""

    def __init__(self) -> None:
        """Start empty, so that whatever is wrong with the app is raised by ``prepare`` and not lost."""
        self._runner: ClientRunner | None = None
        self._opened: tuple[int, OpenRound, Adder] | None = None
        """The round that blocks were last run of."""

    def prepare(
        self,
        app_factory: AppFactory,
        num_clients: int,
        run_config: Mapping[str, UserConfigValue],
        threads: int,
    ) -> None:
        """Build the app."""
        torch.set_num_threads(threads)
        self._runner = ClientRunner(app_factory, num_clients, run_config)
        self._runner.build()

    def run(
        self,
        calls: list[Call],
        small: list[PackedRecord],
        states: dict[int, PackedContent],
        *large: PackedRecord,
    ) -> tuple[list[Outcome], dict[int, PackedContent]]:
        """Run ``calls`` and return their outcomes, and the states that they changed.

        The table of records is ``small`` followed by ``large``, whose values are in shared memory. ``states``
        are those of nodes that last ran elsewhere.
        """
        runner = self._running()
        runner.states.update((node_id, unpack_content(state)) for node_id, state in states.items())
        table = [unpack(packed) for packed in (*small, *large)]
        changed: dict[int, PackedContent] = {}
        outcomes = []
        for fields, places in calls:
            node_id: int = fields["_dst_node_id"]
            before = runner.states.get(node_id)
            outcomes.append(_run_one(runner, fields, places, table))
            after = runner.states.get(node_id)
            if after is not None and after is not before and after != before:
                changed[node_id] = pack_content(after)
        return outcomes, changed

    def agree(
        self,
        clients: list[int],
        places: list[tuple[str, int]],
        small: list[PackedRecord],
        *large: PackedRecord,
    ) -> Any:
        """Return what all workers must do alike for such clients."""
        return self._running().agreement(_content(places, (*small, *large)), clients)

    def pool(
        self,
        round_: int,
        pooling: Pooling,
        agreed: Any,
        blocks: list[Block],
        places: list[tuple[str, int]],
        small: list[PackedRecord],
        *large: PackedRecord,
    ) -> PackedPool:
        """Run the clients of consecutive blocks and return the sum of what they answer.

        What they are sent, given as in ``run``, is the same for all of ``round_`` and decoded once.
        """
        runner = self._running()
        if self._opened is None or self._opened[0] != round_:
            content = _content(places, (*small, *large))
            self._opened = round_, runner.open_round(content, agreed), Adder(pooling)
        _, opened, adder = self._opened
        return pack_pool(runner.pool(opened, blocks, adder))

    def _running(self) -> ClientRunner:
        if self._runner is None:
            raise RuntimeError("prepare comes first")
        return self._runner


def _content(places: list[tuple[str, int]], packed: tuple[PackedRecord, ...]) -> RecordDict:
    return unpack_content([(name, packed[place]) for name, place in places])


def _run_one(
    runner: ClientRunner,
    fields: dict[str, Any],
    places: list[tuple[str, int]],
    table: list[ArrayRecord | MetricRecord | ConfigRecord],
) -> Outcome:
    content = RecordDict()
    for name, place in places:
        content[name] = table[place].copy()
    begin = time.perf_counter()
    outcome = runner.call(flower_compat.message_from_fields(fields, content))
    seconds = time.perf_counter() - begin
    if isinstance(outcome, Error):
        return Outcome(None, (outcome.code, outcome.reason), seconds)
    return Outcome(pack_content(outcome), None, seconds)
