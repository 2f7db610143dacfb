"""Metrics of one's own: functions of the evaluated model, by import path in ``evaluation.measures``.

A measure takes a ``Measured`` and returns numbers by name, which stand in the records of the server's evaluations
beside accuracy and loss: in curves, tables, early stopping and claims alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.errors import ConfigError
from flowerbed.models.compact import compacted
from flowerbed.models.info import ModelInfo, parameter_count
from flowerbed.models.sparsity import multiply_adds, prunable, sparsity_of
from flowerbed.registry import import_attribute

BATCH = 512
TIMED = 1.0
"""Seconds for which a call is repeated, at least."""


@dataclass(frozen=True)
class Measured:
    """What a measure may look at. It changes nothing."""

    model: nn.Module
    """The delivered model, in evaluation mode, on ``device``."""
    dataset: Dataset
    seed: int
    """The run's, for streams of ``flowerbed.seeds``."""
    device: torch.device

    @torch.no_grad()
    def outputs(self, split: Split | None = None) -> tuple[Tensor, Tensor]:
        """Return the outputs of a split (by default the test set), ``(N, ...)``, and its labels, on the CPU."""
        split = self.dataset.test if split is None else split
        return torch.cat([self.model(x).cpu() for x in self.batches(split)]), split.labels

    def batches(self, split: Split) -> Iterator[Tensor]:
        """Yield the prepared inputs of a split in order, on the device."""
        for start in range(0, len(split), BATCH):
            yield self.dataset.prepare(split.inputs[start : start + BATCH].to(self.device))


Measure = Callable[[Measured], Mapping[str, float]]


def load(paths: Sequence[str]) -> list[Measure]:
    """Import the measures; raises ``ConfigError`` that says which one cannot be."""
    return [import_attribute(path, "measure") for path in paths]


def add(found: dict[str, Any], measures: Sequence[Measure], measured: Measured) -> dict[str, Any]:
    """Return ``found`` with what the measures say; raises ``ConfigError`` if two metrics share a name."""
    for measure in measures:
        for name, value in measure(measured).items():
            if name in found:
                raise ConfigError(
                    f"The metric '{name}' is measured twice; rename that of {measure.__name__}."
                )
            found[name] = float(value)
    return found


def sparsity(measured: Measured) -> dict[str, float]:
    """Return how sparse the prunable weights are, the emptiest layer's weights, and multiply-adds left (share)."""
    state = measured.model.state_dict()
    weights = {name: state[name] for name in prunable(ModelInfo.of(measured.model))}
    x = measured.dataset.prepare(measured.dataset.test.inputs[:1].to(measured.device))
    kept, whole = multiply_adds(measured.model, x)
    return {
        "sparsity": sparsity_of({name: w != 0 for name, w in weights.items()}),
        "emptiest-layer": min(float((w != 0).sum()) for w in weights.values()),
        "multiply-adds-left": kept / whole,
    }


def latency(measured: Measured) -> dict[str, float]:
    """Return what a batch of test samples takes, in milliseconds, with the channels that are zero and without, and the
    share of parameters without.

    A time is the median of repeated calls on the run's device, one thread on a CPU. It depends on the machine.
    """
    x = next(measured.batches(measured.dataset.test))
    small = compacted(measured.model, x)
    return {
        "latency-ms": _milliseconds(measured.model, x),
        "compact-latency-ms": _milliseconds(small, x),
        "parameters-left": parameter_count(small) / parameter_count(measured.model),
    }


def _milliseconds(model: nn.Module, x: Tensor) -> float:
    # Only here: its import takes time that every start of a run would pay.
    from torch.utils.benchmark import Timer

    with torch.no_grad():
        timer = Timer("model(x)", globals={"model": model, "x": x})
        return 1000 * timer.blocked_autorange(min_run_time=TIMED).median
