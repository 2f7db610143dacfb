"""One block of clients: stacked copies of the model, their steps, and what they answer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flowerbed.clients.cohort.dropout import DropoutSites, generators
from flowerbed.clients.cohort.extras import StackedExtras
from flowerbed.clients.cohort.functional import corrected
from flowerbed.clients.cohort.kernels import Kernel
from flowerbed.clients.cohort.optimizer import StackedOptimizer
from flowerbed.clients.cohort.refusal import overrides, uses_base_loss
from flowerbed.clients.cohort.result import Stacked, signature
from flowerbed.clients.cohort.schedule import Schedule, Tick
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import MODEL, Extras, LocalRound, Metric, Reply, Trained
from flowerbed.clients.store import ClientState
from flowerbed.errors import ClientError
from flowerbed.storage import Tensors

PRIVATE = "private"
"""The group of a client's state that holds its private parameters."""


@dataclass(frozen=True)
class Member:
    """A client of a block that is ready to train."""

    position: int
    local: LocalRound
    before: ClientState
    """Its state before ``begin``."""
    extras: Extras


@dataclass(frozen=True)
class Roles:
    """Names of the model's tensors by what happens to them."""

    moving: tuple[str, ...]
    """Parameters that training moves."""
    private: frozenset[str]


@dataclass
class _Totals:
    """What the steps of every client report, added up."""

    clients: int
    visits: list[int]
    """Samples that each client has visited."""
    sums: Tensors = field(default_factory=dict)
    counts: Tensors = field(default_factory=dict)

    def metrics(self, locals_: Sequence[LocalRound]) -> Mapping[str, Sequence[Metric]]:
        """Return what the clients report, K values under each name; the one wait for the device."""
        found: dict[str, Sequence[Metric]] = {
            "num-examples": [local.train_data.y.shape[0] for local in locals_],
            "steps": [local.clock.steps for local in locals_],
        }
        found.update({name: value.tolist() for name, value in self.counts.items()})
        for name, value in self.sums.items():
            found[name] = [s / n for s, n in zip(value.tolist(), self.visits, strict=True)]
        return found

    def add(self, found: Mapping[str, Tensor], tick: Tick) -> None:
        """Add what one tick reports: means over each client's batch, or counts."""
        active = tick.active
        self.visits = [v + size for v, size in zip(self.visits, tick.sizes)] + self.visits[active:]
        for name, value in found.items():
            floating = value.is_floating_point()
            if floating and value.dim() > 1:
                continue  # A by-product of the loss, which is for nobody here.
            place = self.sums if floating else self.counts
            if name not in place:
                place[name] = value.new_zeros(self.clients, *value.shape[1:])
            total = place[name][:active]
            if not floating:
                total.add_(value)
            elif tick.uniform:
                total.add_(value, alpha=tick.width)
            else:
                total.add_(value * value.new_tensor(tick.sizes))


@dataclass(frozen=True)
class _Done:
    """K trained models and what training reported."""

    tensors: Tensors
    """Parameters and buffers by name, ``(K, ...)``."""
    totals: _Totals


