"""The round loop: the only one. Every algorithm, grid and paper runs through it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from flowerbed import messages
from flowerbed.errors import CheckpointError, ConfigError, DivergedError, RunError
from flowerbed.pooling import Pooled
from flowerbed.server.by_client import by_client
from flowerbed.server.callbacks import CLIENTS, SERVER, Callback, EarlyStop, MetricsLog, Record
from flowerbed.server.checkpoint import Checkpoint, Checkpoints
from flowerbed.server.devices import DeviceLink
from flowerbed.server.params import EvaluationParams, FederationParams, StopParams
from flowerbed.server.replies import (
    Failure,
    Settled,
    check_replies,
    first_non_finite,
    sent_shapes,
    settle_pool,
)
from flowerbed.storage import Tensors
from flowerbed.strategies.base import FederatedStrategy, Phase

ServerEvaluator = Callable[[Tensors], Mapping[str, Any]]
Derive = Callable[[Mapping[str, Any]], Mapping[str, float]]
"""An evaluation's metrics to further ones."""


class VersionedStore(Protocol):
    """The part of the clients' store that the server needs (see ``flowerbed.clients.store``)."""

    def rewind(self, to_round: int) -> None: ...

    def prune(self, keep_round: int) -> None: ...


@dataclass
class RunResult:
    """What a run leaves in memory."""

    model: Tensors
    history: list[Record]
    status: str
    """completed or stopped (early)."""
    reason: str = ""
    resumed_from: int = 0
    """The round that the run was resumed after; 0 for a run from the start."""

    @property
    def failures(self) -> list[Failure]:
        """Every client failure of the run."""
        return [failure for record in self.history for failure in record.failures]

    def final(self, phase: str = SERVER) -> dict[str, Any]:
        """Return the metrics of the last evaluation of ``phase``; {} if there was none."""
        return next((dict(r.metrics) for r in reversed(self.history) if r.phase == phase), {})


@dataclass(frozen=True)
class _Answers:
    """What one exchange with the clients brought."""

    round: int
    phase: str
    started: float
    asked: int
    answered: int
    """How many replies are usable."""
    failures: list[Failure]
    bytes_down: int
    bytes_up: int
    usable: Sequence[Message] = ()
    """The usable replies in the order of asking, where they are messages."""
    settled: Settled | None = None
    """Their sums, where the grid added them up."""

    def record(self, metrics: dict[str, Any]) -> Record:
        """Return the line of metrics.jsonl for this exchange."""
        return Record(
            self.round,
            self.phase,
            metrics,
            asked=self.asked,
            answered=self.answered,
            failed=len(self.failures),
            seconds=time.perf_counter() - self.started,
            bytes_down=self.bytes_down,
            bytes_up=self.bytes_up,
            failures=tuple(self.failures),
        )


