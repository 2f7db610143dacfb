"""What the simulation grids share: node ids, message ids, replies, and how one client call is made."""

from __future__ import annotations

import contextlib
import itertools
import traceback
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, ClassVar, Final, Protocol, Self, cast

import torch
from flwr.app import Context, Error, Message, RecordDict, UserConfig, UserConfigValue
from flwr.serverapp import Grid

from flowerbed.errors import ConfigError, RunError
from flowerbed.pooling import Adder, Ladder, Pool, Pooling, Refused, blocks
from flowerbed.server.grids import flower_compat

ClientCallable = Callable[[Message, Context], Message]
AppFactory = Callable[[], ClientCallable]
Member = tuple[int, int]
"""A client of a round: its place in the order of asking, and its number."""
Block = Sequence[Member]
Answered = Callable[[bool], None]
"""Called after every client, with whether its reply was added."""


class OpenRound(Protocol):
    """One round at a client app that can pool: its content decoded once, for all clients of the process."""

    def __call__(self, block: Block, adder: Adder, pool: Pool) -> Mapping[int, BaseException]:
        """Run the clients and add their replies to ``pool``; return what clients raised, by place."""


class PoolingApp(Protocol):
    """A client app that, beside messages, takes whole blocks of clients."""

    def open_round(self, content: RecordDict, agreed: Any = None) -> OpenRound:
        """Return the round in which every client is sent ``content``, a training message's.

        ``agreed`` is what ``agreement`` returned in some process; None where nobody was asked.
        """

    def agreement(self, content: RecordDict, clients: Sequence[int]) -> Any:
        """Return what all processes must do alike and one has to find out; picklable."""


class PoolingFactory(Protocol):
    """An ``AppFactory`` whose apps are ``PoolingApp``s; it says so by having these."""

    def block_size(self, cohort: int, parallel: bool) -> int:
        """Return how many clients are added one after another, see ``flowerbed.pooling.block_size``.

        ``parallel`` says whether workers share the blocks; their number must not matter.
        """

    def loads(self, clients: Sequence[int]) -> Sequence[float]:
        """Return about how long each client takes, in units of any size."""

    @property
    def agrees(self) -> bool:
        """Whether its apps need an agreement."""


# The node id of partition 0; partition p is node FIRST_NODE_ID + p. Above Flower's reserved small ids, so
# that a node id taken for a partition id is out of range and noticed.
FIRST_NODE_ID: Final = 1000

# How many frames of a client's exception, counted from where it was raised, an error reply quotes.
TRACEBACK_FRAMES: Final = 3


class ClientGrid(Grid):
    """A Flower grid whose nodes are the clients of a federation: client k is node ``FIRST_NODE_ID + k``.

    Replies come back in the order in which the messages were sent, and a client that fails becomes an error
    reply, never an exception here. ``on_reply``, if set, is called with each reply as it comes in, in no
    particular order.
    """

    on_reply: Callable[[Message], None] | None = None

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return ``Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)``."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)


