"""Learning k-Level Structured Sparse Neural Networks Using Group Envelope Regularization (WGSEF).

Refael, Arbel and Huleihel, arXiv 2212.12921; the envelope is that of Beck and Refael 2022 (sparse regularization via
bidualization). Of the groups s_1 .. s_m of weights, at most k shall be nonzero. With weights d_j > 0 and norms
n_j = ||w_{s_j}|| the aim

    gs(w) = 1/2 sum_j d_j n_j^2   if at most k groups are nonzero, else infinity

is replaced by its best convex lower bound, the group sparse envelope function

    GS_k(w) = min_u 1/2 sum_j d_j n_j^2 / u_j,   0 <= u_j <= 1,  sum_j u_j <= k,

which is 1/2 sum_j d_j n_j^2 wherever at most k groups are active, 1/2 (sum_j sqrt(d_j) n_j)^2 for k = 1 and weight
decay for k = m. The proximal map of lambda GS_k scales every group,

    w_{s_j} = v_{s_j} u_j / (u_j + lambda d_j),   u_j = clip(sqrt(lambda d_j) n_j / eta - lambda d_j, 0, 1),

with eta > 0 such that sum_j u_j = k (u_j = 1 on the support if that has at most k groups). Here 1 / eta is found
exactly, between two of the 2m points where a u_j leaves 0 or reaches 1. Training is SGD, followed in every step by the
proximal map with lambda times the learning rate. k is *not* guaranteed: the map leaves at least k groups, and for small
lambda all. So lambda grows by a factor each round until at most (1 + ``tolerance``) k groups are left, and stays; the
rest is cut at the end (``uncut`` figures are those before). Groups are filters and rows with scale and shift of their
batch norm: a filter of zeros would still emit the shift. Once such a group is zero, no gradient reaches it.

Baselines at the same k: ``lasso`` (proximal group lasso, lambda sum_j sqrt(d_j) n_j, over a grid of lambda about that
which leaves k groups, the best of which counts); ``oneshot`` (weight decay, the smallest groups removed before the last
``finetune`` rounds); ``iht`` (the k largest groups kept after every round). Active groups are counted by exact
zeros. The mathematics is also tried where it is convex: sparse regression with known groups.

What is ours: where d_j stands (at the square of the norm), d_j = 1 (``d=size``: proportional to the root of the size),
one k for the whole network, and the growth of lambda. ``half_space=eps`` adds the half-space step of the stronger arms:
a group is also zeroed if <w_new, w_old> < eps ||w_old||^2. Envelopes contain weight decay, so the optimizer has none.

Many clients: the mean of models with different supports is dense. ``prox=server`` lets clients train on the loss alone
and applies the map once a round, after averaging, with the learning rate times their steps; for one client with one
step a round that is the same algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import ArrayRecord, MetricRecord
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed import seeds
from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound, Step
from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.errors import ConfigError, require
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.measures import Measured
from flowerbed.experiments.reproduction.central import CentralStep, central_run
from flowerbed.experiments.reproduction.claims import Claim, Linear, metric
from flowerbed.experiments.reproduction.engine import Reproduction
from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.experiments.reproduction.paper import Paper
from flowerbed.models.base import Net, Shape, classifier
from flowerbed.models.groups import (
    Groups,
    by_layer,
    inner,
    input_blocks,
    largest,
    lasso_factors,
    norms,
    output_units,
    scaled,
    sizes,
)
from flowerbed.models.info import ModelInfo
from flowerbed.models.layers import conv3x3, image_shape
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors
from flowerbed.strategies.base import Setting
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REGULARIZER, LAM, HELD, GROUPS, BEFORE, ALIVE = "regularizer", "lam", "held", "groups", "before", "alive"
PROXIMAL = ("envelope", "lasso")
LASSO = ("lasso-0.1", "lasso-0.12", "lasso-0.14")
"""The arms of the grid of group lasso."""
UNCUT, TARGET, BLOCK = "uncut", "target", 4


@dataclass(frozen=True)
class WgsefParams(FedAvgParams):
    """Hyper-parameters of group-sparse training."""

    method: str = "envelope"
    """envelope, lasso, iht or oneshot."""
    k: float = 0.2
    """Share of the groups that stay."""
    scope: str = "network"
    """network (one k over all groups) or layer (the same share of every layer)."""
    d: str = "one"
    """Weights of the groups: one, or size (proportional to the root of their size, 1 in the mean)."""
    lam: float = 0.05
    """lambda of the first round."""
    growth: float = 1.5
    """Factor on lambda after a round that leaves too many groups."""
    tolerance: float = 0.05
    """lambda stays once at most (1 + tolerance) k groups are left."""
    prox: str = "client"
    """Who applies the proximal map: client (after every step) or server (after averaging)."""
    half_space: float = -1.0
    """eps of the half-space step, at least 0; -1 is off."""
    finetune: int = 2
    """Rounds after the removal, for oneshot."""
    inputs: int = 0
    """Groups are blocks of that many inputs of the first layer; 0: filters and units."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (
            ("method", (*PROXIMAL, "iht", "oneshot")),
            ("scope", ("network", "layer")),
            ("d", ("one", "size")),
            ("prox", ("client", "server")),
        ):
            given = getattr(self, name)
            require(given in choices, f"strategy.{name} is '{given}'; choose from {', '.join(choices)}.")
        require(0 < self.k <= 1, f"strategy.k is {self.k}; give a share above 0, at most 1.")
        require(self.lam >= 0, f"strategy.lam is {self.lam}; give 0 or more.")
        require(self.growth >= 1, f"strategy.growth is {self.growth}; give 1 (lambda stays) or more.")
        require(self.tolerance >= 0, f"strategy.tolerance is {self.tolerance}; give 0 or more.")
        require(
            self.half_space == -1 or 0 <= self.half_space < 1,
            f"strategy.half_space is {self.half_space}; give -1 (off) or a number in [0, 1).",
        )
        require(
            self.half_space == -1 or self.prox == "client",
            "strategy.half_space compares neighbouring steps; set strategy.prox=client.",
        )
        require(self.finetune >= 0, f"strategy.finetune is {self.finetune}; give 0 or more.")
        require(self.inputs >= 0, f"strategy.inputs is {self.inputs}; give 0 (off) or more.")


