"""The grid that simulates many clients on the workers of a Ray runtime, on one machine or a cluster.

Workers are long-lived actors that build the client app once. A round's large records are put into shared
memory once, however many clients read them, and read there without a copy; one remote call carries as many
clients as its overhead asks for. Where the replies are to be added up, workers do so and one sum comes back
from each call. A worker that dies is replaced and its clients run again, one per call, so that the client that
kills workers is known; after its second kill it is quarantined.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import logging
import math
import os
import random
import sys
import time
import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Final, cast

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict, UserConfig

from flowerbed.errors import ConfigError, RunError
from flowerbed.messages import array_records, metrics, nbytes, record_nbytes, tensors
from flowerbed.pooling import Adder, Pool, Pooling, Refused
from flowerbed.server.grids import flower_compat
from flowerbed.server.grids.base import (
    FIRST_NODE_ID,
    Answered,
    AppFactory,
    Block,
    Member,
    PoolingFactory,
    SimulationGrid,
    in_order,
)
from flowerbed.server.grids.parts import Branches, Part, cut
from flowerbed.server.grids.ray_worker import Call, ClientWorker, Outcome
from flowerbed.server.grids.wire import PackedContent, PackedPool, pack, unpack_content, unpack_pool

logger = logging.getLogger(__name__)

# A record of at least this many bytes is put into shared memory; a smaller one travels with the call, which
# Ray does faster up to about 100 kB.
PUT_BYTES: Final = 1 << 16
# A call should take about this long: much more than its overhead (a millisecond or two), much less than a
# round, so that workers finish together and progress is seen.
CALL_SECONDS: Final = 0.1
LEAST_CALL_SECONDS: Final = 0.005
# A call's replies should not hold more than this in shared memory at once.
CALL_BYTES: Final = 1 << 28
# While nothing is known about the speed of clients, each worker gets about this many calls of a round.
FIRST_CALLS_PER_WORKER: Final = 3
# A client is quarantined when calls that carried it alone have killed their worker this often in a row.
MAX_KILLS: Final = 2
# How often in a row a worker may die before it is ready, and how long all of them may wait for a place.
MAX_FAILED_STARTS: Final = 3
START_SECONDS: Final = 300.0

# For a runtime of our own. By default Ray frees shared memory once a second or a hundred objects at a time:
# with whole models as objects, every round then writes to fresh memory, and the page faults cost more than
# the copies. And replies of up to a megabyte travel faster with the answer than through shared memory.
RUNTIME_CONFIG: Final = {
    "free_objects_batch_size": 1,
    "free_objects_period_milliseconds": 100,
    "max_direct_call_object_size": 1 << 20,
}

QUARANTINED: Final = "quarantined: it killed its worker"

_own_runtime = False


def ensure_runtime(address: str | None, workers: int, gpus_per_worker: float) -> None:
    """Connect to Ray or start it, unless this process already has; check that the workers fit.

    With ``address`` (``"auto"`` or ``"host:port"``) an existing cluster is joined, otherwise a runtime is
    started on this machine, without dashboard and usage statistics. A runtime that somebody else
    initialised in this process is used as it is. The state of Python's global generator is kept.

    Raises ``ConfigError`` if there is no Ray, no cluster at ``address``, or too few CPUs or GPUs.
    """
    global _own_runtime
    ray = import_ray()
    if _own_runtime and address is None and ray.cluster_resources().get("CPU", 0) < workers:
        shutdown()  # It was started for an earlier grid with fewer workers.
    if not ray.is_initialized():
        python_state = random.getstate()
        try:
            _start_runtime(ray, address, workers)
        finally:
            random.setstate(python_state)
        _own_runtime = True
    offered = ray.cluster_resources()
    for resource, needed in (("CPU", float(workers)), ("GPU", workers * gpus_per_worker)):
        if offered.get(resource, 0.0) < needed:
            raise ConfigError(
                f"{workers} workers need {needed:g} {resource}s and Ray has {offered.get(resource, 0.0):g}; "
                "use fewer workers or a smaller share per worker."
            )


def shutdown() -> None:
    """Stop the runtime that ``ensure_runtime`` started, or leave the cluster it joined; else do nothing."""
    global _own_runtime
    if _own_runtime:
        import_ray().shutdown()
        _own_runtime = False


def import_ray() -> Any:
    """Import and return ``ray``; raises ``ConfigError`` saying how to get it."""
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "The Ray grid needs Ray: pip install flowerbed[simulation]. The grid 'inprocess' does without."
        ) from error
    return ray


class RayGrid(SimulationGrid):
    """Runs clients on Ray workers; see ``SimulationGrid`` for what every grid promises.

    ``quarantined`` holds the node ids of clients that killed their worker; they get error replies until the
    end. The Flower state of every client is kept here as well as in its worker, so no worker's death loses it.
    """

    parallel = True

    def __init__(
        self,
        app_factory: AppFactory,
        num_clients: int,
        *,
        workers: int = 2,
        address: str | None = None,
        gpus_per_worker: float = 0.0,
        threads: int = 1,
        stateful: bool = False,
        time_limit: float | None = None,
        run_config: UserConfig | None = None,
        run_id: int = 1,
    ) -> None:
        """Describe the grid; Ray starts with the first message.

        ``app_factory`` must be picklable by cloudpickle; large arrays in it are shared by the workers of a
        machine. Each of the ``workers`` takes one CPU and ``gpus_per_worker`` GPUs (a fraction is a share in
        scheduling, not a cap on memory). ``address``: see ``ensure_runtime``.

        A ``stateful`` client (one that keeps things in its worker or on its worker's disk) always goes to the
        same worker, unless that is dead; otherwise an idle worker takes the next clients. When a worker dies,
        all clients of its call run again, also those that had finished: what a client writes down should be
        keyed by round. (Its Flower ``Context.state`` is: it changes only when the reply is in.)

        ``time_limit``: seconds after which a client's worker is killed and the client gets an error reply.
        It also means one client per call.

        Raises ``ConfigError`` for impossible numbers and if Ray is not installed.
        """
        super().__init__(app_factory, num_clients, threads=threads, run_config=run_config, run_id=run_id)
        if workers < 1:
            raise ConfigError(f"The Ray grid needs at least one worker, not {workers}.")
        if gpus_per_worker < 0:
            raise ConfigError(f"gpus_per_worker is a number of GPUs or a fraction, not {gpus_per_worker}.")
        if time_limit is not None and time_limit <= 0:
            raise ConfigError(f"time_limit is a positive number of seconds, not {time_limit}.")
        self._ray = import_ray()
        self.workers = workers
        self.address = address
        self.gpus_per_worker = gpus_per_worker
        self.stateful = stateful
        self.time_limit = time_limit
        self.quarantined: set[int] = set()
        self._pool: list[_Worker] = []
        self._app_ref: Any = None
        self._closed = False
        self._failed_starts = 0
        self._queue: deque[_Task] = deque()
        self._open: set[str] = set()
        self._replies: dict[str, Message] = {}
        self._shared: weakref.WeakValueDictionary[int, _Shared] = weakref.WeakValueDictionary()
        self._kills: dict[int, int] = {}
        self._states: dict[int, PackedContent] = {}
        self._state_at: dict[int, _Worker] = {}
        self._pace: dict[str, _Pace] = {}
        self._cohorts = itertools.count(1)
        self._agreed: Any = None
        """What workers do alike because one of them found it out."""

    # Flower's Grid.

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue the messages and hand what fits to idle workers."""
        return self._push(messages)

    def _push(self, messages: Iterable[Message], *, alone: bool = False) -> list[str]:
        """Queue the messages, each for a call of its own if ``alone``, and return their ids."""
        accepted = self._accept(messages)
        if not self._pool:
            self._start()
        ids = [message.metadata.message_id for message in accepted]
        self._open.update(ids)
        for message in accepted:
            self._enqueue(message, alone=alone)
        self._dispatch()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to ``message_ids`` that are in, without waiting for the others."""
        while self._advance(0.0):
            pass
        return in_order(list(message_ids), self._replies)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Run all messages and return their replies in send order.

        What has not been answered after ``timeout`` seconds is dropped: queued clients do not run, and the
        reply of a running one is ignored.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        ids = self.push_messages(messages)
        while not self._open.isdisjoint(ids):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._advance(left)
        self._drop(ids)
        return in_order(ids, self._replies)

    def cohort_refusal(self) -> str | None:
        if self.time_limit is not None:
            return "federation.time_limit holds for each client alone, so each has a call of its own"
        if self.stateful:
            return "clients that keep something in their worker go to that worker only"
        return super().cohort_refusal()

    def run_cohort(
        self, content: RecordDict, nodes: Sequence[int], pooling: Pooling, answered: Answered | None = None
    ) -> Pool:
        """Let workers run and add up parts of the cohort, the longest first; see ``SimulationGrid``.

        An idle worker takes the next part. The part of a worker that dies runs again block by block, and the
        clients of a block that kills a worker run alone, as with messages.
        """
        if not self._pool:
            self._start()
        blocks = self._blocks(nodes)
        loads = cast(PoolingFactory, self.app_factory).loads(
            [client for block in blocks for _, client in block]
        )
        remaining = iter(loads)
        parts = cut([sum(itertools.islice(remaining, len(block))) for block in blocks], self.workers)
        barred = {place for place, node in enumerate(nodes) if node in self.quarantined}
        run = _CohortRun(
            next(self._cohorts),
            content,
            [(name, self._share(record)) for name, record in content.items()],
            pooling,
            [[member for member in block if member[0] not in barred] for block in blocks],
            deque(parts),
            answered or _nobody,
        )
        if cast(PoolingFactory, self.app_factory).agrees and self._agreed is None:
            self._agreed = self._agreement(run)
        while run.waiting or any(worker.part is not None for worker in self._pool):
            self._dispatch_parts(run)
            self._advance(math.inf)
        for part in run.deadly:
            run.branches.put(part, self._pool_alone(run, run.blocks[part.start]))
        pool = run.branches.top()
        for place in sorted(barred):
            run.answered(False)
            pool.refused.append(Refused(place, "", QUARANTINED))
        return pool

    def close(self) -> None:
        """End the workers; Ray itself stays for the next grid (see ``shutdown``)."""
        for worker in self._pool:
            self._kill(worker)
        self._pool = []
        self._closed = True
        self._app_ref = None
        self._queue.clear()
        self._open.clear()
        self._replies.clear()
        self._states.clear()
        self._state_at.clear()

    # Workers.

    def _start(self) -> None:
        if self._closed:
            raise RunError("The grid is closed; make a new one.")
        ensure_runtime(self.address, self.workers, self.gpus_per_worker)
        try:
            self._app_ref = self._ray.put(self.app_factory)
        except (TypeError, AttributeError) as error:
            raise ConfigError(
                f"The client app cannot be sent to workers: {error}. Its factory must be picklable."
            ) from error
        self._pool = [self._new_worker(slot) for slot in range(self.workers)]

    def _new_worker(self, slot: int, *, replacement: bool = False) -> _Worker:
        actor = (
            _actor_class()
            .options(
                num_cpus=1,
                num_gpus=self.gpus_per_worker,
                max_restarts=0,
                max_task_retries=0,
                runtime_env={"env_vars": _worker_environment(self.threads)},
            )
            .remote()
        )
        ready = actor.prepare.remote(self._app_ref, self.num_clients, self.run_config, self.threads)
        return _Worker(slot, actor, ready, time.monotonic(), replacement)

    def _kill(self, worker: _Worker) -> None:
        if self._ray.is_initialized():
            self._ray.kill(worker.actor, no_restart=True)

    def _replace(self, worker: _Worker) -> None:
        self._kill(worker)
        self._pool[worker.slot] = self._new_worker(worker.slot, replacement=True)

    # Work, from the queue to the workers.

    def _enqueue(self, message: Message, *, alone: bool = False) -> None:
        node_id = message.metadata.dst_node_id
        if node_id in self.quarantined:
            self._answer(message, Error(flower_compat.NODE_UNAVAILABLE, QUARANTINED))
            return
        records = [(name, self._share(record)) for name, record in message.content.items()]
        self._queue.append(_Task(message, records, alone))

    def _share(self, record: ArrayRecord | MetricRecord | ConfigRecord) -> _Shared:
        """Pack ``record``, once for all messages under way that hold this very object unchanged."""
        values = list(record.values())
        shared = self._shared.get(id(record))
        if shared is not None and shared.still(record, values):
            return shared
        packed = pack(record)
        large = isinstance(record, ArrayRecord) and record_nbytes(record) >= PUT_BYTES
        shared = _Shared(record, values, self._ray.put(packed) if large else packed, large)
        self._shared[id(record)] = shared
        return shared

    def _drop(self, ids: list[str]) -> None:
        """Forget those of ``ids`` that are still unanswered."""
        if not self._open.isdisjoint(ids):
            self._open.difference_update(ids)
            self._queue = deque(task for task in self._queue if task.message_id in self._open)

    def _dispatch(self) -> None:
        idle = [worker for worker in self._pool if worker.idle]
        if not idle or not self._queue:
            return
        share = self._call_size(len(idle))
        for worker in idle:
            tasks = self._take(worker, share)
            if tasks:
                self._submit(worker, tasks)

    def _call_size(self, idle: int) -> int:
        """Return how many clients the next call carries."""
        if self.time_limit is not None:
            return 1
        waiting = len(self._queue)
        pace = self._pace.get(self._queue[0].message.metadata.message_type)
        if pace is None:
            return max(1, waiting // (self.workers * FIRST_CALLS_PER_WORKER))
        # Dividing work that is shorter than a call's own overhead only adds overhead.
        worthwhile = int(LEAST_CALL_SECONDS / max(pace.seconds, 1e-9))
        fair = max(math.ceil(waiting / idle), min(waiting, worthwhile))
        by_time = int(CALL_SECONDS / max(pace.seconds, 1e-9))
        by_memory = int(CALL_BYTES / max(pace.reply_bytes, 1.0))
        return max(1, min(fair, by_time, by_memory))

    def _take(self, worker: _Worker, size: int) -> list[_Task]:
        """Remove from the queue and return the next call of ``worker``: up to ``size`` clients, or one alone."""
        tasks: list[_Task] = []
        passed: list[_Task] = []
        while self._queue and len(tasks) < size:
            if not self._may_run(self._queue[0], worker):
                passed.append(self._queue.popleft())
                continue
            if self._queue[0].alone and tasks:
                break
            tasks.append(self._queue.popleft())
            if tasks[-1].alone:
                break
        self._queue.extendleft(reversed(passed))
        return tasks

    def _may_run(self, task: _Task, worker: _Worker) -> bool:
        if not self.stateful:
            return True
        home = self._pool[(task.node_id - FIRST_NODE_ID) % self.workers]
        return home is worker or home.restarting

    def _agreement(self, run: _CohortRun) -> Any:
        """Let one worker find out what all shall do."""
        while not any(worker.idle for worker in self._pool):
            self._advance(math.inf)
        worker = next(worker for worker in self._pool if worker.idle)
        clients = [client for _, client in run.blocks[0]]
        try:
            return self._ray.get(worker.actor.agree.remote(clients, *run.sent))
        except self._ray.exceptions.RayError as error:
            # It may be these clients' own fault; each worker then finds out for itself, and the next round asks.
            logger.warning("Workers found no agreement (%s).", _headline(error))
            return None

    def _dispatch_parts(self, run: _CohortRun) -> None:
        """Give every idle worker the next part of the cohort."""
        for worker in self._pool:
            if worker.idle and run.waiting:
                part = run.waiting.popleft()
                blocks = [run.blocks[i] for i in part.blocks]
                answer = worker.actor.pool.remote(run.number, run.pooling, self._agreed, blocks, *run.sent)
                worker.part = _PartCall(run, part, answer)

    def _submit(self, worker: _Worker, tasks: list[_Task]) -> None:
        place, small, large = _table(shared for task in tasks for _, shared in task.records)
        calls: list[Call] = [
            (flower_compat.fields_of(task.message), [(name, place[id(s)]) for name, s in task.records])
            for task in tasks
        ]
        nodes = {task.node_id for task in tasks}
        states = {
            node: self._states[node]
            for node in nodes
            if node in self._states and self._state_at.get(node) is not worker
        }
        for node in nodes:
            self._state_at[node] = worker
        answer = worker.actor.run.remote(calls, small, states, *large)
        limit = math.inf if self.time_limit is None else time.monotonic() + self.time_limit
        worker.call = _Call(tasks, answer, limit)

    # Answers, from the workers to the replies.

    def _advance(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds (may be infinite) for one worker; return whether one had news."""
        pending = {worker.pending: worker for worker in self._pool if worker.pending is not None}
        if not pending:
            self._dispatch()
            return False
        now = time.monotonic()
        limits = [worker.call.limit for worker in self._pool if worker.call is not None]
        if any(worker.part is not None for worker in self._pool):
            limits.append(math.inf)
        if not limits:
            limits = [max(worker.started for worker in self._pool) + START_SECONDS]
        wait = min(timeout, max(0.0, min(limits) - now))
        done, _ = self._ray.wait(
            list(pending), num_returns=1, timeout=None if math.isinf(wait) else wait, fetch_local=True
        )
        if done:
            worker = pending[done[0]]
            if worker.part is not None:
                self._finish_part(worker, worker.part)
            elif worker.call is None:
                self._finish_start(worker)
            else:
                self._finish_call(worker, worker.call)
        else:
            self._check_limits()
        self._dispatch()
        return bool(done)

    def _finish_start(self, worker: _Worker) -> None:
        try:
            self._ray.get(worker.ready)
        except self._ray.exceptions.RayTaskError as error:
            self.close()
            raise (error.cause if isinstance(error.cause, Exception) else error) from error
        except self._ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                self.close()
                raise RunError(f"Ray workers die when they start: {_headline(error)}") from error
            self._replace(worker)
        else:
            self._failed_starts = 0
            worker.ready = None

    def _finish_part(self, worker: _Worker, call: _PartCall) -> None:
        worker.part = None
        run, part = call.run, call.part
        try:
            packed: PackedPool = self._ray.get(call.answer)
        except self._ray.exceptions.RayTaskError as error:
            # The worker lives; what it could not do or send, its clients show one by one.
            logger.warning("A part of the cohort failed (%s); its clients run alone.", _headline(error))
            run.deadly.extend(Part(i) for i in part.blocks)
        except self._ray.exceptions.RayError as error:
            logger.warning("A Ray worker died (%s); it is replaced.", _headline(error))
            self._replace(worker)
            single = [Part(i) for i in part.blocks]
            if len(single) > 1:
                run.waiting.extendleft(reversed(single))
            else:
                run.deadly.extend(single)
        else:
            pool = unpack_pool(packed)
            failed = {refused.place for refused in pool.refused}
            for place, _ in (member for i in part.blocks for member in run.blocks[i]):
                run.answered(place not in failed)
            run.branches.put(part, pool)

    def _pool_alone(self, run: _CohortRun, block: Block) -> Pool:
        """Run the clients of a block one per call and add up their replies here."""
        sent = [Message(run.content, self.node_id(client), "train") for _, client in block]
        ids = self._push(sent, alone=True)
        while not self._open.isdisjoint(ids):
            self._advance(math.inf)
        pool, adder = Pool(), Adder(run.pooling)
        for (place, _), reply in zip(block, in_order(ids, self._replies), strict=True):
            if reply.has_error():
                pool.refused.append(Refused(place, "", reply.error.reason or "no reason given"))
                run.answered(False)
                continue
            records = array_records(reply.content)
            streams = {name: tensors(record) for name, record in records.items()}
            run.answered(adder.add(pool, place, streams, metrics(reply.content)))
        return pool

    def _finish_call(self, worker: _Worker, call: _Call) -> None:
        worker.call = None
        try:
            answer: tuple[list[Outcome], dict[int, PackedContent]] = self._ray.get(call.answer)
        except self._ray.exceptions.RayTaskError as error:
            # The worker lives: something in the call could not be sent, in either direction.
            self._call_failed(call, flower_compat.CLIENT_RAISED, str(error.cause or error), kill=False)
            return
        except self._ray.exceptions.RayError as error:
            logger.warning("A Ray worker died (%s); it is replaced.", _headline(error))
            self._replace(worker)
            self._call_failed(
                call, flower_compat.CLIENT_CRASHED, f"WorkerDied: {_headline(error)}", kill=True
            )
            return
        outcomes, changed = answer
        # Copied, for a view would keep the whole answer in shared memory as long as the state lives.
        self._states.update(copy.deepcopy(changed))
        replies = []
        for task, outcome in zip(call.tasks, outcomes, strict=True):
            self._kills.pop(task.node_id, None)
            if outcome.content is not None:
                replies.append(unpack_content(outcome.content))
                self._answer(task.message, replies[-1])
            else:
                self._answer(task.message, Error(*(outcome.error or (0, None))))
        if replies:
            seconds = sum(outcome.seconds for outcome in outcomes if outcome.content is not None) / len(
                replies
            )
            size = sum(map(nbytes, replies)) / len(replies)
            kind = call.tasks[0].message.metadata.message_type
            self._pace.setdefault(kind, _Pace(seconds, size)).observe(seconds, size)

    def _call_failed(self, call: _Call, code: int, reason: str, *, kill: bool) -> None:
        """Run the clients of a failed call again, each alone; if there is but one, judge it."""
        for task in reversed(call.tasks):
            alone = len(call.tasks) == 1
            if alone and kill:
                self._kills[task.node_id] = self._kills.get(task.node_id, 0) + 1
            if alone and not kill:
                self._answer(task.message, Error(code, reason))
            elif self._kills.get(task.node_id, 0) >= MAX_KILLS:
                self.quarantined.add(task.node_id)
                logger.warning("Client %d is quarantined.", self.partition_id(task.node_id))
                self._answer(task.message, Error(code, f"{reason} (twice; the client is quarantined)"))
            elif task.message_id in self._open:
                self._queue.appendleft(dataclasses.replace(task, alone=True))

    def _check_limits(self) -> None:
        now = time.monotonic()
        for worker in list(self._pool):
            call = worker.call
            if call is not None and call.limit <= now:
                worker.call = None
                self._replace(worker)
                reason = f"time limit of {self.time_limit:g} s exceeded"
                for task in call.tasks:
                    self._answer(task.message, Error(flower_compat.NO_REPLY, reason))
        if all(w.ready is not None and now - w.started > START_SECONDS for w in self._pool):
            free = self._ray.available_resources()
            self.close()
            raise RunError(
                f"No Ray worker found a place in {START_SECONDS:g} s: free are {free.get('CPU', 0):g} CPUs and "
                f"{free.get('GPU', 0):g} GPUs. Close other grids, or use fewer workers."
            )

    def _answer(self, message: Message, outcome: Any) -> None:
        message_id = message.metadata.message_id
        if message_id in self._open:
            self._open.remove(message_id)
            self._replies[message_id] = self._announce(flower_compat.reply_with(message, outcome))


@dataclasses.dataclass(frozen=True, eq=False)
class _Shared:
    """A packed record, or the reference to one in shared memory, and the record itself to know it by."""

    record: ArrayRecord | MetricRecord | ConfigRecord
    values: list[Any]
    packed: Any
    large: bool

    def still(self, record: object, values: list[Any]) -> bool:
        """Return whether ``record`` is the record packed, and has not been changed since."""
        return record is self.record and list(map(id, values)) == list(map(id, self.values))


@dataclasses.dataclass(frozen=True, eq=False)
class _Task:
    """A message with its packed records; ``alone`` if it must not share a call."""

    message: Message
    records: list[tuple[str, _Shared]]
    alone: bool = False

    @property
    def node_id(self) -> int:
        return self.message.metadata.dst_node_id

    @property
    def message_id(self) -> str:
        return self.message.metadata.message_id


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """A remote call under way; ``limit`` is the monotonic time at which it is overdue."""

    tasks: list[_Task]
    answer: Any
    limit: float


@dataclasses.dataclass(frozen=True, eq=False)
class _CohortRun:
    """A cohort whose replies are added up, while it runs."""

    number: int
    content: RecordDict
    records: list[tuple[str, _Shared]]
    pooling: Pooling
    blocks: list[list[Member]]
    waiting: deque[Part]
    """Parts that no worker has begun."""
    answered: Answered
    branches: Branches = dataclasses.field(default_factory=Branches)
    deadly: list[Part] = dataclasses.field(default_factory=list)
    """Blocks that a worker did not survive, or of a part that could not be done or sent."""

    @functools.cached_property
    def sent(self) -> list[Any]:
        """The content as workers take it: the place of each record among those that follow, small and large."""
        place, small, large = _table(shared for _, shared in self.records)
        return [[(name, place[id(shared)]) for name, shared in self.records], small, *large]


@dataclasses.dataclass(frozen=True)
class _PartCall:
    """A part of a cohort at a worker, and the reference to its sum."""

    run: _CohortRun
    part: Part
    answer: Any


@dataclasses.dataclass(eq=False)
class _Worker:
    """An actor in its slot of the pool: starting (``ready``), at work (``call``, ``part``), or idle (none)."""

    slot: int
    actor: Any
    ready: Any
    started: float
    replacement: bool
    call: _Call | None = None
    part: _PartCall | None = None

    @property
    def idle(self) -> bool:
        """Whether the worker can be given something."""
        return self.ready is None and self.call is None and self.part is None

    @property
    def restarting(self) -> bool:
        """Whether the worker that was here died and this one cannot work yet."""
        return self.replacement and self.ready is not None

    @property
    def pending(self) -> Any:
        """The reference that resolves when this worker has news, if any."""
        if self.part is not None:
            return self.part.answer
        return self.call.answer if self.call is not None else self.ready


@dataclasses.dataclass
class _Pace:
    """What a client of late has cost, in seconds and in bytes of its reply: running means over calls.

    They forget fast, because the first calls of a worker load libraries and data and say nothing about later.
    """

    seconds: float
    reply_bytes: float

    def observe(self, seconds: float, reply_bytes: float) -> None:
        self.seconds += 0.5 * (seconds - self.seconds)
        self.reply_bytes += 0.5 * (reply_bytes - self.reply_bytes)


@functools.cache
def _actor_class() -> Any:
    return import_ray().remote(ClientWorker)


def _start_runtime(ray: Any, address: str | None, workers: int) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        with warnings.catch_warnings():
            # Ray announces that workers without a GPU share will one day see all GPUs.
            warnings.simplefilter("ignore", FutureWarning)
            if address is None:
                processors = max(workers, os.cpu_count() or 1)
                ray.init(num_cpus=processors, include_dashboard=False, _system_config=RUNTIME_CONFIG, **quiet)
            else:
                ray.init(address=address, **quiet)
    except ConnectionError as error:
        raise ConfigError(
            f"There is no Ray cluster at address '{address}': {_headline(error)}. "
            "Start one with 'ray start --head', or leave the address out."
        ) from error


def _worker_environment(threads: int) -> dict[str, str]:
    gigabyte = str(1 << 30)
    return {
        "OMP_NUM_THREADS": str(threads),
        # Beyond 32 MB glibc maps fresh pages for every allocation and gives them back, a page fault per 4 kB
        # at every training step of a large model; with these it recycles them.
        "MALLOC_MMAP_THRESHOLD_": gigabyte,
        "MALLOC_TRIM_THRESHOLD_": gigabyte,
        # What can be imported here can be imported there.
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(os.path.abspath(entry) for entry in sys.path)),
    }


def _table(records: Iterable[_Shared]) -> tuple[dict[int, int], list[Any], list[Any]]:
    """Return the place of every record, by identity, in the list of small ones followed by large ones; and both."""
    unique = {id(shared): shared for shared in records}.values()
    small, large = [s for s in unique if not s.large], [s for s in unique if s.large]
    place = {id(shared): number for number, shared in enumerate((*small, *large))}
    return place, [shared.packed for shared in small], [shared.packed for shared in large]


def _nobody(ok: bool) -> None:
    """Stand for somebody who wants to know of every client."""


def _headline(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