class SimulationGrid(ClientGrid):
    """A grid whose clients are simulated, one per partition of the data.

    A client sees its own shallow copy of every record, so it may add and remove entries.
    """

    parallel: ClassVar[bool] = False
    """Whether several clients may run at once."""

    def __init__(
        self,
        app_factory: AppFactory,
        num_clients: int,
        *,
        threads: int = 1,
        run_config: UserConfig | None = None,
        run_id: int = 1,
    ) -> None:
        """Describe the federation; nothing is built or started before the first message.

        ``app_factory`` returns the client side: a Flower ``ClientApp`` or any ``(message, context) -> Message``;
        it is called once per process that runs clients. ``threads`` is torch's thread count during client
        calls. ``run_config`` is given to every client in its ``Context``.

        Raises ``ConfigError`` if ``num_clients`` or ``threads`` is below one.
        """
        if num_clients < 1:
            raise ConfigError(f"A federation needs at least one client, not {num_clients}.")
        if threads < 1:
            raise ConfigError(f"A client needs at least one thread, not {threads}.")
        self.num_clients = num_clients
        self.app_factory = app_factory
        self.threads = threads
        self.run_config: UserConfig = dict(run_config or {})
        self._run = flower_compat.RunHandle(run_id)
        self._message_numbers = itertools.count(1)
        flower_compat.set_identity(run_id)

    # Flower's Grid.

    @property
    def run(self) -> Any:
        """The run; only its ``run_id`` is promised."""
        return self._run

    def set_run(self, run: Any) -> None:
        """Adopt ``run``, of which only ``run_id`` is used."""
        self._run = run
        flower_compat.set_identity(run.run_id)

    def get_node_ids(self) -> list[int]:
        """Return the node ids in partition order."""
        return list(self.nodes)

    @abstractmethod
    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Accept messages without waiting for them and return their ids, in order."""

    @abstractmethod
    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return, once each, the replies to ``message_ids`` that are in by now, in the order of the ids."""

    @abstractmethod
    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send all messages, wait for the replies and return them in send order.

        After ``timeout`` seconds the replies that are in are returned; the others never arrive.
        """

    # Ours.

    @property
    def nodes(self) -> range:
        """The node ids in partition order."""
        return range(FIRST_NODE_ID, FIRST_NODE_ID + self.num_clients)

    def cohort_refusal(self) -> str | None:
        """Return a sentence that says why ``run_cohort`` cannot be used; None if it can."""
        if not hasattr(self.app_factory, "block_size"):
            return "the client app answers messages only"
        return None

    @abstractmethod
    def run_cohort(
        self, content: RecordDict, nodes: Sequence[int], pooling: Pooling, answered: Answered | None = None
    ) -> Pool:
        """Send ``content``, a training message's, to all ``nodes`` and return the sums of what they answer.

        The sums are the same bits on every grid and with any number of workers. A client that fails is named in
        ``Pool.refused``, by its place in ``nodes``, and costs no other client anything. ``answered`` is called
        after every client, in no particular order.
        """

    def _blocks(self, nodes: Sequence[int]) -> list[Block]:
        """Return the clients of every block of the cohort."""
        factory = cast(PoolingFactory, self.app_factory)
        members = [(place, self.partition_id(node)) for place, node in enumerate(nodes)]
        places = blocks(len(nodes), factory.block_size(len(nodes), self.parallel))
        return [members[block.start : block.stop] for block in places]

    @abstractmethod
    def close(self) -> None:
        """Release what the grid holds; it cannot be used afterwards. Closing twice is harmless."""

    def node_id(self, partition_id: int) -> int:
        """Return the node id of the client that holds ``partition_id``."""
        return FIRST_NODE_ID + partition_id

    def partition_id(self, node_id: int) -> int:
        """Return the partition that node ``node_id`` holds; raises ``RunError`` if there is no such node."""
        partition = node_id - FIRST_NODE_ID
        if not 0 <= partition < self.num_clients:
            raise RunError(
                f"There is no node {node_id}: this federation has the nodes {FIRST_NODE_ID} to "
                f"{FIRST_NODE_ID + self.num_clients - 1}. Take ids from get_node_ids()."
            )
        return partition

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self, messages: Iterable[Message]) -> list[Message]:
        """Check the destinations and number the messages."""
        accepted = list(messages)
        for message in accepted:
            self.partition_id(message.metadata.dst_node_id)
            flower_compat.set_message_id(message, str(next(self._message_numbers)))
        return accepted

    def _announce(self, reply: Message) -> Message:
        if self.on_reply is not None:
            self.on_reply(reply)
        return reply


class ClientRunner:
    """The clients of one process: the app, built once, and the Flower state of each node.

    Used as it is by ``InProcessGrid``, and inside each worker by ``RayGrid``, so that both treat a client
    in the same way.
    """

    def __init__(
        self, app_factory: AppFactory, num_clients: int, run_config: Mapping[str, UserConfigValue]
    ) -> None:
        """See ``SimulationGrid``. The app is built by the first call."""
        self._factory = app_factory
        self._num_clients = num_clients
        self._run_config = run_config
        self._app: ClientCallable | None = None
        self.states: dict[int, RecordDict] = {}

    def build(self) -> ClientCallable:
        """Return the app, building it if need be. What the factory raises is raised: no client can run."""
        if self._app is None:
            self._app = self._factory()
        return self._app

    def pool(
        self, opened: OpenRound, consecutive: Iterable[Block], adder: Adder, answered: Answered | None = None
    ) -> Pool:
        """Run consecutive blocks of clients, the first of them at a place that a tree of that many may start at."""
        ladder = Ladder(adder)
        for block in consecutive:
            pool = Pool()
            raised = opened(block, adder, pool)
            pool.refused += [Refused(place, "", describe(error)) for place, error in raised.items()]
            ladder.push(pool)
            if answered is not None:
                failed = {refused.place for refused in pool.refused}
                for place, _ in block:
                    answered(place not in failed)
        return ladder.top().on_cpu()

    def open_round(self, content: RecordDict, agreed: Any = None) -> OpenRound:
        """Open a round at the app."""
        return cast(PoolingApp, self.build()).open_round(content, agreed)

    def agreement(self, content: RecordDict, clients: Sequence[int]) -> Any:
        """Ask the app for what all processes must do alike."""
        return cast(PoolingApp, self.build()).agreement(content, clients)

    def call(self, message: Message) -> RecordDict | Error:
        """Run the client to which ``message`` goes and return the content of its reply or its error.

        ``message`` is the client's own. The client's Flower state changes only if it does not fail.
        """
        app = self.build()
        node_id = message.metadata.dst_node_id
        context = Context(
            run_id=message.metadata.run_id,
            node_id=node_id,
            node_config={"partition-id": node_id - FIRST_NODE_ID, "num-partitions": self._num_clients},
            state=own_copy(self.states.get(node_id) or RecordDict()),
            run_config=dict(self._run_config),
        )
        try:
            reply = app(message, context)
            outcome = _outcome(reply)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a client's failure is its reply.
            return Error(flower_compat.CLIENT_RAISED, describe(error))
        if context.state or node_id in self.states:
            self.states[node_id] = context.state
        return outcome


def _outcome(reply: object) -> RecordDict | Error:
    if not isinstance(reply, Message):
        raise TypeError(f"the client returned {type(reply).__name__} where a Message is due")
    return reply.error if reply.has_error() else reply.content


def describe(error: BaseException) -> str:
    """Return ``"<type>: <message>"`` and, below it, the innermost frames of the traceback."""
    frames = traceback.extract_tb(error.__traceback__)[-TRACEBACK_FRAMES:]
    headline = f"{type(error).__name__}: {error}"
    return headline + "\n" + "".join(traceback.format_list(frames)).rstrip() if frames else headline


def own_copy(content: RecordDict) -> RecordDict:
    """Return a copy whose records can be changed without the original noticing; values are shared."""
    copied = RecordDict()
    for name, record in content.items():
        copied[name] = record.copy()
    return copied


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run the block with ``count`` torch threads and restore the count afterwards."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_order(ids: Sequence[str], replies: dict[str, Message]) -> list[Message]:
    """Remove the replies to ``ids`` from ``replies`` and return them in the order of ``ids``."""
    return [replies.pop(message_id) for message_id in ids if message_id in replies]
