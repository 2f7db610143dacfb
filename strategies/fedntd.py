"""FedNTD: not-true distillation, which preserves what the global model knows of other classes.

Reference: Lee et al., "Preservation of the Global Knowledge by Not-True Distillation in Federated Learning",
NeurIPS 2022, equations 4 and 5.

Client k, with logits z of the model in training and z_g of w_t (frozen), both without the true class:

    loss = cross entropy + beta T^2 mean( KL( softmax(z_g / T) || softmax(z / T) ) )

Server: as in FedAvg. beta = 0 is FedAvg bit for bit. The term does not depend on the logit of the true class,
and is zero where both models agree on the others; so its gradient is zero at w_t.

The teacher runs in evaluation mode. For token models every position is one sample of the mean.

Defaults: beta = 1 and T = 1, as in the released configurations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound
from flowerbed.clients.teacher import teacher
from flowerbed.errors import require
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.strategies.base import STRATEGIES
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams


@dataclass(frozen=True)
class FedNtdParams(FedAvgParams):
    """Hyper-parameters of FedNTD."""

    beta: float = 1.0
    """Weight of the distillation term."""
    temperature: float = 1.0
    """T."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta >= 0, f"strategy.beta is {self.beta}; give 0 (FedAvg) or more.")
        require(self.temperature > 0, f"strategy.temperature is {self.temperature}; give a number above 0.")


class FedNtdHalf(ClientHalf):
    """Local training with the global model as a teacher of the classes that a sample is not."""

    def begin(self, local: LocalRound) -> Extras:
        return {"global": local.received_model()} if self.params.beta else {}

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        if not extras:
            return super().loss(model, batch, extras, task)
        outputs = model(batch["x"])
        with teacher(model, extras["global"]) as shared:
            taught = shared(batch["x"])
        distilled = not_true_divergence(outputs, taught, batch["y"], self.params.temperature).mean()
        supervised = task.loss(outputs, batch["y"]).mean()
        return supervised + self.params.beta * self.params.temperature**2 * distilled, {
            "not-true-divergence": distilled
        }


@STRATEGIES.register("fedntd")
class FedNtd(FedAvg):
    """FedAvg's server."""

    Params = FedNtdParams
    Half = FedNtdHalf
    params: FedNtdParams


def not_true_divergence(outputs: Tensor, taught: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher || student) over the classes that a sample is not, in nats.

    ``outputs`` and ``taught`` are logits ``(..., C)``, ``labels`` int64 ``(...)``; the result is ``(...)``.
    """
    others = torch.arange(outputs.shape[-1] - 1, device=outputs.device)
    # Indices 0..C-2 with the true class skipped.
    index = others + (others >= labels.unsqueeze(-1)).long()
    student = F.log_softmax(outputs.gather(-1, index) / temperature, dim=-1)
    teaching = F.log_softmax(taught.gather(-1, index) / temperature, dim=-1)
    return F.kl_div(student, teaching, reduction="none", log_target=True).sum(-1)
