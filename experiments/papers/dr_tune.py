"""DR-Tune: Improving Fine-tuning of Pretrained Visual Models by Distribution Regularization with Semantic Calibration.

Zhou, Chen and Huang, ICCV 2023, arXiv 2308.12058. Nothing holds the fine-tuned encoder near the pretrained one, but the
new classifier must also be right about the pretrained features of the training images.

f_p: the frozen pretrained encoder, in evaluation mode; f_d: the trained one, which starts as f_p; g: a linear head with
w_c ~ N(0, 0.01^2). A queue holds the last K features V_d, V_p of the same views, and their labels; it is filled with
pretrained features in both places before the first step. A step on a batch x, y with d = f_d(x) is

    L = CE(g(d), y) + weight R_DR,    R_DR = mean over the queue of CE(g(A_j), y_j)

and pushes d, f_p(x), y afterwards. Only g is moved by R_DR. A is the calibrated V_p, made without gradient:

    s = mean ||d_i||;   A, Q = rows of V_p, V_d over their norms                          all
    R = the rotation from centred A to centred Q (Kabsch), anew every ``every`` steps;  A <- A_c R^T    full
    A_j <- A_j + mu_d - mu_p for every class:  mu_p = mean A_j,  mu_d = sum_j a_j Q_j,
        a = softmax over the class of Q_j . w_c / ||w_c||                                translation, full
    A <- s A / ||A||                                                                                  all

Controls, all with the same learning rates and steps: ``probe`` (only g is trained), plain fine-tuning, L2-SP (anchor
/ 2 times the squared distance of the encoder from its start), R_DR without calibration, with the translation alone. The
weight of every regularised method is one of three, chosen by the same validation samples (``chosen``), never by the
test set. Where the queue is as long as the data set, R_DR remembers those very images.

``raw-accuracy``: the final head on pretrained features of *test* images, what R_DR without calibration is to keep.

Differences from the released code: R is kept between its computations, where the code rotates on every tenth step and
not at all between (``as_coded``). The code takes one mean over batch and queue together, L = (B CE + K R_DR) / (B + K),
so that its learning rates are those of a loss (B + K) / B times smaller (``joined``).

The paper's backbones saw a million images; here a small network saw six classes of CIFAR-10, and fine-tunes on the
other four. What that does not show: self-supervised pretraining, 224 pixels, D = 2048.

Many clients: queues stay at home, since their rows are features of private images; a class that a queue lacks is left
out. ``reference=received`` takes the received model as f_p in every round, with a queue filled anew: the local head is
then held valid for the features of the global model, and the rotation undoes the client's drift.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed import seeds
from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound, Step, Trained
from flowerbed.clients.queues import Queue
from flowerbed.clients.rates import scaled
from flowerbed.clients.teacher import teacher
from flowerbed.clients.training import batches_of
from flowerbed.errors import require
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.measures import Measured
from flowerbed.experiments.parts import build_parts
from flowerbed.experiments.reproduction.central import CentralStep, central_run
from flowerbed.experiments.reproduction.claims import Claim, Linear, mean, metric
from flowerbed.experiments.reproduction.engine import Reproduction
from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.experiments.reproduction.paper import Paper
from flowerbed.models.alignment import centred, residual, rotation
from flowerbed.models.base import Net, Shape
from flowerbed.models.batchnorm import fixed_statistics
from flowerbed.models.info import ModelInfo
from flowerbed.models.layers import ChannelsLast, GlobalMean, image_shape
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.models.zoo import draw_net
from flowerbed.storage import Tensors
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BANK, FIRST, RATES, DECAY = "bank", "first", "rates", "decay"
QUEUE, ROTATION = "dr-tune", "dr-tune rotation"
D, P = "d", "p"
CALIBRATIONS = ("none", "translation", "full")


@dataclass(frozen=True)
class DrTuneParams(FedAvgParams):
    """Hyper-parameters of DR-Tune and of what it is compared with."""

    weight: float = 0.0
    """Weight of R_DR; 0 is plain fine-tuning."""
    queue: int = 100
    """K, rows of the queue."""
    calibration: str = "full"
    """none, translation (of the classes) or full (rotation before it)."""
    every: int = 10
    """Steps between two computations of R."""
    as_coded: bool = False
    """Rotate only on the steps on which R is computed."""
    joined: bool = False
    """One mean over batch and queue, as released, in place of a sum of two; ``weight`` must be 1."""
    head_lr: float = 10.0
    """Learning rate of the head, as a multiple of ``local.lr``."""
    anchor: float = 0.0
    """L2-SP: strength of the pull of the encoder to its start."""
    probe: bool = False
    """Train the head alone."""
    reference: str = "initial"
    """f_p: initial (the model before the first round) or received (that of this round)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight", "anchor"):
            require(
                getattr(self, name) >= 0, f"strategy.{name} is {getattr(self, name)}; give 0 (off) or more."
            )
        for name in ("queue", "every"):
            require(getattr(self, name) >= 1, f"strategy.{name} is {getattr(self, name)}; give at least 1.")
        require(self.head_lr > 0, f"strategy.head_lr is {self.head_lr}; give a factor above 0.")
        for name, choices in (("calibration", CALIBRATIONS), ("reference", ("initial", "received"))):
            given = getattr(self, name)
            require(given in choices, f"strategy.{name} is '{given}'; choose from {', '.join(choices)}.")
        require(
            not self.joined or self.weight == 1,
            "strategy.joined has no weight of its own; set strategy.weight=1.",
        )


