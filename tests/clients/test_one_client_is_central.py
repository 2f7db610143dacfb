"""One client, R rounds of E epochs = a plain PyTorch loop of R*E epochs, bit for bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flowerbed.datasets.sources import load_dataset
from flowerbed.experiments.simulation import simulate
from flowerbed.models.base import ModelSpec
from flowerbed.seeds import seed_sequence, torch_seed

ROUNDS, EPOCHS, BATCH = 3, 2, 128


def plain_loop(
    model: str, options: dict[str, Any], local: dict[str, Any], seed: int
) -> dict[str, torch.Tensor]:
    """Train centrally; nothing of the trainer is used, only the documented seeds and the model."""
    data = load_dataset("digits")
    x, y = data.prepare(data.train.inputs), data.train.labels
    net = ModelSpec(model, data.input_shape, data.num_classes, options).build(seed)
    lr, kind = local["lr"], local.get("optimizer", "sgd")
    if kind == "sgd":
        sgd = {k: local[k] for k in ("momentum", "nesterov", "weight_decay") if k in local}
        optimizer: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), lr=lr, **sgd)
    else:
        optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind](
            net.parameters(), lr=lr, weight_decay=local.get("weight_decay", 0.0)
        )
    steps_per_epoch = len(y) // BATCH if local.get("drop_last") else math.ceil(len(y) / BATCH)
    total, step = ROUNDS * EPOCHS * steps_per_epoch, 0
    torch.manual_seed(torch_seed(seed, "modules", 0))
    net.train()
    for epoch in range(ROUNDS * EPOCHS):
        order = np.random.Generator(np.random.PCG64(seed_sequence(seed, "data order", 0, epoch)))
        rows = torch.from_numpy(order.permutation(len(y)))
        for i in range(steps_per_epoch):
            batch = rows[i * BATCH : (i + 1) * BATCH]
            if local.get("schedule") == "cosine":
                optimizer.param_groups[0]["lr"] = 0.5 * lr * (1 + math.cos(math.pi * step / total))
            if local.get("schedule") == "exponential":
                optimizer.param_groups[0]["lr"] = lr * local["lr_decay"] ** (epoch // EPOCHS)
            loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            if local.get("clip_norm"):
                nn.utils.clip_grad_norm_(net.parameters(), local["clip_norm"])
            optimizer.step()
            step += 1
    return dict(net.state_dict())


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sgd": ("mlp", {}, {"lr": 0.1}),
    "momentum, decay": ("mlp", {}, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}),
    "nesterov, cosine": ("mlp", {}, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "schedule": "cosine"}),
    "exponential, clip": (
        "mlp",
        {},
        {"lr": 0.2, "schedule": "exponential", "lr_decay": 0.5, "clip_norm": 0.5},
    ),
    "adam": ("mlp", {}, {"lr": 1e-3, "optimizer": "adam"}),
    "adamw, drop last": (
        "mlp",
        {},
        {"lr": 1e-3, "optimizer": "adamw", "weight_decay": 0.01, "drop_last": True},
    ),
    "batch norm buffers": ("resnet8", {"norm": "bn"}, {"lr": 0.05, "momentum": 0.9}),
    "dropout": ("pfl_cnn", {}, {"lr": 0.05}),
}


@pytest.mark.parametrize("case", CASES)
def test_one_client_equals_the_plain_loop(case: str) -> None:
    model, options, local = CASES[case]
    result = simulate(
        dataset="digits",
        model={"name": model, **options},
        federation={"clients": 1, "rounds": ROUNDS},
        local={"epochs": EPOCHS, "batch_size": BATCH, "persist": True, **local},
        evaluation={"every": 0},
        seed=7,
        grid={"device": "cpu"},
    )
    expected = plain_loop(model, options, local, seed=7)
    assert result.model.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(result.model[name], value), name


def test_a_fresh_optimizer_each_round_is_something_else() -> None:
    """Guards the test above: without persist, momentum starts anew and the bits must differ."""

    def run(persist: bool) -> torch.Tensor:
        result = simulate(
            federation={"clients": 1, "rounds": 2},
            local={"momentum": 0.9, "persist": persist},
            evaluation={"every": 0},
        )
        return result.model["head.weight"]

    assert not torch.equal(run(True), run(False))
