"""The two ways to compute a step of many clients, behind one interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from flowerbed.clients.cohort.dropout import DropoutSites, Masks
from flowerbed.clients.cohort.extras import StackedExtras
from flowerbed.clients.cohort.functional import StackedGradients, VmapLoss
from flowerbed.clients.cohort.fused import FusedStack, UnknownStackError
from flowerbed.clients.cohort.schedule import Tick

Now = Mapping[str, Tensor]
"""Parameters and buffers of the clients that are still active, ``(A, ...)`` by name."""


class Kernel(Protocol):
    """Computes one step of many clients."""

    fuses: bool
    """Whether ``descend`` can be used."""

    def empty(self, clients: int, like: Tensor) -> Tensor:
        """Return room for a parameter of every client, ``(K, ...)``, in the memory layout that suits."""

    def gradients(self, now: Now, tick: Tick, extras: StackedExtras, masks: Masks) -> StackedGradients:
        """Return losses, further scalars and gradients of every active client."""

    def descend(self, now: Now, tick: Tick, masks: Masks) -> Tensor:
        """Make one plain SGD step in place; return the losses."""


class FusedKernel:
    """The hand-written stack."""

    fuses = True

    def __init__(self, stack: FusedStack, moving: frozenset[str], sites: DropoutSites) -> None:
        self._stack, self._moving, self._sites = stack, moving, sites

    def empty(self, clients: int, like: Tensor) -> Tensor:
        if like.dim() != 4:
            return like.new_empty(clients, *like.shape)
        out, channels, height, width = like.shape
        return like.new_empty(clients, out, height, width, channels).permute(0, 1, 4, 2, 3)

    def gradients(self, now: Now, tick: Tick, extras: StackedExtras, masks: Masks) -> StackedGradients:
        losses, gradients = self._stack.gradients(now, self._moving, tick, self._placed(now, tick, masks))
        return losses, {}, gradients

    def descend(self, now: Now, tick: Tick, masks: Masks) -> Tensor:
        return self._stack.descend(now, self._moving, tick, self._placed(now, tick, masks))

    def _placed(self, now: Now, tick: Tick, masks: Masks) -> list[Tensor]:
        x = tick.batch["x"]
        if any(now[name].dtype != x.dtype for name in self._moving):
            raise UnknownStackError(f"parameters and samples ({x.dtype}) differ in type")
        if not masks:
            return []
        if not self._stack.calls(self._sites.of(tick.sizes[0])):
            raise UnknownStackError("its dropout layers are not called once each")
        return self._stack.place(masks, tick)


class VmapKernel:
    """Any loss that ``torch.func`` can differentiate for many clients at once."""

    fuses = False

    def __init__(self, loss: VmapLoss, sites: DropoutSites) -> None:
        self._loss, self._sites = loss, sites

    def empty(self, clients: int, like: Tensor) -> Tensor:
        return like.new_empty(clients, *like.shape)

    def gradients(self, now: Now, tick: Tick, extras: StackedExtras, masks: Masks) -> StackedGradients:
        sites = {size: self._sites.of(size) for size in set(tick.sizes)} if masks else {}
        with torch.enable_grad():
            return self._loss.gradients(now, tick, extras, sites, masks)

    def descend(self, now: Now, tick: Tick, masks: Masks) -> Tensor:
        raise NotImplementedError("torch.func makes gradients, it does not update")