@dataclass
class Bank:
    """The queue and the rotation that is kept with it."""

    queue: Queue
    turn: Tensor | None = None


class DrTuneHalf(ClientHalf):
    """Fine-tunes with a head that also has to know the pretrained features."""

    params: DrTuneParams

    def __init__(self, params: DrTuneParams) -> None:
        super().__init__(params)
        self.stateful = params.weight > 0

    def frozen(self, info: ModelInfo) -> frozenset[str]:
        return info.backbone & info.parameters if self.params.probe else frozenset()

    def begin(self, local: LocalRound) -> Extras:
        first = local.received_model() if self.params.reference == "received" else dict(local.open_initial())
        rates = {name: self.params.head_lr for name in local.info.head & local.info.parameters}
        extras = {FIRST: first, RATES: rates, DECAY: local.local.weight_decay}
        return {**extras, BANK: self._bank(local, first)} if self.params.weight else extras

    def _bank(self, local: LocalRound, first: Tensors) -> Bank:
        """Return the bank as the last round left it, or one that is full of pretrained features."""
        if self.params.reference == "initial":
            kept = Queue.kept(local.state, QUEUE, local.device)
            if kept is not None:
                turn = local.state.get(ROTATION, {}).get("turn")
                return Bank(kept, None if turn is None else turn.to(local.device))
        bank = Bank(Queue.empty(self.params.queue))
        batch_at = batches_of(local, local.local, local.train_data, " of the queue")
        with teacher(local.parts, first) as pretrained:
            step = 0
            while len(bank.queue) < self.params.queue:
                batch = batch_at(step)
                p = pretrained.features(batch["x"])
                bank.queue.push({D: p, P: p, "y": batch["y"]})
                step += 1
        self._turn(bank, 0)
        return bank

    def _turn(self, bank: Bank, following: int) -> None:
        """Compute R where it is due at the step that follows, as it always is at the first."""
        if self.params.calibration != "full":
            return
        if following % self.params.every == 0:
            rows = bank.queue.rows()
            a, q = (centred(F.normalize(rows[name], dim=1)) for name in (P, D))
            bank.turn = rotation(a, q)
        elif self.params.as_coded:
            bank.turn = None

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        asked, y = self.params, batch["y"]
        if asked.probe:
            with fixed_statistics(model.module):
                return task.mean_loss(model(batch["x"]), y), {}
        d = model.features(batch["x"])
        value = task.mean_loss(model.head(d), y)
        if asked.anchor:
            first = extras[FIRST]
            moved = [
                (w - first[n]).square().sum() for n, w in model.parameters.items() if n not in extras[RATES]
            ]
            value = value + asked.anchor / 2 * torch.stack(moved).sum()
        if not asked.weight:
            return value, {}
        with teacher(model, extras[FIRST]) as pretrained:
            p = pretrained.features(batch["x"])
        rows, bank = extras[BANK].queue.rows(), extras[BANK]
        scale = d.detach().norm(dim=1).mean()
        weights = model.parameters["head.weight"].detach()
        a, found = calibrated(rows, weights, scale, asked.calibration, bank.turn)
        outputs = model.head(a)
        r_dr = task.mean_loss(outputs, rows["y"])
        if asked.joined:
            value = (len(y) * value + len(a) * r_dr) / (len(y) + len(a))
        else:
            value = value + asked.weight * r_dr
        right = (outputs.detach().argmax(1) == rows["y"]).float().mean()
        return value, {**found, "r-dr": r_dr, "queue-accuracy": right, D: d.detach(), P: p}

    def correct(self, gradients: Tensors, parameters: Mapping[str, Tensor], extras: Extras) -> Tensors:
        return scaled(gradients, parameters, extras[RATES], extras[DECAY])

    def after_step(self, step: Step) -> None:
        if self.params.weight:
            bank = step.extras[BANK]
            bank.queue.push({D: step.products[D], P: step.products[P], "y": step.batch["y"]})
            self._turn(bank, step.index + 1)

    def end(self, local: LocalRound, trained: Trained, extras: Extras) -> Mapping[str, Mapping[str, Tensor]]:
        if self.params.weight and self.params.reference == "initial":
            extras[BANK].queue.keep(local.state, QUEUE)
            turn = extras[BANK].turn
            local.state[ROTATION] = {} if turn is None else {"turn": turn}
        return super().end(local, trained, extras)


