"""A plain PyTorch loop over a description: what conformance compares one client with, bit for bit.

Nothing is trained through it. It shares with the federation only what is documented: the description, the seeds of data
order, weights and modules, and the learning rate at each step. A paper writes the central twin of an arm as a loss::

    def central(simulation):
        def loss(step): ...
        return central_run(simulation, loss)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowerbed import seeds
from flowerbed.errors import ConfigError, require
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.parts import build_parts
from flowerbed.storage import Tensors


@dataclass(frozen=True)
class CentralStep:
    """One optimizer step of a plain loop."""

    number: int
    """From 0."""
    epoch: int
    """From 0."""
    epochs: int
    """Of the whole run."""
    net: nn.Module
    x: Tensor
    y: Tensor
    rows: Tensor
    """Which samples these are, as positions in the training data."""
    examples: int
    """Training samples in all."""
    classes: int
    lr: float


Loss = Callable[[CentralStep], Tensor]
After = Callable[[CentralStep], None]


def central_run(
    simulation: Simulation,
    loss: Loss,
    *,
    before: Callable[[nn.Module], None] | None = None,
    after: After | None = None,
    decayed: Callable[[str], bool] | None = None,
) -> Tensors:
    """Train on all training data and return the state dict.

    ``before`` acts on the initial model, ``after`` follows every optimizer step, ``decayed`` says by name
    which parameters weight decay acts on (by default all). Raises ``ConfigError`` for settings
    that are not part of the plain loop (augmentation, several clients).
    """
    local, rounds = simulation.local, simulation.federation.rounds
    require(simulation.federation.clients == 1, "A central run has one client; set federation.clients=1.")
    if local.augment != "none" or not local.persist:
        raise ConfigError("A central run needs local.augment=none and local.persist=true.")
    parts = build_parts(simulation)
    data, chosen = parts.dataset, torch.from_numpy(parts.train.indices(0).copy())
    x, y = data.prepare(data.train.inputs[chosen]), data.train.labels[chosen]
    net = parts.spec.model.build(simulation.seed)
    if before is not None:
        before(net)
    optimizer = _optimizer(simulation, net, decayed or (lambda name: True))
    size = local.batch_size or len(y)
    per_epoch, per_round = local.batches_per_epoch(len(y)), local.steps_per_round(len(y))
    epochs = -(-rounds * per_round // per_epoch)
    net.train()
    with seeds.torch_stream(simulation.seed, "modules", 0):
        for number in range(rounds * per_round):
            epoch, place = divmod(number, per_epoch)
            rng = seeds.numpy_rng(simulation.seed, "data order", 0, epoch)
            drawn = local.replacement
            order = rng.integers(len(y), size=per_epoch * size) if drawn else rng.permutation(len(y))
            rows = torch.from_numpy(order)[place * size : (place + 1) * size]
            lr = local.lr_at(number, per_round, rounds)
            step = CentralStep(
                number, epoch, epochs, net, x[rows], y[rows], rows, len(y), data.num_classes, lr
            )
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            loss(step).backward()  # type: ignore[no-untyped-call]
            if local.clip_norm:
                torch.nn.utils.clip_grad_norm_(net.parameters(), local.clip_norm)
            optimizer.step()
            if after is not None:
                after(step)
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def _optimizer(
    simulation: Simulation, net: nn.Module, decayed: Callable[[str], bool]
) -> torch.optim.Optimizer:
    local = simulation.local
    groups = [
        {
            "params": [p for n, p in net.named_parameters() if decayed(n) == decays],
            "weight_decay": local.weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    if local.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=local.lr, momentum=local.momentum, nesterov=local.nesterov)
    if local.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=local.lr, momentum=local.momentum, eps=local.eps)
    kind = torch.optim.Adam if local.optimizer == "adam" else torch.optim.AdamW
    betas = (local.momentum or 0.9, local.beta2)
    return kind(groups, lr=local.lr, betas=betas, eps=local.eps)
