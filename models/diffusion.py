"""Diffusion models: what a noise predictor is, two of them, and samplers that count the calls of the network.

A variance preserving diffusion has x_t = a_t x_0 + s_t e with e ~ N(0, I), a_t^2 = abar_t, s_t^2 = 1 - abar_t, for
times 0 ... T - 1; t = -1 is the clean image, abar_{-1} = 1. A ``DiffusionPrior`` predicts e from x_t; the denoised
image is xhat = (x_t - s_t e) / a_t. Images lie in [-1, 1].

Ho, Jain and Abbeel, NeurIPS 2020 (the diffusion); Song, Meng and Ermon, ICLR 2021 (DDIM); Lu et al., 2022 (the
multistep solver, DPM-Solver++ 2M); Ho and Salimans, 2022 (classifier-free guidance).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.errors import ConfigError, require
from flowerbed.models.base import Shape
from flowerbed.models.layers import image_shape

SCHEDULES = ("linear", "cosine")
SOLVERS = ("ddim", "dpm")


@dataclass(frozen=True, eq=False)
class Schedule:
    """How much noise there is at each time."""

    abar: Tensor
    """float64 ``(T + 1,)``, that of time t at place t + 1; the first is 1."""

    @classmethod
    def named(cls, name: str, steps: int = 1000) -> Schedule:
        """Return ``linear`` (beta from 1e-4 to 0.02) or ``cosine`` (Nichol and Dhariwal, ICML 2021), with T times."""
        require(name in SCHEDULES, f"Noise schedule '{name}' is none of {', '.join(SCHEDULES)}.")
        require(steps >= 2, f"A diffusion has at least 2 times, not {steps}.")
        if name == "linear":
            # The same noise at the end, however many times there are.
            betas = (torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * (1000 / steps)).clamp(max=0.999)
        else:
            f = torch.cos(
                (torch.linspace(0, 1, steps + 1, dtype=torch.float64) + 0.008) / 1.008 * math.pi / 2
            )
            betas = (1 - (f[1:] / f[:-1]) ** 2).clamp(max=0.999)
        return cls(torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)]))

    @property
    def steps(self) -> int:
        """T, the number of times."""
        return len(self.abar) - 1

    def signal(self, t: int) -> float:
        """Return a_t."""
        return math.sqrt(float(self.abar[t + 1]))

    def noise(self, t: int) -> float:
        """Return s_t."""
        return math.sqrt(1 - float(self.abar[t + 1]))

    def rates(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return a_t and s_t for times ``(B,)``, each ``(B, 1, ...)`` to be multiplied with ``like``."""
        abar = self.abar.to(t.device)[t + 1].view(-1, *[1] * (like.ndim - 1))
        return abar.sqrt().to(like.dtype), (1 - abar).sqrt().to(like.dtype)

    def grid(self, count: int) -> list[int]:
        """Return ``count`` times, evenly from T - 1 down to 0."""
        require(1 <= count <= self.steps, f"Of {self.steps} times {count} cannot be visited.")
        return [round(t) for t in torch.linspace(self.steps - 1, 0, count, dtype=torch.float64).tolist()]


class DiffusionPrior(nn.Module):
    """A noise predictor with its schedule: ``prior(x_t, t, labels)`` is e."""

    def __init__(self, num_classes: int, schedule: str, steps: int) -> None:
        super().__init__()
        self.schedule = Schedule.named(schedule, steps)
        self.null = num_classes
        """The label that stands for none."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the predicted noise for x_t ``(B, ...)``, times ``(B,)`` and labels ``(B,)``; None means no label."""
        raise NotImplementedError

    def at(self, x: Tensor, t: int, labels: Tensor | None = None) -> Tensor:
        """Return the predicted noise where all samples are at time t."""
        e: Tensor = self(x, torch.full((len(x),), t, device=x.device), labels)
        return e

    def denoised(self, x: Tensor, e: Tensor, t: int) -> Tensor:
        """Return xhat, given x_t and the noise in it."""
        return (x - self.schedule.noise(t) * e) / self.schedule.signal(t)

    def unlabelled(self, x: Tensor) -> Tensor:
        """Return the label that stands for none, for every sample."""
        return torch.full((len(x),), self.null, device=x.device)


