"""Neural Collapse in Deep Linear Networks: From Balanced to Imbalanced Data.

Dang, Tho Tran, Osher, Hung Tran-The, Ho and Nguyen, ICML 2023, arXiv 2301.00437. With M linear layers on features H_1
that are free parameters (rows here, d wide), K classes of n_k samples, N in all, and one-hot Y, the objective is

    F = 1/(2N) ||W_M ... W_1 H_1 - Y||^2 + 1/2 lambda_W sum_j ||W_j||^2 + 1/2 lambda_H ||H_1||^2

Its global minimisers for d >= K and no bias (section 4), with P = W_M ... W_1 and class means mu_k:

    b_k       = M N / n_k (N lambda_W^M lambda_H)^(1/M)
    x_k       = argmin over x >= 0 of g(x) = 1 / (x^M + 1) + b_k x
              = 0 if b_k > b*, the class is lost;  b* = (M-1)^((M-1)/M) / M,  and 1 for M = 1
                else the largest root of b_k = M x^(M-1) / (x^M + 1)^2;  M = 1: x = 1/sqrt(b_k) - 1
    sigma_k^2 = N lambda_H x_k^M            singular values of P, shared by the layers in equal parts: sigma_k^(1/M)
    mu_k . mu_l = 0,  ||mu_k||^2 = sigma_k^2 / (sigma_k^2 + N lambda_H)^2
    P P^T     = diag(sigma_k^2),  P mu = diag(sigma_k^2 / (sigma_k^2 + N lambda_H))
    F         = sum_k n_k / (2N) g(x_k)

and no variance within a class. So a larger class has a longer classifier and a SHORTER mean. With a last bias that is
not penalised, and balanced classes, every diagonal matrix above becomes that number times I - 1 1^T / K, after taking
the global mean away; the bias is 1/K; F is (K-1)/K times as large.

Arms: free features (all closed forms can be checked in absolute terms), and a ReLU network with a linear layer on 1,500
images of unequal classes, where the frame is predicted as far as the features are free. The loss scale matters: a mean
over N K numbers, as common square losses have it, is another pair of lambdas, which normalised metrics on balanced data
hide.

Controls: the frame of balanced classes, held against an unbalanced run, must miss. The plain lengths without their
normalisation are claimed too. ``ce-1`` is the cross entropy under one layer, whose frame is a simplex. The paper claims
that for every M; but with four classes and M = 3 a square in the plane has a lower F, so none is claimed.

Differences from the released code: it takes the largest root without looking whether g is below 1 there, so it keeps
classes that are lost. The network is held against the lambdas that it was trained with. They are larger than the
released ones (1e-5), so that lengths settle within 3,000 steps; at lambda_H = 1e-3 its features died in a probe.

Many clients: samples and their free features belong to clients, layers are averaged by n_c / N. The objective of a
client is 1/2 mean (||P h - y||^2 + N lambda_H ||h||^2) + 1/2 lambda_W sum ||W_j||^2 over its samples, or over a batch,
with N that of all clients; free features move with n_c / N of their gradient. Then one full-batch step at every client
is one step on F.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound
from flowerbed.errors import ConfigError, require
from flowerbed.models.collapse import equiangular
from flowerbed.models.deep_linear import TABLE
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors
from flowerbed.strategies.base import ClientReply
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

SAMPLES, ALL = "samples", "all"
"""The stream that tells clients N, and its one tensor."""


@dataclass(frozen=True)
class DeepLinearParams(FedAvgParams):
    """What F is made of."""

    lambda_w: float = 5e-4
    """lambda_W, penalty on each linear layer."""
    lambda_h: float = 5e-4
    """lambda_H, penalty on the features that enter the first of them."""
    loss: str = "mse"
    """mse as above, or ce: the mean cross entropy in its place."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lambda_w", "lambda_h"):
            value = getattr(self, name)
            require(value > 0, f"strategy.{name} is {value}; give a number above 0.")
        require(self.loss in ("mse", "ce"), f"strategy.loss is '{self.loss}'; choose mse or ce.")
        require(self.server_lr == 1, f"strategy.server_lr is {self.server_lr}; it has to be 1 here.")


class DeepLinearHalf(ClientHalf):
    """Descends F: penalties on the head's weights and on what enters it, nothing on other layers and biases."""

    params: DeepLinearParams

    def begin(self, local: LocalRound) -> Extras:
        return {ALL: local.received[SAMPLES][ALL], "share": len(local.train_data)}

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        z = model.features(batch["x"])
        fit = fitted(model.head(z), batch["y"], self.params.loss)
        weights = [p for name, p in model.parameters.items() if name.startswith("head.") and p.ndim == 2]
        decay = torch.stack([w.square().sum() for w in weights]).sum()
        size = z.square().sum(1).mean() * extras[ALL]
        return fit + self.params.lambda_w / 2 * decay + self.params.lambda_h / 2 * size, {}

    def correct(self, gradients: Tensors, parameters: Mapping[str, Tensor], extras: Extras) -> Tensors:
        if TABLE not in gradients:
            return gradients
        return {**gradients, TABLE: gradients[TABLE] * (extras["share"] / extras[ALL])}


