"""The optimizers of local training on stacked parameters: torch's arithmetic, client by client in one go."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flowerbed.clients.params import LocalParams
from flowerbed.storage import Tensors


class StackedOptimizer:
    """SGD, Adam or AdamW for K clients that all begin at the same time and may end at different ones."""

    def __init__(self, params: LocalParams, weights: Mapping[str, Tensor], moving: Sequence[str]) -> None:
        """``weights`` are the ``(K, ...)`` parameters; those in ``moving`` are stepped."""
        self._params = params
        self._steps = 0
        self._state: dict[str, Tensors] = {}
        groups = ["momentum"] if params.optimizer == "sgd" and params.momentum else []
        if params.optimizer != "sgd":
            groups = ["mean", "square"]
        for group in groups:
            self._state[group] = {n: torch.zeros_like(weights[n]) for n in moving}

    @property
    def plain(self) -> bool:
        """Whether a step is ``w -= lr g`` and no more."""
        params = self._params
        return params.optimizer == "sgd" and not (params.momentum or params.weight_decay or params.clip_norm)

    def step(
        self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], lr: Sequence[float]
    ) -> None:
        """Move the active clients' ``weights`` (a prefix, in place) by their gradients, which may be overwritten."""
        params, active = self._params, len(lr)
        self._steps += 1
        if params.clip_norm:
            clip(gradients, params.clip_norm)
        for name, gradient in gradients.items():
            w = weights[name]
            rate = same(lr)
            if params.weight_decay and params.optimizer != "adamw":
                gradient = gradient.add(w, alpha=params.weight_decay)
            if params.optimizer == "sgd":
                move(w, self._momentum(name, gradient, active), lr)
                continue
            if params.weight_decay and params.optimizer == "adamw":
                if rate is not None:
                    w.mul_(1 - rate * params.weight_decay)
                else:
                    w.mul_(1 - params.weight_decay * column(lr, w))
            move(w, self._adam(name, gradient, active), lr)

    def _momentum(self, name: str, gradient: Tensor, active: int) -> Tensor:
        params = self._params
        if not params.momentum:
            return gradient
        velocity = self._state["momentum"][name][:active]
        velocity.mul_(params.momentum).add_(gradient)
        return gradient.add(velocity, alpha=params.momentum) if params.nesterov else velocity

    def _adam(self, name: str, gradient: Tensor, active: int) -> Tensor:
        beta_1, beta_2 = self._params.momentum or 0.9, self._params.beta2
        mean, square = (self._state[group][name][:active] for group in ("mean", "square"))
        mean.lerp_(gradient, 1 - beta_1)
        square.mul_(beta_2).addcmul_(gradient, gradient.conj(), value=1 - beta_2)
        size = math.sqrt(1 - beta_2**self._steps)
        return mean / (square.sqrt() / size).add_(self._params.eps) / (1 - beta_1**self._steps)


def clip(gradients: Mapping[str, Tensor], bound: float) -> None:
    """Scale each client's gradients in place to a joint norm of at most ``bound``, as ``clip_grad_norm_`` does."""
    norms = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients.values()]
    total = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    factor = (bound / (total + 1e-6)).clamp(max=1.0)
    for gradient in gradients.values():
        gradient.mul_(factor.to(gradient.dtype).view(-1, *[1] * (gradient.dim() - 1)))


def move(w: Tensor, direction: Tensor, lr: Sequence[float]) -> None:
    """Subtract ``lr`` times the direction, in place; each client has its own rate."""
    rate = same(lr)
    if rate is not None:
        w.add_(direction, alpha=-rate)
    else:
        w.sub_(direction * column(lr, w))


def same(values: Sequence[float]) -> float | None:
    """Return the value that all are, or None."""
    return values[0] if values.count(values[0]) == len(values) else None


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """Return one value a client, shaped to multiply a stacked tensor."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, *[1] * (like.dim() - 1))
