"""Grokking at the Edge of Numerical Stability: StableMax and perpGrad.

Prieto, Barsbey, Mediano and Birdal, ICLR 2025, arXiv 2501.04697. After the training data are fitted, the cross entropy
without regularisation falls mostly by growing the logits along the weights as they are (naive loss minimisation). That
delays generalisation and ends in softmax collapse: in the working precision

    sum_k exp(z_k - max z) = 1     exactly, and the loss and the gradient of that sample are 0

Two remedies. StableMax, a softmax whose s grows slowly, never collapses:

    p_i = s(z_i) / sum_k s(z_k),   s(z) = z + 1 for z >= 0,  1 / (1 - z) for z < 0

perpGrad removes what points along the weights from the gradient, tensor by tensor, before any optimizer:

    g_perp = g - (w.g / w.w) w                     eq. 12
    g_perp <- g_perp ||g|| / ||g_perp||            ``variant=as_coded``, the default: the released code keeps the norm

Diagnostics: the share of collapsed training samples, in the precision of the loss (another one hides it), and for each
tensor cos(w, -grad L), which is near 1 where growing the weights is all that descent does.

Controls. ``decay`` is the strong baseline: weight decay 8 at the same learning rate generalises without either
remedy, only later than perpGrad. Public discussion of the released code shows the same at p = 113, so perpGrad is no
win over regularisation but works without any. All arms share Adam's epsilon, 1e-25 as released for the plain arms: a
larger one slows descent once gradients are small, which is another failure than that of precision.

Differences from the released code: epsilon is the same in all arms, where the wrapper of perpGrad drops what it is
given and uses 1e-8; beta_2 is 0.99 for the cross entropy on addition, else 0.999. A tensor of one element, and one
whose gradient is along it up to rounding, get a gradient of 0 rather than rounding noise at full length. Weight decay
is decoupled; coupled decay would come after the projection. The transformer of the paper is left out. The order of the
full batch, hence rounding, differs from epoch to epoch, as released.

Many clients: both remedies are local. The projection is along the client's current weights; Adam's moments stay with
the client. Averaging drifted clients shrinks norms, which acts like decay; perp-SGD steps can only grow them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras
from flowerbed.clients.training import Hooks
from flowerbed.errors import require
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.reproduction.central import CentralStep, central_run
from flowerbed.experiments.reproduction.claims import Claim, metric
from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.experiments.reproduction.paper import Paper
from flowerbed.models.base import Net, Shape
from flowerbed.models.parts import ModelParts
from flowerbed.models.softmax import LOSSES, collapsed, dtype_of
from flowerbed.models.tasks import Task
from flowerbed.server.callbacks import SERVER
from flowerbed.storage import Tensors
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flowerbed.experiments.reproduction.engine import Reproduction

COLLAPSED = "collapsed"
GROKKED = 0.95
"""Test accuracy that counts as generalisation."""
NOISE = 16
"""What is below this many units of rounding of ||g|| is no direction."""


@dataclass(frozen=True)
class StabilityParams(FedAvgParams):
    """What the loss is, how exactly it is computed, and which gradient moves."""

    loss: str = "ce"
    """ce or stablemax."""
    precision: str = "float32"
    """Of logits and loss: float16, float32 or float64; weights and network keep theirs."""
    gradient: str = "plain"
    """plain or perp."""
    variant: str = "as_coded"
    """perpGrad: as_coded (rescaled to the norm of g) or paper (eq. 12 as it stands)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        dtype_of(self.precision)
        for name, choices in (
            ("loss", tuple(LOSSES)),
            ("gradient", ("plain", "perp")),
            ("variant", ("as_coded", "paper")),
        ):
            given = getattr(self, name)
            require(given in choices, f"strategy.{name} is '{given}'; choose from {', '.join(choices)}.")


def perpendicular(g: Tensor, w: Tensor, keep_norm: bool) -> Tensor:
    """Return g without its part along w, both flattened; 0 where nothing but rounding would be left."""
    along = (w * g).sum() / (w.square().sum() + 1e-30)
    rest = g - along * w
    size, whole = rest.norm(), g.norm()
    if size <= NOISE * torch.finfo(g.dtype).eps * whole:
        return torch.zeros_like(g)
    return rest * (whole / size) if keep_norm else rest


