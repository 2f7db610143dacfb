"""The bare loop, written plainly: what somebody writes who wants only the arithmetic.

One model, batches that are slices, ``torch.optim.SGD``, images as they come (NCHW), no tricks. ``bare`` puts the
global weights back before each client and keeps nothing of what it has trained: no federation. ``averaging`` is
the same with the mean of the clients' models as the next global model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.experiments.benchmarks.gate import Gate
from flowerbed.experiments.benchmarks.workload import MODELS, read_work, users


class Block(nn.Module):
    """Two 3x3 convolutions with group norm around a shortcut; a changed shape is subsampled and padded."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.stride = channels // channels_in
        self.padding = (channels - channels_in) // 2
        self.conv1 = nn.Conv2d(channels_in, channels, 3, self.stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(8, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(x + y)


def build(name: str) -> nn.Module:
    """Return the model called ``name`` in ``MODELS``, as a textbook writes it."""
    if name == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    if name == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10))
    if name == "leaf_cnn":
        return nn.Sequential(
            nn.Conv2d(1, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(3136, 512),
            nn.ReLU(),
            nn.Linear(512, 10),
        )
    if name == "pfl_cnn":
        return nn.Sequential(
            nn.Conv2d(3, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
            nn.Flatten(),
            nn.Linear(12544, 128),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(128, 10),
        )
    assert name == "resnet8", name
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.GroupNorm(8, 16),
        nn.ReLU(),
        Block(16, 16),
        Block(16, 32),
        Block(32, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def tensors(folder: Path, view: str, device: str) -> tuple[Tensor, Tensor]:
    """Return inputs ``(users, samples, ...)`` and labels ``(users, samples)`` on the device."""
    inputs, labels = users(folder, view)
    x = torch.from_numpy(inputs)
    # Touched once here, so that no round pays for mapping pages.
    x.sum()
    return x.to(device), torch.from_numpy(labels).to(device)


def run(gate: Gate, folder: Path, model: str, device: str, *, averaging: bool) -> dict[str, Any]:
    """Train round after round until the gate says that it is over."""
    work = read_work(folder)
    x, y = tensors(folder, MODELS[model].view, device)
    torch.manual_seed(0)
    net = build(model).to(device)
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=work.lr)
    parameters = list(net.parameters())
    start = [parameter.detach().clone() for parameter in parameters]
    round_ = 0
    gate.open()
    while True:
        total = [torch.zeros_like(value) for value in start]
        for i in range(work.cohort):
            user = (round_ * work.cohort + i) % work.users
            with torch.no_grad():
                for parameter, value in zip(parameters, start, strict=True):
                    parameter.copy_(value)
            for first in range(0, work.samples, work.batch):
                rows = slice(first, first + work.batch)
                optimizer.zero_grad()
                F.cross_entropy(net(x[user, rows]), y[user, rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            if averaging:
                with torch.no_grad():
                    for value, parameter in zip(total, parameters, strict=True):
                        value.add_(parameter)
        if averaging:
            start = [value / work.cohort for value in total]
        round_ += 1
        gate.passed()
