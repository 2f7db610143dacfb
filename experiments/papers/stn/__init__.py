"""Self-Tuning Networks: Bilevel Optimization of Hyperparameters using Structured Best-Response Functions (STN).

MacKay, Vicol, Lorraine, Duvenaud and Grosse, ICLR 2019, arXiv 1903.03088. Regularisation is tuned by gradient descent
while the network trains once. f is the training loss with regularisation, F the validation loss without any:

    lambda* = argmin F(lambda, w*(lambda)),    w*(lambda) = argmin_w f(lambda, w)

The weights become a compact function of the hyperparameters, the local best response (``flowerbed.models.gated``),

    w_phi(lambda): y = W x + b + (V lambda) * (U x) + (C lambda) * c

and two steps alternate, after a warm-up of the first alone:

    1. phi:             f(w_phi(lambda + eps), lambda + eps), an eps ~ N(0, diag(sigma^2)) for each sample
    2. lambda, sigma:   F(w_phi(lambda + eps)) - tau H,  H = sum_j log(sigma_j sqrt(2 pi e)), phi fixed, no dropout

Rates are functions r(lambda) of unconstrained numbers; lambda gets its gradient through the gates alone, never through
a dropout mask, so that even whole numbers can be tuned. ``tau`` keeps sigma from collapsing, where the response would
be flat, and a wide sigma biases lambda.

Why gates: for y = s . Q x with penalty e^lambda ||dy/dx||^2, in the principal axes of the inputs (X^T X = diag(d_j^2)),
the exact response is s_j(lambda) = s_j(-inf) sigmoid(log(d_j^2 / N) - lambda), a gate for each unit.

``ridge-*`` is this without any training noise: on ridge regression with penalty e^lambda the response w_0 + eps u is a
linear system (``response``), and its hypergradient is compared with the exact one. The split is fixed, so seeds agree.

Controls. ``fixed-*`` are ordinary networks of the same size with constant rates for the same epochs, a grid of five
("the best" is that by validation loss, seed by seed); ``untuned`` has gates and perturbed rates but no second step. All
figures are those at the best epoch by the validation loss at lambda itself, without perturbation.

Differences from the released code: the scalar on W x + b, which the theory does not know, is left out; V and C start at
0. ``centred`` lets the gates see lambda minus its current value, as in Delta-STN (Bae and Grosse, arXiv 2010.13514).

Many clients: each divides its own samples into training and validation. phi, lambda and s are averaged, lambda in the
unconstrained space: the average of the responses means something since all start a round from one lambda. With
``personal`` lambda and sigma stay at the client: a common response, and own rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.clients.bilevel import Level, alternate, held_out
from flowerbed.clients.data import Batch, ClientData
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import MODEL, Extras, LocalRound, Reply, shared_model
from flowerbed.clients.params import OPTIMIZERS
from flowerbed.clients.training import batches_of
from flowerbed.datasets.augment import Scale
from flowerbed.datasets.rated_augment import STRENGTHS, jitter
from flowerbed.errors import ClientError, require
from flowerbed.models.gated import Conditioned, GatedConv2d, GatedLinear
from flowerbed.models.info import ModelInfo
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

HYPER, SPREAD, SCALE, UPPER = "hyper", "spread", "scale", " upper"


@dataclass(frozen=True)
class StnParams(FedAvgParams):
    """Hyper-parameters of the alternation."""

    tune: bool = True
    """Whether there is a second step; without it the rates stay what they are."""
    perturb: bool = True
    """Whether the first step draws lambda + eps; without it all samples see lambda."""
    train_steps: int = 2
    """T_train."""
    valid_steps: int = 1
    """T_valid."""
    warm_up: int = 0
    """Steps of the run before the first step on lambda."""
    tau: float = 1e-3
    """Weight of the entropy of the perturbations."""
    tune_scale: bool = True
    """Whether sigma is tuned as well; without it the second step perturbs nothing."""
    hyper_optimizer: str = "rmsprop"
    hyper_lr: float = 0.03
    valid: float = 0.4
    """Share of a client's samples that it holds out for validation."""
    personal: bool = False
    """Whether lambda and sigma stay at the client."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train_steps", "valid_steps"):
            value = getattr(self, name)
            require(value >= 1, f"strategy.{name} is {value}; give at least 1.")
        require(self.warm_up >= 0, f"strategy.warm_up is {self.warm_up}; give 0 steps or more.")
        require(self.tau >= 0, f"strategy.tau is {self.tau}; give 0 or more.")
        require(self.hyper_lr > 0, f"strategy.hyper_lr is {self.hyper_lr}; give a number above 0.")
        require(
            self.hyper_optimizer in OPTIMIZERS,
            f"strategy.hyper_optimizer is '{self.hyper_optimizer}'; choose from {', '.join(OPTIMIZERS)}.",
        )
        require(0 < self.valid < 1, f"strategy.valid is {self.valid}; give a share between 0 and 1.")


class StnHalf(ClientHalf):
    """Alternates between training the response and tuning what it responds to."""

    params: StnParams

    def private(self, info: ModelInfo) -> frozenset[str]:
        return frozenset({HYPER, SPREAD}) if self.params.personal else frozenset()

    def run(self, local: LocalRound) -> Reply:
        params, net = self.params, conditioned(local.model)
        if params.tune and not any(isinstance(m, GatedLinear | GatedConv2d) for m in net.modules()):
            raise ClientError("there are no gates for lambda to be tuned through; set model.gated=true")
        train_data, valid_data = held_out(local, params.valid)
        weights = frozenset(local.parts.parameters) - {HYPER, SPREAD}
        lower = Level(
            self.loss, weights, local.local, batches_of(local, local.local, train_data), params.train_steps
        )
        plain = replace(
            local.local,
            optimizer=params.hyper_optimizer,
            lr=params.hyper_lr,
            momentum=0.0,
            nesterov=False,
            weight_decay=0.0,
            clip_norm=0.0,
            schedule="constant",
            augment="none",
        )
        moves = frozenset({HYPER, SPREAD} if params.tune_scale else {HYPER})
        batches = batches_of(local, plain, valid_data, UPPER)
        upper = Level(self.validation, moves, plain, batches, params.valid_steps, UPPER)
        extras = {SCALE: train_data.scale}
        trained, tuned = alternate(local, lower, upper if params.tune else None, extras, params.warm_up)
        found = dict(trained.metrics)
        if tuned is not None:
            found["tuning-loss"] = tuned.metrics["loss"]
        found["validation-loss"] = validation_loss(net, valid_data, local.task)
        streams = {MODEL: shared_model(local, self.private(local.info))}
        return Reply(streams, {"num-examples": len(train_data), "steps": trained.steps, **found})

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return f at perturbed hyperparameters: dropout and augmentation as they say."""
        net = conditioned(model.module)
        raw = perturbed(net, len(batch["y"]), self.params.perturb).detach()
        x = regularised(net, batch["x"], raw, extras[SCALE])
        with net.at(raw):
            return task.mean_loss(model(x), batch["y"]), {}

    def validation(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return F at perturbed hyperparameters minus tau H; lambda's gradient comes through the gates."""
        # The next training step puts the module back into training mode.
        net = conditioned(model.module.eval())
        with net.at(perturbed(net, len(batch["y"]), self.params.tune_scale)):
            value = task.mean_loss(model(batch["x"]), batch["y"])
        return value - self.params.tau * entropy(net), {}


class Stn(FedAvg):
    """FedAvg over clients that tune their own regularisation; averages lambda and sigma like weights."""

    Params = StnParams
    Half = StnHalf


def conditioned(module: nn.Module) -> Conditioned:
    """Return the model; raises ``ClientError`` if it has no hyperparameters of its own."""
    if not isinstance(module, Conditioned):
        raise ClientError(
            f"{type(module).__name__} has no hyperparameters to tune; choose a model whose builder returns a "
            "flowerbed.models.gated.Conditioned"
        )
    return module


def perturbed(net: Conditioned, count: int, perturb: bool) -> Tensor:
    """Return lambda + eps, a row for each of ``count`` samples."""
    if not perturb:
        return net.hyper.expand(count, -1)
    eps = torch.randn(count, len(net.knobs), device=net.hyper.device)
    return net.hyper + F.softplus(net.spread) * eps


def entropy(net: Conditioned) -> Tensor:
    """Return H, the entropy of the perturbations."""
    return (F.softplus(net.spread).log() + 0.5 * math.log(2 * math.pi * math.e)).sum()


def regularised(net: Conditioned, x: Tensor, raw: Tensor, scale: Scale) -> Tensor:
    """Return the inputs under the augmentations among the hyperparameters."""
    strengths = {name: value for name, value in net.values(raw).items() if name in STRENGTHS}
    return jitter(x, strengths, scale) if strengths else x


@torch.no_grad()
def validation_loss(net: Conditioned, data: ClientData, task: Task) -> float:
    """Return the mean loss of samples at lambda itself, in evaluation mode."""
    net.eval()
    pieces = zip(torch.split(data.x, 512), torch.split(data.y, 512), strict=True)
    return math.fsum(float(task.mean_loss(net(x), y)) * len(y) for x, y in pieces) / len(data)


# The exact test: ridge regression.

LAMBDAS = tuple(range(-5, 2))


def response(gram: Tensor, right: Tensor, lambda_: float, sigma: float) -> tuple[Tensor, Tensor]:
    """Return w_0 and u ``(d,)`` that minimise E f(lambda + eps, w_0 + eps u) over eps ~ N(0, sigma^2).

    f is ||y - X w||^2 / N + e^lambda ||w||^2; ``gram`` is X^T X / N, ``right`` X^T y / N. With m_k the mean of
    e^(lambda + eps) eps^k,

        (X^T X / N + m_0) w_0 + m_1 u = X^T y / N          m_1 w_0 + (sigma^2 X^T X / N + m_2) u = 0
    """
    m0 = math.exp(lambda_ + sigma**2 / 2)
    m1, m2 = sigma**2 * m0, (sigma**2 + sigma**4) * m0
    one = torch.eye(len(right), dtype=gram.dtype)
    upper = torch.cat([gram + m0 * one, m1 * one], 1)
    lower = torch.cat([m1 * one, sigma**2 * gram + m2 * one], 1)
    w, u = torch.linalg.solve(torch.cat([upper, lower]), torch.cat([right, 0 * right])).chunk(2)
    return w, u


@dataclass(frozen=True)
class RidgeParams(FedAvgParams):
    """How far around lambda the response is fitted."""

    sigma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.sigma > 0, f"strategy.sigma is {self.sigma}; give a number above 0.")


class RidgeHalf(ClientHalf):
    """Solves for the best responses, without any training."""

    params: RidgeParams

    def run(self, local: LocalRound) -> Reply:
        gram, right = normal_equations(local.train_data.x, local.train_data.extras["target"])
        pairs = [response(gram, right, at, self.params.sigma) for at in LAMBDAS]
        found = {"w": torch.stack([w for w, _ in pairs]), "u": torch.stack([u for _, u in pairs])}
        return Reply({MODEL: found}, {"num-examples": len(local.train_data), "steps": 0})


class Ridge(FedAvg):
    """Averages the clients' responses."""

    Params = RidgeParams
    Half = RidgeHalf


def normal_equations(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return X^T X / N and X^T y / N in float64, on the CPU."""
    x, y = x.double().cpu(), y.double().cpu()
    return x.T @ x / len(y), x.T @ y / len(y)
