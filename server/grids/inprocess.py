"""The grid without any machinery: clients run one after another in the server's process."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from flwr.app import Message, RecordDict, UserConfig

from flowerbed.errors import RunError
from flowerbed.pooling import Adder, Pool, Pooling
from flowerbed.server.grids import flower_compat
from flowerbed.server.grids.base import (
    Answered,
    AppFactory,
    ClientRunner,
    SimulationGrid,
    own_copy,
    torch_threads,
)


class InProcessGrid(SimulationGrid):
    """Runs every client in this process, in send order; the default for one client, tests and debugging.

    A client that kills its process kills the run, and a running client cannot be interrupted: use
    ``RayGrid`` where that matters.
    """

    def __init__(
        self,
        app_factory: AppFactory,
        num_clients: int,
        *,
        threads: int = 1,
        run_config: UserConfig | None = None,
        run_id: int = 1,
    ) -> None:
        """See ``SimulationGrid``."""
        super().__init__(app_factory, num_clients, threads=threads, run_config=run_config, run_id=run_id)
        self._runner: ClientRunner | None = ClientRunner(app_factory, num_clients, self.run_config)
        self._waiting: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue the messages; they run when their replies are pulled."""
        accepted = self._accept(messages)
        self._waiting.update((message.metadata.message_id, message) for message in accepted)
        return [message.metadata.message_id for message in accepted]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Run the oldest queued message among ``message_ids`` and return its reply; empty if none is queued.

        One at a time, so that an asynchronous server sees replies come in one by one, as from a real grid.
        """
        wanted = set(message_ids)
        for message_id in self._waiting:
            if message_id in wanted:
                with torch_threads(self.threads):
                    return [self._call(self._waiting.pop(message_id))]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Run all messages and return their replies; none is begun after ``timeout`` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        replies = []
        with torch_threads(self.threads):
            for message in self._accept(messages):
                if deadline is not None and time.monotonic() >= deadline:
                    break
                replies.append(self._call(message))
        return replies

    def run_cohort(
        self, content: RecordDict, nodes: Sequence[int], pooling: Pooling, answered: Answered | None = None
    ) -> Pool:
        """Run the clients one after another; see ``SimulationGrid``."""
        runner = self._running()
        with torch_threads(self.threads):
            return runner.pool(runner.open_round(content), self._blocks(nodes), Adder(pooling), answered)

    def close(self) -> None:
        """Drop the app and the states of the clients."""
        self._runner = None
        self._waiting.clear()

    def _call(self, message: Message) -> Message:
        outcome = self._running().call(flower_compat.message_copy(message, own_copy(message.content)))
        return self._announce(flower_compat.reply_with(message, outcome))

    def _running(self) -> ClientRunner:
        if self._runner is None:
            raise RunError("The grid is closed; make a new one.")
        return self._runner