class BlockTrainer:
    """Trains blocks of clients of one half with one kernel."""

    def __init__(
        self,
        half: ClientHalf,
        model: nn.Module,
        roles: Roles,
        kernel: Kernel,
        sites: DropoutSites,
        fast: bool,
    ) -> None:
        """``fast`` draws dropout's masks in the fast way, where their probabilities allow it."""
        self._fast = fast and sites.coarse
        self._half, self._module, self._roles, self._kernel, self._sites = half, model, roles, kernel, sites
        self._resident: Tensors = dict(model.state_dict(keep_vars=True))
        self._parameters = dict(model.named_parameters())
        self._corrects, self._ends = overrides(half, "correct"), overrides(half, "end")

    def __call__(self, members: Sequence[Member]) -> list[Stacked]:
        """Train the clients, ordered by steps, and return what they send.

        One block, or one for each client where they send things that cannot be stacked. Raises whatever makes the
        block impossible; the clients' states are then to be put back.
        """
        with torch.no_grad():
            if not self._module.training:
                self._module.train()  # Some ``begin`` has looked at its model.
            done = self._train(members)
            for name, parameter in self._parameters.items():
                parameter.requires_grad_(name in self._roles.moving)
            result = self._answers(members, done)
            for k, member in enumerate(members):
                if self._roles.private:
                    member.local.state[PRIVATE] = {n: done.tensors[n][k] for n in sorted(self._roles.private)}
                member.local.optimizer_steps += member.local.clock.steps
        return result

    # Training.

    def _train(self, members: Sequence[Member]) -> _Done:
        locals_ = [member.local for member in members]
        params = locals_[0].local
        extras = StackedExtras.of([member.extras for member in members])
        tensors = self._start(locals_)
        optimizer = StackedOptimizer(params, tensors, self._roles.moving)
        fuse = self._kernel.fuses and not self._corrects and optimizer.plain
        drawing = generators(locals_, fast=self._fast) if self._sites else []
        totals = _Totals(len(locals_), [0] * len(locals_))
        active, now, own = 0, tensors, extras
        for tick in Schedule(locals_, columns=not uses_base_loss(self._half)):
            if tick.active != active:
                active = tick.active
                now = {name: value[:active] for name, value in tensors.items()}
                own = extras.first(active)
            masks = self._sites.draw(drawing, tick.sizes, tick.batch["x"].dtype)
            if fuse:
                totals.add({"loss": self._kernel.descend(now, tick, masks)}, tick)
                continue
            losses, metrics, gradients = self._kernel.gradients(now, tick, own, masks)
            if self._corrects:
                gradients = corrected(self._half, gradients, now, own)
            optimizer.step(now, gradients, tick.lr)
            totals.add({"loss": losses, **metrics}, tick)
        return _Done(tensors, totals)

    def _start(self, locals_: Sequence[LocalRound]) -> Tensors:
        """Return where the clients start."""
        starts = [start_of(local, self._resident, self._roles.private) for local in locals_]
        tensors: Tensors = {}
        for name, resident in self._resident.items():
            sources = [start[name] for start in starts]
            room = tensors[name] = self._kernel.empty(len(locals_), resident.detach())
            if all(source is sources[0] for source in sources):
                room.copy_(sources[0].expand(room.shape))
            else:
                for k, source in enumerate(sources):
                    room[k].copy_(source)
        return tensors

    # Answers.

    def _answers(self, members: Sequence[Member], done: _Done) -> list[Stacked]:
        """Return the models, or what every client's ``end`` makes of its own."""
        positions = [member.position for member in members]
        metrics = done.totals.metrics([member.local for member in members])
        model = {n: v for n, v in done.tensors.items() if n not in self._roles.private}
        if not self._ends:
            return [Stacked(positions, {MODEL: model}, metrics)]
        replies, unchanged = [], True
        for k, member in enumerate(members):
            found = {name: values[k] for name, values in metrics.items()}
            own = {n: v[k] for n, v in done.tensors.items()}
            streams, lent = self._ended(member, _trained(member.local, found, done.totals.counts), own)
            unchanged &= lent
            replies.append(Reply(streams, found))
        if any(signature(reply) != signature(replies[0]) for reply in replies):
            return [Stacked.of([p], [reply]) for p, reply in zip(positions, replies, strict=True)]
        if not unchanged:
            return [Stacked.of(positions, replies)]
        # What the clients send of their models is what they trained, which is stacked already.
        others = [Reply({s: v for s, v in r.streams.items() if s != MODEL}, r.metrics) for r in replies]
        return [Stacked(positions, {MODEL: model, **Stacked.of(positions, others).streams}, metrics)]

    def _ended(self, member: Member, trained: Trained, own: Tensors) -> tuple[dict[str, Tensors], bool]:
        """Return what a client's ``end`` sends, and whether the model in it is the trained one, untouched."""
        local, before = member.local, member.local.lent
        lent = {n: v for n, v in self._resident.items() if n not in self._roles.private}
        local.lent = lent
        self._module.train()
        with hosted(self._resident, own), torch.enable_grad():
            streams = self._half.end(local, trained, member.extras)
            # Detached here: the resident tensors are these values only inside.
            found = {s: {n: v.detach() for n, v in tensors.items()} for s, tensors in streams.items()}
        local.lent = before
        return found, streams.get(MODEL) is lent


@contextmanager
def hosted(resident: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the resident model's tensors be views of others meanwhile; nothing is copied."""
    own = {name: resident[name].data for name in tensors}
    try:
        for name, tensor in tensors.items():
            resident[name].data = tensor
        yield
    finally:
        for name, tensor in own.items():
            resident[name].data = tensor


def start_of(local: LocalRound, resident: Mapping[str, Tensor], private: frozenset[str]) -> Tensors:
    """Return where a client starts, by name: the received model with the private tensors from its own state.

    Raises ``ClientError`` if a tensor is missing or has another shape than in the ``resident`` model.
    """
    found: Tensors = dict(local.received.get(MODEL, {}))
    if private:
        initial = local.open_initial()
        found.update({n: initial[n] for n in private if n in initial})
        found.update(local.state.get(PRIVATE, {}))
    for name, target in resident.items():
        if name not in found:
            raise ClientError(f"the received model lacks '{name}'; server and client models differ")
        if found[name].shape != target.shape:
            raise ClientError(
                f"'{name}' arrived with shape {tuple(found[name].shape)}, this client's model has "
                f"{tuple(target.shape)}; server and client models differ"
            )
    return found


def _trained(local: LocalRound, found: Mapping[str, Metric], counts: Collection[str]) -> Trained:
    """Return what the training loop would have returned for a client."""
    clock = local.clock
    own = {name: value for name, value in found.items() if name not in ("num-examples", "steps")}
    return Trained(
        steps=clock.steps,
        examples=len(local.train_data),
        lr=local.local.lr_at(clock.all_steps[-1], clock.steps, clock.rounds),
        metrics={n: v for n, v in own.items() if n not in counts and isinstance(v, float)},
        counts={n: v for n, v in own.items() if n in counts},  # type: ignore[misc]
    )
