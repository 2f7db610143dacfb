"""The same loss for K clients by ``torch.func``: any model and any pure ``loss`` that vmap can handle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

from flowerbed.clients.cohort.compiled import Compiled
from flowerbed.clients.cohort.dropout import GivenMasks, Masks, Site
from flowerbed.clients.cohort.extras import StackedExtras
from flowerbed.clients.cohort.schedule import Tick
from flowerbed.clients.half import ClientHalf
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors

StackedGradients = tuple[Tensor, Tensors, Tensors]
"""Losses ``(A,)``, further scalars or counts ``(A, ...)``, and gradients ``(A, ...)`` by name."""


class VmapLoss:
    """Differentiates a half's loss at the stacked parameters of many clients."""

    def __init__(
        self,
        half: ClientHalf,
        model: nn.Module,
        task: Task,
        moving: Sequence[str],
        *,
        low: torch.dtype | None = None,
        compiled_for: torch.device | None = None,
    ) -> None:
        """The parameters in ``moving`` are differentiated.

        ``low`` is the type in which autocast computes the model, ``compiled_for`` the device to compile it for, if
        it shall be compiled.
        """
        self._half, self._model, self._task, self._low = half, model, task, low
        self._moving = tuple(moving)
        self._parameters = frozenset(name for name, _ in model.named_parameters())
        self._given = GivenMasks(model)
        self._step: Callable[..., StackedGradients] = self._differentiated
        if compiled_for is not None:
            self._step = Compiled(self._differentiated, compiled_for)

    def gradients(
        self,
        tensors: Mapping[str, Tensor],
        tick: Tick,
        extras: StackedExtras,
        sites: Mapping[int, Sequence[Site]],
        noises: Masks,
    ) -> StackedGradients:
        """Evaluate one tick; clients are evaluated together if their batches have the same size.

        ``tensors`` are all parameters and buffers, ``(A, ...)``; buffers are updated in place by layers that do
        so. ``sites`` are the calls of dropout by batch size, ``noises`` their masks.
        """
        if tick.uniform:
            return self._evaluate(tensors, tick.batch, extras, sites.get(tick.width, ()), noises)
        parts: list[tuple[Tensor, StackedGradients]] = []
        for size in sorted(set(tick.sizes), reverse=True):
            chosen = [k for k, own in enumerate(tick.sizes) if own == size]
            index = torch.tensor(chosen, device=tick.batch["y"].device)
            some = {n: v[index] for n, v in tensors.items()}
            batch = {n: v[index, :size] for n, v in tick.batch.items()}
            own_noises = [noises[k] for k in chosen] if noises else []
            found = self._evaluate(some, batch, extras.take(index), sites.get(size, ()), own_noises)
            for name in tensors.keys() - self._parameters:
                tensors[name][index] = some[name]
            if isinstance(self._step, Compiled):
                found = pytree.tree_map(torch.clone, found)  # The next call may write to the same place.
            parts.append((index, found))
        return _merged(parts, tick.active)

    def _evaluate(
        self,
        tensors: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        extras: StackedExtras,
        called: Sequence[Site],
        noises: Masks,
    ) -> StackedGradients:
        moving = {n: tensors[n] for n in self._moving}
        fixed = {n: v for n, v in tensors.items() if n not in moving}
        masks = [torch.stack([own[i] for own in noises]) for i in range(len(called))] if noises else []

        if isinstance(self._step, Compiled):
            # Slices of longer columns differ in their strides, for each of which code would be made.
            batch = {name: column.contiguous() for name, column in batch.items()}
        with self._given.in_place() if masks else nullcontext():
            return self._step(moving, fixed, dict(batch), extras, masks)

    def _differentiated(
        self,
        moving: Tensors,
        fixed: Tensors,
        batch: Tensors,
        extras: StackedExtras,
        masks: Sequence[Tensor],
    ) -> StackedGradients:
        def loss(
            moving: Tensors, fixed: Tensors, batch: Tensors, leaves: Sequence[Tensor], masks: Sequence[Tensor]
        ) -> tuple[Tensor, tuple[Tensor, Mapping[str, Tensor]]]:
            known = {**moving, **fixed}
            weights = {n: v for n, v in known.items() if n in self._parameters}
            buffers = {n: v for n, v in known.items() if n not in self._parameters}
            parts = ModelParts.functional(self._model, weights, buffers, low=self._low)
            self._given.left[:] = masks
            value, metrics = self._half.loss(parts, batch, extras.filled(leaves), self._task)
            return value, (value, dict(metrics))

        dims = (0, 0 if fixed else None, 0, extras.dims, 0 if masks else None)
        gradients, (losses, metrics) = vmap(grad(loss, has_aux=True), in_dims=dims, randomness="error")(
            moving, fixed, batch, extras.leaves, masks
        )
        return losses, metrics, gradients


def corrected(
    half: ClientHalf, gradients: Tensors, weights: Mapping[str, Tensor], extras: StackedExtras
) -> Tensors:
    """Return what ``correct`` makes of every client's gradients."""

    def one(gradients: Tensors, weights: Tensors, leaves: Sequence[Tensor]) -> Tensors:
        return dict(half.correct(gradients, weights, extras.filled(leaves)))

    with torch.no_grad():
        own = {name: weights[name] for name in gradients}
        found: Tensors = vmap(one, in_dims=(0, 0, extras.dims))(gradients, own, extras.leaves)
    return found


def _merged(parts: Sequence[tuple[Tensor, StackedGradients]], clients: int) -> StackedGradients:
    def joined(values: Sequence[Tensor]) -> Tensor:
        result = values[0].new_empty(clients, *values[0].shape[1:])
        for (index, _), value in zip(parts, values, strict=True):
            result[index] = value
        return result

    found = [one for _, one in parts]
    metrics = {n: joined([f[1][n] for f in found]) for n in found[0][1]}
    gradients = {n: joined([f[2][n] for f in found]) for n in found[0][2]}
    return joined([f[0] for f in found]), metrics, gradients
