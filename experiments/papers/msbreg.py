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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flowerbed.datasets.views  # noqa: F401  (makes the augmentation "ssl" known)
from flowerbed import seeds
from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound, Step, Trained
from flowerbed.clients.momentum import MomentumModel, cosine_tau
from flowerbed.clients.training import Batches, own_batches, view_of
from flowerbed.datasets.augment import AUGMENTATIONS, Scale
from flowerbed.errors import ConfigError, require
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.measures import Measured
from flowerbed.experiments.parts import build_parts
from flowerbed.experiments.reproduction.central import CentralStep, central_run
from flowerbed.experiments.reproduction.claims import Claim, metric
from flowerbed.experiments.reproduction.engine import Reproduction
from flowerbed.experiments.reproduction.paper import Paper
from flowerbed.models.base import Net, Shape
from flowerbed.models.layers import GlobalMean, image_shape
from flowerbed.models.parts import ModelParts
from flowerbed.models.probes import effective_rank, nearest_neighbour_probe, ridge_probe, spread
from flowerbed.models.tasks import Task
from flowerbed.models.zoo import draw_net
from flowerbed.storage import Tensors
from flowerbed.strategies.base import Phase
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TARGET, STEPS, VIEWS = "target", "steps", "views"
LABELLED, TESTED = 6000, 5000
"""Images that the probes are fitted to, and judged by."""


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


def embedder(
    input_shape: Shape,
    num_classes: int,
    *,
    encoder: str = "conv3",
    norm: str = "none",
    d: int = 32,
    hidden: int = 128,
    projector: str = "layer",
    predictor: bool = False,
) -> Net:
    """Return an encoder and a projector to ``d`` dimensions as the body, a predictor or nothing as the head.

    ``encoder``: conv3, three strided convolutions (16, 32, 64 channels) and the mean over positions; or the body of a
    model by name, with ``norm`` bn or gn. ``projector``: the norm of projector and predictor, layer or batch.
    """
    if encoder == "conv3":
        channels, *_ = image_shape("embedder", input_shape, 8)
        layers: list[nn.Module] = []
        for following in (16, 32, 64):
            layers += [nn.Conv2d(channels, following, 3, 2, padding=1), nn.ReLU()]
            channels = following
        features, width = nn.Sequential(*layers, GlobalMean()), channels
    else:
        options = {} if norm == "none" else {"norm": norm}
        net = draw_net(encoder, input_shape, num_classes, **options)
        features, width = nn.Sequential(net.body), net.feature_dim
    if projector not in ("layer", "batch"):
        raise ConfigError(f"Option projector='{projector}' of an embedder must be 'layer' or 'batch'.")

    def mapping(inputs: int) -> nn.Sequential:
        norm = nn.LayerNorm(hidden) if projector == "layer" else nn.BatchNorm1d(hidden)
        return nn.Sequential(nn.Linear(inputs, hidden), norm, nn.ReLU(), nn.Linear(hidden, d))

    return Net(nn.Sequential(features, mapping(width)), mapping(d) if predictor else nn.Identity(), d)