class StabilityHalf(ClientHalf):
    """Another loss, another precision, another gradient; each alone or together."""

    params: StabilityParams

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        outputs, dtype = model(batch["x"]), dtype_of(self.params.precision)
        value = LOSSES[self.params.loss](outputs, batch["y"], dtype)
        right = (outputs.detach().argmax(-1) == batch["y"]).float().mean()
        return value, {COLLAPSED: collapsed(outputs, dtype).float().mean(), "fitted": right}

    def correct(self, gradients: Tensors, parameters: Mapping[str, Tensor], extras: Extras) -> Tensors:
        keep = self.params.variant == "as_coded"
        return {n: perpendicular(g, parameters[n], keep) for n, g in gradients.items()}

    def hooks(self) -> Hooks:
        return super().hooks() if self.params.gradient == "perp" else Hooks()


class Stability(FedAvg):
    """FedAvg over clients that mind their numbers."""

    Params, Half = StabilityParams, StabilityHalf


def mlp(input_shape: Shape, num_classes: int, *, width: int = 200, bias: bool = False) -> Net:
    """Return two hidden ReLU layers of ``width``, with torch's initial weights."""
    layers: list[nn.Module] = [nn.Flatten()]
    for size in (math.prod(input_shape), width):
        layers += [nn.Linear(size, width, bias=bias), nn.ReLU()]
    return Net(nn.Sequential(*layers), nn.Linear(width, num_classes, bias=bias), width)


def diagnosis(finished: Finished) -> dict[str, float]:
    """Return what the run came to: when it generalised, what collapsed and when, and which way the gradient points.

    Epochs are of the evaluation grid; one that never came is the number of epochs of the run plus a round.
    """
    asked = StabilityParams(**finished.simulation.strategy.options)
    local, records = finished.simulation.local, finished.records
    model, train = finished.model, finished.dataset.train
    x, y = finished.dataset.prepare(train.inputs), train.labels
    each = local.steps_per_round(len(y)) // local.batches_per_epoch(len(y))
    never = (finished.simulation.federation.rounds + 1) * each
    server = [(r.round * each, r.metrics) for r in records if r.phase == SERVER]
    trained = [(r.round * each, r.metrics) for r in records if COLLAPSED in r.metrics]

    def first(rows: Sequence[tuple[int, Mapping[str, Any]]], name: str, above: float) -> float:
        return float(next((epoch for epoch, found in rows if found[name] > above), never))

    outputs = model(x)
    dtype = dtype_of(asked.precision)
    value = LOSSES[asked.loss](outputs, y, dtype)
    weights = [p for p in model.parameters() if p.ndim == 2]
    gradients = torch.autograd.grad(value, weights)
    cosines = [
        float(-(w.detach() * g).sum() / (w.detach().norm() * g.norm()).clamp(min=1e-30))
        for w, g in zip(weights, gradients, strict=True)
    ]
    return {
        "grokked-at": first(server, "accuracy", GROKKED),
        "collapsed-at": first(trained, COLLAPSED, 0.05),
        "collapsed": float(collapsed(outputs, dtype).float().mean()),
        # What a softmax in float32 would say of the same logits, whatever the loss was.
        "softmax-collapsed": float(collapsed(outputs, torch.float32).float().mean()),
        "train-accuracy": float((outputs.argmax(-1) == y).float().mean()),
        "largest-logit": float(outputs.detach().abs().max()),
        "norm": float(torch.cat([w.detach().flatten() for w in weights]).norm()),
        **{f"cosine-{i}": c for i, c in enumerate(cosines, start=1)},
    }


def central(simulation: Simulation) -> Tensors:
    """Return what a plain loop makes of an arm without perpGrad: the loss in its precision."""
    asked = StabilityParams(**simulation.strategy.options)
    high = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}[asked.precision]

    def loss(step: CentralStep) -> Tensor:
        z = step.net(step.x).to(high)
        rows = torch.arange(len(z))
        if asked.loss == "stablemax":
            s = torch.where(z >= 0, z.clamp(min=0) + 1, 1 / (1 - z.clamp(max=0)))
            each = s.sum(1).log() - s[rows, step.y].log()
        else:
            z = z - z.detach().amax(1, keepdim=True)
            each = z.exp().sum(1).log() - z[rows, step.y]
        value: Tensor = (each.float() if asked.precision == "float16" else each).mean()
        return value

    return central_run(simulation, loss)


