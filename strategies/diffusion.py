"""Diffusion models as federations: training one (DDPM), and collecting the centres of an exact one.

Used by name of class; what trains is a ``flowerbed.models.diffusion.DiffusionPrior``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import MODEL, Extras, LocalRound, Reply, Step, Trained
from flowerbed.errors import ClientError, ConfigError, require
from flowerbed.models.diffusion import DiffusionPrior, denoising_loss
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.pooling import Mean, Pooling
from flowerbed.storage import Tensors
from flowerbed.strategies.base import ClientReply, FederatedStrategy, Phase, Setting
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

EMA = "averaged weights"
"""Stream and server state: the exponential moving average of the weights over the steps."""
CENTRES = "centres"
EMPTY = -1


@dataclass(frozen=True)
class DdpmParams(FedAvgParams):
    """Hyper-parameters of the training of a noise predictor."""

    drop: float = 0.1
    """Share of the labels left out, so that one network predicts with and without them."""
    ema: float = 0.995
    """Weight of the past in the moving average of the weights, which is what is delivered; 0 means no average."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.drop <= 1, f"strategy.drop is {self.drop}; give a share, 0 to 1.")
        require(0 <= self.ema < 1, f"strategy.ema is {self.ema}; give at least 0, below 1.")


class DdpmHalf(ClientHalf):
    """Trains on the error of the predicted noise; goes on with the average that it is sent."""

    params: DdpmParams

    def begin(self, local: LocalRound) -> Extras:
        prior_of(local)
        if not self.params.ema:
            return {}
        sent = local.received.get(EMA) or {n: p.detach() for n, p in local.parts.parameters.items()}
        return {EMA: {name: value.to(local.device, copy=True) for name, value in sent.items()}}

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        prior = model.module
        assert isinstance(prior, DiffusionPrior)
        labels = batch["y"]
        if self.params.drop:
            left_out = torch.rand(labels.shape, device=labels.device) < self.params.drop
            labels = torch.where(left_out, prior.null, labels)
        return denoising_loss(model, prior.schedule, batch["x"], labels), {}

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        for name, average in step.extras.get(EMA, {}).items():
            average.lerp_(step.parts.parameters[name], 1 - self.params.ema)

    def end(self, local: LocalRound, trained: Trained, extras: Extras) -> Mapping[str, Mapping[str, Tensor]]:
        return {**super().end(local, trained, extras), **extras}


class Ddpm(FedAvg):
    """FedAvg over noise predictors; delivers the moving average of the weights."""

    Params = DdpmParams
    Half = DdpmHalf
    params: DdpmParams

    @property
    def pooled(self) -> Pooling | None:
        further: Pooling = {EMA: Mean(EMA, self.params.weighting)} if self.params.ema else {}
        return {MODEL: Mean(MODEL, self.params.weighting), **further}

    def broadcast(self, server_round: int) -> Mapping[str, Mapping[str, Tensor]]:
        return {EMA: self.state[EMA]} if EMA in self.state else {}

    def combine(
        self, server_round: int, current: Tensors, means: Mapping[str, Tensors], count: int
    ) -> Tensors:
        if self.params.ema:
            self.state[EMA] = dict(means[EMA])
        return super().combine(server_round, current, means, count)

    def deliver(self, model: Tensors) -> Tensors:
        return {**model, **self.state.get(EMA, {})}


@dataclass(frozen=True)
class CollectedParams:
    """A fit without settings."""


class CollectedHalf(ClientHalf):
    """Sends its samples as they are, in as many rows as the model has; those left over have the label -1."""

    def run(self, local: LocalRound) -> Reply:
        data, rows = local.train_data, local.received[MODEL]["labels"].shape[0]
        empty = max(0, rows - len(data))
        labels = F.pad(data.y[:rows], (0, empty), value=EMPTY)
        centres = torch.cat([data.x[:rows], data.x.new_zeros(empty, *data.x.shape[1:])])
        return Reply({CENTRES: {"centres": centres, "labels": labels}}, {"num-examples": len(data)})


class Collected(FederatedStrategy):
    """Makes an ``Empirical`` model of the samples of all clients in one round. They hand them over: no privacy."""

    Params = CollectedParams
    Half = CollectedHalf
    individual_replies = True

    def setup(self, setting: Setting) -> None:
        if not {"centres", "labels"} <= setting.info.shapes.keys():
            raise ConfigError("Samples are collected for the model 'Empirical' only; choose that one.")
        super().setup(setting)

    def phases(self, rounds: int) -> list[Phase]:
        return [Phase("train", rounds, everyone=True)]

    def aggregate(self, server_round: int, current: Tensors, replies: list[ClientReply]) -> Tensors:
        found = {
            name: torch.cat([reply.streams[CENTRES][name] for reply in replies])
            for name in ("centres", "labels")
        }
        there = found["labels"] != EMPTY
        found = {name: value[there] for name, value in found.items()}
        if len(found["labels"]) < len(current["labels"]):
            raise ConfigError(
                f"The clients have {len(found['labels'])} samples, the model needs {len(current['labels'])}; lower "
                "model.centres."
            )
        return {name: value[: len(current["labels"])] for name, value in found.items()}


def prior_of(local: LocalRound) -> DiffusionPrior:
    """Return the resident model; raises ``ClientError`` if it predicts no noise."""
    if not isinstance(local.model, DiffusionPrior):
        raise ClientError(
            f"{type(local.model).__name__} is no diffusion model; choose one of flowerbed.models.diffusion"
        )
    return local.model