def fitted(outputs: Tensor, labels: Tensor, loss: str) -> Tensor:
    """Return the first term of F, or the cross entropy in its place."""
    if loss == "ce":
        return F.cross_entropy(outputs, labels)
    return (outputs - F.one_hot(labels, outputs.shape[1])).square().sum(1).mean() / 2


class DeepLinear(FedAvg):
    """Averages layers by samples; the free features of a sample are those of the client that has it."""

    Params, Half = DeepLinearParams, DeepLinearHalf

    def broadcast(self, server_round: int) -> Mapping[str, Mapping[str, Tensor]]:
        if self.setting is None:
            raise ConfigError("DeepLinear needs to know the number of samples; call setup() before the run.")
        return {SAMPLES: {ALL: torch.tensor(float(sum(self.setting.class_counts)), dtype=torch.float64)}}

    def aggregate(self, server_round: int, current: Tensors, replies: list[ClientReply]) -> Tensors:
        if len(replies) == 1:
            # A mean of one, without the rounding of n x / n that float64 models would see.
            return dict(replies[0].model)
        averaged = super().aggregate(server_round, current, replies)
        if TABLE in averaged:
            rows = current[TABLE].clone()
            for reply in replies:
                own = (reply.model[TABLE] != current[TABLE]).any(1)
                rows[own] = reply.model[TABLE][own]
            averaged = {**averaged, TABLE: rows}
        return averaged


@dataclass(frozen=True)
class Frame:
    """The global minimiser of F. All tensors are float64 and by class."""

    sigma: Tensor
    """Singular values of P, ``(K,)``; 0 for a class that is lost."""
    b: Tensor
    minimum: float
    """F there."""
    shape: Tensor
    """What the numbers multiply: I, or I - 11^T / K with a bias, ``(K, K)``."""
    noise: float
    """N lambda_H."""
    depth: int

    @property
    def lost(self) -> Tensor:
        """Which classes are zero, bool ``(K,)``."""
        return self.sigma == 0

    def targets(self, level: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return mu mu^T of what enters layer ``level``, P P^T of the layers from there on, and P mu: ``(K, K)``."""
        each = self.sigma ** (1 / self.depth)
        product = self.sigma**2 / (self.sigma**2 + self.noise)
        means = self.sigma / (self.sigma**2 + self.noise) * each**level
        layers = each ** (self.depth - level)
        return means**2 * self.shape, layers**2 * self.shape, product * self.shape


def root(b: float, depth: int) -> float:
    """Return x_k for b_k: the minimiser of 1 / (x^M + 1) + b x over x >= 0; at b* the one that is not 0."""
    if depth == 1:
        return b**-0.5 - 1 if b < 1 else 0.0
    if b > threshold(depth):
        return 0.0
    low = math.pow((depth - 1) / (depth + 1), 1 / depth)
    high = math.pow(depth / b, 1 / (depth + 1))
    for _ in range(200):
        x = (low + high) / 2
        low, high = (x, high) if depth * x ** (depth - 1) / (x**depth + 1) ** 2 > b else (low, x)
    return (low + high) / 2


def threshold(depth: int) -> float:
    """Return b*, beyond which a class is lost."""
    return 1.0 if depth == 1 else float((depth - 1) ** ((depth - 1) / depth) / depth)


def frame(counts: Sequence[int], depth: int, lambda_w: float, lambda_h: float, bias: bool = False) -> Frame:
    """Return the minimiser for classes of these sizes; widths of at least K are assumed.

    Raises ``ConfigError`` for a bias with classes of different sizes, for which there is no closed form here.
    """
    require(not bias or len(set(counts)) == 1, "With a bias the closed form is that of equal class sizes.")
    n = torch.tensor(list(counts), dtype=torch.float64)
    total, classes = float(n.sum()), len(n)
    b = depth * total / n * (total * lambda_w**depth * lambda_h) ** (1 / depth)
    x = torch.tensor([root(float(one), depth) for one in b], dtype=torch.float64)
    least = float((n / (2 * total) * (1 / (x**depth + 1) + b * x)).sum())
    eye = torch.eye(classes, dtype=torch.float64)
    shape, share = (equiangular(classes), (classes - 1) / classes) if bias else (eye, 1.0)
    noise = total * lambda_h
    return Frame((noise * x**depth).sqrt(), b, share * least, shape, noise, depth)
