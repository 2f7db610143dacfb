"""Work that can be counted instead of timed: the same on every machine, so that a test can hold it to a budget."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from flowerbed.experiments.benchmarks.competitors.flowerbed_side import merged
from flowerbed.experiments.simulation import simulate

Calls = Counter[str]


class OperatorCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the calls of torch operators below autograd, by name, in the thread that enters it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Calls = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count the call and make it."""
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operator_calls(run: Callable[[], object]) -> Calls:
    """Return how often ``run`` calls each torch operator."""
    counter = OperatorCounter()
    with counter:
        run()
    return counter.calls


def python_calls(run: Callable[[], object]) -> int:
    """Return how many functions ``run`` calls in this thread, of Python and of C."""
    count = 0

    def seen(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


def federation(clients: int, steps: int, more: Mapping[str, Mapping[str, Any]]) -> Callable[[], object]:
    """Return one round of so many clients and steps in process, with the further settings; a run to be counted."""
    settings = {
        "federation": {"clients": 8, "cohort": clients, "rounds": 1},
        "local": {"steps": steps, "batch_size": 10, "lr": 0.1},
        "evaluation": {"every": 0},
        "grid": {"device": "cpu"},
        "run": {"progress": False},
    }
    return lambda: simulate(**merged(settings, more))


def of_a_step(more: Mapping[str, Mapping[str, Any]]) -> Calls:
    """Return the operator calls of one client step: what each of five further steps adds."""
    few, many = (operator_calls(federation(1, steps, more)) for steps in (1, 6))
    return Counter({name: (many[name] - few[name]) // 5 for name in many if many[name] > few[name]})


def of_a_client(more: Mapping[str, Mapping[str, Any]]) -> Calls:
    """Return the operator calls of a client beside its steps: what each of four further clients adds."""
    few, many = (operator_calls(federation(clients, 1, more)) for clients in (2, 6))
    step = of_a_step(more)
    added = {name: (many[name] - few[name]) // 4 - step[name] for name in many}
    return Counter({name: count for name, count in added.items() if count > 0})


def of_a_plain_step(net: nn.Module, inputs: torch.Tensor) -> Calls:
    """Return the operator calls of a step of the bare loop: a slice, both passes, the optimizer of torch."""
    labels = torch.zeros(len(inputs), dtype=torch.int64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(inputs[:10]), labels[:10]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    step()
    return operator_calls(step)
