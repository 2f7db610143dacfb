"""Self-Knowledge Distillation with Progressive Refinement of Targets (PS-KD).

Kim, Ji, Yoon and Hwang, ICCV 2021, arXiv 2006.12000. A network is its own teacher: the target of a sample is a blend
of its label and of what the same network predicted for it one epoch ago.

    alpha_t = alpha_T t / T                      in epoch t of T, without clipping
    q_i     = (1 - alpha_t) y_i + alpha_t m_i    target, y_i one-hot
    loss    = mean over the batch of - sum_c q_ic log p_ic
    m_i    <- p_i                                after the step, detached

m_i starts as y_i, so the first epoch is plain cross entropy. p_i is the softmax of the very forward pass that the loss
was made of: in training mode, on the augmented view, before the update. There is no temperature and no second term.

The gradient of the true class is that of the cross entropy times
r_i = 1 - alpha_t (1 - p_past) / (1 - p), so samples whose confidence fell since the last epoch weigh more.

Controls. ``target=uniform`` with ``ramp=constant`` is label smoothing; with ``ramp=linear`` it has the schedule of
PS-KD but not the past predictions ("decayed smoothing"): what that loses is what the memory does. ``alpha=0`` is cross
entropy.

Differences from the released code: the memory starts as one-hot rows, where the code starts at zero and writes them
during the first epoch, so that a sample left out then has a target that does not sum to 1; and figures are those of the
last epoch, where the code picks the best one on the test set.

Many clients: the memory stays on the client and comes from its locally trained model, while training starts from the
averaged one, so the past prediction is a personal anchor. Rows of a client that was not asked for rounds are old.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound, Step, Trained
from flowerbed.clients.memory import SampleMemory
from flowerbed.clients.training import Batches, own_batches
from flowerbed.errors import require
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.measures import Measured
from flowerbed.experiments.reproduction.central import CentralStep, central_run
from flowerbed.experiments.reproduction.claims import Claim, metric
from flowerbed.experiments.reproduction.paper import Paper
from flowerbed.models.base import Net, Shape, classifier
from flowerbed.models.layers import GlobalMean, image_shape
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

PAST, PROBABILITIES = "past predictions", "probabilities"


@dataclass(frozen=True)
class PsKdParams(FedAvgParams):
    """Hyper-parameters of PS-KD."""

    alpha: float = 0.8
    """alpha_T, the weight of the past prediction in the last epoch."""
    ramp: str = "linear"
    """linear: alpha_t = alpha_T t / T, as in the paper; constant: alpha_T from the start."""
    target: str = "past"
    """What the label is blended with: past (own predictions of an epoch ago), or uniform."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.alpha <= 1, f"strategy.alpha is {self.alpha}; give a number in [0, 1].")
        require(
            self.ramp in ("linear", "constant"), f"strategy.ramp is '{self.ramp}'; choose linear or constant."
        )
        require(
            self.target in ("past", "uniform"),
            f"strategy.target is '{self.target}'; choose past or uniform.",
        )


