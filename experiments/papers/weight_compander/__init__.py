"""Weight Compander: A Simple Weight Reparameterization for Regularization (WC).

Cakaj, Mehnert and Yang, arXiv 2306.16993. Every kernel weight is a fixed odd, saturating function of the number that
the optimizer trains,

    w = Psi(v) = a arctan(v / b),    a, b > 0,

whose slope at zero, a / b, is above 1. Small weights are pushed away from zero and large ones are held below a pi / 2,
so that none dominates. To first order an SGD step on v moves w by - lr Psi'(v)^2 dL/dw,
Psi'(v) = (a / b) / (1 + (v / b)^2): each weight has its own learning rate, larger by (a / b)^2 near zero and vanishing
in the tails. Weight decay acts on v. After training v is folded into w, and inference costs what it did.

Here a = 3 s and b = 2 s with s the standard deviation of a layer's initial weights, and v starts at Psi^-1(w) of the
usual w, so that all arms start as the same network (``start=naive``: v starts at the usual w). Convolutions and linear
layers are reparametrised; biases and normalisation are not. ``learned=true`` trains log a and log b of every layer
with the network.

Controls. ``kernel_gradient=(a / b)^2`` on plain weights has the larger step of WC near zero and no curve
("slope only"). ``a = b`` large is plain training. Both methods run over the same grid of learning rates, and the
headline compares them at the rate that is best for *plain* training.

What is ours, since the paper's function and constants could not be checked against its text: the arctan (``tanh`` and
``mulaw``, sgn(v) a log(1 + |v| / b), have the same slope), the constants, one a and one b a layer, and their bounds
1 <= a / b <= ``most`` and a within a factor ``most`` of its start. Without these bounds (``most=0``) the last layer's
slope runs away: the classifier escapes weight decay. Weight decay leaves log a and log b alone (``decay_curve``
includes them; it then pulls towards the start).

Many clients: v, a and b are sent, and averaged as they are; ``aggregate_in=w`` averages the weights instead and maps
back, which for one client is the same up to rounding. The server restores the scales and bounds a and b again, whatever
a client sends, so that no client's weights exceed the cap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound, Step
from flowerbed.errors import ClientError, require
from flowerbed.models.base import ModelSpec, Shape
from flowerbed.models.reparametrised import part_name, raw_names, reparametrise
from flowerbed.models.sparsity import prunable
from flowerbed.models.zoo import draw_model
from flowerbed.pooling import Pooling
from flowerbed.storage import Tensors
from flowerbed.strategies.aggregation import weighted_mean
from flowerbed.strategies.base import ClientReply
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

CURVES: Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "arctan": (torch.atan, lambda r: torch.tan(r.clamp(-0.99 * math.pi / 2, 0.99 * math.pi / 2))),
    "tanh": (torch.tanh, lambda r: torch.atanh(r.clamp(-0.99, 0.99))),
    "mulaw": (lambda u: u.sign() * u.abs().log1p(), lambda r: r.sign() * r.abs().expm1()),
}
"""Odd functions of slope 1 at zero, with their inverses, which stop just below the cap."""
KERNELS, DECAY = "kernels", "decay"
LOG_A, LOG_B, A0, B0 = "log_a", "log_b", "a0", "b0"


@dataclass(frozen=True)
class WeightCompanderParams(FedAvgParams):
    """Hyper-parameters of the compander."""

    shape: str = "arctan"
    """arctan, tanh or mulaw; none trains plain weights."""
    a: float = 3.0
    """Scale of w, in standard deviations of the layer's initial weights."""
    b: float = 2.0
    """Scale of v, likewise."""
    start: str = "matched"
    """matched: v starts at Psi^-1(w), so that the network starts as the plain one; naive: at w."""
    learned: bool = False
    """Whether a and b are trained, one of each a layer."""
    most: float = 4.0
    """Largest a / b, and largest factor between a and its start, of a learned curve; 0 bounds nothing."""
    decay_curve: bool = False
    """Whether weight decay also pulls a learned curve, towards its start."""
    kernel_gradient: float = 1.0
    """Factor on the gradients of kernels, their weight decay left out: the control (a / b)^2 for plain weights."""
    aggregate_in: str = "v"
    """What the server averages: v, or w, mapped back by the averaged curve."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (
            ("shape", (*CURVES, "none")),
            ("start", ("matched", "naive")),
            ("aggregate_in", ("v", "w")),
        ):
            given = getattr(self, name)
            require(given in choices, f"strategy.{name} is '{given}'; choose from {', '.join(choices)}.")
        require(
            self.a > 0 and self.b > 0,
            f"strategy.a is {self.a} and strategy.b {self.b}; give numbers above 0.",
        )
        require(
            self.most == 0 or self.most >= 1,
            f"strategy.most is {self.most}; give 0 (no bound) or at least 1.",
        )
        require(
            not (self.learned and self.most) or 1 <= self.a / self.b <= self.most,
            f"strategy.a / strategy.b is {self.a / self.b:.4g}; a learned curve starts between 1 and strategy.most.",
        )
        require(
            self.kernel_gradient > 0,
            f"strategy.kernel_gradient is {self.kernel_gradient}; give a number above 0.",
        )


def psi(shape: str, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return a f(v / b)."""
    return a * CURVES[shape][0](v / b)


