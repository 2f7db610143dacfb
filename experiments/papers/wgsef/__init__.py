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
batch norm: a filter of zeros would still emit the shift. Once such a group is zero, no gradient reaches it. At full
scale the channels that nothing writes any more are taken out and both models timed (``latency`` of
``flowerbed.experiments.measures``).

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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord, MetricRecord
from torch import Tensor

from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound, Step
from flowerbed.errors import ConfigError, require
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
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors
from flowerbed.strategies.base import Setting
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

REGULARIZER, LAM, HELD, GROUPS, BEFORE, ALIVE = "regularizer", "lam", "held", "groups", "before", "alive"
PROXIMAL = ("envelope", "lasso")
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
