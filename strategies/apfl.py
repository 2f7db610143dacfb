"""APFL: a personal model that is a learned mixture of a local and the shared one.

Reference: Deng, Kamani and Mahdavi, "Adaptive Personalized Federated Learning", 2020, Algorithm 1.

Client k, each step, with the mixture m = alpha_k v_k + (1 - alpha_k) w:
           w   <- w   - eta grad F_k(w)
           v_k <- v_k - eta alpha_k grad F_k(m)      (the derivative of F_k(m) by v_k)
and once a round, at its start, if ``adaptive``:
           alpha_k <- clip(alpha_k - eta <v_k - w, grad F_k(m)>, 0, 1)   on the round's first batch.
Server:    FedAvg on w.

v_k starts from the run's initial model. Adapting alpha once a round, by plain gradient descent, keeps the
momentum and weight decay of ``local``, which act on w and v_k, away from it. (The FedTorch implementation
mixes outputs instead of parameters and adds a penalty; not here.) alpha = 0 is FedAvg; alpha = 1 is local
training, both with ``adaptive=false``. The mixture has BatchNorm statistics of its own.

Evaluated are the received model (``""``) and alpha_k v_k + (1 - alpha_k) w with the received w
(``personal``): after aggregation, before further local training. A client that never trained mixes the
initial model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf, Predictor
from flowerbed.clients.local_round import Extras, LocalRound, Trained
from flowerbed.clients.training import module_stream, own_batches
from flowerbed.errors import require
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors
from flowerbed.strategies.base import STRATEGIES
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams
from flowerbed.strategies.personal import PERSONAL, parts_of, personal_model, two_predictors

PREFIX = "personal "
MIXING = "mixing"


@dataclass(frozen=True)
class APFLParams(FedAvgParams):
    """FedAvg's parameters, for the shared model, and the mixture's."""

    alpha: float = 0.5
    """alpha_k at the start: the personal share of the mixture."""
    adaptive: bool = True
    """Whether clients adapt alpha."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.alpha <= 1, f"strategy.alpha is {self.alpha}; give a number in [0, 1].")


class APFLHalf(ClientHalf):
    """Trains the shared model and the personal one in the same steps."""

    stateful = True
    params: APFLParams

    def begin(self, local: LocalRound) -> Extras:
        stored = {n: v.to(local.device, copy=True) for n, v in personal_model(local).items()}
        parts = parts_of(local, stored)
        alpha = self._alpha(local)
        extras = {PERSONAL: dict(parts.parameters), "buffers": dict(parts.buffers), "alpha": alpha}
        if self.params.adaptive:
            first = local.clock.first_step
            batch = own_batches(local, local.local)(first)
            local.model.train()
            with module_stream(local, persist=False, scope=" mixing"):
                slope = self.slope(local.parts, batch, extras, local.task)
            lr = local.local.lr_at(first, local.clock.steps, local.clock.rounds)
            extras["alpha"] = (alpha - lr * slope).clamp(0, 1)
        return extras

    def further(self, extras: Extras) -> Tensors:
        return {PREFIX + name: value for name, value in extras[PERSONAL].items()}

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        shared, _ = super().loss(model, batch, extras, task)
        mixed = mixture(extras["alpha"], extras[PERSONAL], model.parameters)
        parts = ModelParts.functional(model.module, mixed, extras["buffers"])
        personal, _ = super().loss(parts, batch, extras, task)
        return shared + personal, {"shared-loss": shared, "personal-loss": personal}

    def slope(self, model: ModelParts, batch: Batch, extras: Extras, task: Task) -> Tensor:
        """Return ``<v - w, grad F(m)>``, the derivative of the mixture's loss by alpha."""
        alpha = extras["alpha"].clone().requires_grad_()
        # A forward pass of this kind must not count in the batch statistics.
        buffers = {name: value.clone() for name, value in extras["buffers"].items()}
        mixed = mixture(alpha, extras[PERSONAL], model.parameters)
        value, _ = super().loss(ModelParts.functional(model.module, mixed, buffers), batch, extras, task)
        (slope,) = torch.autograd.grad(value, [alpha])
        return slope

    def end(self, local: LocalRound, trained: Trained, extras: Extras) -> Mapping[str, Mapping[str, Tensor]]:
        kept = {**extras[PERSONAL], **extras["buffers"]}
        local.state[PERSONAL] = {name: value.detach().clone() for name, value in kept.items()}
        local.state[MIXING] = {"alpha": extras["alpha"]}
        return super().end(local, trained, extras)

    def predictors(self, local: LocalRound) -> Mapping[str, Predictor]:
        stored = personal_model(local)
        parts = parts_of(local, stored)
        mixed = mixture(self._alpha(local), parts.parameters, local.parts.parameters)
        return two_predictors(local, ModelParts.functional(local.model, mixed, parts.buffers))

    def _alpha(self, local: LocalRound) -> Tensor:
        stored = local.state.get(MIXING, {}).get("alpha")
        alpha = torch.tensor(self.params.alpha, dtype=torch.float64) if stored is None else stored
        return alpha.to(local.device)


def mixture(alpha: Tensor, personal: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensors:
    """Return ``alpha v + (1 - alpha) w`` by name; no gradient flows to w."""
    return {
        n: alpha.to(v.dtype) * v + (1 - alpha).to(v.dtype) * shared[n].detach() for n, v in personal.items()
    }


@STRATEGIES.register("apfl")
class APFL(FedAvg):
    """FedAvg on the shared model."""

    Params = APFLParams
    Half = APFLHalf
    params: APFLParams
