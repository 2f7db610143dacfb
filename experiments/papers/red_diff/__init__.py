"""A Variational Perspective on Solving Inverse Problems with Diffusion Models (RED-diff).

Mardani, Song, Kautz and Vahdat, ICLR 2024, arXiv 2305.04391. y = H(x_0) + sigma_v n is measured; a Gaussian
q = N(mu, s^2 I), s -> 0, is fitted to p(x_0 | y) by KL(q || p). The prior's part of it is an integral over diffusion
times of score mismatches whose gradient needs no derivative of the network:

    x_t  = a_t mu + s_t e,   e ~ N(0, I)
    loss = v |y - H(mu)|^2 / (2 m) + lambda_t <sg(e_theta(x_t, t) - e), mu> / n,   lambda_t = lambda s_t / a_t

for m measured numbers and n pixels, one time t a step from T - 1 down to 0, one Adam step (betas 0.9, 0.99) each,
started at mu = H^+ y. With xhat_t the denoised image, e_theta - e = (a_t / s_t)(mu - xhat_t), so the weight s_t / a_t
(``linear`` in 1 / SNR) makes the prior's gradient lambda (mu - xhat_t) / n at every time.

``weight``: const, sqrt, linear, square, log(1 + s/a), clip(s/a, 1), power23; ``order``: descending, ascending, random.

Baselines with as many calls of the network (or more), which differentiate through it:
DPS and PiGDM (``flowerbed.models.restoration``). ``tv``: the same descent with smoothed total variation for the prior.
``pinv``: H^+ y. DPS draws samples, and PSNR prefers the posterior's mean, so ``dps-mean`` averages 8 of its samples (8
times the calls).

Every method's settings are chosen on other images, ``tuned_on``, by PSNR over equally many combinations (``tune``).
PSNR is over the pixels that are not seen as they are; a classifier trained on the data says what it recognises.

Controls: each weight is tuned for itself; ``v`` = 0 forgets the measurement (score distillation). Adam hides the scale
of a gradient, and a pixel that is not seen has only that of the prior: for inpainting a small lambda is as good as any.

Quick scale: the exact predictor of a smoothed set of digits, and a network trained on them; both are arms of
``adaptive-guidance``.

Many clients: who owns y restores it and sends nothing. Where several clients measured the same objects (``Joint``), mu
is what the server keeps and broadcasts: clients answer with the gradient of their own measurements, the server adds
the prior's and takes the Adam step. Sums divided by all m make many clients one.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flowerbed import seeds
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import LocalRound, Reply
from flowerbed.errors import ClientError, ConfigError, require
from flowerbed.models.diffusion import DiffusionPrior
from flowerbed.models.inverse import BlockMean, Operator, box_mask, random_mask
from flowerbed.models.restoration import Adam, Problem, data_gradient, dps, pigdm, total_variation
from flowerbed.storage import Tensors
from flowerbed.strategies.base import ClientReply, FederatedStrategy, Phase, Setting
from flowerbed.strategies.diffusion import prior_of
from flowerbed.strategies.server_side import ServerSide

TASKS = ("random", "box", "blocks")
METHODS = ("red", "dps", "pigdm", "tv", "pinv")
ORDERS = ("descending", "ascending", "random")
WEIGHTS: dict[str, Callable[[float], float]] = {
    "const": lambda r: 1.0,
    "sqrt": math.sqrt,
    "linear": lambda r: r,
    "square": lambda r: r * r,
    "log": math.log1p,
    "clip": lambda r: min(r, 1.0),
    "power23": lambda r: r ** (2 / 3),
}
"""Of r = s_t / a_t, the inverse of the signal to noise ratio."""
RESTORED, CHOSEN = "restored", "chosen"
MU, ADAM, GRADIENT = "mu", "adam", "gradient"
START = "start"


@dataclass(frozen=True)
class RedDiffParams:
    """How measurements are made and restored; nothing is trained."""

    method: str = "red"
    """red, dps, pigdm, tv or pinv."""
    task: str = "random"
    """random (a share of the pixels is seen), box (a square in the middle is not) or blocks (block means)."""
    sigma_v: float = 0.05
    """Standard deviation of the noise on what is seen."""
    share: float = 0.5
    """Of the pixels that are seen (random)."""
    side: int = 4
    """Of the hidden square (box)."""
    factor: int = 2
    """Side of a block (blocks)."""
    images: int = 64
    """Test images that a client restores in a round."""
    tuned_on: int = 32
    """Other test images on which the settings in ``tune`` are chosen."""
    tune: dict[str, list[float]] = field(default_factory=dict)
    """Settings to choose from, by name; all combinations are tried."""
    steps: int = 100
    """Calls of the network for an image."""
    lam: float = 0.25
    """lambda, the weight of the prior (red, tv)."""
    lr: float = 0.1
    """Step of Adam, in units of pixels (red, tv)."""
    v: float = 1.0
    """Weight of the measurement (red, tv)."""
    s0: float = 0.0
    """Standard deviation of q (red)."""
    weight: str = "linear"
    order: str = "descending"
    zeta: float = 0.5
    """Step along the measurement's gradient (dps)."""
    weight_g: float = 1.0
    """Weight of the guidance (pigdm; 1 in its paper)."""
    eta: float = 1.0
    """Noise of the DDIM step (dps, pigdm)."""
    samples: int = 1
    """Runs whose mean is taken (dps)."""

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("task", TASKS), ("weight", WEIGHTS), ("order", ORDERS)):
            given = getattr(self, name)
            require(given in known, f"strategy.{name} is '{given}'; choose from {', '.join(known)}.")
        for name in ("images", "tuned_on", "steps", "side", "factor", "samples"):
            require(getattr(self, name) >= 1, f"strategy.{name} is {getattr(self, name)}; give at least 1.")
        for name in ("sigma_v", "lam", "v", "s0", "zeta", "weight_g", "eta"):
            require(getattr(self, name) >= 0, f"strategy.{name} is {getattr(self, name)}; give 0 or more.")
        require(self.lr > 0, f"strategy.lr is {self.lr}; give a step above 0.")
        require(0 < self.share < 1, f"strategy.share is {self.share}; give a share between 0 and 1.")
        strange = sorted(set(self.tune) - {"lam", "lr", "zeta", "weight_g", "eta"})
        require(
            not strange, f"strategy.tune has '{(strange or ['?'])[0]}'; tune lam, lr, zeta, weight_g or eta."
        )

    def combinations(self) -> list[dict[str, Any]]:
        """Return all settings to choose from; one that is empty if there is nothing to choose."""
        return [
            dict(zip(self.tune, values, strict=True)) for values in itertools.product(*self.tune.values())
        ]