@dataclass
class Federation:
    """A strategy, an initial model and a grid, run for a number of rounds."""

    strategy: FederatedStrategy
    model: Tensors
    """The initial global model: parameters and buffers by name."""
    grid: Grid
    params: FederationParams
    exchange: str = "auto"
    """How training replies come back: messages, one from each client; pooled, as sums; auto: as sums where neither
    the strategy nor the grid needs messages. The model is the same in every bit."""
    evaluator: ServerEvaluator | None = None
    evaluation: EvaluationParams = field(default_factory=EvaluationParams)
    stop: StopParams = field(default_factory=StopParams)
    callbacks: Sequence[Callback] = ()
    log: MetricsLog | None = None
    """Where every record goes; needed with ``checkpoints``, since early stopping looks back."""
    checkpoints: Checkpoints | None = None
    checkpoint_every: int = 1
    store: VersionedStore | None = None
    identity: str = ""
    """Hash of the configuration; a checkpoint of another identity is refused."""
    derive: Derive | None = None
    """Adds to every evaluation what follows from its counts and the run's data (class groups)."""
    link: DeviceLink | None = None
    """What is agreed with single devices; None where all clients are treated alike."""
    timeout: float | None = None
    """Seconds to wait for the replies of an exchange; a client that needs longer has given no reply. None waits for
    ever: simulated clients always answer, devices need not."""

    def __post_init__(self) -> None:
        if self.checkpoints is not None and self.log is None:
            raise ConfigError(
                "Checkpoints need a metrics log beside them; give Federation(log=MetricsLog(...))."
            )
        self.history: list[Record] = []
        self._earlier = 0
        """The rounds of preparatory phases, which strategy and clients do not count."""

    def run(self, *, resume: bool = False) -> RunResult:
        """Run all phases and return the result.

        ``resume`` continues after the newest whole checkpoint, to the same bits as a run that was never
        interrupted. Raises ``RunError`` when a round cannot be used and ``CheckpointError`` when there is
        nothing to resume.
        """
        status = "failed"
        try:
            resumed_from = self._resume() if resume else self._start()
            status, reason = self._rounds(resumed_from)
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            for callback in self.callbacks:
                callback.finished(status)
        return RunResult(self.strategy.deliver(self.model), self.history, status, reason, resumed_from)

    def _start(self) -> int:
        if self.log is not None:
            self.log.rewind(0)
        if self.store is not None:
            self.store.rewind(0)
        return 0

    def _resume(self) -> int:
        if self.checkpoints is None:
            raise CheckpointError("This run keeps no checkpoints, so there is nothing to resume.")
        checkpoint = self.checkpoints.resumable(self.identity)
        self.model = checkpoint.model
        self.strategy.load_state_dict(checkpoint.strategy)
        if self.log is not None:
            self.history = self.log.rewind(checkpoint.extra["records"])
        if self.store is not None:
            self.store.rewind(checkpoint.round)
        return checkpoint.round

    def _rounds(self, done: int) -> tuple[str, str]:
        phases = self.strategy.phases(self.params.rounds)
        rounds = sum(phase.rounds for phase in phases)
        self._earlier = _preparatory(phases)
        # One after the other: a run may be told to go on for ever.
        plan = itertools.chain.from_iterable(itertools.repeat(phase, phase.rounds) for phase in phases)
        for callback in self.callbacks:
            callback.started(rounds, done + 1)
        stopper = EarlyStop(self.stop)
        reason = stopper.reason(self.history) if done else None
        if not done and self.evaluation.every:
            self._evaluate_server(0)
        entered: Phase | None = None
        for phase in itertools.islice(plan, done):
            entered = phase
        for server_round, phase in enumerate(plan, start=done + 1):
            if reason is not None:
                return "stopped", reason
            self.strategy.phase = phase
            if phase is not entered:
                self.model = self.strategy.start_phase(phase, self.model)
                entered = phase
            self._exchange(server_round, phase)
            last = server_round == rounds
            if last or _due(self.evaluation.every, server_round):
                self._evaluate_server(server_round)
            if self.evaluation.clients_every and (last or _due(self.evaluation.clients_every, server_round)):
                self._evaluate_clients(server_round)
            reason = stopper.reason(self.history)
            if last or reason is not None or _due(self.checkpoint_every, server_round):
                self._checkpoint(server_round)
        return ("stopped", reason) if reason is not None else ("completed", "")

    def _exchange(self, server_round: int, phase: Phase) -> None:
        """Ask the clients, use what is usable, and move the model."""
        arrays = messages.array_record(self.model)
        refusal = self.pooling_refusal()
        if refusal is None:
            answers = self._pool(arrays, server_round, phase.name)
        elif self.exchange == "pooled" and phase.message_type == "train":
            raise ConfigError(f"grid.exchange=pooled cannot be used: {refusal}; set grid.exchange=auto.")
        else:
            asked = list(
                self.strategy.configure_train(self._counted(server_round), arrays, self._config(), self.grid)
            )
            _require_someone(server_round, asked)
            answers = self._ask(asked, server_round, phase.name)
        wanted = answers.asked if phase.everyone else self.params.wanted
        used = min(answers.answered, wanted)
        needed = max(1, round(self.params.quorum * wanted))
        if used < needed:
            self._record(answers.record({}))
            first = answers.failures[0] if answers.failures else None
            diverged = {failure.kind for failure in answers.failures} == {"non-finite"}
            raise (DivergedError if diverged else RunError)(
                f"Round {server_round}: {used} of {answers.asked} clients gave a usable reply, "
                f"{needed} are needed (federation.quorum={self.params.quorum})."
                + (f" First failure: client {first.client}, {first.reason}." if first else "")
            )
        self.strategy.rejected.clear()
        updated, metrics = self._aggregate(server_round, answers, used)
        numbers = self._numbers(self.strategy.rejected)
        answers.failures.extend(
            Failure(server_round, numbers[node], "rejected", reason)
            for node, reason in self.strategy.rejected.items()
        )
        if updated is not None:
            bad = first_non_finite(updated)
            if bad is not None:
                raise DivergedError(
                    f"Round {server_round}: the aggregated model is not finite ('{bad}'); lower local.lr or "
                    "the strategy's server learning rate."
                )
            self.model = messages.tensors(updated)
        elif phase.message_type == "train":
            raise RunError(
                f"Round {server_round}: {type(self.strategy).__name__} made no model from {used} replies; "
                "it may need more clients a round."
            )
        agreed = self.link.metrics() if self.link is not None and phase.message_type == "train" else {}
        self._record(answers.record({**_plain(metrics), **agreed}))

    def _aggregate(
        self, server_round: int, answers: _Answers, used: int
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        settled, pooling = answers.settled, self.strategy.pooled
        if settled is None or settled.layout is None or pooling is None:
            return self.strategy.aggregate_train(self._counted(server_round), answers.usable[:used])
        pooled = Pooled.of(pooling, settled.layout, settled.sums)
        return self.strategy.aggregate_pooled(self._counted(server_round), pooled)

    def pooling_refusal(self) -> str | None:
        """Return a sentence that says why training replies of this phase come as messages; None if as sums."""
        if self.exchange == "messages":
            return "grid.exchange=messages asks for a message from each client"
        if self.link is not None:
            return "what devices do or send may differ (devices)"
        if self.params.oversample:
            return (
                "federation.oversample asks more clients than are used, so that replies are chosen one by one"
            )
        # Looked up on the class: what only wraps a grid and changes its messages must see them.
        if not hasattr(type(self.grid), "run_cohort"):
            return f"{type(self.grid).__name__} carries messages only"
        refusal: str | None = self.strategy.pooling_refusal() or self.grid.cohort_refusal()  # type: ignore[attr-defined]
        return refusal

    def _evaluate_clients(self, server_round: int) -> None:
        arrays = messages.array_record(self.strategy.deliver(self.model))
        counted = self._counted(server_round)
        asked = list(self.strategy.configure_evaluate(counted, arrays, self._config(), self.grid))
        if asked:
            answers = self._ask(asked, server_round, CLIENTS)
            metrics = self.strategy.aggregate_evaluate(counted, answers.usable)
            self._record(
                answers.record({**self._derived(_plain(metrics)), **self._by_client(answers.usable)})
            )

    def _by_client(self, replies: Sequence[Message]) -> dict[str, Any]:
        nodes = [reply.metadata.src_node_id for reply in replies]
        numbers = self._numbers(nodes)
        return by_client([numbers[node] for node in nodes], [messages.metrics(r.content) for r in replies])

    def _evaluate_server(self, server_round: int) -> None:
        if self.evaluator is None or not self.strategy.whole:
            return
        started = time.perf_counter()
        metrics = dict(self.evaluator(self.strategy.deliver(self.model)))
        for name, model in self.strategy.alternatives(self.model).items():
            metrics.update({f"{name}-{key}": value for key, value in self.evaluator(model).items()})
        self._record(
            Record(server_round, SERVER, self._derived(metrics), seconds=time.perf_counter() - started)
        )

    def _derived(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Return the metrics of an evaluation with what follows from them."""
        return {**metrics, **self.derive(metrics)} if self.derive is not None else metrics

    def _pool(self, arrays: ArrayRecord, server_round: int, phase: str) -> _Answers:
        """Let the grid run the clients and add up their replies."""
        started = time.perf_counter()
        content, nodes = self.strategy.question(
            self._counted(server_round), arrays, self._config(), self.grid
        )
        _require_someone(server_round, nodes)
        pooling = self.strategy.pooled or {}
        answered = self._announcer(server_round, phase, len(nodes))
        pool = self.grid.run_cohort(content, nodes, pooling, answered)  # type: ignore[attr-defined]
        numbers = self._numbers(nodes)
        asked = [numbers[node] for node in nodes]
        settled = settle_pool(pool, sent_shapes(content), asked, server_round)
        return _Answers(
            server_round,
            phase,
            started,
            len(nodes),
            settled.count,
            settled.failures,
            bytes_down=len(nodes) * messages.nbytes(content),
            bytes_up=pool.nbytes,
            settled=settled,
        )

    def _announcer(self, server_round: int, phase: str, asked: int) -> Callable[[bool], None]:
        """Tell the callbacks that clients were asked; return what tells them that one has answered."""
        for callback in self.callbacks:
            callback.asked(server_round, phase, asked)

        def answered(ok: bool) -> None:
            for callback in self.callbacks:
                callback.answered(server_round, ok)

        return answered

    def _numbers(self, nodes: Iterable[int]) -> dict[int, int]:
        """Return the client number of each node; a node that the grid does not have keeps its id."""
        if hasattr(self.grid, "nodes"):
            known: range = self.grid.nodes
            return {node: known.index(node) if node in known else node for node in nodes}
        return {node: self._places.get(node, node) for node in nodes}

    @cached_property
    def _places(self) -> dict[int, int]:
        """The number of every client of a grid that is not ours, as it was when a node was first looked up."""
        return {node: i for i, node in enumerate(sorted(self.grid.get_node_ids()))}

    def _ask(self, asked: list[Message], server_round: int, phase: str) -> _Answers:
        """Exchange messages with the clients and sort what comes back."""
        started = time.perf_counter()
        answered = self._announcer(server_round, phase, len(asked))
        numbers = self._numbers(message.metadata.dst_node_id for message in asked)
        if self.link is not None:
            asked = self.link.outgoing(asked, numbers)
        # Our grids report replies as they arrive; with Flower's own grid the progress display just waits.
        grid: Any = self.grid
        reports = hasattr(grid, "on_reply")
        if reports:
            grid.on_reply = lambda reply: answered(not reply.has_error())
        try:
            replies = list(grid.send_and_receive(asked, timeout=self.timeout))
        finally:
            if reports:
                # A cohort that is added up later may make messages too, and tells of them in its own way.
                grid.on_reply = None
        bytes_up = sum(messages.nbytes(reply.content) for reply in replies if reply.has_content())
        if self.link is not None:
            replies = self.link.incoming(asked, replies, numbers)
        checked = check_replies(asked, replies, numbers, server_round)
        # Most messages of a round share one content, which is measured once.
        contents = {id(message.content): message.content for message in asked}
        measured = {key: messages.nbytes(content) for key, content in contents.items()}
        return _Answers(
            server_round,
            phase,
            started,
            len(asked),
            len(checked.usable),
            checked.failures,
            bytes_down=sum(measured[id(message.content)] for message in asked),
            bytes_up=bytes_up,
            usable=checked.usable,
        )

    def _counted(self, server_round: int) -> int:
        """Return the number of a round as strategy and clients count it."""
        return server_round - self._earlier

    def _config(self) -> ConfigRecord:
        limit = {"time-limit": self.params.time_limit} if self.params.time_limit else {}
        return ConfigRecord({**limit, **({messages.EARLIER: self._earlier} if self._earlier else {})})

    def _record(self, record: Record) -> None:
        self.history.append(record)
        if self.log is not None:
            self.log.append(record)
        for callback in self.callbacks:
            callback.recorded(record)

    def _checkpoint(self, server_round: int) -> None:
        if self.checkpoints is None:
            return
        extra = {"identity": self.identity, "records": len(self.history)}
        self.checkpoints.save(Checkpoint(server_round, self.model, self.strategy.state_dict(), extra))
        if self.store is not None:
            oldest = self.checkpoints.rounds()[0]
            self.store.prune(oldest)


def _require_someone(server_round: int, asked: Sequence[object]) -> None:
    if not asked:
        raise RunError(f"Round {server_round}: the strategy asked no client.")


def _preparatory(phases: Sequence[Phase]) -> int:
    """Return the rounds that are not counted; raises ``ConfigError`` where some follow counted ones."""
    first = list(itertools.takewhile(lambda phase: phase.preparatory, phases))
    late = next((phase.name for phase in phases[len(first) :] if phase.preparatory), None)
    if late is not None:
        raise ConfigError(f"Phase '{late}' is preparatory and follows one that is not; put it first.")
    return sum(phase.rounds for phase in first)


def _due(every: int, server_round: int) -> bool:
    return every > 0 and server_round % every == 0


def _plain(metrics: MetricRecord | None) -> dict[str, Any]:
    return dict(metrics.items()) if metrics is not None else {}
