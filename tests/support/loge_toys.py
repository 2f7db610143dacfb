"""Parts of FedLoGe's tests that must be importable by name, also in Ray workers."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from flowerbed.clients.local_round import LocalRound, Reply
from flowerbed.models.base import Net
from flowerbed.strategies.fedloge import FedLoGeHalf, FedLoGeParams


def signed_net(input_shape: tuple[int, ...], num_classes: int) -> Net:
    """Return a network for 8x8 images whose 16 features lie in (-1, 1)."""
    return Net(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh()), nn.Linear(16, num_classes), 16)


class KillsItsWorkerOnce(FedLoGeHalf):
    """Takes its process down in round 2, the first time; afterwards a file says that it did."""

    def __init__(self, params: FedLoGeParams, marker: str) -> None:
        super().__init__(params)
        self.marker = marker

    def run(self, local: LocalRound) -> Reply:
        if local.clock.round == 2 and not Path(self.marker).exists():
            Path(self.marker).touch()
            os._exit(1)
        return super().run(local)