def shares(q: Tensor, c: Tensor, k: int) -> Tensor:
    """Return u with u_j = clip(t q_j - c_j, 0, 1), sum u = k, by the exact t; 1 where q > 0 if at most k are.

    All float64 ``(m,)``; c >= 0, and c > 0 or q >= 0.
    """
    some = q > 0
    if int(some.sum()) <= k:
        return some.to(q.dtype)
    places = torch.cat([c[some] / q[some], (1 + c[some]) / q[some]]).sort().values

    def total(t: Tensor) -> Tensor:
        return (t * q - c).clamp(0, 1).sum()

    # Found by halving, since running sums over places that differ by many orders of magnitude lose their digits.
    low, high = -1, len(places) - 1
    while high - low > 1:
        middle = (low + high) // 2
        reaches = bool(total(places[middle]) >= k * (1 - 1e-12))
        low, high = (low, middle) if reaches else (middle, high)
    t = places[high]
    if low >= 0:
        under, over = total(places[low]), total(t)
        t = places[low] + (t - places[low]) * ((k - under) / (over - under)).clamp_max(1)
    return (t * q - c).clamp(0, 1)


def envelope(n: Tensor, d: Tensor, k: int) -> Tensor:
    """Return GS_k of groups with norms n and weights d, float64 ``(m,)``."""
    a = d.sqrt() * n
    u = shares(a, torch.zeros_like(a), k)
    return 0.5 * (a[a > 0] ** 2 / u[a > 0]).sum()


def envelope_factors(n: Tensor, d: Tensor, k: int, lam: float) -> Tensor:
    """Return what the proximal map of ``lam GS_k`` multiplies each group by; exactly 0 for groups that go."""
    if lam == 0:
        return torch.ones_like(n)
    u = shares((lam * d).sqrt() * n, lam * d, k)
    return u / (u + lam * d)


