"""What ``begin`` returned for each client, stacked leaf by leaf."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowerbed.clients.local_round import Extras


class UnstackableError(Exception):
    """The clients' extras differ in more than the values of tensors."""


@dataclass(frozen=True)
class StackedExtras:
    """The extras of K clients: tensors apart from the structure that holds them."""

    template: Any
    leaves: tuple[Tensor, ...]
    """``(K, ...)``, or without the leading dimension where all clients hold the same values."""
    shared: tuple[bool, ...]

    @classmethod
    def of(cls, extras: Sequence[Extras]) -> StackedExtras:
        """Stack; raises ``UnstackableError`` if structures, shapes, types or plain values differ."""
        leaves: list[Tensor] = []
        shared: list[bool] = []
        template = _stack(list(extras), leaves, shared, "extras")
        return cls(template, tuple(leaves), tuple(shared))

    def first(self, active: int) -> StackedExtras:
        """Return the extras of the first clients."""
        return self._map(lambda leaf: leaf[:active])

    def take(self, index: Tensor) -> StackedExtras:
        """Return the extras of some clients."""
        return self._map(lambda leaf: leaf[index])

    def _map(self, function: Any) -> StackedExtras:
        leaves = [v if s else function(v) for v, s in zip(self.leaves, self.shared, strict=True)]
        return StackedExtras(self.template, tuple(leaves), self.shared)

    @property
    def dims(self) -> tuple[int | None, ...]:
        """Return the ``in_dims`` of the leaves for ``torch.func.vmap``."""
        return tuple(None if s else 0 for s in self.shared)

    def filled(self, leaves: Sequence[Tensor]) -> Any:
        """Return one client's extras, given its leaves."""
        return _fill(self.template, iter(leaves))


@dataclass(frozen=True)
class _Leaf:
    """Marks the place of a tensor."""


def _stack(values: list[Any], leaves: list[Tensor], shared: list[bool], path: str) -> Any:
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise UnstackableError(f"{path} is of another type at another client")
    if isinstance(first, Tensor):
        if any(v.shape != first.shape or v.dtype != first.dtype for v in values):
            raise UnstackableError(f"{path} has another shape or type at another client")
        same = all(v is first or torch.equal(v, first) for v in values[1:])
        leaves.append(first.detach() if same else torch.stack([v.detach() for v in values]))
        shared.append(same)
        return _Leaf()
    if isinstance(first, Mapping):
        if any(value.keys() != first.keys() for value in values):
            raise UnstackableError(f"{path} has other names at another client")
        return {n: _stack([v[n] for v in values], leaves, shared, f"{path}[{n!r}]") for n in first}
    if isinstance(first, list | tuple):
        if any(len(value) != len(first) for value in values):
            raise UnstackableError(f"{path} has another length at another client")
        parts = [_stack([v[i] for v in values], leaves, shared, f"{path}[{i}]") for i in range(len(first))]
        return parts if isinstance(first, list) else tuple(parts)
    if any(value is not first and value != first for value in values):
        raise UnstackableError(f"{path} is a plain value that differs between clients")
    return first


def _fill(template: Any, leaves: Iterator[Tensor]) -> Any:
    if isinstance(template, _Leaf):
        return next(leaves)
    if isinstance(template, dict):
        return {name: _fill(value, leaves) for name, value in template.items()}
    if isinstance(template, list):
        return [_fill(value, leaves) for value in template]
    if isinstance(template, tuple):
        return tuple(_fill(value, leaves) for value in template)
    return template
