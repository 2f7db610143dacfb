"""How gradients move parameters in a local step: torch's optimizers, plain SGD without the object.

Both kinds keep their state by field and parameter name, in the groups that the client's store knows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from flowerbed.clients.params import LocalParams
from flowerbed.clients.store import ClientState
from flowerbed.errors import ClientError

Gradients = Mapping[str, Tensor | None]
"""The gradient of each parameter, None where the loss does not depend on it: such a parameter does not move."""

OPTIMIZER_GROUP = "optimizer"


class UpdateRule(Protocol):
    """Moves named parameters in place, once a step."""

    plain: bool
    """Whether a step is ``w -= lr g`` and no more."""

    def step(self, gradients: Gradients, lr: float) -> None:
        """Make one step."""

    def state(self, scope: str = "") -> ClientState:
        """Return the rule's tensors as one group a field, each by parameter name."""

    def restore(self, state: ClientState, scope: str = "") -> None:
        """Put back what ``state`` returned; does nothing where the client has no such state yet."""


def update_rule(
    params: LocalParams, moving: Mapping[str, Tensor], decayed: Collection[str] | None = None
) -> UpdateRule:
    """Return the rule of ``params`` for the named parameters; weight decay acts on those in ``decayed``, or on all."""
    if not moving:
        raise ClientError("every parameter is frozen, there is nothing to train")
    return (Sgd if params.optimizer == "sgd" else Adaptive)(params, moving, decayed)


class Sgd:
    """``torch.optim.SGD`` to the bit: the same operations in the same order, without its bookkeeping."""

    FIELD = "momentum_buffer"

    def __init__(
        self, params: LocalParams, moving: Mapping[str, Tensor], decayed: Collection[str] | None = None
    ) -> None:
        self._momentum, self._nesterov = params.momentum, params.nesterov
        self._weight_decay, self._decayed = params.weight_decay, decayed
        self.plain = not (params.momentum or params.weight_decay)
        self._moving = moving
        self._buffers: dict[str, Tensor] = {}

    def step(self, gradients: Gradients, lr: float) -> None:
        found = {name: g for name in self._moving if (g := gradients[name]) is not None}
        if found:
            weights = [self._moving[name] for name in found]
            with torch.no_grad():
                torch._foreach_add_(weights, self._directions(found, weights), alpha=-lr)

    def _directions(self, found: Mapping[str, Tensor], weights: list[Tensor]) -> list[Tensor]:
        """Return along what each parameter moves."""
        steps = list(found.values())
        if self._weight_decay and self._decayed is None:
            steps = list(torch._foreach_add(steps, weights, alpha=self._weight_decay))
        elif self._weight_decay:
            pairs = zip(found.items(), weights, strict=True)
            steps = [
                g.add(w, alpha=self._weight_decay) if n in (self._decayed or ()) else g for (n, g), w in pairs
            ]
        if not self._momentum:
            return steps
        buffers = self._accumulated(dict(zip(found, steps, strict=True)))
        return list(torch._foreach_add(steps, buffers, alpha=self._momentum)) if self._nesterov else buffers

    def _accumulated(self, steps: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the buffers after this step; a parameter's first step is its buffer."""
        known = {name: step for name, step in steps.items() if name in self._buffers}
        if known:
            kept = [self._buffers[name] for name in known]
            torch._foreach_mul_(kept, self._momentum)
            torch._foreach_add_(kept, list(known.values()))
        for name, step in steps.items():
            if name not in known:
                self._buffers[name] = step.clone()
        return [self._buffers[name] for name in steps]

    def state(self, scope: str = "") -> ClientState:
        return {f"{OPTIMIZER_GROUP}{scope}.{self.FIELD}": dict(self._buffers)} if self._buffers else {}

    def restore(self, state: ClientState, scope: str = "") -> None:
        kept = state.get(f"{OPTIMIZER_GROUP}{scope}.{self.FIELD}", {})
        self._buffers = {n: kept[n].clone().to(p.device) for n, p in self._moving.items() if n in kept}


class Adaptive:
    """``torch.optim.Adam``, ``AdamW`` or ``RMSprop``."""

    plain = False

    def __init__(
        self, params: LocalParams, moving: Mapping[str, Tensor], decayed: Collection[str] | None = None
    ) -> None:
        self._moving = moving
        spared = [p for n, p in moving.items() if decayed is not None and n not in decayed]
        groups: list[dict[str, Any]] = [
            {"params": [p for n, p in moving.items() if decayed is None or n in decayed]}
        ]
        if spared:
            groups.append({"params": spared, "weight_decay": 0.0})
        decay = params.weight_decay
        self._optimizer: torch.optim.Optimizer
        if params.optimizer == "rmsprop":
            self._optimizer = torch.optim.RMSprop(
                groups, lr=params.lr, momentum=params.momentum, weight_decay=decay, eps=params.eps
            )
        else:
            kind = torch.optim.Adam if params.optimizer == "adam" else torch.optim.AdamW
            betas = (params.momentum or 0.9, params.beta2)
            self._optimizer = kind(groups, lr=params.lr, betas=betas, weight_decay=decay, eps=params.eps)

    def step(self, gradients: Gradients, lr: float) -> None:
        for name, parameter in self._moving.items():
            parameter.grad = gradients[name]
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        for parameter in self._moving.values():
            parameter.grad = None

    def state(self, scope: str = "") -> ClientState:
        groups: ClientState = {}
        for name, parameter in self._moving.items():
            for key, value in self._optimizer.state[parameter].items():
                groups.setdefault(f"{OPTIMIZER_GROUP}{scope}.{key}", {})[name] = torch.as_tensor(value)
        return groups

    def restore(self, state: ClientState, scope: str = "") -> None:
        prefix = f"{OPTIMIZER_GROUP}{scope}."
        for group, tensors in state.items():
            if group.startswith(prefix):
                key = group.removeprefix(prefix)
                for name, value in tensors.items():
                    if name in self._moving:
                        parameter = self._moving[name]
                        # The step counter lives on the CPU whatever the device of the parameter.
                        device = "cpu" if key == "step" else parameter.device
                        self._optimizer.state[parameter][key] = value.clone().to(device)


@torch.no_grad()
def clip(gradients: Gradients, names: Mapping[str, object], bound: float) -> None:
    """Scale the gradients of ``names``, in place, to a common norm of at most ``bound``, as torch does it."""
    found = [g for name in names if (g := gradients[name]) is not None]
    if found:
        norm = torch.nn.utils.get_total_norm(found)
        torch._foreach_mul_(found, torch.clamp(bound / (norm + 1e-6), max=1.0))
