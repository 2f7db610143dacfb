"""pFedMe: personal models by Moreau envelopes.

Reference: Dinh, Tran and Nguyen, "Personalized Federated Learning with Moreau Envelopes", NeurIPS 2020,
equations (2) to (4), Algorithm 1.

Client k, from w_k = w_t, for each of the round's S steps (one batch each):
           theta_k ~ argmin_theta f_k(theta; batch) + lambda/2 ||theta - w_k||^2, by K steps of the local optimizer;
           w_k <- w_k - eta lambda (w_k - theta_k).
Server:    w_{t+1} = (1 - beta) w_t + beta mean_k w_k, over the replies, uniformly; beta is ``server_lr``.

theta starts a round at w_t and each inner problem where the last one ended, as in the released code, which also
takes one batch for each w-step. The paper tunes its parameters; the defaults are of the size that it uses, with an
inner rate (``local.lr``) below 0.1. A round costs K S gradients; a learning-rate schedule applies to the inner
steps. The inner problem's curvature is at least lambda, so an inner rate above 2 / lambda diverges and one near
1 / lambda is fast. BatchNorm statistics travel with w_k.

Evaluated are the received model (``""``) and theta_k as the client's last training left it (``personal``); a
client that never trained has the run's initial model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowerbed.clients.half import ClientHalf, Predictor
from flowerbed.clients.local_round import MODEL, Extras, LocalRound, Reply, Step
from flowerbed.clients.training import own_batches, train
from flowerbed.errors import require
from flowerbed.storage import Tensors
from flowerbed.strategies.base import STRATEGIES, Setting
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams
from flowerbed.strategies.personal import PERSONAL, parts_of, personal_model, two_predictors, whole_model


@dataclass(frozen=True)
class PFedMeParams(FedAvgParams):
    """The server's parameters (``server_lr`` is the paper's beta) and the envelope's."""

    weighting: str = "uniform"
    lambda_: float = 15.0
    """lambda: pull of the personal model theta towards w_k."""
    eta: float = 0.005
    """Step size of w_k."""
    K: int = 5
    """Optimizer steps for each personal model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lambda_ > 0, f"strategy.lambda_ is {self.lambda_}; give a number above 0.")
        require(self.eta > 0, f"strategy.eta is {self.eta}; give a number above 0.")
        require(self.K >= 1, f"strategy.K is {self.K}; give at least 1.")


class PFedMeHalf(ClientHalf):
    """Trains theta in the resident model and moves w beside it."""

    stateful = True
    params: PFedMeParams

    def run(self, local: LocalRound) -> Reply:
        inner, outer = self.params.K, local.parameters()
        batches = own_batches(local, local.local)
        trained = train(
            local,
            self.loss,
            extras={"w": outer},
            hooks=self.hooks(),
            params=replace(local.local, steps=inner * local.clock.steps),
            batches=lambda step: batches(step // inner),
        )
        local.state[PERSONAL] = whole_model(local)
        metrics = {"num-examples": trained.examples, "steps": trained.steps, **trained.metrics}
        return Reply({MODEL: {**local.state[PERSONAL], **outer}}, metrics)

    def correct(self, gradients: Tensors, parameters: Mapping[str, Tensor], extras: Extras) -> Tensors:
        w = extras["w"]
        return {n: g + self.params.lambda_ * (parameters[n] - w[n]) for n, g in gradients.items()}

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        if (step.index + 1) % self.params.K == 0:
            rate = self.params.eta * self.params.lambda_
            for name, w in step.extras["w"].items():
                w.sub_(w - step.parts.parameters[name], alpha=rate)

    def predictors(self, local: LocalRound) -> Mapping[str, Predictor]:
        return two_predictors(local, parts_of(local, personal_model(local)))


@STRATEGIES.register("pfedme")
class PFedMe(FedAvg):
    """The server's step with beta is FedAvg's with a server learning rate."""

    Params = PFedMeParams
    Half = PFedMeHalf
    params: PFedMeParams

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        lr, lambda_ = setting.local.lr, self.params.lambda_
        require(
            setting.local.optimizer != "sgd" or lr * lambda_ < 2,
            f"pFedMe's inner steps diverge with local.lr={lr} and strategy.lambda_={lambda_}, whose product must "
            f"stay below 2; give local.lr a value near {1 / lambda_:.2g}.",
        )
