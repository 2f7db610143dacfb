"""The local training loop: the only one. Algorithms and papers plug functions into it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from flowerbed import seeds
from flowerbed.clients.data import Batch, BatchOrder
from flowerbed.clients.local_round import Extras, LocalRound, Trained
from flowerbed.clients.params import LocalParams
from flowerbed.clients.store import ClientState
from flowerbed.datasets.augment import AUGMENTATIONS
from flowerbed.errors import ClientError
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors

Loss = Callable[[ModelParts, Batch, Extras, Task], tuple[Tensor, Mapping[str, Tensor]]]
Correct = Callable[[Tensors, Mapping[str, Tensor], Extras], Tensors]

OPTIMIZER_GROUP = "optimizer."
GENERATOR_GROUP = "generator"


class TimeLimitError(ClientError):
    """The client ran out of the time that the server gave it."""


def train(
    local: LocalRound,
    loss: Loss,
    *,
    extras: Extras,
    correct: Correct | None = None,
    frozen: frozenset[str] = frozenset(),
) -> Trained:
    """Run this round's optimizer steps on the resident model, in place.

    ``loss(parts, batch, extras, task)`` is differentiated in each step, ``correct`` (if given) edits the
    gradients before clipping and the optimizer, parameters named in ``frozen`` do not move. With
    ``local.local.persist`` the optimizer state and the modules' random stream come from and return to
    ``local.state``.
    """
    params, clock = local.local, local.clock
    examples = len(local.train_data)
    moving = {name: p for name, p in local.model.named_parameters() if name not in frozen}
    for name, parameter in local.model.named_parameters():
        parameter.requires_grad_(name in moving)
    optimizer = make_optimizer(params, moving)
    if params.persist:
        restore_optimizer(optimizer, moving, local.state)
    order = BatchOrder(params, examples, local.seed, local.client)
    augment = AUGMENTATIONS.get(params.augment)
    totals: dict[str, Tensor] = {}
    visits = 0
    lr = params.lr
    local.model.train()
    with module_stream(local):
        for step in range(clock.first_step, clock.first_step + clock.steps):
            if local.deadline is not None and time.monotonic() > local.deadline:
                raise TimeLimitError(f"time limit exceeded after {step - clock.first_step} steps")
            batch = local.train_data.batch(order.rows(step).to(local.device))
            if params.augment != "none":
                stream = seeds.torch_rng(local.seed, "augment", local.client, step, device=local.device.type)
                batch["x"] = augment(batch["x"], stream)
            lr = params.lr_at(step, clock.steps, clock.rounds)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            value, metrics = loss(local.parts, batch, extras, local.task)
            value.backward()  # type: ignore[no-untyped-call]
            if correct is not None:
                _correct_gradients(moving, correct, extras)
            if params.clip_norm:
                torch.nn.utils.clip_grad_norm_(moving.values(), params.clip_norm)
            optimizer.step()
            size = len(batch["y"])
            visits += size
            for name, scalar in {"loss": value, **metrics}.items():
                totals[name] = totals.get(name, torch.zeros((), device=local.device)) + scalar.detach() * size
    if params.persist:
        local.state.update(optimizer_state(optimizer, moving))
    return Trained(
        steps=clock.steps,
        examples=examples,
        lr=lr,
        metrics={name: float(total) / visits for name, total in totals.items()},
    )


def _correct_gradients(moving: Mapping[str, Tensor], correct: Correct, extras: Extras) -> None:
    gradients = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in moving.items()}
    with torch.no_grad():
        corrected = correct(gradients, moving, extras)
    for name, parameter in moving.items():
        parameter.grad = corrected[name]


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


def optimizer_state(optimizer: torch.optim.Optimizer, moving: Mapping[str, Tensor]) -> ClientState:
    """Return the optimizer's tensors as groups ``optimizer.<field>`` of parameter names."""
    groups: ClientState = {}
    for name, parameter in moving.items():
        for key, value in optimizer.state[parameter].items():
            if value is not None:
                groups.setdefault(OPTIMIZER_GROUP + key, {})[name] = torch.as_tensor(value)
    return groups


def restore_optimizer(
    optimizer: torch.optim.Optimizer, moving: Mapping[str, Tensor], state: ClientState
) -> None:
    """Put back what ``optimizer_state`` returned; does nothing where the client has no such state yet."""
    for group, tensors in state.items():
        if group.startswith(OPTIMIZER_GROUP):
            key = group.removeprefix(OPTIMIZER_GROUP)
            for name, value in tensors.items():
                if name in moving:
                    # Adam's step counter lives on the CPU whatever the device of the parameter.
                    device = "cpu" if key == "step" else moving[name].device
                    optimizer.state[moving[name]][key] = value.clone().to(device)


@contextlib.contextmanager
def module_stream(local: LocalRound) -> Iterator[None]:
    """Let modules such as dropout draw from this client's stream: torch's default generator is seeded.

    Without ``persist`` the stream starts anew each round; with it, it goes on where the client's last round
    ended. Afterwards torch's generators are as they were.
    """
    persist = local.local.persist
    key = (local.client,) if persist else (local.client, local.clock.round)
    with seeds.torch_stream(local.seed, "modules", *key, device=local.device):
        if persist and GENERATOR_GROUP in local.state:
            seeds.set_torch_states(local.state[GENERATOR_GROUP], local.device)
        yield
        if persist:
            local.state[GENERATOR_GROUP] = seeds.torch_states(local.device)