def psi_inverse(shape: str, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the v that becomes w, or that nearest to it below 0.99 of the cap."""
    return b * CURVES[shape][1](w / a)


def curve(tensors: Mapping[str, Tensor], raw: str) -> tuple[Tensor, Tensor]:
    """Return a and b of the raw tensor called ``raw``, in a state dict."""
    a, b = tensors[part_name(raw, A0)], tensors[part_name(raw, B0)]
    if part_name(raw, LOG_A) in tensors:
        return a * tensors[part_name(raw, LOG_A)].exp(), b * tensors[part_name(raw, LOG_B)].exp()
    return a, b


@torch.no_grad()
def bounded(tensors: Mapping[str, Tensor], most: float) -> Tensors:
    """Return log a and log b, relative to their start, within the bounds of learned curves."""
    found: Tensors = {}
    for raw in raw_names(tensors):
        names = part_name(raw, LOG_A), part_name(raw, LOG_B)
        if most and names[0] in tensors:
            log_a, log_b = (tensors[name] for name in names)
            start = (tensors[part_name(raw, A0)] / tensors[part_name(raw, B0)]).log()
            slope = (start + log_a - log_b).clamp(0, math.log(most))
            log_a = log_a.clamp(-math.log(most), math.log(most))
            found |= dict(zip(names, (log_a, start + log_a - slope), strict=True))
    return found


class Compander(nn.Module):
    """Psi of one layer, as a parametrization."""

    def __init__(self, weight: Tensor, asked: WeightCompanderParams) -> None:
        """``weight`` holds the initial weights; their standard deviation is the unit of a and b."""
        super().__init__()
        self.shape, self.matched = asked.shape, asked.start == "matched"
        self.register_buffer(A0, asked.a * weight.std())
        self.register_buffer(B0, asked.b * weight.std())
        if asked.learned:
            self.log_a = nn.Parameter(torch.zeros_like(self.get_buffer(A0)))
            self.log_b = nn.Parameter(torch.zeros_like(self.get_buffer(B0)))

    def curve(self) -> tuple[Tensor, Tensor]:
        """Return a and b."""
        a, b = self.get_buffer(A0), self.get_buffer(B0)
        return (a * self.log_a.exp(), b * self.log_b.exp()) if LOG_A in self._parameters else (a, b)

    def forward(self, v: Tensor) -> Tensor:
        # Autocast leaves this in the type of v: in bfloat16 the arctan of small numbers loses its digits.
        return psi(self.shape, v, *self.curve())

    def right_inverse(self, w: Tensor) -> Tensor:
        """Return the v to start from."""
        return psi_inverse(self.shape, w, *self.curve()) if self.matched else w.clone()


class WeightCompanderHalf(ClientHalf):
    """Trains v; keeps learned curves within their bounds."""

    params: WeightCompanderParams

    def begin(self, local: LocalRound) -> Extras:
        exempt = self.params.learned and not self.params.decay_curve
        if exempt and local.local.optimizer == "adamw" and local.local.weight_decay:
            raise ClientError(
                "AdamW decays every parameter; set strategy.decay_curve=true or another optimizer."
            )
        return {KERNELS: frozenset(prunable(local.info)), DECAY: local.local.weight_decay if exempt else 0.0}

    def correct(self, gradients: Tensors, parameters: Mapping[str, Tensor], extras: Extras) -> Tensors:
        found = dict(gradients)
        for name in gradients:
            if name in extras[KERNELS]:
                if self.params.kernel_gradient != 1:
                    found[name] = gradients[name] * self.params.kernel_gradient
            elif extras[DECAY] and name.endswith((LOG_A, LOG_B)):
                # The optimizer adds the decay again.
                found[name] = gradients[name] - extras[DECAY] * parameters[name]
        return found

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        if self.params.learned:
            for name, value in bounded(step.parts.state, self.params.most).items():
                step.parts.parameters[name].copy_(value)


class WeightCompander(FedAvg):
    """FedAvg over reparametrised models."""

    Params = WeightCompanderParams
    Half = WeightCompanderHalf
    params: WeightCompanderParams

    def model_spec(self, spec: ModelSpec) -> ModelSpec:
        if self.params.shape == "none":
            return spec
        own = ("shape", "a", "b", "start", "learned", "most")
        asked = {name: getattr(self.params, name) for name in own}
        options = {"of": spec.name, "asked": asked, "options": dict(spec.options)}
        return replace(spec, name=f"{__name__}:companded", options=options)

    @property
    def pooled(self) -> Pooling | None:
        return super().pooled if self.params.aggregate_in == "v" else None

    def combine(
        self, server_round: int, current: Tensors, means: Mapping[str, Tensors], count: int
    ) -> Tensors:
        return self._restored(current, super().combine(server_round, current, means, count))

    def aggregate(self, server_round: int, current: Tensors, replies: list[ClientReply]) -> Tensors:
        if self.params.aggregate_in == "v":
            return super().aggregate(server_round, current, replies)
        weights = [self._mapped(psi, self._restored(current, reply.model)) for reply in replies]
        mean = weighted_mean(weights, self.weights(replies))
        found = self.step(server_round, self._mapped(psi, current), mean)
        return self._mapped(psi_inverse, self._restored(current, found))

    def _mapped(self, function: Callable[..., Tensor], tensors: Tensors) -> Tensors:
        """Return a model with ``function`` of every raw tensor in its place."""
        mapped = {n: function(self.params.shape, tensors[n], *curve(tensors, n)) for n in raw_names(tensors)}
        return {**tensors, **mapped}

    def _restored(self, current: Tensors, tensors: Tensors) -> Tensors:
        """Return a model with the run's own scales and its curves within bounds, whatever was sent."""
        scales = {part_name(raw, part) for raw in raw_names(tensors) for part in (A0, B0)}
        whole = {n: current[n] if n in scales else v for n, v in tensors.items()}
        return {**whole, **bounded(whole, self.params.most)}


def companded(
    input_shape: Shape,
    num_classes: int,
    *,
    of: str = "",
    asked: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Return the model called ``of`` with these options, reparametrised as ``asked``: fields of the parameters."""
    model = draw_model(of, input_shape, num_classes, **(options or {}))
    params = WeightCompanderParams(**(asked or {}))
    return reparametrise(model, lambda weight: Compander(weight, params))