@dataclass(frozen=True)
class Plan:
    """The groups of a model with what a method needs to know of them."""

    groups: Groups
    d: Tensor
    asked: WgsefParams

    @classmethod
    def of(cls, info: ModelInfo, asked: WgsefParams) -> Plan:
        """Return the plan for a model; the server and every client make the same one."""
        groups = input_blocks(info, asked.inputs) if asked.inputs else output_units(info)
        root = sizes(groups, info.shapes).sqrt()
        return cls(groups, root / root.mean() if asked.d == "size" else torch.ones_like(root), asked)

    @property
    def k(self) -> int:
        """How many groups stay in all."""
        return sum(self.parts) if self.asked.scope == "layer" else max(1, round(self.asked.k * len(self.d)))

    @property
    def parts(self) -> list[int]:
        """How many groups stay in each layer, where each layer has its own k."""
        return [max(1, round(self.asked.k * layer.count)) for layer in self.groups]

    def active(self, tensors: Mapping[str, Tensor]) -> int:
        """Return the number of groups that are not exactly zero."""
        return int((norms(self.groups, tensors) > 0).sum())

    def factors(self, n: Tensor, lam: float) -> Tensor:
        """Return the factors of a proximal step, given the norms."""
        d = self.d.to(n.device)
        if self.asked.method == "lasso":
            return lasso_factors(n, lam * d.sqrt())
        if self.asked.scope == "network":
            return envelope_factors(n, d, self.k, lam)
        pieces = zip(by_layer(self.groups, n), by_layer(self.groups, d), self.parts, strict=True)
        return torch.cat([envelope_factors(own, weights, k, lam) for own, weights, k in pieces])

    def cut(self, tensors: Tensors) -> Tensors:
        """Return a model of exactly k groups at most: those of the largest n_j / sqrt(d_j)."""
        values = norms(self.groups, tensors) / self.d.sqrt()
        if self.asked.scope == "layer":
            pieces = zip(self.groups, by_layer(self.groups, values), self.parts, strict=True)
            keep = torch.cat([largest([layer], own, k) for layer, own, k in pieces])
        else:
            keep = largest(self.groups, values, self.k)
        return {**tensors, **scaled(self.groups, tensors, keep.double())}


class WgsefHalf(ClientHalf):
    """SGD with a proximal step."""

    params: WgsefParams

    def begin(self, local: LocalRound) -> Extras:
        plan = Plan.of(local.info, self.params)
        extras: dict[str, Any] = {GROUPS: plan, LAM: float(local.received[REGULARIZER][LAM])}
        removed = local.clock.round > local.clock.rounds - self.params.finetune
        if self.params.method == "oneshot" and removed:
            extras[ALIVE] = (norms(plan.groups, local.parts.parameters) > 0).double()
        if self.params.half_space >= 0:
            extras[BEFORE] = local.parameters()
        return extras

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        if TARGET in batch:
            return 0.5 * (model(batch["x"]).squeeze(-1) - batch[TARGET]).square().mean(), {}
        return task.mean_loss(model(batch["x"]), batch["y"]), {}

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        plan, weights = step.extras[GROUPS], step.parts.parameters
        if ALIVE in step.extras:
            factors = step.extras[ALIVE]
        elif self.params.method in PROXIMAL and self.params.prox == "client":
            factors = plan.factors(norms(plan.groups, weights), step.lr * step.extras[LAM])
        else:
            return
        after = scaled(plan.groups, weights, factors)
        if BEFORE in step.extras:
            before = step.extras[BEFORE]
            ahead = inner(plan.groups, after, before) >= self.params.half_space * inner(
                plan.groups, before, before
            )
            after = scaled(plan.groups, after, ahead.double())
            before.update({name: value.clone() for name, value in after.items()})
        for name, value in after.items():
            weights[name].copy_(value)


