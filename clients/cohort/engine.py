"""The cohort engine: K clients of one round as one batched computation, the same result in less time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from flowerbed import seeds
from flowerbed.clients.cohort import plan as planning
from flowerbed.clients.cohort.block import PRIVATE, BlockTrainer, Member, Roles, start_of
from flowerbed.clients.cohort.dropout import DropoutSites
from flowerbed.clients.cohort.extras import UnstackableError
from flowerbed.clients.cohort.functional import VmapLoss
from flowerbed.clients.cohort.fused import FusedStack, UnknownStackError, large_layers
from flowerbed.clients.cohort.kernels import FusedKernel, Kernel, VmapKernel
from flowerbed.clients.cohort.layers import has_onednn
from flowerbed.clients.cohort.plan import Candidate, Plan
from flowerbed.clients.cohort.refusal import TIME_LIMIT, overrides, refusal, uses_base_loss
from flowerbed.clients.cohort.result import Stacked
from flowerbed.clients.cohort_params import CohortOptions
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound, Reply
from flowerbed.clients.params import LocalParams
from flowerbed.models.info import ModelInfo
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Classification, Task

LOG = logging.getLogger(__name__)
TRIAL_STEPS = 2
TRIAL_BATCH = 8

_PLANS: dict[object, Plan] = {}
"""What was measured in this process, by everything that it depends on."""


class CohortEngine:
    """Computes clients of the gradient level in blocks, on stacked copies of the resident model.

    Give it ``LocalRound``s that were opened but not loaded: it puts the received and the private parameters
    where they belong, keeps the private ones in ``local.state``, and leaves storing ``local.state`` to the
    caller. What it cannot batch it computes one client at a time, and says so once.
    """

    def __init__(
        self,
        half: ClientHalf,
        model: nn.Module,
        info: ModelInfo,
        task: Task,
        local: LocalParams,
        device: torch.device,
        *,
        options: CohortOptions | None = None,
        plan: Plan | None = None,
    ) -> None:
        """``model`` is the resident model that ``half`` would train in place; ``plan`` skips the measurement."""
        self._half, self._model, self._task = half, model, task
        self._params, self._device = local, device
        self._options = options or CohortOptions()
        self._given = plan
        self._frozen, self._private = half.frozen(info), half.private(info)
        self._resident = dict(model.state_dict(keep_vars=True))
        self._loaded: dict[str, Tensor] = {}
        self._largest: int | None = None
        self._said: set[str] = set()
        self._example: tuple[LocalRound, Extras] | None = None
        self._trainers: dict[str, BlockTrainer] = {}
        self._sites = DropoutSites(model, self._loss, device)

    # What it can do.

    def refusal(self) -> str | None:
        """Return a sentence that says why no clients are batched at all; None if they are."""
        if self._options.kernel == "generic":
            return "cohort.kernel=generic asks for one client at a time"
        if all(name in self._frozen for name, _ in self._model.named_parameters()):
            return "every parameter is frozen, there is nothing to train"
        return refusal(self._half, self._params)

    def plan(self, locals_: Sequence[LocalRound]) -> Plan:
        """Return the kernel and block size for such clients, measured on the first of them when first asked."""
        if self._given is None and (why := self.refusal()) is not None:
            self._given = Plan("generic", 1, why)
        if self._given is not None:
            return self._given
        first = next((local for local in locals_ if local.clock.steps), None)
        if first is None:
            return Plan("generic", 1, "no client of this cohort has a step to make")
        try:
            key = (self._signature, tuple(first.train_data.x.shape[1:]))
            if key not in _PLANS:
                _PLANS[key] = self._measured(first)
        except (Exception, SystemExit) as error:  # noqa: BLE001  (the client will fail with the same error when it trains)
            why = f"the client that it was tried on failed ({planning.first_line(error)})"
            return Plan("generic", 1, why)
        self._given = _PLANS[key]
        return self._given

    @cached_property
    def _signature(self) -> object:
        shapes = tuple((n, v.shape, v.dtype) for n, v in self._resident.items())
        half = (type(self._half), repr(self._half.params))
        threads = torch.get_num_threads()
        return half, str(self._model), shapes, self._params, self._options, self._device, threads

    def _measured(self, local: LocalRound) -> Plan:
        options = self._options
        kernels = [options.kernel] if options.kernel != "auto" else ["fused", "vmap"]
        missing = {}
        if kernels[0].startswith("fused") and isinstance(stack := self._stack(local, kernels[0]), str):
            missing[kernels.pop(0)] = stack
        elif options.kernel == "auto" and has_onednn() and large_layers(self._model):
            kernels.insert(0, "fused-onednn")
        if options.kernel in kernels and options.block:
            return Plan(options.kernel, options.block, "chosen by cohort.kernel and cohort.block")
        if options.kernel == "compiled":
            size = planning.compiled_block(self._bytes, self._device)
            return Plan(
                options.kernel, size, "chosen by cohort.kernel; its block, which cohort.block sets, by size"
            )
        sizes = [options.block] if options.block else planning.blocks(self._bytes)
        candidates = [Candidate(k, size, self._trial(local, k, size)) for k in kernels for size in sizes]
        if options.kernel == "auto" or not kernels:
            # First, so that there is always something to compare with.
            candidates.insert(0, Candidate("generic", 1, self._trial(local, "generic", 1)))
        plan = planning.measured(candidates, self._device)
        return replace(plan, reason=planning.impossible(plan.reason, missing))

    def _trial(self, local: LocalRound, kernel: str, block: int) -> Callable[[], int]:
        """Return a function that trains copies of one client for a few steps and returns how many it made."""
        data = local.train_data
        clock = replace(local.clock, steps=min(local.clock.steps, TRIAL_STEPS))

        def copied() -> LocalRound:
            state = {group: dict(tensors) for group, tensors in local.state.items()}
            return replace(local, clock=clock, state=state, open_train=lambda: data)

        def trial() -> int:
            if kernel == "generic":
                self._alone(0, copied())
            else:
                self._batched(kernel, [self._open(k, copied()) for k in range(block)])
            return block * clock.steps

        return trial

    @property
    def _low(self) -> torch.dtype | None:
        """The type of what is computed in lower precision."""
        return torch.bfloat16 if self._options.precision == "bfloat16" else None

    @property
    def _bytes(self) -> int:
        return sum(v.numel() * v.element_size() for v in self._model.parameters())

    # Running.

    def run(
        self, locals_: Sequence[LocalRound], failed: MutableMapping[int, BaseException] | None = None
    ) -> Iterator[Stacked]:
        """Train the clients and yield their results block by block, in an order of the engine's own.

        ``Stacked.positions`` are indices into ``locals_``. Where ``failed`` is given, a client whose data or
        algorithm raises an error is left out and its error put there by position; otherwise it is raised.
        """
        plan = self.plan(locals_)
        kernel = plan.kernel
        self._loaded = {}  # Others use the resident model between two cohorts.
        if kernel == "generic":
            self._say(plan.reason, logging.INFO)
        elif any(local.deadline is not None for local in locals_):
            kernel = "generic"
            self._say(f"clients are computed one after another: {TIME_LIMIT}")
        order = sorted(range(len(locals_)), key=lambda i: (-locals_[i].clock.steps, i))
        busy = [i for i in order if kernel != "generic" and locals_[i].clock.steps]
        while busy:
            size = min(plan.block, self._largest or plan.block)
            members, busy_now, busy = [], busy[:size], busy[size:]
            for i in busy_now:
                with _kept(failed, i):
                    members.append(self._open(i, locals_[i]))
            yield from self._block(kernel, members, failed)
        for i, local in enumerate(locals_):
            if kernel == "generic" or not local.clock.steps:
                with _kept(failed, i):
                    yield self._alone(i, local)

    def replies(self, locals_: Sequence[LocalRound]) -> list[Reply]:
        """Train the clients and return their replies in the order of ``locals_``."""
        for local in locals_:
            local.lent = None  # Replies that are kept may not be views of the resident model.
        found = dict(pair for stacked in self.run(locals_) for pair in stacked.replies())
        return [found[i] for i in range(len(locals_))]

    def _block(
        self, kernel: str, members: Sequence[Member], failed: MutableMapping[int, BaseException] | None
    ) -> Iterator[Stacked]:
        """Compute a block; if it does not fit, its halves; if it cannot be batched, each client alone."""
        if not members:
            return
        try:
            result = self._batched(kernel, members)
        except (Exception, SystemExit) as error:  # noqa: BLE001  (each client alone raises what is its own)
            for member in members:
                member.local.state.clear()
                member.local.state.update(member.before)
            if _out_of_memory(error) and len(members) > 1:
                half = (len(members) + 1) // 2
                self._largest = half
                self._say(f"{len(members)} clients do not fit into memory together, {half} may")
                reopened = [self._open(member.position, member.local) for member in members]
                yield from self._block(kernel, reopened[:half], failed)
                yield from self._block(kernel, reopened[half:], failed)
                return
            why = str(error) if isinstance(error, UnstackableError) else planning.first_line(error)
            self._say(f"these clients cannot be computed together ({why})")
            for member in members:
                with _kept(failed, member.position):
                    yield self._alone(member.position, member.local)
            return
        yield from result

    def _batched(self, kernel: str, members: Sequence[Member]) -> list[Stacked]:
        if self._example is None:
            self._example = members[0].local, members[0].extras
        if kernel not in self._trainers:
            self._trainers[kernel] = self._trainer(kernel, members[0].local)
        return self._trainers[kernel](members)

    def _trainer(self, name: str, local: LocalRound) -> BlockTrainer:
        roles = Roles(self._moving(), self._private)
        kernel: Kernel
        if name.startswith("fused"):
            stack = self._stack(local, name)
            if isinstance(stack, str):
                raise UnknownStackError(stack)
            kernel = FusedKernel(stack, frozenset(roles.moving), self._sites)
        else:
            target = self._device if name == "compiled" else None
            loss = VmapLoss(
                self._half, self._model, self._task, roles.moving, low=self._low, compiled_for=target
            )
            kernel = VmapKernel(loss, self._sites)
        return BlockTrainer(
            self._half, self._model, roles, kernel, self._sites, self._options.dropout == "fast"
        )

    def _stack(self, local: LocalRound, kernel: str) -> FusedStack | str:
        """Return the hand-written stack of the model, or why there is none."""
        if not uses_base_loss(self._half):
            return f"{type(self._half).__name__} has a loss of its own"
        if type(self._task) is not Classification:
            return "the task is not classification"
        try:
            images = local.train_data.x.dim() == 4
            return FusedStack(self._model, images=images, low=self._low, onednn=kernel == "fused-onednn")
        except UnknownStackError as error:
            return str(error)

    # One client.

    def _open(self, position: int, local: LocalRound) -> Member:
        """Prepare a client's round, with its model in the resident one if ``begin`` may look."""
        before = {group: dict(tensors) for group, tensors in local.state.items()}
        if not overrides(self._half, "begin"):
            local.train_data  # noqa: B018  (an error in the data is this client's own)
            return Member(position, local, before, {})
        self._load(local)
        return Member(position, local, before, self._half.begin(local))

    def _alone(self, position: int, local: LocalRound) -> Stacked:
        """Do what one client does by itself."""
        self._load(local)
        self._loaded = {}
        reply = self._half.run(local)
        if self._private:
            own = {name: self._resident[name].detach().clone() for name in sorted(self._private)}
            local.state[PRIVATE] = own
        return Stacked.of([position], [reply])

    @torch.no_grad()
    def _load(self, local: LocalRound) -> None:
        """Put a client's start into the resident model; what is there already is not copied again."""
        start = start_of(local, self._resident, self._private)
        for name, target in self._resident.items():
            if self._loaded.get(name) is not start[name]:
                target.copy_(start[name])
                self._loaded[name] = start[name]

    # What the loss does, watched once on one client.

    def _moving(self) -> tuple[str, ...]:
        """Return the parameters that training moves: none that are frozen, none without a gradient.

        A parameter that the loss does not touch stands still under any optimizer, unless ``correct`` moves it.
        """
        free = {n: p for n, p in self._model.named_parameters() if n not in self._frozen}
        if overrides(self._half, "correct"):
            return tuple(free)
        for parameter in free.values():
            parameter.requires_grad_()
        with seeds.torch_stream(0, "cohort probe", device=self._device), torch.enable_grad():
            loss = self._loss(self._params.batch_size or TRIAL_BATCH)
            gradients = torch.autograd.grad(loss, list(free.values()), allow_unused=True)
        return tuple(n for n, gradient in zip(free, gradients, strict=True) if gradient is not None)

    def _loss(self, size: int) -> Tensor:
        """Return the loss of a batch of the given size of some client, at the resident parameters."""
        assert self._example is not None
        local, extras = self._example
        data = local.train_data
        batch = data.batch(torch.arange(size, device=data.y.device) % len(data))
        self._model.train()
        self._loaded = {}  # Batch norm moves its buffers.
        value, _ = self._half.loss(ModelParts.resident(self._model), batch, extras, self._task)
        return value

    def _say(self, reason: str, level: int = logging.WARNING) -> None:
        if reason not in self._said:
            self._said.add(reason)
            LOG.log(level, "cohort engine: %s.", reason)


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def _kept(failed: MutableMapping[int, BaseException] | None, position: int) -> Iterator[None]:
    """Keep an error of one client, if there is a place for it."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if failed is None:
            raise
        failed[position] = error
