"""Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models (AG, LinearAG).

Castillo, Kohler, Perez, Perez, Pumarola, Ghanem, Arbelaez and Thabet, AAAI 2025, arXiv 2312.12487. Classifier-free
guidance of scale s takes two calls of the network a step, e = e_u + s (e_c - e_u). Late in the sampling the conditional
and the unconditional prediction are parallel, and the second call is wasted.

AG: while guidance is on, both are computed and the guided step is taken; once

    gamma_t = <e_c, e_u> / (|e_c| |e_u|) >= gamma_bar

it is off for all later steps of this image, which then cost one call. The step that passes the threshold cost two.

LinearAG: before that point the unconditional prediction is nearly linear in what is known already,

    e_u_hat(t) = sum_{j <= t} a_tj e_c(j) + sum_{j < t} b_tj e_u(j)           (j in sampling order)

with one scalar a prediction, by least squares over a few guided trajectories. In the first half of the steps true
guidance and such steps alternate, the second half is conditional: 25 calls in place of 40.

Search: the policy behind both. Every step has weights alpha_t over no label, label, and guidance of s/2, s and 2s; the
relaxed sampler e_t = sum_k softmax(alpha_t)_k e_t^(k) is brought close to full guidance from the same noise, plus
``cost`` times the expected calls. The largest weight of each step is the policy that is then run.

``space``: on images, e_c and e_u are both nearly x_t at the first step and gamma is 0.9999 there, so that the rule as
printed (``noise``) stops at once. The denoised images give a cosine that rises (``x0``, the default here). Both run.

Controls: guidance in the first k steps with as many calls as AG needed, computed from the same noise within the AG arm
(k is rounded up, in favour of the control); guidance in the first or the last half; the label alone. All are judged by
the distance to full guidance *from the same noise*: against the data guidance itself is biased.

Quick scale: two noise predictors. ``exact`` is the closed form of a smoothed data set, without any error of training;
``unet`` was trained on it. Their images are also judged by a classifier that was trained on the data.

Many clients: nothing is trained, so each samples by itself. LinearAG needs second moments of predictions alone, one
matrix (2T)^2, which clients send and the server adds up: exactly the fit on all trajectories. A searched policy is that
of the clients' averaged alpha.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from flowerbed import seeds
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import LocalRound, Reply
from flowerbed.errors import require
from flowerbed.models.diffusion import SOLVERS, DiffusionPrior, Guidance, Policy, Predictions, guided, sample
from flowerbed.storage import Tensors
from flowerbed.strategies.base import ClientReply, FederatedStrategy, Phase
from flowerbed.strategies.diffusion import prior_of

POLICIES = ("cfg", "first", "last", "conditional", "ag", "linear", "search")
SPACES = ("x0", "noise")
SAMPLES, COSINES = "samples", "cosines"
LEARNED, MOMENTS, ALPHA = "learned policy", "moments", "alpha"
OPTIONS = 5
"""Choices of a searched step: no label, label, guidance of s/2, s and 2s."""
RIDGE = 1e-8
"""Added to the moments' diagonal, relative to its mean: the predictions are almost collinear."""


@dataclass(frozen=True)
class AdaptiveGuidanceParams:
    """How images are sampled; nothing is trained."""

    policy: str = "ag"
    """cfg, first or last (guidance in so many steps: ``k``), conditional, ag, linear or search."""
    s: float = 7.5
    """Scale of the guidance."""
    T: int = 20
    """Steps of the sampler."""
    gamma_bar: float = 0.99
    """Cosine from which guidance is off (ag)."""
    space: str = "x0"
    """Where the cosine is taken: x0 (denoised images) or noise (as printed)."""
    warm_up: int = 0
    """Steps at the start that never turn guidance off."""
    k: int = 10
    """Guided steps (first, last), or steps in which linear alternates before it is conditional."""
    solver: str = "ddim"
    images: int = 200
    """Images that a client makes in a round, the classes in turn."""
    fitted_on: int = 200
    """Trajectories of a client that a linear or a searched policy is learned on; others than those judged."""
    search_steps: int = 60
    """Steps of the search, by Adam."""
    cost: float = 2e-3
    """What an expected call weighs in it."""

    def __post_init__(self) -> None:
        for name, known in (("policy", POLICIES), ("space", SPACES), ("solver", SOLVERS)):
            given = getattr(self, name)
            require(given in known, f"strategy.{name} is '{given}'; choose from {', '.join(known)}.")
        for name in ("T", "images", "fitted_on", "search_steps"):
            require(getattr(self, name) >= 1, f"strategy.{name} is {getattr(self, name)}; give at least 1.")
        for name in ("warm_up", "k"):
            given = getattr(self, name)
            require(0 <= given <= self.T, f"strategy.{name} is {given}; give 0 to strategy.T={self.T}.")
        require(self.cost >= 0, f"strategy.cost is {self.cost}; give 0 or more.")

    @property
    def learns(self) -> bool:
        """Whether something is measured on trajectories before the first image."""
        return self.policy in ("linear", "search")