class DrTune(FedAvg):
    """FedAvg over clients that fine-tune so."""

    Params = DrTuneParams
    Half = DrTuneHalf


@torch.no_grad()
def calibrated(
    rows: Mapping[str, Tensor], weights: Tensor, scale: Tensor, how: str, turn: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return A ``(K, D)`` of a queue's rows for head weights ``(C, D)``, and how far from V_d it was before and after.

    ``turn`` is R, if A is rotated. Reported are the distance of A from Q (both centred) before and after the rotation,
    and the mean distance of their class centres before and after everything.
    """
    a, q, y = F.normalize(rows[P], dim=1), F.normalize(rows[D], dim=1), rows["y"]
    found = {"centres-before": _apart(a, q, y)}
    if how == "full":
        found["residual-before"] = residual(centred(a), centred(q))
        a = centred(a) if turn is None else centred(a) @ turn.T
        found["residual-after"] = residual(a, centred(q))
    if how != "none":
        moved = torch.zeros_like(a)
        for c in range(len(weights)):
            own = y == c
            if bool(own.any()):
                sure = (q[own] @ F.normalize(weights[c], dim=0)).softmax(0)
                moved[own] = (sure[:, None] * q[own]).sum(0) - a[own].mean(0)
        a = a + moved
        found["centres-after"] = _apart(a, q, y)
    return scale * F.normalize(a, dim=1), found


def _apart(a: Tensor, q: Tensor, y: Tensor) -> Tensor:
    """Return the mean distance between the centres of a class in the two clouds, over the classes there are."""
    return torch.stack([(a[y == c].mean(0) - q[y == c].mean(0)).norm() for c in torch.unique(y)]).mean()


def backbone(input_shape: Shape, num_classes: int, *, of: str = "") -> Net:
    """Return a network ``of`` any kind, or three strided convolutions (24, 48, 96), with w_c ~ N(0, 0.01^2)."""
    net = draw_net(of, input_shape, num_classes) if of else _conv3(input_shape)
    head = nn.Linear(net.feature_dim, num_classes)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return Net(net.body, head, net.feature_dim)


def _conv3(input_shape: Shape) -> Net:
    channels, *_ = image_shape("backbone", input_shape, 8)
    layers: list[nn.Module] = []
    for following in (24, 48, 96):
        layers += [
            nn.Conv2d(channels, following, 3, 2, padding=1, bias=False),
            nn.BatchNorm2d(following),
            nn.ReLU(),
        ]
        channels = following
    return Net(nn.Sequential(ChannelsLast(*layers), GlobalMean()), nn.Identity(), channels)


def validated(measured: Measured) -> dict[str, float]:
    """Return the accuracy on the validation samples, where there are some."""
    split = measured.dataset.validation
    if split is None:
        return {}
    outputs, labels = measured.outputs(split)
    return {"validation": float((outputs.argmax(-1) == labels).double().mean())}


@torch.no_grad()
def on_raw_features(run: Finished) -> dict[str, float]:
    """Return how often the final head is right about features that the network had before, of test images."""
    start, final, dataset = run.parts.spec.model.build(run.seed).eval(), run.model, run.dataset
    assert isinstance(start, Net)
    assert isinstance(final, Net)
    right = 0
    for rows in torch.split(torch.arange(len(dataset.test)), 500):
        x = dataset.prepare(dataset.test.inputs[rows])
        right += int((final.head(start.features(x)).argmax(1) == dataset.test.labels[rows]).sum())
    return {"raw-accuracy": right / len(dataset.test)}


FAMILIES = ("l2-sp", "dr", "translation", "full")
"""Methods with a weight to choose; their arms are called NAME-WEIGHT."""


def choose(runs: Mapping[str, Finished]) -> Mapping[str, Mapping[str, float]]:
    """Return, for every arm of a family, the accuracy of its arm that validates best (the first of equals)."""
    found: dict[str, dict[str, float]] = {}
    for family in FAMILIES:
        arms = [arm for arm in runs if arm.rpartition("-")[0] == family]
        if arms:
            best = max(arms, key=lambda arm: runs[arm].values["validation"])
            found |= {arm: {"chosen": runs[best].values["accuracy"]} for arm in arms}
    return found


def central(simulation: Simulation) -> Tensors:
    """Return what a plain loop makes of fine-tuning, of L2-SP, and of R_DR without calibration, by hand."""
    asked = DrTuneParams(**simulation.strategy.options)
    decay, size = simulation.local.weight_decay, asked.queue
    frozen: list[Net] = []
    queue: list[tuple[Tensor, Tensor]] = []
    latest: list[tuple[Tensor, Tensor]] = []

    def before(net: nn.Module) -> None:
        assert isinstance(net, Net)
        frozen.append(copy.deepcopy(net).eval())
        for p in net.head.parameters():
            p.register_hook(  # type: ignore[no-untyped-call]
                lambda g, p=p: g * asked.head_lr + (asked.head_lr - 1) * decay * p.detach()
            )
        if asked.weight:
            for x, y in _warming(simulation):
                queue.extend(zip(pretrained(x), y, strict=True))

    def pretrained(x: Tensor) -> Tensor:
        with torch.no_grad():
            return frozen[0].features(x)

    def loss(step: CentralStep) -> Tensor:
        net = step.net
        assert isinstance(net, Net)
        d = net.features(step.x)
        value = F.cross_entropy(net.head(d), step.y)
        if asked.anchor:
            pairs = zip(net.body.parameters(), frozen[0].body.parameters(), strict=True)
            moved = [(w - w0.detach()).square().sum() for w, w0 in pairs]
            value = value + asked.anchor / 2 * torch.stack(moved).sum()
        if asked.weight:
            rows = queue[-size:]
            a = torch.stack([z for z, _ in rows])
            for _ in range(2):
                a = a / a.norm(dim=1, keepdim=True)
            a = d.detach().norm(dim=1).mean() * a
            value = value + asked.weight * F.cross_entropy(net.head(a), torch.stack([y for _, y in rows]))
            latest[:] = zip(pretrained(step.x), step.y, strict=True)
        return value

    def after(step: CentralStep) -> None:
        queue.extend(latest)

    return central_run(simulation, loss, before=before, after=after)


def _warming(simulation: Simulation) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches that fill the queue: epochs of an order of their own."""
    parts, size = build_parts(simulation), simulation.local.batch_size
    rows = torch.from_numpy(parts.train.indices(0).copy())
    x, y = parts.dataset.prepare(parts.dataset.train.inputs[rows]), parts.dataset.train.labels[rows]
    left, epoch = DrTuneParams(**simulation.strategy.options).queue, 0
    while left > 0:
        order = torch.from_numpy(
            seeds.numpy_rng(simulation.seed, "data order of the queue", 0, epoch).permutation(len(y))
        )
        for chosen in torch.split(order, size):
            if left > 0:
                yield x[chosen], y[chosen]
                left -= len(chosen)
        epoch += 1


def pictures(made: Reproduction) -> Figure:
    """Return accuracy by weight, the head on raw features, and what calibration does to the two clouds."""
    from flowerbed.experiments.compare_report import INK
    from flowerbed.experiments.reproduction import figures

    figure, (by_weight, raw, apart) = figures.canvas(3)
    for place, family in enumerate(FAMILIES[1:]):
        arms = [arm for arm in made.arms if arm.rpartition("-")[0] == family]
        weights = [float(arm.rpartition("-")[2]) for arm in arms]
        figures.line(
            by_weight, weights, [figures.values(made, arm, "accuracy") for arm in arms], family, place
        )
    for place, arm in enumerate(("fine-tune", "probe"), start=3):
        found = figures.values(made, arm, "accuracy") if arm in made.arms else []
        if found:
            colour, _ = figures.look(place)
            by_weight.axhline(sum(found) / len(found), color=colour, linestyle="--", linewidth=1.2, label=arm)
    by_weight.set_xscale("log")
    figures.finish(by_weight, "weight of R_DR", "test accuracy")
    shown = [a for a in made.arms if a.startswith("many-")]
    for place, arm in enumerate(shown):
        colour, _ = figures.look(place)
        own, kept = figures.values(made, arm, "accuracy"), figures.values(made, arm, "raw-accuracy")
        raw.plot(kept, own, "o", color=colour, label=arm.removeprefix("many-"), markersize=5, mew=0)
    figures.finish(raw, "head on pretrained test features", "test accuracy (100 images a class)")
    for place, arm in enumerate(("dr-1.0", "translation-1.0", "full-1.0")):
        for name, style in (("centres-before", "--"), ("centres-after", "-")):
            outcomes = made.of(arm) if arm in made.arms else []
            curves = [dict(o.curves.get(f"train:{name}", ())) for o in outcomes]
            rounds = sorted(set.intersection(*(set(c) for c in curves))) if curves else []
            if rounds:
                means = [sum(c[r] for c in curves) / len(curves) for r in rounds]
                label = arm if name.endswith("before") else f"{arm}, calibrated"
                apart.plot(
                    rounds, means, style, color=figures.look(place)[0], label=label, linewidth=2.6 - place
                )
    apart.axhline(0, color=INK, linewidth=0.6)
    figures.finish(apart, "epoch", "distance of class centres")
    return figure


accuracy, chosen, raw = metric("accuracy"), metric("chosen"), metric("raw-accuracy")
before, after = metric("train:centres-before"), metric("train:centres-after")
far, near = metric("train:residual-before"), metric("train:residual-after")
WEIGHTS = {"l2-sp": ("0.005", "0.05", "0.5"), **dict.fromkeys(FAMILIES[1:], ("0.1", "0.3", "1.0"))}


def best(family: str) -> Linear:
    """Return the accuracy of a family at the weight that validation chose."""
    return mean(chosen[f"{family}-{w}"] for w in WEIGHTS[family])


PAPER = Paper(
    slug="dr-tune",
    claims=(
        Claim(
            "the head keeps what was pretrained",
            "A head under distribution regularisation knows pretrained features of unseen images, a fine-tuned one "
            "does not.",
            raw["many-dr-1.0"] >= raw["many-fine-tune"] + 0.06,
        ),
        Claim(
            "calibration brings the clouds together",
            "The translation removes four fifths of the distance between class centres, the rotation lowers what is "
            "left between the two clouds.",
            (after["full-1.0"] <= 0.2 * before["full-1.0"], near["full-1.0"] <= far["full-1.0"]),
        ),
        Claim(
            "no harm",
            "Full DR-Tune costs at most two points against plain fine-tuning.",
            (
                best("full") >= accuracy["fine-tune"] - 0.02,
                accuracy["many-full-0.1"] >= accuracy["many-fine-tune"] - 0.02,
            ),
        ),
        Claim(
            "better than fine-tuning",
            "The paper's claim: full DR-Tune is more accurate than plain fine-tuning.",
            best("full") >= accuracy["fine-tune"] + 0.005,
        ),
        Claim(
            "calibration repairs",
            "With calibration it is more accurate than without.",
            best("full") >= best("dr"),
        ),
        Claim(
            "better than an anchor",
            "It is more accurate than L2-SP, which holds the weights of the encoder.",
            best("full") >= best("l2-sp"),
        ),
    ),
    measure=on_raw_features,
    analyse=choose,
    figure=pictures,
    central=dict.fromkeys(("fine-tune", "l2-sp-0.05", "dr-1.0"), central),
    uses=(
        "flowerbed.clients.queues",
        "flowerbed.clients.rates",
        "flowerbed.datasets.excerpt",
        "flowerbed.models.alignment",
        "flowerbed.models.batchnorm",
    ),
)
