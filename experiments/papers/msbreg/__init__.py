"""An Embedding-Dynamic Approach to Self-supervised Learning (MSBReg).

Moon, Buracas, Park, Kim and Canny, WACV 2023, arXiv 2207.03552. The embeddings of images are particles on the unit
sphere. Views of an image are pulled to their centroid, the whole cloud is pushed to fill the space, and every particle
is kicked at random. What keeps them from collapsing into a point is the loss, not a layer.

    z_i^v = normalise(h(f(x_i^v)))        V views of each of N images, online network, d dimensions
    c_i   = normalise(mean_v z'_i^v)      from the target network, whose weights follow: w' <- tau w' + (1 - tau) w

    L_M = mean_iv ||z_i^v - c_i||^2                              multi-view centroid
    L_S = mean_k (sigma_k - 1)^2                                 singular values
    L_B = mean_iv z_i^v . n_i                                    Brownian diffusion
    L   = L_M + lambda_S L_S + lambda_B L_B

sigma_k are the singular values, over sqrt(N / d), of the N unit centroids of the online embeddings less their mean: all
are 1 for an isotropic cloud. n_i is uniform on the sphere, fresh at every step, one for each image and shared by its
views: one a view would fight L_M, one a batch would only move the cloud. E[L_B] = 0 whatever z is, so that B is a
random walk and its value says nothing; it is not reported.

Certain are M and B. The formula of S and all weights are our reading: ``form`` offers three with the same minimum, the
spectrum above, the barrier - mean_k log sigma_k (flat by the bound on sum_k sigma_k^2), and the Frobenius norm
||Z^T Z d/N - I||_F^2 / d. The centred cloud has at most N - 1 singular values that are not 0, and only these count.
``pull`` offers view_to_centroid as above; centroid_to_centroid ||mean_v z_i^v - c_i||^2, which is less by the variance
of the views; and pairs, where every view is pulled to each other one of the target's. By default there is no predictor.

Baseline: BYOL (Grill et al., NeurIPS 2020), pairs with a predictor, with and without batch norm in projector and
predictor. Controls: each term left out; a projector with batch norm, which alone avoids the collapse; a random encoder
that is never trained, which is strong on small images. Elsewhere the projector has layer norm.

Probes see labels of training images only, on the encoder's features. Effective rank and spread are of the embeddings.

Many clients: the online network is averaged; the target is the client's own, or with ``target=server`` the moving
average of the global models. S then flattens each client's own cloud, and the union of clouds may overlap. B needs no
communication, and its draws differ between clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import flowerbed.datasets.views  # noqa: F401  (makes the augmentation "ssl" known)
from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound, Step, Trained
from flowerbed.clients.momentum import MomentumModel, cosine_tau
from flowerbed.clients.training import Batches, own_batches, view_of
from flowerbed.errors import require
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors
from flowerbed.strategies.base import Phase
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

TARGET, STEPS, VIEWS = "target", "steps", "views"


@dataclass(frozen=True)
class MsbParams(FedAvgParams):
    """Hyper-parameters of MSBReg, and of BYOL."""

    lambda_s: float = 1.0
    """Weight of the singular values."""
    lambda_b: float = 0.1
    """Weight of the Brownian kicks."""
    views: int = 4
    """V."""
    view: str = "ssl"
    """The augmentation that makes a view."""
    pull: str = "view_to_centroid"
    """view_to_centroid, centroid_to_centroid or pairs."""
    form: str = "spectrum"
    """S as: spectrum, barrier or frobenius."""
    tau: float = 0.99
    """Momentum of the target, a step (at the server: a round)."""
    ramp: str = "constant"
    """constant, or cosine: tau rises to 1 with the run."""
    target: str = "client"
    """Where the target lives: client or server."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lambda_s >= 0, f"strategy.lambda_s is {self.lambda_s}; give 0 (off) or more.")
        require(self.lambda_b >= 0, f"strategy.lambda_b is {self.lambda_b}; give 0 (off) or more.")
        require(self.views >= 1, f"strategy.views is {self.views}; give at least 1.")
        require(0 <= self.tau <= 1, f"strategy.tau is {self.tau}; give a number in [0, 1].")
        for name, choices in (
            ("pull", ("view_to_centroid", "centroid_to_centroid", "pairs")),
            ("form", ("spectrum", "barrier", "frobenius")),
            ("ramp", ("constant", "cosine")),
            ("target", ("client", "server")),
        ):
            given = getattr(self, name)
            require(given in choices, f"strategy.{name} is '{given}'; choose from {', '.join(choices)}.")
        require(
            self.pull != "pairs" or self.views >= 2,
            "strategy.pull=pairs compares views; set strategy.views to at least 2.",
        )


