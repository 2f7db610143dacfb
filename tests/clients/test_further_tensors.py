"""Training moves further tensors beside the model's parameters, and a training may bring a clock of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
import worlds
from torch import Tensor

from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound
from flowerbed.clients.params import LocalParams
from flowerbed.clients.training import train
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors


class Shifted(ClientHalf):
    """Adds a trained number to all logits of class 0; its own gradient is large."""

    def begin(self, local: LocalRound) -> Extras:
        return {"shift": torch.zeros(())}

    def further(self, extras: Extras) -> Tensors:
        return {"shift": extras["shift"]}

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        plain, _ = super().loss(model, batch, extras, task)
        return plain + (extras["shift"] - 100.0) ** 2, {}


def test_they_move_by_the_same_optimizer() -> None:
    local = worlds.open_round(LocalParams(batch_size=0, lr=0.25, momentum=0.5, steps=2))
    half = Shifted()
    extras = half.begin(local)
    train(local, half.loss, extras=extras, further=half.further(extras))
    # Gradients 2 (s - 100): -200 moves s to 50 with momentum -200; then -100 + 0.5 * -200 = -200 again.
    assert float(extras["shift"].detach()) == pytest.approx(100.0)
    plain = worlds.open_round(LocalParams(batch_size=0, lr=0.25, momentum=0.5, steps=2))
    train(plain, ClientHalf().loss, extras={})
    assert worlds.equal(dict(local.model.state_dict()), dict(plain.model.state_dict()))


def test_a_round_hands_them_to_the_training() -> None:
    seen: list[float] = []

    class Watched(Shifted):
        def end(
            self, local: LocalRound, trained: object, extras: Extras
        ) -> Mapping[str, Mapping[str, Tensor]]:
            seen.append(float(extras["shift"].detach()))
            return {}

    Watched().run(worlds.open_round(LocalParams(batch_size=0, lr=0.25, steps=1)))
    assert seen == [50.0]


def test_they_are_clipped_apart() -> None:
    params = LocalParams(batch_size=0, lr=1.0, clip_norm=0.01, steps=1)
    local, plain = worlds.open_round(params), worlds.open_round(params)
    extras = Shifted().begin(local)
    train(local, Shifted().loss, extras=extras, further=dict(extras))
    train(plain, ClientHalf().loss, extras={})
    assert float(extras["shift"].detach()) == pytest.approx(0.01, rel=1e-4)
    assert worlds.equal(dict(local.model.state_dict()), dict(plain.model.state_dict()))


def test_their_optimizer_state_persists() -> None:
    local = worlds.open_round(LocalParams(batch_size=0, lr=0.1, momentum=0.9, persist=True))
    extras = Shifted().begin(local)
    train(local, Shifted().loss, extras=extras, further=dict(extras))
    assert float(local.state["optimizer.momentum_buffer"]["shift"]) == pytest.approx(-200.0)


def test_other_parameters_bring_a_clock_of_their_own() -> None:
    local = worlds.open_round(LocalParams(batch_size=5, schedule="cosine", lr=1.0))
    local.clock = replace(local.clock, round=2)
    seen: list[int] = []

    def batches(step: int) -> Batch:
        seen.append(step)
        return local.train_data.batch(slice(0, 5))

    longer = replace(local.local, epochs=2)
    trained = train(local, ClientHalf().loss, extras={}, params=longer, batches=batches)
    assert seen == list(range(8, 16))
    assert trained.lr == pytest.approx(0.5 * (1 + math.cos(math.pi * 15 / 40)))
