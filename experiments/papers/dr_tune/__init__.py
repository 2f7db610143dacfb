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

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound, Step, Trained
from flowerbed.clients.queues import Queue
from flowerbed.clients.rates import scaled
from flowerbed.clients.teacher import teacher
from flowerbed.clients.training import batches_of
from flowerbed.errors import require
from flowerbed.models.alignment import centred, residual, rotation
from flowerbed.models.batchnorm import fixed_statistics
from flowerbed.models.info import ModelInfo
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

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
