"""MOON: model-contrastive federated learning.

Reference: Li, He, Song, "Model-Contrastive Federated Learning", CVPR 2021, equations 3 and 4.

Client k, with features z of the model in training, z_g of w_t, and z_p of this client's own model at the end of
its last round (both frozen), for each sample:

    l_con = -log( e^{cos(z, z_g)/T} / (e^{cos(z, z_g)/T} + e^{cos(z, z_p)/T}) )
    loss  = cross entropy + mu mean(l_con)

Server: as in FedAvg. mu = 0 is FedAvg bit for bit. A client's first round has z_p = z_g, where l_con is log 2
whatever z is; its gradient is zero, and the round is FedAvg's.

Deviations: z is the input of the model's head. The paper puts a projection of two layers (256 outputs) before
the head; a model that has one inside its body has it here too. The two frozen models run in evaluation mode.
Client state is one whole model.

Defaults: mu = 1, the released code's; the paper tunes 0.1, 1, 5 and 10. T = 0.5 is the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound, Trained, shared_model
from flowerbed.clients.teacher import teacher
from flowerbed.errors import require
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.strategies.base import STRATEGIES, Setting
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

PREVIOUS = "previous"
"""Group of the client's own last model."""


@dataclass(frozen=True)
class MoonParams(FedAvgParams):
    """Hyper-parameters of MOON."""

    mu: float = 1.0
    """Weight of the contrastive term."""
    temperature: float = 0.5
    """T."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.mu >= 0, f"strategy.mu is {self.mu}; give 0 (FedAvg) or more.")
        require(self.temperature > 0, f"strategy.temperature is {self.temperature}; give a number above 0.")


class MoonHalf(ClientHalf):
    """Local training that pulls features to the global model's and away from the client's last ones."""

    stateful = True

    def begin(self, local: LocalRound) -> Extras:
        if not self.params.mu:
            return {}
        shared = local.received_model()
        previous = {n: w.to(local.device) for n, w in local.state.get(PREVIOUS, {}).items()}
        return {"global": shared, "previous": previous or shared}

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        if not extras:
            return super().loss(model, batch, extras, task)
        x = batch["x"]
        z = model.features(x)
        with teacher(model, extras["global"]) as shared:
            z_g = shared.features(x)
        with teacher(model, extras["previous"]) as own:
            z_p = own.features(x)
        contrast = contrastive_loss(z, z_g, z_p, self.params.temperature).mean()
        supervised = task.loss(model.head(z), batch["y"]).mean()
        return supervised + self.params.mu * contrast, {"contrastive": contrast}

    def end(self, local: LocalRound, trained: Trained, extras: Extras) -> Mapping[str, Mapping[str, Tensor]]:
        if extras:
            local.state[PREVIOUS] = shared_model(local, frozenset())
        return super().end(local, trained, extras)


@STRATEGIES.register("moon")
class Moon(FedAvg):
    """FedAvg's server."""

    Params = MoonParams
    Half = MoonHalf
    params: MoonParams

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        require(
            bool(setting.info.head),
            "MOON compares features, and this model has no head that would say where they end; choose a model "
            "of the zoo, or let your builder return flowerbed.models.base.Net(body, head, feature_dim).",
        )


def contrastive_loss(z: Tensor, z_g: Tensor, z_p: Tensor, temperature: float) -> Tensor:
    """Return l_con of each sample for features ``(..., D)``; shape ``(...)``."""
    # One product with the difference, so that equal references give exactly log 2 and the gradient zero.
    apart = F.normalize(z_p, dim=-1) - F.normalize(z_g, dim=-1)
    return F.softplus((F.normalize(z, dim=-1) * apart).sum(-1) / temperature)