class PsKdHalf(ClientHalf):
    """Trains on blended targets; remembers what it predicted for each sample."""

    stateful = True
    params: PsKdParams

    def begin(self, local: LocalRound) -> Extras:
        classes = local.task.classes
        return {PAST: SampleMemory.open(local, PAST, lambda data: F.one_hot(data.y, classes).float())}

    def batches(self, local: LocalRound) -> Batches:
        plain = own_batches(local, local.local)
        per_epoch = local.local.batches_per_epoch(len(local.train_data))
        epochs = -(-local.clock.rounds * local.clock.steps // per_epoch)

        def batch(step: int) -> Batch:
            epoch = step // per_epoch + 1
            alpha = self.params.alpha * (epoch / epochs if self.params.ramp == "linear" else 1.0)
            return {**plain(step), "alpha": torch.tensor(alpha, device=local.device)}

        return batch

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        outputs = model(batch["x"])
        if self.params.target == "past":
            other = extras[PAST].read(batch["index"])
        else:
            other = torch.full_like(outputs, 1 / task.classes)
        # Written as a sum of two losses, so that alpha = 0 is the cross entropy to the bit.
        value = task.mean_loss(outputs, batch["y"]) * (1 - batch["alpha"])
        value = value + F.cross_entropy(outputs, other) * batch["alpha"]
        return value, {PROBABILITIES: outputs.detach().softmax(-1), "alpha": batch["alpha"]}

    def after_step(self, step: Step) -> None:
        step.extras[PAST].write(step.batch["index"], step.products[PROBABILITIES], step.index)

    def end(self, local: LocalRound, trained: Trained, extras: Extras) -> Mapping[str, Mapping[str, Tensor]]:
        extras[PAST].keep(local.state, PAST)
        return super().end(local, trained, extras)


class PsKd(FedAvg):
    """FedAvg over clients that distil themselves."""

    Params = PsKdParams
    Half = PsKdHalf


def conv3(input_shape: Shape, num_classes: int) -> Net:
    """Return three strided convolutions (16, 32, 64 channels) with batch norm and a mean over positions."""
    channels, *_ = image_shape("conv3", input_shape, 8)
    layers: list[nn.Module] = []
    for following in (16, 32, 64):
        layers += [
            nn.Conv2d(channels, following, 3, 2, padding=1, bias=False),
            nn.BatchNorm2d(following),
            nn.ReLU(),
        ]
        channels = following
    return classifier(nn.Sequential(*layers, GlobalMean()), 64, num_classes)


def confidence(measured: Measured) -> dict[str, float]:
    """Return error, the calibration error in the paper's 10 bins, AURC and E-AURC, all as shares.

    AURC is the mean over n of the error among the n most confident predictions; E-AURC is what it exceeds that of
    the best ranking with the same errors by (Geifman et al., ICLR 2019).
    """
    outputs, labels = measured.outputs()
    sure, guess = outputs.double().softmax(-1).max(-1)
    wrong = (guess != labels).double()
    bins = (sure * 10).ceil().long().clamp(1, 10) - 1
    gaps = torch.zeros(10, dtype=torch.float64).index_add(0, bins, 1 - wrong - sure)
    count = torch.arange(1, len(labels) + 1, dtype=torch.float64)
    by_confidence = torch.sort(sure, descending=True, stable=True).indices
    aurc = (wrong[by_confidence].cumsum(0) / count).mean()
    best = (wrong.sort().values.cumsum(0) / count).mean()
    return {
        "error": float(wrong.mean()),
        "ece-10": float(gaps.abs().sum()) / len(labels),
        "aurc": float(aurc),
        "e-aurc": float(aurc - best),
    }


def central(simulation: Simulation) -> Tensors:
    """Return what a plain loop makes of an arm: Algorithm 1 of the paper."""
    asked = PsKdParams(**simulation.strategy.options)
    memory = torch.empty(0)
    latest = torch.empty(0)

    def loss(step: CentralStep) -> Tensor:
        nonlocal memory, latest
        hard = F.one_hot(step.y, step.classes).float()
        if not step.number:
            memory = torch.zeros(step.examples, step.classes)
        alpha = torch.tensor(
            asked.alpha * ((step.epoch + 1) / step.epochs if asked.ramp == "linear" else 1.0)
        )
        past = memory[step.rows] if step.epoch else hard
        outputs = step.net(step.x)
        latest = outputs.detach().softmax(-1)
        soft = past if asked.target == "past" else torch.full_like(outputs, 1 / step.classes)
        return F.cross_entropy(outputs, step.y) * (1 - alpha) + F.cross_entropy(outputs, soft) * alpha

    def remember(step: CentralStep) -> None:
        memory[step.rows] = latest

    return central_run(simulation, loss, after=remember)


error, ece, nll, aurc = metric("error"), metric("ece-10"), metric("loss"), metric("aurc")
PAPER = Paper(
    slug="ps-kd",
    claims=(
        Claim(
            "calibration",
            "PS-KD is far better calibrated than training on the labels alone.",
            ece["ps-kd"] <= 0.6 * ece["ce"],
        ),
        Claim(
            "likelihood",
            "PS-KD has a better likelihood than the cross entropy and than label smoothing.",
            (nll["ps-kd"] <= nll["ce"] - 0.005, nll["ps-kd"] <= 0.92 * nll["ls"]),
        ),
        Claim(
            "ranking",
            "PS-KD ranks its predictions by confidence no worse than the cross entropy.",
            aurc["ps-kd"] <= aurc["ce"] + 0.0005,
        ),
        Claim(
            "accuracy",
            "PS-KD costs no accuracy (at this size the paper's gain in accuracy is not claimed).",
            error["ps-kd"] <= error["ce"] + 0.004,
        ),
        Claim(
            "past predictions matter",
            "Without the past predictions the same softening schedule loses clearly.",
            nll["decayed-smoothing"] >= 2.0 * nll["ps-kd"],
        ),
    ),
    central=dict.fromkeys(("ce", "ls", "ps-kd", "decayed-smoothing"), central),
    uses=("flowerbed.clients.memory",),
)
