"""The local training loop: the only one. Algorithms and papers plug functions into it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowerbed import seeds
from flowerbed.clients.data import LABELLED, Batch, BatchOrder, ClientData
from flowerbed.clients.local_round import Extras, LocalRound, Step, Trained
from flowerbed.clients.params import LocalParams
from flowerbed.clients.store import ClientState
from flowerbed.datasets.augment import AUGMENTATIONS, Scale
from flowerbed.errors import ClientError
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors

Loss = Callable[[ModelParts, Batch, Extras, Task], tuple[Tensor, Mapping[str, Tensor]]]
Compute = Callable[[], tuple[Tensor, Mapping[str, Tensor]]]
"""Evaluates the loss of the current batch at the current parameters: (loss, further scalars)."""
Gradients = Mapping[str, Tensor | None]
StepGradients = tuple[Tensor, Mapping[str, Tensor], Gradients]
"""Loss, further scalars, and the gradient of each parameter (None where the loss does not depend on it)."""
Estimate = Callable[[Compute, Mapping[str, Tensor]], StepGradients]
Correct = Callable[[Tensors, Mapping[str, Tensor], Extras], Tensors]
AfterStep = Callable[[Step], None]
Batches = Callable[[int], Batch]

OPTIMIZER_GROUP = "optimizer"
GENERATOR_GROUP = "generator"


class TimeLimitError(ClientError):
    """The client ran out of the time that the server gave it."""


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
    scope: str = "",
) -> Trained:
    """Run optimizer steps on the resident model, in place.

    ``loss(parts, batch, extras, task)`` is differentiated in each step; of what it reports beside its value,
    integer tensors are counts and add up, others are averaged. Parameters named in ``frozen`` do not move;
    those in ``further`` (leaf tensors that the loss finds in ``extras``) move beside the model's, clipped apart
    from them. By default the steps are those of this round on the client's own batches: ``params``
    replaces the local parameters and brings a clock of its own, ``steps`` replaces the clocks, ``batches``
    (clock to batch) the data. With ``params.persist`` the optimizer state and the modules' random stream come
    from and return to ``local.state``; ``scope`` keeps several trainings of one round apart there.
    """
    clock, hooks, further = local.clock, hooks or Hooks(), further or {}
    if params is None:
        params = local.local
    else:
        clock = replace(clock, steps=params.steps_per_round(len(local.train_data)))
    steps = clock.all_steps if steps is None else steps
    own = {name: p for name, p in local.model.named_parameters() if name not in frozen}
    for name, parameter in local.model.named_parameters():
        parameter.requires_grad_(name in own)
    for tensor in further.values():
        tensor.requires_grad_()
    moving = {**own, **further}
    optimizer = make_optimizer(params, moving)
    if params.persist:
        restore_optimizer(optimizer, moving, local.state, scope)
    batches = batches or own_batches(local, params)
    totals: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    visits = 0
    lr = params.lr
    local.model.train()
    with module_stream(local, params.persist, scope):
        for index in steps:
            if local.deadline is not None and time.monotonic() > local.deadline:
                raise TimeLimitError(f"time limit exceeded after {index - steps.start} steps")
            batch = batches(index)
            lr = params.lr_at(index, clock.steps, clock.rounds)
            for group in optimizer.param_groups:
                group["lr"] = lr
            value, metrics = _set_gradients(local, loss, batch, extras, hooks, moving)
            if params.clip_norm:
                for tensors in (own, further):
                    torch.nn.utils.clip_grad_norm_(tensors.values(), params.clip_norm)
            optimizer.step()
            if hooks.after_step is not None:
                hooks.after_step(Step(index, lr, batch, local.parts, extras, local.task))
            # A step on unlabelled samples alone still counts.
            size = max(len(batch["y"]), 1)
            visits += size
            for name, found in {"loss": value, **metrics}.items():
                if found.is_floating_point():
                    before = totals.get(name, torch.zeros((), device=local.device))
                    totals[name] = before + found.detach() * size
                else:
                    counts[name] = counts[name] + found if name in counts else found
    local.optimizer_steps += len(steps)
    if params.persist:
        local.state.update(optimizer_state(optimizer, moving, scope))
    return Trained(
        steps=len(steps),
        examples=len(local.train_data),
        lr=lr,
        metrics={name: float(total) / visits for name, total in totals.items()},
        counts={name: count.tolist() for name, count in counts.items()},
    )


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

    def batch(step: int) -> Batch:
        found = data.batch(order.rows(step).to(local.device))
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


def _set_gradients(
    local: LocalRound, loss: Loss, batch: Batch, extras: Extras, hooks: Hooks, moving: Mapping[str, Tensor]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Leave in ``.grad`` what the optimizer shall use; return the loss and the further scalars."""

    def compute() -> tuple[Tensor, Mapping[str, Tensor]]:
        return loss(local.parts, batch, extras, local.task)

    value, metrics, gradients = (hooks.estimate or backpropagate)(compute, moving)
    if hooks.correct is not None:
        # A parameter that the loss does not touch has gradient zero, which a correction may move.
        full = {n: torch.zeros_like(p) if (g := gradients[n]) is None else g for n, p in moving.items()}
        with torch.no_grad():
            gradients = hooks.correct(full, moving, extras)
    for name, parameter in moving.items():
        parameter.grad = gradients[name]
    return value, metrics


def make_optimizer(params: LocalParams, moving: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """Return the optimizer of ``params`` over the named parameters."""
    parameters = list(moving.values())
    if not parameters:
        raise ClientError("every parameter is frozen, there is nothing to train")
    if params.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=params.lr,
            momentum=params.momentum,
            nesterov=params.nesterov,
            weight_decay=params.weight_decay,
        )
    kind = torch.optim.Adam if params.optimizer == "adam" else torch.optim.AdamW
    betas = (params.momentum or 0.9, 0.999)
    return kind(parameters, lr=params.lr, betas=betas, weight_decay=params.weight_decay)


def optimizer_state(
    optimizer: torch.optim.Optimizer, moving: Mapping[str, Tensor], scope: str = ""
) -> ClientState:
    """Return the optimizer's tensors as one group a field, each by parameter name."""
    groups: ClientState = {}
    for name, parameter in moving.items():
        for key, value in optimizer.state[parameter].items():
            if value is not None:
                groups.setdefault(f"{OPTIMIZER_GROUP}{scope}.{key}", {})[name] = torch.as_tensor(value)
    return groups


def restore_optimizer(
    optimizer: torch.optim.Optimizer, moving: Mapping[str, Tensor], state: ClientState, scope: str = ""
) -> None:
    """Put back what ``optimizer_state`` returned; does nothing where the client has no such state yet."""
    prefix = f"{OPTIMIZER_GROUP}{scope}."
    for group, tensors in state.items():
        if group.startswith(prefix):
            key = group.removeprefix(prefix)
            for name, value in tensors.items():
                if name in moving:
                    # Adam's step counter lives on the CPU whatever the device of the parameter.
                    device = "cpu" if key == "step" else moving[name].device
                    optimizer.state[moving[name]][key] = value.clone().to(device)


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
