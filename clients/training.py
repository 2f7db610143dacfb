"""The local training loop: the only one. Algorithms and papers plug functions into it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from flowerbed import seeds
from flowerbed.clients.data import LABELLED, Batch, BatchOrder, BatchReader, ClientData
from flowerbed.clients.engine_rules import Gradients, clip, update_rule
from flowerbed.clients.local_round import Extras, LocalRound, Step, Trained
from flowerbed.clients.params import LocalParams
from flowerbed.datasets.augment import AUGMENTATIONS, Scale
from flowerbed.errors import ClientError
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors

Loss = Callable[[ModelParts, Batch, Extras, Task], tuple[Tensor, Mapping[str, Tensor]]]
Compute = Callable[[], tuple[Tensor, Mapping[str, Tensor]]]
"""Evaluates the loss of the current batch at the current parameters: (loss, further scalars)."""
StepGradients = tuple[Tensor, Mapping[str, Tensor], Gradients]
"""Loss, further scalars, and the gradient of each parameter (None where the loss does not depend on it)."""
Correct = Callable[[Tensors, Mapping[str, Tensor], Extras], Tensors]
AfterStep = Callable[[Step], None]
Batches = Callable[[int], Batch]

GENERATOR_GROUP = "generator"


class TimeLimitError(ClientError):
    """The client ran out of the time that the server gave it."""


@dataclass(slots=True)
class Evaluation:
    """The loss of one step's batch: call it for (loss, further scalars) where the parameters stand.

    What it is made of is there for estimates that evaluate it elsewhere, many at a time.
    """

    loss: Loss
    parts: ModelParts
    batch: Batch
    extras: Extras
    task: Task

    def __call__(self) -> tuple[Tensor, Mapping[str, Tensor]]:
        return self.loss(self.parts, self.batch, self.extras, self.task)

    def at(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the loss with ``tensors`` in place of the model's own of these names, parameters or buffers.

        Works under ``torch.func``. Buffers that are not named and that the model updates are updated.
        """
        buffers = {n: tensors.get(n, b) for n, b in self.parts.buffers.items()}
        parameters = {n: tensors.get(n, p) for n, p in self.parts.parameters.items()}
        moved = replace(self.parts, parameters=parameters, buffers=buffers, in_place=False)
        return self.loss(moved, self.batch, self.extras, self.task)[0]


Estimate = Callable[[Evaluation, Mapping[str, Tensor]], StepGradients]


@dataclass(frozen=True)
class Hooks:
    """The optional functions of a step, in the order in which they act; None costs nothing."""

    estimate: Estimate | None = None
    """Makes the gradients, in place of one backward pass."""
    correct: Correct | None = None
    """Edits the gradients, before clipping and the optimizer."""
    after_step: AfterStep | None = None
    """Acts on the model after the optimizer step."""