class AdaptiveGuidance:
    """AG: guidance until the two predictions of an image are parallel, the label alone from then on."""

    def __init__(self, s: float, gamma_bar: float, space: str = "x0", warm_up: int = 0) -> None:
        self.s, self.gamma_bar, self.space, self.warm_up = s, gamma_bar, space, warm_up
        self.on: Tensor | None = None

    def __call__(self, step: int, now: Predictions) -> Tensor:
        e_c = now.conditional()
        on = torch.ones(len(e_c), dtype=torch.bool, device=e_c.device) if self.on is None else self.on
        if not on.any():
            return e_c
        # Only images that still need it are computed: with all of them in one batch nothing would be saved.
        rows = None if on.all() else on
        e_u = _scattered(now.unconditional(rows), e_c, rows)
        gamma = cosine(now, e_c, e_u, self.space)
        self.on = on & ((gamma < self.gamma_bar) | (step < self.warm_up))
        return torch.where(_wide(on, e_c), guided(e_c, e_u, self.s), e_c)


class LinearGuidance:
    """LinearAG: true guidance and a linear estimate of e_u in turns for k steps, then the label alone."""

    def __init__(self, s: float, coefficients: Tensor, k: int) -> None:
        """``coefficients`` are ``(T, 2T)``: a in the first T columns, b in the others."""
        self.s, self.coefficients, self.k = s, coefficients, k
        self._c: list[Tensor] = []
        self._u: list[Tensor] = []

    def __call__(self, step: int, now: Predictions) -> Tensor:
        e_c = now.conditional()
        if step >= self.k:
            return e_c
        self._c.append(e_c)
        e_u = now.unconditional() if step % 2 == 0 else self.estimate(step)
        self._u.append(e_u)
        return guided(e_c, e_u, self.s)

    def estimate(self, step: int) -> Tensor:
        """Return e_u_hat from the predictions so far, the estimates among them."""
        steps, row = len(self.coefficients), self.coefficients[step]
        terms = [row[j] * e for j, e in enumerate(self._c)] + [
            row[steps + j] * e for j, e in enumerate(self._u)
        ]
        return torch.stack(terms).sum(0).to(self._c[0].dtype)


@dataclass
class Recorded:
    """Full guidance that keeps both predictions of every step."""

    s: float
    c: list[Tensor] = field(default_factory=list)
    u: list[Tensor] = field(default_factory=list)
    cosines: dict[str, list[Tensor]] = field(default_factory=lambda: {space: [] for space in SPACES})

    def __call__(self, step: int, now: Predictions) -> Tensor:
        e_c, e_u = now.conditional(), now.unconditional()
        self.c.append(e_c)
        self.u.append(e_u)
        for space, found in self.cosines.items():
            found.append(cosine(now, e_c, e_u, space))
        return guided(e_c, e_u, self.s)


class Weighted:
    """The relaxed policy of the search; or, if ``hard``, the one that its largest weights stand for."""

    def __init__(self, s: float, alpha: Tensor, hard: bool) -> None:
        self.s, self.alpha, self.hard = s, alpha, hard

    def __call__(self, step: int, now: Predictions) -> Tensor:
        if self.hard:
            best = int(self.alpha[step].argmax())
            if best < 2:
                return now.conditional() if best else now.unconditional()
            return guided(now.conditional(), now.unconditional(), self.s * 2.0 ** (best - 3))
        e_c, e_u = now.conditional(), now.unconditional()
        w = self.alpha[step].softmax(0)
        scale = w[1] + self.s * (w[2] / 2 + w[3] + 2 * w[4])
        return e_u + scale * (e_c - e_u)


