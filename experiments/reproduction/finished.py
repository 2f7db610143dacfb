"""A run that is over, for a paper's own measures and pictures: what it was, what it delivered, what it kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from flowerbed.clients.store import ClientState, DiskStore
from flowerbed.datasets.dataset import Dataset
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.parts import Parts, build_parts
from flowerbed.experiments.run_directory import load_simulation
from flowerbed.server.callbacks import MetricsLog, Record
from flowerbed.storage import Tensors


@dataclass(frozen=True)
class Finished:
    """One arm with one seed."""

    arm: str
    seed: int
    directory: Path
    values: Mapping[str, float] = field(default_factory=dict)
    """Its figures so far, by metric."""

    @cached_property
    def simulation(self) -> Simulation:
        """Its description, with every option written out."""
        return load_simulation(self.directory)

    @cached_property
    def parts(self) -> Parts:
        """Everything that it was made of, built anew."""
        return build_parts(self.simulation)

    @property
    def dataset(self) -> Dataset:
        """Its data."""
        return self.parts.dataset

    @property
    def tensors(self) -> Tensors:
        """The delivered model: parameters and buffers by name."""
        return load_file(self.directory / "model.safetensors")

    @property
    def model(self) -> nn.Module:
        """The delivered model, in evaluation mode, on the CPU."""
        module = self.parts.spec.model.build(self.seed)
        module.load_state_dict(self.tensors)
        return module.eval()

    @property
    def records(self) -> list[Record]:
        """Every round's outcome."""
        return MetricsLog(self.directory / "metrics.jsonl").records()

    def client(self, number: int = 0) -> ClientState:
        """Return what a client kept at the end (memories, optimizer, private parts), as groups of named tensors."""
        return DiskStore(self.directory / "checkpoints" / "clients").read(number, 10**9)