class MsbHalf(ClientHalf):
    """Trains without labels, with a target that follows."""

    stateful = True
    params: MsbParams

    def begin(self, local: LocalRound) -> Extras:
        target = MomentumModel.open(local, TARGET, local.received.get(TARGET))
        return {TARGET: target, STEPS: local.clock.rounds * local.clock.steps}

    def batches(self, local: LocalRound) -> Batches:
        plain, scale = own_batches(local, local.local), local.train_data.scale

        def batch(step: int) -> Batch:
            found = plain(step)
            names = [f"view {v}" for v in range(self.params.views)]
            seen = [view_of(local, found["x"], scale, self.params.view, name, step) for name in names]
            return {**found, VIEWS: torch.stack(seen)}

        return batch

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        views = batch[VIEWS]
        raw = model.features(views.flatten(0, 1)).float()
        with torch.no_grad():
            aim = extras[TARGET].view(model).features(views.flatten(0, 1)).float()
        # What is pulled: z, or what the predictor makes of it.
        q = unit(model.head(raw).float(), len(views))
        value = pulled(q, unit(aim, len(views)), self.params.pull)
        z, found = unit(raw, len(views)), {"pull": value}
        if self.params.lambda_s:
            flat = flatness(F.normalize(z.mean(0), dim=1), self.params.form)
            value, found["singular"] = value + self.params.lambda_s * flat, flat
        if self.params.lambda_b:
            value = value + self.params.lambda_b * kick(z)
        return value, found

    def after_step(self, step: Step) -> None:
        if self.params.target == "client":
            tau = self.params.tau
            if self.params.ramp == "cosine":
                tau = cosine_tau(tau, step.index, step.extras[STEPS])
            step.extras[TARGET].follow(step.parts, tau)

    def end(self, local: LocalRound, trained: Trained, extras: Extras) -> Mapping[str, Mapping[str, Tensor]]:
        if self.params.target == "client":
            extras[TARGET].keep(local.state, TARGET)
        return super().end(local, trained, extras)


def unit(embeddings: Tensor, views: int) -> Tensor:
    """Return embeddings of all views, one view after another ``(V N, d)``, with length 1 as ``(V, N, d)``."""
    return F.normalize(embeddings, dim=1).reshape(views, -1, embeddings.shape[1])


def pulled(q: Tensor, aim: Tensor, pull: str) -> Tensor:
    """Return L_M for unit vectors ``q`` of the online and ``aim`` of the target network, both ``(V, N, d)``."""
    if pull == "pairs":
        others = (aim.sum(0) - aim) / (len(aim) - 1)
        return (2 - 2 * (q * others).sum(-1)).mean()
    c = F.normalize(aim.mean(0), dim=1)
    if pull == "centroid_to_centroid":
        return (q.mean(0) - c).square().sum(-1).mean()
    return (2 - 2 * (q * c).sum(-1)).mean()


def flatness(z: Tensor, form: str = "spectrum") -> Tensor:
    """Return L_S of the unit vectors ``z`` ``(N, d)``; in float32 at least."""
    n, d = z.shape
    z = z - z.mean(0)
    sigma: Tensor
    if form == "frobenius":
        away = z.T @ z * (d / n) - torch.eye(d, dtype=z.dtype, device=z.device)
        return away.square().sum() / d
    sigma = torch.linalg.svdvals(z)[: min(n - 1, d)] * (d / n) ** 0.5
    return -(sigma + 1e-6).log().mean() if form == "barrier" else (sigma - 1).square().mean()


def kick(z: Tensor) -> Tensor:
    """Return L_B of ``z`` ``(V, N, d)``: the mean product with one random unit vector an image, drawn by torch."""
    n = F.normalize(torch.randn(z.shape[1:], dtype=z.dtype, device=z.device), dim=1)
    return (z * n).sum(-1).mean()


class Msb(FedAvg):
    """FedAvg of the online networks."""

    Params, Half = MsbParams, MsbHalf
    params: MsbParams

    def start_phase(self, phase: Phase, model: Tensors) -> Tensors:
        if self.params.target == "server" and TARGET not in self.state:
            self.state[TARGET] = {n: v.clone() for n, v in model.items()}
        return super().start_phase(phase, model)

    def broadcast(self, server_round: int) -> Mapping[str, Mapping[str, Tensor]]:
        return {TARGET: self.state[TARGET]} if self.params.target == "server" else {}

    def combine(
        self, server_round: int, current: Tensors, means: Mapping[str, Tensors], count: int
    ) -> Tensors:
        model = super().combine(server_round, current, means, count)
        if self.params.target == "server":
            tau, moving = self.params.tau, self.parameters(model)
            self.state[TARGET] = {
                n: old.lerp(model[n], 1 - tau) if n in moving else model[n].clone()
                for n, old in self.state[TARGET].items()
            }
        return model