class Empirical(DiffusionPrior):
    """The exact noise predictor of a smoothed data set: p(x_0) is the mean of N(c_i, k^2 I) over its centres c_i.

    E[x_0 | x_t] is a softmax average in closed form, so that there is nothing to train and no error in the score. With
    a label only the centres of this class count, if there are any.
    """

    centres: Tensor
    labels: Tensor

    def __init__(
        self,
        input_shape: Shape,
        num_classes: int,
        *,
        centres: int,
        kernel: float = 0.3,
        schedule: str = "linear",
        steps: int = 1000,
    ) -> None:
        """``centres`` is how many there are; whoever fits the model puts them into the buffers."""
        super().__init__(num_classes, schedule, steps)
        require(centres >= 1, f"Option centres={centres} of model 'Empirical' must be at least 1.")
        require(kernel > 0, f"Option kernel={kernel} of model 'Empirical' must be above 0.")
        self.kernel = kernel
        self.register_buffer("centres", torch.zeros(centres, *input_shape))
        self.register_buffer("labels", torch.zeros(centres, dtype=torch.int64))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        a, s = self.schedule.rates(t, x.flatten(1))
        centres, flat = self.centres.flatten(1).to(x.dtype), x.flatten(1)
        variance = (a * self.kernel) ** 2 + s**2
        # ||x - a c||^2 without ||x||^2, which is the same for every centre.
        distance = a**2 * (centres**2).sum(1) - 2 * a * (flat @ centres.T)
        logits = -distance / (2 * variance)
        if labels is not None:
            own = self.labels == labels[:, None]
            logits = logits.masked_fill(~own & own.any(1, keepdim=True), -math.inf)
        mean = logits.softmax(1) @ centres
        # E[x_0 | x_t] = mean + (a k^2 / variance) (x_t - a mean), and what is left of x_t is noise.
        e: Tensor = (s / variance * (flat - a * mean)).view_as(x)
        return e