def operator_of(asked: RedDiffParams, truth: Tensor, generator: torch.Generator) -> Operator:
    """Return how the images of a task are measured."""
    if asked.task == "random":
        return random_mask(truth.shape, asked.share, generator)
    if asked.task == "box":
        return box_mask(truth.shape, asked.side, truth.device)
    return BlockMean(asked.factor)


def prior_gradient(
    prior: DiffusionPrior, mu: Tensor, t: int, asked: RedDiffParams, generator: torch.Generator
) -> Tensor:
    """Return lambda_t (e_theta(x_t, t) - e) / n: the gradient of the prior's part, without any Jacobian."""
    a, s = prior.schedule.signal(t), prior.schedule.noise(t)
    e = torch.randn(mu.shape, generator=generator, device=mu.device, dtype=mu.dtype)
    centre = mu
    if asked.s0:
        centre = mu + asked.s0 * torch.randn(mu.shape, generator=generator, device=mu.device, dtype=mu.dtype)
    residual = prior.at(a * centre + s * e, t) - e
    return asked.lam * WEIGHTS[asked.weight](s / a) * residual / mu[0].numel()


def red_diff(problem: Problem, asked: RedDiffParams, generator: torch.Generator) -> Tensor:
    """Return mu of every image."""
    mu, adam = problem.start, Adam(asked.lr)
    measured = problem.operator.size(mu)
    for t in times(problem.prior, asked, generator):
        gradient = prior_gradient(problem.prior, mu, t, asked, generator)
        gradient = gradient + asked.v * data_gradient(problem.operator, problem.y, mu) / measured
        mu = adam.step(mu, gradient)
    return mu


def times(prior: DiffusionPrior, asked: RedDiffParams, generator: torch.Generator) -> list[int]:
    """Return the time of every step."""
    grid = prior.schedule.grid(asked.steps)
    if asked.order == "random":
        order = torch.randperm(len(grid), generator=generator, device=generator.device)
        return [grid[i] for i in order.tolist()]
    return grid[::-1] if asked.order == "ascending" else grid