@torch.no_grad()
def embedded(measured: Measured, rows: int, test: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return features, unit embeddings and labels of the first ``rows`` samples of a split."""
    split = measured.dataset.test if test else measured.dataset.train
    body = measured.model.get_submodule("body")
    assert isinstance(body, nn.Sequential)
    features = []
    for start in range(0, min(rows, len(split)), 500):
        x = split.inputs[start : min(start + 500, rows)].to(measured.device)
        features.append(body[0](measured.dataset.prepare(x)))
    found = torch.cat(features)
    z = F.normalize(body[1](found), dim=1)
    return found.cpu(), z.cpu(), split.labels[: len(found)]


def probed(measured: Measured) -> Mapping[str, float]:
    """Return the accuracies of a ridge and a neighbour probe, and rank (absolute, as a share of d) and spread of z."""
    features, _, labels = embedded(measured, LABELLED, test=False)
    tested, z, wanted = embedded(measured, TESTED, test=True)
    rank = effective_rank(z)
    return {
        "probe": ridge_probe(features, labels, tested, wanted),
        "neighbours": nearest_neighbour_probe(features, labels, tested, wanted),
        "effective-rank": rank,
        "rank-share": rank / z.shape[1],
        "spread": spread(z),
    }


def central(simulation: Simulation) -> Tensors:
    """Return what a plain loop makes of an arm: views, two networks, three losses."""
    asked = MsbParams(**simulation.strategy.options)
    data = build_parts(simulation).dataset
    augment, scale = AUGMENTATIONS.get(asked.view), Scale(data.mean, data.std)
    target: list[Net] = []

    def copied(net: nn.Module) -> None:
        twin = build_parts(simulation).spec.model.build(simulation.seed)
        assert isinstance(twin, Net)
        twin.load_state_dict(net.state_dict())
        target.append(twin.requires_grad_(False))

    def loss(step: CentralStep) -> Tensor:
        net, count = step.net, asked.views
        assert isinstance(net, Net)
        streams = [seeds.torch_rng(simulation.seed, f"view {v}", 0, step.number) for v in range(count)]
        x = torch.cat([augment(step.x, stream, scale=scale) for stream in streams])
        raw = net.body(x)
        # In this order, which decides how gradients add up.
        q, aim, z = (
            F.normalize(e, dim=1).reshape(count, -1, e.shape[1])
            for e in (net.head(raw), target[0].body(x), raw)
        )
        if asked.pull == "pairs":
            value = (2 - 2 * (q * ((aim.sum(0) - aim) / (count - 1))).sum(-1)).mean()
        else:
            value = (2 - 2 * (q * F.normalize(aim.mean(0), dim=1)).sum(-1)).mean()
        if asked.lambda_s:
            centroids = F.normalize(z.mean(0), dim=1)
            n, d = centroids.shape
            sigma = torch.linalg.svdvals(centroids - centroids.mean(0))[: min(n - 1, d)]
            value = value + asked.lambda_s * (sigma * (d / n) ** 0.5 - 1).square().mean()
        if asked.lambda_b:
            kicks = F.normalize(torch.randn(z.shape[1:]), dim=1)
            value = value + asked.lambda_b * (z * kicks).sum(-1).mean()
        return value

    @torch.no_grad()
    def follow(step: CentralStep) -> None:
        for old, new in zip(target[0].parameters(), step.net.parameters(), strict=True):
            old.lerp_(new, 1 - asked.tau)
        for kept, seen in zip(target[0].buffers(), step.net.buffers(), strict=True):
            kept.copy_(seen)

    return central_run(simulation, loss, before=copied, after=follow)


def clouds(made: Reproduction) -> Figure:
    """Return the singular values of the embeddings with the first seed, and probe accuracy over spread."""
    from flowerbed.experiments.reproduction import figures

    figure, (left, right) = figures.canvas(2)
    for place, arm in enumerate(made.arms):
        colour, style = figures.look(place)
        run = made.finished(arm, made.seeds[0])
        _, z, _ = embedded(Measured(run.model, run.dataset, run.seed, torch.device("cpu")), TESTED, test=True)
        sigma = torch.linalg.svdvals(z - z.mean(0)) * (z.shape[1] / len(z)) ** 0.5
        left.plot(range(1, len(sigma) + 1), sigma.tolist(), style, color=colour, label=arm, linewidth=1.4)
        x, y = (figures.values(made, arm, name) for name in ("spread", "probe"))
        right.plot(x, y, "o" if style == "-" else "s", color=colour, markersize=4, alpha=0.7)
        if x and y:
            middle = (sum(x) / len(x), sum(y) / len(y))
            right.annotate(arm, middle, fontsize=7, color=colour, xytext=(5, 4), textcoords="offset points")
    left.axhline(1.0, color="0.6", linewidth=0.8, linestyle=":")
    left.set_yscale("log")
    left.set_ylim(bottom=1e-3)
    right.margins(0.12)
    figures.finish(left, "k", "singular value of the embeddings (1: isotropic)")
    figures.finish(right, "spread of the embeddings", "accuracy of the ridge probe")
    return figure


probe, share, wide = metric("probe"), metric("rank-share"), metric("spread")
WITH_S: Sequence[str] = ("m-s", "msb")
WITHOUT_S: Sequence[str] = ("m", "m-b")
PAPER = Paper(
    slug="msbreg",
    claims=(
        Claim(
            "dispersed embeddings are better",
            "With all three terms the features are better than with the centroid alone, and than random ones.",
            (probe["msb"] >= probe["m"] + 0.015, probe["msb"] >= probe["random"] + 0.03),
        ),
        Claim(
            "singular values disperse",
            "The term on singular values makes the embeddings fill their space.",
            tuple(share[arm] >= 25 / 32 for arm in WITH_S) + tuple(wide[arm] >= 0.5 for arm in WITH_S),
        ),
        Claim(
            "the pull alone collapses",
            "Without it they collapse, at least in part, where no batch norm prevents it.",
            tuple(share[arm] <= 17 / 32 for arm in WITHOUT_S) + tuple(wide[arm] <= 0.25 for arm in WITHOUT_S),
        ),
        Claim(
            "kicks cost nothing",
            "The Brownian term changes the probe by at most one point at this size.",
            (probe["msb"] >= probe["m-s"] - 0.01, probe["msb"] <= probe["m-s"] + 0.01),
        ),
        Claim(
            "no layer is needed",
            "Without batch norm BYOL collapses and MSBReg does not.",
            (wide["byol"] <= 0.25, wide["msb"] >= 0.5),
        ),
        Claim(
            "they stabilise other methods",
            "With the two regularisers BYOL does not collapse either, and is better.",
            (wide["byol-sb"] >= 0.5, probe["byol-sb"] >= probe["byol"]),
        ),
        Claim(
            "as good as BYOL",
            "MSBReg's features are as good as those of BYOL with batch norm.",
            probe["msb"] >= probe["byol-bn"] - 0.01,
        ),
    ),
    central=dict.fromkeys(("msb", "byol-bn"), central),
    figure=clouds,
    uses=("flowerbed.clients.momentum", "flowerbed.datasets.views", "flowerbed.models.probes"),
)