def train(
    local: LocalRound,
    loss: Loss,
    *,
    extras: Extras,
    hooks: Hooks | None = None,
    frozen: frozenset[str] = frozenset(),
    params: LocalParams | None = None,
    steps: range | None = None,
    batches: Batches | None = None,
    further: Mapping[str, Tensor] | None = None,
    decayed: Collection[str] | None = None,
    scope: str = "",
) -> Trained:
    """Run optimizer steps on the resident model, in place.

    ``loss(parts, batch, extras, task)`` is differentiated in each step; of what it reports beside its value,
    integer tensors are counts and add up, other scalars are averaged, and other tensors (by-products such as the
    outputs) go to ``after_step`` and no further. Parameters named in ``frozen`` do not move;
    those in ``further`` (leaf tensors that the loss finds in ``extras``) move beside the model's, clipped apart
    from them. Weight decay acts on what ``decayed`` names, by default on all. By default the steps are those of
    this round on the client's own batches: ``params`` replaces the local parameters and brings a clock of its own,
    ``steps`` replaces the clocks, ``batches`` (clock to batch) the data. With ``params.persist`` the optimizer state
    and the modules' random stream come from and return to ``local.state``; ``scope`` keeps several trainings of one
    round apart there.
    """
    clock, hooks, further = local.clock, hooks or Hooks(), further or {}
    if params is None:
        params = local.local
    else:
        clock = replace(clock, steps=params.steps_per_round(len(local.train_data)))
    steps = clock.all_steps if steps is None else steps
    own = {name: p for name, p in local.parts.parameters.items() if name not in frozen}
    for name, parameter in local.parts.parameters.items():
        parameter.requires_grad_(name in own)
    for tensor in further.values():
        tensor.requires_grad_()
    moving = {**own, **further}
    rule = update_rule(params, moving, decayed)
    if params.persist:
        rule.restore(local.state, scope)
    batches = batches or own_batches(local, params)
    if local.term is not None:
        loss = _with_term(loss, local.term)
    if local.estimate is not None and hooks.estimate is not None:
        raise ClientError(
            "the algorithm makes its gradients by itself, and so does a transform of the clients (defence=); they do "
            "not combine"
        )
    parts = replace(local.parts, low=torch.bfloat16) if params.precision == "bfloat16" else local.parts
    estimate = local.estimate or hooks.estimate
    fast = local.fast if hasattr(loss, ONE_CALL) and estimate is None else None
    estimate = estimate or backpropagate
    if fast is not None and rule.plain and hooks.correct is None and not (further or params.clip_norm):
        estimate = fast.descend
    reported = _Reported()
    lr = params.lr
    local.model.train()
    with contextlib.ExitStack() as stack:
        # Where nothing can draw, seeding for it and putting the generators back is spared.
        quiet = hasattr(loss, ONE_CALL) and hooks == Hooks() and isinstance(batches, BatchReader)
        if local.parts.draws or not quiet:
            stack.enter_context(module_stream(local, params.persist, scope))
        if fast is not None:
            stack.enter_context(fast.applied())
        for index in steps:
            if local.deadline is not None and time.monotonic() > local.deadline:
                raise TimeLimitError(f"time limit exceeded after {index - steps.start} steps")
            batch = batches(index)
            if local.alter is not None:
                batch = local.alter(batch, index)
            lr = params.lr_at(index, clock.steps, clock.rounds)
            if fast is not None:
                fast.lr = lr

            value, metrics, gradients = estimate(Evaluation(loss, parts, batch, extras, local.task), moving)
            if hooks.correct is not None:
                gradients = _corrected(hooks.correct, gradients, moving, extras)
            if params.clip_norm:
                for names in (own, further):
                    clip(gradients, names, params.clip_norm)
            rule.step(gradients, lr)
            if hooks.after_step is not None:
                products = {n: v.detach() for n, v in metrics.items() if v.ndim and v.is_floating_point()}
                hooks.after_step(Step(index, lr, batch, local.parts, extras, local.task, products))
            # A step on unlabelled samples alone still counts.
            reported.add(
                {"loss": value, **metrics} if metrics else {"loss": value}, max(batch["y"].shape[0], 1)
            )
    local.optimizer_steps += len(steps)
    if params.persist:
        local.state.update(rule.state(scope))
    return Trained(
        steps=len(steps),
        examples=len(local.train_data),
        lr=lr,
        metrics=reported.means(),
        counts={name: count.tolist() for name, count in reported.counts.items()},
    )