def solve(problem: Problem, asked: RedDiffParams, generator: torch.Generator) -> Tensor:
    """Return what a method makes of the measurements."""
    if asked.method == "red":
        return red_diff(problem, asked, generator)
    if asked.method == "dps":
        made = [
            dps(problem, generator, steps=asked.steps, zeta=asked.zeta, eta=asked.eta)
            for _ in range(asked.samples)
        ]
        return torch.stack(made).mean(0)
    if asked.method == "pigdm":
        return pigdm(problem, generator, steps=asked.steps, weight=asked.weight_g, eta=asked.eta)
    if asked.method == "tv":
        return total_variation(problem, steps=asked.steps, lam=asked.lam, lr=asked.lr, v=asked.v)
    return problem.start


class RedDiffHalf(ClientHalf):
    """Restores its own measurements with the model that it is sent, and keeps what it restored."""

    stateful = True
    params: RedDiffParams

    @torch.no_grad()
    def run(self, local: LocalRound) -> Reply:
        before = local.state.get(RESTORED, {})
        done = len(before["psnr"]) if before else 0
        if CHOSEN not in local.state:
            local.state[CHOSEN] = self._chosen(local)
        chosen: dict[str, Any] = {name: float(value) for name, value in local.state[CHOSEN].items()}
        asked = replace(self.params, **chosen)
        problem, labels = self.problem(local, done, asked.images)
        began = time.thread_time()
        found = solve(problem, asked, self._stream(local, "solver", done))
        seconds = time.thread_time() - began
        kept = {
            "images": found,
            "labels": labels,
            "psnr": problem.judged(found),
            "truth": problem.truth,
            "start": problem.start,
        }
        local.state[RESTORED] = {n: torch.cat([before[n], v]) if before else v for n, v in kept.items()}
        metrics = {
            "psnr": float(local.state[RESTORED]["psnr"].double().mean()),
            "step-seconds": seconds / asked.steps,
        }
        return Reply(
            {}, {"num-examples": asked.images, **metrics, **{f"chosen-{n}": v for n, v in chosen.items()}}
        )

    def problem(self, local: LocalRound, first: int, count: int) -> tuple[Problem, Tensor]:
        """Return the measurements of ``count`` test images from the ``first`` on, in the run's order, and labels.

        Those for tuning are the last ones in it.
        """
        data = local.test_data
        if first + count > len(data):
            raise ClientError(
                f"it has {len(data)} test images and {first + count} were asked for; lower strategy.images or "
                "strategy.tuned_on"
            )
        order = torch.from_numpy(seeds.numpy_rng(local.seed, "test images").permutation(len(data)))
        # By sample id, so that clients with the same images take the same.
        rows = data.index.argsort()[order[first : first + count].to(data.x.device)]
        asked, truth, generator = self.params, data.x[rows], self._stream(local, "measurement", first)
        operator = operator_of(asked, truth, generator)
        return Problem.measured(prior_of(local).eval(), operator, truth, asked.sigma_v, generator), data.y[
            rows
        ]

    def _chosen(self, local: LocalRound) -> Tensors:
        """Return the settings of ``tune`` with the best PSNR on other images, by name; {} if there is no choice."""
        combinations = self.params.combinations()
        if len(combinations) == 1:
            return {name: torch.tensor(value, dtype=torch.float64) for name, value in combinations[0].items()}
        first = len(local.test_data) - self.params.tuned_on
        if first < self.params.images * local.clock.rounds:
            raise ClientError("the images for tuning would be among those judged; lower strategy.images")
        problem, _ = self.problem(local, first, self.params.tuned_on)
        scores = []
        for one in combinations:
            # One run decides a setting, also where several are averaged later.
            asked = replace(self.params, samples=1, **one)
            found = solve(problem, asked, self._stream(local, "solver", first))
            scores.append(float(problem.judged(found).nan_to_num(-100.0).double().mean()))
        best = combinations[max(range(len(scores)), key=scores.__getitem__)]
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in best.items()}

    def _stream(self, local: LocalRound, purpose: str, first: int) -> torch.Generator:
        return seeds.torch_rng(local.seed, purpose, local.client, first, device=local.device.type)