class _Block(nn.Module):
    """Two convolutions with group norm, told of time and label between them, around a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, embedding: int, groups: int) -> None:
        super().__init__()
        self.before = nn.GroupNorm(math.gcd(groups, channels_in), channels_in)
        self.first = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.told = nn.Linear(embedding, channels_out)
        self.between = nn.GroupNorm(math.gcd(groups, channels_out), channels_out)
        self.second = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = (
            nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)
        )

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        y = self.first(F.silu(self.before(x))) + self.told(told)[:, :, None, None]
        z: Tensor = self.second(F.silu(self.between(y))) + self.shortcut(x)
        return z


class UNet(DiffusionPrior):
    """A small convolutional U-Net that is told time and class: one block a level on either side, one in the middle."""

    def __init__(
        self,
        input_shape: Shape,
        num_classes: int,
        *,
        base: int = 32,
        widths: Sequence[int] = (1, 2),
        groups: int = 8,
        schedule: str = "linear",
        steps: int = 1000,
    ) -> None:
        """``widths`` has one entry a level, whose channels are that times ``base``; each next one halves the side."""
        super().__init__(num_classes, schedule, steps)
        channels, *sides = image_shape("UNet", input_shape, 2 ** (len(widths) - 1))
        factor = 2 ** (len(widths) - 1)
        if base < 2 or not widths or any(side % factor for side in sides):
            raise ConfigError(
                f"Model 'UNet' with {len(widths)} levels needs sides that {factor} divides and base of at least 2; "
                f"got {sides[0]}x{sides[1]} and base={base}."
            )
        embedding = 4 * base
        self.frequencies = base // 2
        self.time = nn.Sequential(
            nn.Linear(2 * self.frequencies, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.label = nn.Embedding(num_classes + 1, embedding)
        self.enter = nn.Conv2d(channels, base, 3, padding=1)
        sizes = [base * width for width in widths]
        self.down, self.narrow = nn.ModuleList(), nn.ModuleList()
        before = base
        for level, size in enumerate(sizes):
            self.down.append(_Block(before, size, embedding, groups))
            if level < len(sizes) - 1:
                self.narrow.append(nn.Conv2d(size, size, 3, 2, padding=1))
            before = size
        self.middle = _Block(before, before, embedding, groups)
        self.up = nn.ModuleList()
        for size in reversed(sizes):
            self.up.append(_Block(before + size, size, embedding, groups))
            before = size
        self.last = nn.GroupNorm(math.gcd(groups, before), before)
        self.leave = nn.Conv2d(before, channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        labels = self.unlabelled(x) if labels is None else labels
        told = F.silu(self.time(self._waves(t)) + self.label(labels))
        y, skipped = self.enter(x), []
        for level, block in enumerate(self.down):
            y = block(y, told)
            skipped.append(y)
            if level < len(self.narrow):
                y = self.narrow[level](y)
        y = self.middle(y, told)
        for place, block in enumerate(self.up):
            if place:
                y = F.interpolate(y, scale_factor=2.0, mode="nearest")
            y = block(torch.cat([y, skipped.pop()], 1), told)
        e: Tensor = self.leave(F.silu(self.last(y)))
        return e

    def _waves(self, t: Tensor) -> Tensor:
        rates = torch.exp(
            -math.log(10_000) * torch.arange(self.frequencies, device=t.device) / self.frequencies
        )
        angles = t[:, None] * (1000 / self.schedule.steps) * rates
        return torch.cat([angles.sin(), angles.cos()], 1)


class Predictions:
    """The two predictions at one step of a sampler, computed when asked for; counts the calls of every sample."""

    def __init__(
        self, prior: DiffusionPrior, x: Tensor, t: int, labels: Tensor, negative: Tensor, calls: Tensor
    ) -> None:
        """``calls`` int64 ``(B,)`` is added to; ``negative`` are the labels to lead away from."""
        self.prior, self.x, self.t = prior, x, t
        self._labels, self._negative, self._calls = labels, negative, calls

    def conditional(self) -> Tensor:
        """Return e_c, ``(B, ...)``: one call for each sample."""
        self._calls += 1
        return self.prior.at(self.x, self.t, self._labels)

    def unconditional(self, rows: Tensor | None = None) -> Tensor:
        """Return e_u of the samples ``rows`` (bool ``(B,)``; None means all): one call for each of these."""
        if rows is None:
            self._calls += 1
            return self.prior.at(self.x, self.t, self._negative)
        self._calls += rows.to(self._calls.dtype)
        return self.prior.at(self.x[rows], self.t, self._negative[rows])

    def denoised(self, e: Tensor) -> Tensor:
        """Return xhat for a prediction of all samples."""
        return self.prior.denoised(self.x, e, self.t)


class Policy(Protocol):
    """Which predictions a step uses, and how; may remember earlier steps of the trajectory."""

    def __call__(self, step: int, now: Predictions) -> Tensor:
        """Return the noise that the solver goes on with at ``step`` (from 0), ``(B, ...)``."""


def guided(e_c: Tensor, e_u: Tensor, s: float) -> Tensor:
    """Return classifier-free guidance of scale ``s``: e_u + s (e_c - e_u); 1 is conditional only."""
    return e_u + s * (e_c - e_u)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of one scale in some steps, conditional predictions alone in the others."""

    scale: float
    on: Collection[int] | None = None
    """The steps with guidance, from 0; None means all."""

    def __call__(self, step: int, now: Predictions) -> Tensor:
        e_c = now.conditional()
        if self.on is not None and step not in self.on:
            return e_c
        return guided(e_c, now.unconditional(), self.scale)


class Unconditional:
    """No label at all: one call a step."""

    def __call__(self, step: int, now: Predictions) -> Tensor:
        return now.unconditional()