class AdaptiveGuidanceHalf(ClientHalf):
    """Samples with the model that it is sent, and keeps the images."""

    stateful = True
    params: AdaptiveGuidanceParams

    @torch.no_grad()
    def run(self, local: LocalRound) -> Reply:
        asked, prior = self.params, prior_of(local).eval()
        before = local.state.get(SAMPLES, {})
        count = len(before["labels"]) if before else 0
        start, labels = self._starts(local, prior, "starting noise", asked.images, count)
        policy = self._policy(local)
        began = time.thread_time()
        made = sample(prior, start, labels, policy, steps=asked.T, solver=asked.solver)
        seconds = time.thread_time() - began
        found = {"images": made.images, "labels": labels, "calls": made.calls}
        if isinstance(policy, Recorded):
            local.state[COSINES] = {n: torch.stack(v).mean(1) for n, v in policy.cosines.items()}
        if asked.policy == "ag":
            k = math.ceil(float(made.calls.double().mean())) - asked.T
            control = Guidance(asked.s, range(k))
            fixed = sample(prior, start, labels, control, steps=asked.T, solver=asked.solver)
            found |= {"control": fixed.images, "control calls": fixed.calls}
        local.state[SAMPLES] = {n: torch.cat([before[n], v]) if before else v for n, v in found.items()}
        metrics = {
            "nfe": float(made.calls.double().mean()),
            "nfe-std": float(made.calls.double().std(correction=0)),
            "sampling-seconds": seconds,
        }
        if asked.policy == "search":
            metrics |= described(local.received[LEARNED][ALPHA])
        if asked.policy == "linear":
            full = Recorded(asked.s)
            sample(prior, start, labels, full, steps=asked.T, solver=asked.solver)
            metrics |= errors(full, local.received[LEARNED][MOMENTS].to(local.device))
        return Reply({}, {"num-examples": asked.images, **metrics})

    def query(self, local: LocalRound) -> Reply:
        asked, prior = self.params, prior_of(local).eval()
        start, labels = self._starts(local, prior, "calibration noise", asked.fitted_on)
        if asked.policy == "linear":
            return Reply(
                {MOMENTS: {MOMENTS: moments(prior, start, labels, asked)}}, {"num-examples": asked.fitted_on}
            )
        alpha = search(prior, start, labels, asked)
        return Reply({ALPHA: {ALPHA: alpha}}, {"num-examples": asked.fitted_on})

    def _starts(
        self, local: LocalRound, prior: DiffusionPrior, purpose: str, count: int, first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Return starting noise and labels; the same for every policy."""
        shape = local.train_data.x.shape[1:]
        generator = seeds.torch_rng(local.seed, purpose, local.client, first, device=local.device.type)
        start = torch.randn(count, *shape, generator=generator, device=local.device)
        labels = (first + torch.arange(count, device=local.device)) % local.task.classes
        return start, labels

    def _policy(self, local: LocalRound) -> Policy:
        asked = self.params
        if asked.policy == "ag":
            return AdaptiveGuidance(asked.s, asked.gamma_bar, asked.space, asked.warm_up)
        if asked.policy == "linear":
            return LinearGuidance(asked.s, local.received[LEARNED][MOMENTS].to(local.device), asked.k)
        if asked.policy == "search":
            return Weighted(asked.s, local.received[LEARNED][ALPHA], hard=True)
        if asked.policy == "cfg":
            return Recorded(asked.s)
        guided_steps = {"first": range(asked.k), "last": range(asked.T - asked.k, asked.T)}
        return Guidance(asked.s, guided_steps.get(asked.policy, range(0)))


class AdaptiveSampling(FederatedStrategy):
    """Sends a diffusion model to clients that sample with it; adds up what a policy is learned from."""

    Params = AdaptiveGuidanceParams
    Half = AdaptiveGuidanceHalf
    params: AdaptiveGuidanceParams
    sums_in_queries = True

    def phases(self, rounds: int) -> list[Phase]:
        asking = [Phase("calibrate", 1, "query", everyone=True)] if self.params.learns else []
        return [*asking, *super().phases(rounds)]

    def broadcast(self, server_round: int) -> Mapping[str, Mapping[str, Tensor]]:
        return {LEARNED: self.state[LEARNED]} if LEARNED in self.state else {}

    def aggregate(self, server_round: int, current: Tensors, replies: list[ClientReply]) -> Tensors:
        if self.phase.name == "calibrate":
            if self.params.policy == "linear":
                total = torch.stack([reply.streams[MOMENTS][MOMENTS] for reply in replies]).sum(0)
                self.state[LEARNED] = {MOMENTS: fitted(total)}
            else:
                self.state[LEARNED] = {
                    ALPHA: torch.stack([reply.streams[ALPHA][ALPHA] for reply in replies]).mean(0)
                }
        return {}


def cosine(now: Predictions, e_c: Tensor, e_u: Tensor, space: str) -> Tensor:
    """Return gamma of every image over all its dimensions, in float32, ``(B,)``."""
    one, other = (now.denoised(e_c), now.denoised(e_u)) if space == "x0" else (e_c, e_u)
    return F.cosine_similarity(one.flatten(1).float(), other.flatten(1).float())


def moments(prior: DiffusionPrior, start: Tensor, labels: Tensor, asked: AdaptiveGuidanceParams) -> Tensor:
    """Return the second moments of all predictions of guided trajectories, float64 ``(2T, 2T)``: sums, so they add up.

    e_c of the T steps comes first, then e_u. The moments that step t's fit needs are a part of the matrix.
    """
    kept = Recorded(asked.s)
    with torch.no_grad():
        sample(prior, start, labels, kept, steps=asked.T, solver=asked.solver)
    rows = torch.stack([*kept.c, *kept.u]).flatten(1).double()
    return rows @ rows.T


def fitted(total: Tensor) -> Tensor:
    """Return the coefficients ``(T, 2T)`` of every step's least squares, given the moments."""
    steps = len(total) // 2
    coefficients = torch.zeros(steps, 2 * steps, dtype=torch.float64)
    for t in range(steps):
        known = torch.tensor([*range(t + 1), *range(steps, steps + t)])
        a = total[known][:, known]
        ridge = RIDGE * a.diagonal().mean() * torch.eye(len(known), dtype=a.dtype)
        coefficients[t, known] = torch.linalg.solve(a + ridge, total[known, steps + t])
    return coefficients


def errors(full: Recorded, coefficients: Tensor) -> dict[str, float]:
    """Return the largest relative error of e_u over the steps: of the fit, of e_c, of the last difference."""
    steps = len(coefficients)
    worst = {"linear-error": 0.0, "conditional-error": 0.0, "difference-error": 0.0}
    for t in range(steps):
        terms = torch.stack([*full.c[: t + 1], *full.u[:t]])
        weights = torch.cat([coefficients[t, : t + 1], coefficients[t, steps : steps + t]]).to(terms)
        estimates = {"linear-error": torch.tensordot(weights, terms, 1), "conditional-error": full.c[t]}
        if t:
            estimates["difference-error"] = full.c[t] + full.u[t - 1] - full.c[t - 1]
        for name, estimate in estimates.items():
            worst[name] = max(worst[name], float((estimate - full.u[t]).norm() / full.u[t].norm()))
    return worst


def search(prior: DiffusionPrior, start: Tensor, labels: Tensor, asked: AdaptiveGuidanceParams) -> Tensor:
    """Return the weights alpha ``(T, 5)`` of the policy search, before the softmax."""
    with torch.no_grad():
        target = sample(prior, start, labels, Guidance(asked.s), steps=asked.T, solver=asked.solver).images
    alpha = torch.zeros(asked.T, OPTIONS, device=start.device, requires_grad=True)
    calls = torch.tensor([1.0, 1, 2, 2, 2], device=start.device)
    optimizer = torch.optim.Adam([alpha], lr=0.3)
    for _ in range(asked.search_steps):
        with torch.enable_grad():
            relaxed = Weighted(asked.s, alpha, hard=False)
            made = sample(prior, start, labels, relaxed, steps=asked.T, solver=asked.solver).images
            loss = F.mse_loss(made, target) + asked.cost * (alpha.softmax(1) @ calls).sum()
            (alpha.grad,) = torch.autograd.grad(loss, [alpha])
        optimizer.step()
    return alpha.detach()


def described(alpha: Tensor) -> dict[str, float]:
    """Return in how many steps of each half a searched policy has guidance."""
    on = (alpha.argmax(1) >= 2).double()
    half = len(on) // 2
    return {"guided-early": float(on[:half].sum()), "guided-late": float(on[half:].sum())}


def _wide(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (like.ndim - 1))


def _scattered(values: Tensor, like: Tensor, rows: Tensor | None) -> Tensor:
    """Return ``values`` of some rows in the shape of all of them."""
    if rows is None:
        return values
    whole = like.clone()
    whole[rows] = values
    return whole
