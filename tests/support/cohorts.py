"""Cohorts of clients on random data, and the comparison of what two engines make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flowerbed.clients.cohort import CohortEngine, CohortOptions
from flowerbed.clients.data import ClientData
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Clock, LocalRound, Reply
from flowerbed.clients.params import LocalParams
from flowerbed.models.base import ModelSpec
from flowerbed.models.info import ModelInfo
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import task_for

CPU = torch.device("cpu")


@dataclass
class Cohort:
    """Clients of one half that share a resident model; ``sizes`` are their numbers of samples."""

    model: str = "mlp"
    shape: tuple[int, ...] = (6,)
    classes: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)
    half: ClientHalf = field(default_factory=ClientHalf)
    local: LocalParams = field(default_factory=lambda: LocalParams(batch_size=4))
    sizes: Sequence[int] = (9, 4, 12, 7)
    dtype: torch.dtype = torch.float64
    task: str = "classification"
    module: nn.Module | None = None
    round: int = 2

    def __post_init__(self) -> None:
        spec = ModelSpec(self.model, self.shape, self.classes, self.options)
        self.net = (self.module or spec.build(1)).to(self.dtype)
        self.start = {name: value.detach().clone() for name, value in self.net.state_dict().items()}
        generator = torch.Generator().manual_seed(7)
        self.data = [self._samples(size, generator) for size in self.sizes]
        self.states: list[dict[str, dict[str, Tensor]]] = [{} for _ in self.sizes]

    def _samples(self, size: int, generator: torch.Generator) -> ClientData:
        if self.task == "next-token":
            tokens = torch.randint(0, self.classes, (size, self.shape[0] + 1), generator=generator)
            return ClientData(tokens[:, :-1], tokens[:, 1:], torch.arange(size), {})
        x = torch.randn(size, *self.shape, generator=generator, dtype=torch.float64).to(self.dtype)
        y = torch.randint(0, self.classes, (size,), generator=generator)
        return ClientData(x, y, torch.arange(size), {})

    def rounds(self) -> list[LocalRound]:
        """Open a round of every client, each with a state of its own."""
        return [self._open(k) for k in range(len(self.data))]

    def _open(self, k: int) -> LocalRound:
        data = self.data[k]
        return LocalRound(
            client=k, seed=5, clock=Clock(self.round, 4, self.local.steps_per_round(len(data))), phase="train",
            config={}, received={"arrays": self.start}, model=self.net, parts=ModelParts.resident(self.net),
            info=ModelInfo.of(self.net), task=task_for(self.task, self.classes), local=self.local,
            open_train=lambda: data, open_test=lambda: data, state=dict(self.states[k]), device=CPU,
            open_initial=lambda: self.start,
        )  # fmt: skip

    def engine(self, **options: Any) -> CohortEngine:
        info, task = ModelInfo.of(self.net), task_for(self.task, self.classes)
        return CohortEngine(
            self.half, self.net, info, task, self.local, CPU, options=CohortOptions(**options)
        )

    def alone(self) -> list[Reply]:
        """Return what every client answers by itself: the slow twin."""
        replies = []
        for local in self.rounds():
            local.load(self.start)
            replies.append(self.half.run(local))
        return replies

    def together(self, **options: Any) -> list[Reply]:
        return self.engine(**options).replies(self.rounds())


def assert_same(found: Sequence[Reply], wanted: Sequence[Reply], tolerance: float) -> None:
    """Every stream and metric agrees; tensors to ``tolerance`` of their largest value."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.streams.keys() == other.streams.keys()
        for stream, tensors in other.streams.items():
            assert one.streams[stream].keys() == tensors.keys()
            assert_close(one.streams[stream], tensors, tolerance)
        assert one.metrics.keys() == other.metrics.keys()
        for name, value in other.metrics.items():
            got, want = (torch.tensor(v, dtype=torch.float64) for v in (one.metrics[name], value))
            # Metrics add up in float32 there, whatever the model's type.
            torch.testing.assert_close(got, want, rtol=max(tolerance, 1e-6), atol=1e-7)


def assert_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float) -> None:
    """Tensors agree in shape, type and, to ``tolerance`` of their largest value, in value."""
    for name, value in wanted.items():
        got = found[name]
        assert got.shape == value.shape, name
        assert got.dtype == value.dtype, name
        if value.is_floating_point():
            scale = float(value.abs().max()) if value.numel() else 0.0
            error = float((got - value).abs().max()) if value.numel() else 0.0
            assert error <= tolerance * max(scale, 1e-6), f"{name} is off by {error} of {scale}"
        else:
            assert torch.equal(got, value), name


def raising(error: Exception) -> Callable[..., Any]:
    """Return a function that raises."""

    def function(*args: Any, **kwargs: Any) -> Any:
        raise error

    return function