@dataclass(frozen=True)
class Sampled:
    """What a sampler made."""

    images: Tensor
    calls: Tensor
    """Calls of the network for every sample (NFE), int64 ``(B,)``."""


def sample(
    prior: DiffusionPrior,
    start: Tensor,
    labels: Tensor,
    policy: Policy,
    *,
    steps: int,
    solver: str = "ddim",
    eta: float = 0.0,
    negative: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Sampled:
    """Run a sampler from ``start`` = x_{T-1}, ``(B, ...)``, in ``steps`` steps down to the clean image.

    ``solver`` is ``ddim`` (``eta`` = 0 draws nothing, 1 as much noise as the original sampler) or ``dpm``
    (DPM-Solver++ of second order, multistep). ``negative`` are the labels that guidance leads away from, by default
    none. Gradients flow where the caller enables them.
    """
    require(solver in SOLVERS, f"Solver '{solver}' is none of {', '.join(SOLVERS)}.")
    require(not eta or solver == "ddim", "Only the solver 'ddim' draws noise; set eta=0.")
    times = [*prior.schedule.grid(steps), -1]
    calls = torch.zeros(len(start), dtype=torch.int64, device=start.device)
    negative = prior.unlabelled(start) if negative is None else negative
    x, second = start, Multistep(prior.schedule)
    for step in range(steps):
        t, following = times[step], times[step + 1]
        e = policy(step, Predictions(prior, x, t, labels, negative, calls))
        if solver == "dpm":
            x = second(x, prior.denoised(x, e, t), t, following)
        else:
            x = ddim_step(prior, x, e, t, following, eta, generator)
    return Sampled(x, calls)


def ddim_step(
    prior: DiffusionPrior,
    x: Tensor,
    e: Tensor,
    t: int,
    following: int,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    denoised: Tensor | None = None,
) -> Tensor:
    """Return x at the ``following`` time: a xhat + c_1 n + c_2 e, where eta = 0 means c_1 = 0 and no draw.

    ``denoised`` takes the place of xhat where a method has corrected it.
    """
    schedule = prior.schedule
    before, after = float(schedule.abar[t + 1]), float(schedule.abar[following + 1])
    fresh = eta * math.sqrt(max(0.0, (1 - before / after) * (1 - after) / (1 - before)))
    kept = math.sqrt(max(0.0, 1 - after - fresh**2))
    clean = prior.denoised(x, e, t) if denoised is None else denoised
    x = schedule.signal(following) * clean + kept * e
    if fresh:
        x = x + fresh * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return x


class Multistep:
    """DPM-Solver++ (2M): the denoised image is taken as linear in log(a / s) through its last two values."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._last: tuple[float, Tensor] | None = None

    def __call__(self, x: Tensor, denoised: Tensor, t: int, following: int) -> Tensor:
        """Return x at the ``following`` time."""
        schedule = self._schedule
        if following < 0:
            return denoised
        here, there = self._place(t), self._place(following)
        step, estimate = there - here, denoised
        # Far beyond the last two points the line is no guide: the last steps of an even grid are large in this measure.
        if self._last is not None and step <= 2 * (here - self._last[0]):
            before, older = self._last
            estimate = denoised + step / (2 * (here - before)) * (denoised - older)
        self._last = here, denoised
        ratio = schedule.noise(following) / schedule.noise(t)
        return ratio * x - schedule.signal(following) * math.expm1(-step) * estimate

    def _place(self, t: int) -> float:
        return math.log(self._schedule.signal(t) / self._schedule.noise(t))


def denoising_loss(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    schedule: Schedule,
    x: Tensor,
    labels: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the mean of (e_theta(x_t, t, label) - e)^2 at uniform times, a scalar.

    ``predict`` is a prior, or a view of one. Without ``generator`` the draws are from torch's default one.
    """
    t = torch.randint(schedule.steps, (len(x),), generator=generator, device=x.device)
    e = torch.randn(x.shape, generator=generator, device=x.device)
    a, s = schedule.rates(t, x)
    return F.mse_loss(predict(a * x + s * e, t, labels), e)