class Wgsef(FedAvg):
    """FedAvg that chooses lambda, and delivers k groups."""

    Params = WgsefParams
    Half = WgsefHalf
    params: WgsefParams
    plan: Plan

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        self.plan = Plan.of(setting.info, self.params)
        lam = torch.tensor(self.params.lam, dtype=torch.float64)
        self.state[REGULARIZER] = {LAM: lam, HELD: torch.tensor(0)}
        if self.params.method == "oneshot" and self.params.finetune >= setting.rounds:
            raise ConfigError(
                f"strategy.finetune is {self.params.finetune}; leave a round before the removal."
            )
        if self.params.prox == "server" and not setting.local.steps:
            raise ConfigError("strategy.prox=server needs to know the steps of a round; set local.steps.")

    def broadcast(self, server_round: int) -> Mapping[str, Mapping[str, Tensor]]:
        return {REGULARIZER: {LAM: self.state[REGULARIZER][LAM]}}

    def combine(
        self, server_round: int, current: Tensors, means: Mapping[str, Tensors], count: int
    ) -> Tensors:
        model, plan = super().combine(server_round, current, means, count), self.plan
        assert self.setting is not None
        local, rounds, lam = self.setting.local, self.setting.rounds, self.state[REGULARIZER][LAM]
        removes = self.params.method == "oneshot" and server_round == rounds - self.params.finetune
        if self.params.method == "iht" or removes:
            return plan.cut(model)
        if self.params.method not in PROXIMAL:
            return model
        if self.params.prox == "server":
            lr = local.lr_at((server_round - 1) * local.steps, local.steps, rounds)
            factors = plan.factors(norms(plan.groups, model), lr * local.steps * float(lam))
            model = {**model, **scaled(plan.groups, model, factors)}
        held = bool(self.state[REGULARIZER][HELD])
        if held or plan.active(model) <= (1 + self.params.tolerance) * plan.k:
            self.state[REGULARIZER][HELD] = torch.tensor(1)
        else:
            self.state[REGULARIZER][LAM] = lam * self.params.growth
        return model

    def finished(
        self, server_round: int, model: Tensors, metrics: MetricRecord, replies: int
    ) -> tuple[ArrayRecord, MetricRecord]:
        metrics["active-groups"] = float(self.plan.active(model))
        metrics["next-lambda"] = float(self.state[REGULARIZER][LAM])
        return super().finished(server_round, model, metrics, replies)

    def deliver(self, model: Tensors) -> Tensors:
        return self.plan.cut(model)

    def alternatives(self, model: Tensors) -> Mapping[str, Tensors]:
        return {UNCUT: model}


