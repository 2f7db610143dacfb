"""A second set of weights that follows the model slowly: the momentum encoder, or mean teacher.

    target <- tau target + (1 - tau) model        after every step, parameters; buffers are copied

It is a part of the client's state, so that a later round goes on with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowerbed.clients.local_round import LocalRound
from flowerbed.clients.store import ClientState
from flowerbed.models.parts import ModelParts
from flowerbed.storage import Tensors


@dataclass(frozen=True)
class MomentumModel:
    """The weights by name, and what can be done with them."""

    tensors: Tensors
    """Parameters and buffers."""

    @classmethod
    def open(cls, local: LocalRound, name: str, initial: Mapping[str, Tensor] | None = None) -> MomentumModel:
        """Return the client's model called ``name`` as its last round left it; at first it is ``initial``.

        By default it begins as the model that this round received.
        """
        begins = local.model.state_dict() if initial is None else initial
        found = local.state.get(group(name), begins)
        return cls({n: v.detach().to(local.device, copy=True) for n, v in found.items()})

    def view(self, model: ModelParts) -> ModelParts:
        """Return these weights in the module of ``model``, to compute with in the mode in which that is.

        What batch norm writes into its running statistics meanwhile is lost: ``follow`` copies the model's.
        """
        buffers = {n: self.tensors[n].clone() for n in model.buffers}
        parameters = {n: self.tensors[n] for n in model.parameters}
        return replace(ModelParts.functional(model.module, parameters, buffers), low=model.low)

    @torch.no_grad()
    def follow(self, model: ModelParts, tau: float) -> None:
        """Move the parameters by the share 1 - ``tau`` towards the model's, and copy its buffers."""
        for name, value in model.parameters.items():
            self.tensors[name].lerp_(value, 1 - tau)
        for name, value in model.buffers.items():
            self.tensors[name].copy_(value)

    def keep(self, state: ClientState, name: str) -> None:
        """Put it into the client's state, for its next round."""
        state[group(name)] = self.tensors


def group(name: str) -> str:
    """Return the group of the client's state that holds the momentum model called ``name``."""
    return f"momentum {name}"


def cosine_tau(tau: float, step: int, steps: int) -> float:
    """Return tau at a step of ``steps``, rising from ``tau`` to 1 on half a cosine (Grill et al. 2020, BYOL)."""
    return 1 - (1 - tau) * (math.cos(math.pi * step / steps) + 1) / 2