class RedDiff(FederatedStrategy):
    """Sends a diffusion model to clients that restore their own measurements with it."""

    Params = RedDiffParams
    Half = RedDiffHalf
    params: RedDiffParams

    def aggregate(self, server_round: int, current: Tensors, replies: list[ClientReply]) -> Tensors:
        return {}


class JointHalf(RedDiffHalf):
    """Measures the objects that all clients see, and answers with the gradient of its own measurements."""

    @torch.no_grad()
    def run(self, local: LocalRound) -> Reply:
        problem, _ = self.problem(local, 0, self.params.images)
        gradient = data_gradient(problem.operator, problem.y, local.received[MU][MU].to(local.device))
        return Reply({GRADIENT: {GRADIENT: gradient}}, {"num-examples": self.params.images})

    @torch.no_grad()
    def query(self, local: LocalRound) -> Reply:
        problem, labels = self.problem(local, 0, self.params.images)
        operator, truth = problem.operator, problem.truth
        counted: dict[str, Any] = {"num-examples": self.params.images}
        if local.phase == START:
            seen = operator.inverse(operator(torch.ones_like(truth)))
            size = operator.size(truth).to(truth.dtype)
            return Reply({START: {"sum": problem.start, "seen": seen, "size": size}}, counted)
        found = local.received[MU][MU].to(local.device)
        score = problem.judged(found)
        local.state[RESTORED] = {
            "images": found.clone(), "labels": labels, "psnr": score, "truth": truth, "start": problem.start
        }  # fmt: skip
        return Reply({}, {**counted, "psnr": float(score.double().mean())})


class Joint(FederatedStrategy):
    """RED-diff with the image on the server and the measurements at the clients; a step is a round."""

    Params = RedDiffParams
    Half = JointHalf
    params: RedDiffParams
    sums_in_queries = True

    def setup(self, setting: Setting) -> None:
        asked = self.params
        require(
            asked.method == "red" and asked.order != "random" and not asked.tune,
            "Several clients restore together with method=red, an order that is not random, and nothing to tune.",
        )
        require(
            asked.steps == setting.rounds,
            f"A step is a round here; set strategy.steps and federation.rounds to the same number, not {asked.steps} "
            f"and {setting.rounds}.",
        )
        super().setup(setting)

    def phases(self, rounds: int) -> list[Phase]:
        return [
            Phase(START, 1, "query", everyone=True),
            Phase("train", rounds, everyone=True),
            Phase("judge", 1, "query", everyone=True),
        ]

    def broadcast(self, server_round: int) -> Mapping[str, Mapping[str, Tensor]]:
        return {MU: {MU: self.state[MU][MU]}} if MU in self.state else {}

    def aggregate(self, server_round: int, current: Tensors, replies: list[ClientReply]) -> Tensors:
        if self.phase.name == START:
            total = {
                n: torch.stack([r.streams[START][n] for r in replies]).sum(0)
                for n in replies[0].streams[START]
            }
            stream = seeds.torch_rng(self._side.seed, "solver", 0, 0).get_state()
            self.state[MU] = {
                MU: total["sum"] / total["seen"].clamp(min=1),
                "size": total["size"],
                "stream": stream,
            }
        elif self.phase.name == "train":
            self._step(
                server_round - 2,
                current,
                torch.stack([r.streams[GRADIENT][GRADIENT] for r in replies]).sum(0),
            )
        return {}

    @torch.no_grad()
    def _step(self, step: int, current: Tensors, data: Tensor) -> None:
        kept, prior = self.state[MU], self._prior
        prior.load_state_dict(current)
        generator = torch.Generator()
        generator.set_state(kept["stream"])
        mu = kept[MU]
        t = times(prior, self.params, generator)[step]
        gradient = prior_gradient(prior, mu, t, self.params, generator) + self.params.v * data / kept["size"]
        adam = Adam(self.params.lr, self.state.get(ADAM))
        self.state[MU] = {**kept, MU: adam.step(mu, gradient), "stream": generator.get_state()}
        self.state[ADAM] = adam.state

    @property
    def _side(self) -> ServerSide:
        if self.setting is None or self.setting.server is None:
            raise ConfigError("Joint needs the model on the server; run it as a simulation.")
        return self.setting.server

    @cached_property
    def _prior(self) -> DiffusionPrior:
        model = self._side.model.build(self._side.seed)
        assert isinstance(model, DiffusionPrior)
        return model.eval()