def conv_net(input_shape: Shape, num_classes: int, *, widths: tuple[int, ...] = (32, 64, 64, 128)) -> Net:
    """Return three strided convolutions and a hidden layer, each with batch norm, of ``widths`` channels and units."""
    channels, height, width = image_shape("conv_net", input_shape, 8)
    layers: list[nn.Module] = []
    for following in widths[:3]:
        layers += [conv3x3(channels, following, 2), nn.BatchNorm2d(following), nn.ReLU()]
        channels, height, width = following, -(-height // 2), -(-width // 2)
    hidden = nn.Linear(channels * height * width, widths[3], bias=False)
    return classifier(
        nn.Sequential(*layers, nn.Flatten(), hidden, nn.BatchNorm1d(widths[3]), nn.ReLU()),
        widths[3],
        num_classes,
    )


def linear_map(input_shape: Shape, num_classes: int) -> Net:
    """Return one output, linear in the inputs, from weights of zero."""
    head = nn.Linear(input_shape[0], 1, bias=False)
    nn.init.zeros_(head.weight)
    return Net(nn.Identity(), head, input_shape[0])


def sparse_regression(
    *, seed: int = 0, n: int = 200, groups: int = 50, active: int = 8, snr: float = 10.0
) -> Dataset:
    """Return n samples of a linear map of which few groups of four inputs matter, with noise.

    Inputs and the weights of active groups are standard normal; the noise has 1 / snr of the signal's variance. The
    extra ``target`` is what to predict. The test inputs begin with the unit vectors, whose targets are the weights; n
    further samples follow.
    """
    rng, width = seeds.torch_rng(seed, "sparse regression"), groups * BLOCK
    w = torch.randn(groups, BLOCK, generator=rng)
    w[torch.randperm(groups, generator=rng)[active:]] = 0
    x = torch.randn(2 * n, width, generator=rng)
    y = x @ w.flatten() + w.norm() / snr**0.5 * torch.randn(2 * n, generator=rng)
    return Dataset(
        "sparse regression",
        Split(x[:n], torch.zeros(n, dtype=torch.int64), {TARGET: y[:n]}),
        Split(
            torch.cat([torch.eye(width), x[n:]]),
            torch.zeros(width + n, dtype=torch.int64),
            {TARGET: torch.cat([w.flatten(), y[n:]])},
        ),
        ("none",),
        (0.0,),
        (1.0,),
        task="measured",
    )


def left(measured: Measured) -> dict[str, float]:
    """Return how many groups of filters and units are not exactly zero, and how many the emptiest layer has."""
    groups, state = output_units(ModelInfo.of(measured.model)), measured.model.state_dict()
    alive = norms(groups, state) > 0
    return {
        "groups": float(alive.sum()),
        "share-of-groups": float(alive.double().mean()),
        "emptiest-layer-groups": float(min(int(own.sum()) for own in by_layer(groups, alive))),
    }


def recovery(measured: Measured) -> dict[str, float]:
    """Return the relative error of the weights ``||w - w*|| / ||w*||``, groups, F1 of the support, held-out error."""
    target, width = measured.dataset.test.extras[TARGET].double(), measured.dataset.input_shape[0]
    outputs = measured.outputs()[0].flatten().double()
    w, truth = outputs[:width], target[:width]
    found, true = (v.view(-1, BLOCK).norm(dim=1) > 0 for v in (w, truth))
    return {
        "relative-error": float((w - truth).norm() / truth.norm()),
        "support-f1": 2 * float((found & true).sum()) / max(1.0, float(found.sum() + true.sum())),
        "groups": float(found.sum()),
        "held-out-error": float((outputs[width:] - target[width:]).square().mean()),
    }


def along_the_path(run: Finished) -> Mapping[str, float]:
    """Return the figures of regression, cut to k, at the lambda of the path that predicts held-out samples best."""
    seen = [r.metrics for r in run.records if r.phase == "evaluate-server" and "held-out-error" in r.metrics]
    if not seen:
        return {}
    best = min(seen, key=lambda metrics: metrics["held-out-error"])
    return {f"held-out:{name}": best[name] for name in ("relative-error", "support-f1")}


def tuned(runs: Mapping[str, Finished]) -> Mapping[str, Mapping[str, float]]:
    """Return the accuracy of group lasso with k groups at the best lambda of its grid, 0 at the others."""
    found = {arm: runs[arm].values["accuracy"] for arm in LASSO if arm in runs}
    best = max(found, key=lambda arm: found[arm], default="")
    return {arm: {"chosen:accuracy": value if arm == best else 0.0} for arm, value in found.items()}


def central(simulation: Simulation) -> Tensors:
    """Return what a plain loop makes of the method on ``conv_net``, with eta by bisection, group by group."""
    asked, lam, held, last = WgsefParams(**simulation.strategy.options), 0.0, False, 0
    rounds = simulation.federation.rounds

    def rows(net: nn.Module) -> list[tuple[Tensor, ...]]:
        p = dict(net.named_parameters())
        layers = [("body.0", "body.1"), ("body.3", "body.4"), ("body.6", "body.7"), ("body.10", "body.11")]
        return [
            (p[f"{a}.weight"][j], p[f"{b}.weight"][j : j + 1], p[f"{b}.bias"][j : j + 1])
            for a, b in layers
            for j in range(len(p[f"{b}.bias"]))
        ]

    def length(group: tuple[Tensor, ...]) -> float:
        return math.sqrt(sum(float(part.double().square().sum()) for part in group))

    @torch.no_grad()
    def prox(step: CentralStep) -> None:
        nonlocal lam, held, last
        groups = rows(step.net)
        k, weight = round(asked.k * len(groups)), step.lr * (lam or asked.lam)
        n = [length(group) for group in groups]
        low, high = 0.0, 2 * max(n) / weight**0.5
        for _ in range(200):
            eta = (low + high) / 2
            u = [min(1.0, max(0.0, weight**0.5 * one / eta - weight)) for one in n]
            low, high = (eta, high) if sum(u) > k else (low, eta)
        if sum(one > 0 for one in n) <= k:
            u = [float(one > 0) for one in n]
        for group, share in zip(groups, u, strict=True):
            for part in group:
                part.mul_(torch.tensor(share / (share + weight)).float())
        if (step.number + 1) % (-(-step.examples // simulation.local.batch_size)) == 0:
            held = held or sum(length(g) > 0 for g in groups) <= (1 + asked.tolerance) * k
            lam = (lam or asked.lam) * (1.0 if held else asked.growth)
            last += 1
        if last == rounds:
            sizes_now = [length(group) for group in groups]
            best = {
                max(range(start, stop), key=lambda j: (sizes_now[j], j)) for start, stop in spans(step.net)
            }
            for j in sorted(range(len(groups)), key=lambda j: (j in best, sizes_now[j], j))[
                : len(groups) - k
            ]:
                for part in groups[j]:
                    part.zero_()

    def spans(net: nn.Module) -> list[tuple[int, int]]:
        counts = [len(m.weight) for m in net.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        return [(sum(counts[:i]), sum(counts[: i + 1])) for i in range(len(counts))]

    return central_run(simulation, lambda step: F.cross_entropy(step.net(step.x), step.y), after=prox)


def sparsity_and_price(made: Reproduction) -> Figure:
    """Return active groups by round, accuracy before and after the cut, and the error of regression by round."""
    from flowerbed.experiments.reproduction import figures

    figure, (left_axis, middle, right) = figures.canvas(3, 1, 4.4)
    nets = [arm for arm in made.arms if not arm.startswith("regression")]
    for place, arm in enumerate(nets):
        _curve(left_axis, made, arm, "train:active-groups", arm, place)
        colour, _ = figures.look(place)
        for shift, name, fill in ((-0.12, f"{UNCUT}-accuracy", "none"), (0.12, "accuracy", colour)):
            found = figures.values(made, arm, name)
            middle.plot([place + shift] * len(found), found, "o", color=colour, mfc=fill, markersize=5)
    middle.set_xticks(range(len(nets)), nets, rotation=30)
    figures.finish(left_axis, "round", "groups left")
    figures.finish(middle, "hollow: before the cut to k", "test accuracy")
    for place, arm in enumerate(a for a in made.arms if a.startswith("regression")):
        _curve(right, made, arm, "relative-error", arm.removeprefix("regression-"), place)
    figures.finish(right, "round (lambda grows)", "relative error, cut to k")
    return figure


def _curve(axis: Axes, made: Reproduction, arm: str, name: str, label: str, place: int) -> None:
    from flowerbed.experiments.reproduction import figures

    curves = [dict(o.curves.get(name, ())) for o in made.of(arm)]
    rounds = sorted(set.intersection(*(set(curve) for curve in curves)))
    figures.line(axis, rounds, [[curve[r] for curve in curves] for r in rounds], label, place)


accuracy, error = metric("accuracy"), metric("relative-error")
held_out, share = metric("held-out:relative-error"), metric(f"{UNCUT}-share-of-groups")
PAPER = Paper(
    slug="wgsef",
    claims=(
        Claim(
            "nothing left to cut",
            "The final cut to k groups costs at most 0.3 points of accuracy.",
            metric(f"{UNCUT}-accuracy")["wgsef"] - accuracy["wgsef"] <= 0.003,
        ),
        Claim(
            "better than group lasso",
            "With k groups it is more accurate than group lasso at the best of its grid, whose survivors are shrunk.",
            accuracy["wgsef"] >= sum((metric("chosen:accuracy")[arm] for arm in LASSO), Linear()) + 0.003,
        ),
        Claim(
            "hits k",
            "Growing lambda, the groups that are not exactly zero come within 5 % of k before any cut.",
            (share["wgsef"] <= 1.05 * 0.2, share["wgsef"] >= 0.95 * 0.2),
        ),
        Claim(
            "regression",
            "In sparse regression with the true k its error is at most nine tenths of that of group lasso, both where "
            "group lasso has k groups and where held-out samples choose its lambda.",
            (
                held_out["regression-envelope"] <= 0.9 * error["regression-lasso"],
                held_out["regression-envelope"] <= 0.9 * held_out["regression-lasso"],
            ),
        ),
    ),
    central={"wgsef": central},
    measure=along_the_path,
    analyse=tuned,
    figure=sparsity_and_price,
    uses=("flowerbed.models.groups",),
)
