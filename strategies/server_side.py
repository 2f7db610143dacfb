"""What a server half needs to train by itself: samples of its own, and the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from flowerbed.clients.app import choose_device
from flowerbed.clients.data import ClientData
from flowerbed.clients.local_round import MODEL, Clock, LocalRound
from flowerbed.clients.params import LocalParams
from flowerbed.datasets.dataset import Dataset
from flowerbed.models.base import ModelSpec
from flowerbed.models.info import ModelInfo
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task, task_for


@dataclass(frozen=True)
class ServerSide:
    """The server as one more participant, numbered after the last client, with the same ``train``."""

    seed: int
    client: int
    """The number under which it draws its random streams: that of the clients (N)."""
    model: ModelSpec
    dataset: Dataset
    samples: npt.NDArray[np.int64]
    """Rows of the training split that only the server has (``data.server_per_class``), labels seen; may be none."""
    device: str = "auto"

    @cached_property
    def data(self) -> ClientData:
        """The server's own samples."""
        return ClientData.view(self.dataset, self.dataset.train, self.samples, choose_device(self.device))

    @property
    def task(self) -> Task:
        """What the model is trained for."""
        return task_for(self.dataset.task, self.dataset.num_classes)

    def open(self, model: Mapping[str, Tensor], local: LocalParams, round_: int, rounds: int) -> LocalRound:
        """Return a local round on the server's samples, its resident model holding ``model``.

        ``round_`` of ``rounds`` decides data order and learning rates, as for a client. ``state`` is empty.
        """
        device = choose_device(self.device)
        received = {MODEL: dict(model)}
        opened = LocalRound(
            client=self.client,
            seed=self.seed,
            clock=Clock(round_, rounds, local.steps_per_round(len(self.samples))),
            phase="server",
            config={},
            received=received,
            model=self._module,
            parts=ModelParts.resident(self._module),
            info=ModelInfo.of(self._module),
            task=self.task,
            local=local,
            open_train=lambda: self.data,
            open_test=lambda: self.data.take(torch.empty(0, dtype=torch.int64, device=device)),
            state={},
            device=device,
        )
        opened.load(model)
        return opened

    @cached_property
    def _module(self) -> nn.Module:
        return self.model.build(self.seed).to(choose_device(self.device))