def _with_term(loss: Loss, term: Callable[[ModelParts], Tensor]) -> Loss:
    """Return the loss plus a term of the model alone."""

    def found(
        parts: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        value, metrics = loss(parts, batch, extras, task)
        return value + term(parts), metrics

    return found


@dataclass
class _Reported:
    """What the steps of a round reported, added up."""

    totals: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    visits: int = 0

    def add(self, found: Mapping[str, Tensor], size: int) -> None:
        """Add the scalars of one step on a batch of ``size`` samples."""
        self.visits += size
        for name, value in found.items():
            value = value.detach()
            if not value.is_floating_point():
                self.counts[name] = self.counts[name] + value if name in self.counts else value
            elif not value.ndim:
                if name in self.totals:
                    self.totals[name].add_(value, alpha=size)
                else:
                    self.totals[name] = value * size

    def means(self) -> dict[str, float]:
        """Return the means of the floating scalars over the samples."""
        return {name: float(total) / self.visits for name, total in self.totals.items()}


LossFunction = TypeVar("LossFunction", bound=Callable[..., object])
ONE_CALL = "of_one_call"


def of_one_call(loss: LossFunction) -> LossFunction:
    """Mark a loss that calls the model once, uses nothing else of it, and neither differentiates nor draws by itself.

    Only such a loss can be trained with the fast engine's layers; others are trained strictly. An override has to be
    marked anew.
    """
    setattr(loss, ONE_CALL, True)
    return loss


def own_batches(local: LocalRound, params: LocalParams) -> Batches:
    """Return the client's own batches: the documented order of its data, augmented as ``params`` say."""
    if LABELLED in local.train_data.extras and not bool(local.train_data.extras[LABELLED].all()):
        raise ClientError(
            "some of this client's samples have no label and the strategy uses every sample; use a "
            "semi-supervised strategy, or set data.labelled=1"
        )
    return batches_of(local, params, local.train_data)


def batches_of(local: LocalRound, params: LocalParams, data: ClientData, stream: str = "") -> Batches:
    """Return batches of ``data`` in the documented order, augmented as ``params`` say.

    Different ``stream`` names order and augment independently of each other.
    """
    order = BatchOrder(params, len(data), local.seed, local.client, f"data order{stream}")
    read = BatchReader(data, order)
    if params.augment == "none":
        return read

    def batch(step: int) -> Batch:
        found = read(step)
        found["x"] = view_of(local, found["x"], data.scale, params.augment, f"augment{stream}", step)
        return found

    return batch


def view_of(local: LocalRound, x: Tensor, scale: Scale, augmentation: str, purpose: str, step: int) -> Tensor:
    """Return the inputs ``x`` under the augmentation of that name, drawn from the step's own stream."""
    if augmentation == "none":
        return x
    rng = seeds.torch_rng(local.seed, purpose, local.client, step, device=local.device.type)
    return AUGMENTATIONS.get(augmentation)(x, rng, scale=scale)


def backpropagate(compute: Compute, parameters: Mapping[str, Tensor]) -> StepGradients:
    """Return loss, metrics and gradients by one backward pass."""
    value, metrics = compute()
    gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return value, metrics, dict(zip(parameters, gradients, strict=True))


@torch.no_grad()
def _corrected(
    correct: Correct, gradients: Gradients, moving: Mapping[str, Tensor], extras: Extras
) -> Gradients:
    """Return what ``correct`` makes of the gradients, zero for a parameter that the loss does not touch."""
    full = {n: torch.zeros_like(p) if (g := gradients[n]) is None else g for n, p in moving.items()}
    return correct(full, moving, extras)


@contextlib.contextmanager
def module_stream(local: LocalRound, persist: bool, scope: str = "") -> Iterator[None]:
    """Let modules such as dropout draw from this client's stream: torch's default generator is seeded.

    Without ``persist`` the stream starts anew each round; with it, it goes on where the client's last round
    ended. Afterwards torch's generators are as they were.
    """
    group = GENERATOR_GROUP + scope
    key = (local.client,) if persist else (local.client, local.clock.round)
    with seeds.torch_stream(local.seed, f"modules{scope}", *key, device=local.device):
        if persist and group in local.state:
            seeds.set_torch_states(local.state[group], local.device)
        yield
        if persist:
            local.state[group] = seeds.torch_states(local.device)