def curves(made: Reproduction) -> Figure:
    """Return test accuracy on addition, collapse by precision, and both on parity, over epochs."""
    from flowerbed.experiments.reproduction import figures

    drawn, axes = figures.canvas(4)
    addition = ("plain", "decay", "perp", "perp-sgd", "stablemax")
    onset = ("onset-float16", "onset-float32", "onset-float64")
    parity = ("parity-ce", "parity-stablemax", "parity-perp")
    for axis, arms, name, title in (
        (axes[0], addition, "accuracy", "test accuracy, addition"),
        (axes[1], onset, "train:collapsed", "collapsed training samples, addition"),
        (axes[2], parity, "accuracy", "test accuracy, parity"),
        (axes[3], parity, "train:collapsed", "collapsed training samples, parity"),
    ):
        for place, arm in enumerate(arms):
            found = [dict(o.curves.get(name, ())) for o in made.of(arm)]
            rounds = sorted(set.intersection(*(set(curve) for curve in found)))
            each = made.scale.arms[arm].settings["local"]["steps"]
            figures.line(
                axis, [r * each for r in rounds], [[c[r] for c in found] for r in rounds], arm, place
            )
        figures.finish(axis, "epochs", title)
    return drawn


accuracy, grokked, onset, gone = (metric(n) for n in ("accuracy", "grokked-at", "collapsed-at", "collapsed"))
PAPER = Paper(
    slug="grokking-numerical-stability",
    claims=(
        Claim(
            "perpGrad generalises at once",
            "Without any regularisation perpGrad reaches 95 % test accuracy within 150 epochs.",
            (grokked["perp"] <= 150, accuracy["perp"] >= 0.95),
        ),
        Claim(
            "plain training never does",
            "Without regularisation AdamW fits the training data and predicts nothing (control of the gain).",
            (accuracy["plain"] <= 0.1, metric("train-accuracy")["plain"] >= 1),
        ),
        Claim(
            "decay does, later",
            "Strong weight decay generalises too, within 100 to 300 epochs, but after perpGrad (strong baseline).",
            (grokked["decay"] >= 100, grokked["decay"] <= 300, grokked["decay"] >= grokked["perp"] + 1),
        ),
        Claim(
            "descent grows the weights",
            "After fitting, plain descent points along the weights of the last layer.",
            metric("cosine-3")["plain"] >= 0.7,
        ),
        Claim(
            "collapse stops parity",
            "The cross entropy does not learn parity and its softmax collapses.",
            (accuracy["parity-ce"] <= 0.60, gone["parity-ce"] >= 0.3),
            mechanism=gone["parity-ce"] >= 0.3,
        ),
        Claim(
            "StableMax learns parity",
            "StableMax learns parity without regularisation, on logits under which a softmax would collapse.",
            (accuracy["parity-stablemax"] >= 0.85, metric("softmax-collapsed")["parity-stablemax"] >= 0.9),
            mechanism=accuracy["parity-stablemax"] >= accuracy["parity-ce"] + 0.1,
        ),
        Claim(
            "precision decides the onset",
            "The softmax collapses by epoch 500 in float16, from 1,250 to 2,250 in float32, not by 3,000 in float64.",
            (
                onset["onset-float16"] <= 500,
                onset["onset-float32"] >= 1250,
                onset["onset-float32"] <= 2250,
                onset["onset-float64"] >= 3001,
            ),
            mechanism=(
                onset["onset-float16"] <= onset["onset-float32"] - 1,
                onset["onset-float32"] <= onset["onset-float64"] - 1,
            ),
        ),
    ),
    measure=diagnosis,
    figure=curves,
    central=dict.fromkeys(("plain", "decay", "stablemax", "onset-float16", "parity-stablemax"), central),
    uses=("flowerbed.models.softmax", "flowerbed.datasets.algorithmic"),
)
