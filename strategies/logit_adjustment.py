"""Balanced softmax, or logit adjustment, in every client's training.

References: Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020, equation
(4); Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation (10).

Client k:  loss CE(z + tau log n, y) with logits z and class counts n; the outputs used to predict are z alone.
Server:    FedAvg.

``tau = 1`` is balanced softmax, ``tau = 0`` FedAvg, bit for bit. Counts of absent classes are taken as one,
as in the released code of FedETF: log 0 would silently forbid a class. Scaling all counts changes nothing.

Where n comes from is open in a federation. ``prior=local`` counts the client's own labels; nothing more is
sent. ``prior=global`` uses the sum over all clients that have answered so far, which costs their privacy C
numbers; until the first answers are in, round 1 trains without adjustment.

Evaluated is the received model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound, Trained
from flowerbed.errors import require
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.pooling import Pooling
from flowerbed.storage import Tensors
from flowerbed.strategies.base import STRATEGIES, ClientReply
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

COUNTS = "class counts"
CLIENTS = "class counts of clients"


def class_counts(labels: Tensor, num_classes: int) -> Tensor:
    """Return how often each class occurs in ``labels`` (any shape), float32 ``(C,)``."""
    return torch.bincount(labels.flatten(), minlength=num_classes).float()


def log_prior(counts: Tensor, tau: float = 1.0) -> Tensor:
    """Return what is added to the logits, ``tau log max(n, 1)``, of the shape of ``counts``."""
    return tau * counts.clamp(min=1).log()


@dataclass(frozen=True)
class LogitAdjustmentParams(FedAvgParams):
    """FedAvg's parameters and the adjustment."""

    tau: float = 1.0
    """Strength of the adjustment."""
    prior: str = "local"
    """Whose class counts: local or global."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tau >= 0, f"strategy.tau is {self.tau}; give 0 (FedAvg) or more.")
        require(
            self.prior in ("local", "global"), f"strategy.prior is '{self.prior}'; choose local or global."
        )


class LogitAdjustmentHalf(ClientHalf):
    """FedAvg's client with adjusted logits."""

    params: LogitAdjustmentParams

    def begin(self, local: LocalRound) -> Extras:
        own = class_counts(local.train_data.y, local.task.classes)
        used = own
        if self.params.prior == "global":
            known = local.received.get(COUNTS)
            used = torch.ones_like(own) if known is None else known["n"].to(own)
        return {"counts": own, "log prior": log_prior(used, self.params.tau)}

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return task.loss(model(batch["x"]) + extras["log prior"], batch["y"]).mean(), {}

    def end(self, local: LocalRound, trained: Trained, extras: Extras) -> Mapping[str, Mapping[str, Tensor]]:
        streams = super().end(local, trained, extras)
        return {**streams, COUNTS: {"n": extras["counts"]}} if self.params.prior == "global" else streams


@STRATEGIES.register("logit_adjustment")
class LogitAdjustment(FedAvg):
    """FedAvg that also adds up class counts where the prior is global."""

    Params = LogitAdjustmentParams
    Half = LogitAdjustmentHalf
    params: LogitAdjustmentParams

    def __init__(self, params: LogitAdjustmentParams | None = None) -> None:
        super().__init__(params)
        # A client's counts count once, however often it answers.
        self.individual_replies = self.params.prior == "global"

    @property
    def pooled(self) -> Pooling | None:
        return super().pooled

    def broadcast(self, server_round: int) -> Mapping[str, Mapping[str, Tensor]]:
        known = self.state.get(CLIENTS)
        return {COUNTS: {"n": torch.stack(list(known.values())).sum(0)}} if known else {}

    def aggregate(self, server_round: int, current: Tensors, replies: list[ClientReply]) -> Tensors:
        if self.params.prior == "global":
            known = self.state.setdefault(CLIENTS, {})
            known.update({str(r.node): r.streams[COUNTS]["n"].clone() for r in replies})
        return super().aggregate(server_round, current, replies)
