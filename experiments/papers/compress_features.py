"""Compressing Features for Learning with Noisy Labels (Nested / Dropout + Co-teaching).

Chen, Hu, Shen, Ai and Suykens, IEEE TNNLS 2022, arXiv 2206.13140. A network memorises wrong labels when the features
before its classifier carry too much. Masking them limits that; two such networks then teach each other.

Stage one. h = f(x) in R^D, z = m * h, logits = W^T z without bias; cross entropy on the noisy labels, with
    dropout   m_d ~ Bernoulli(1 - p) / (1 - p), independent;
    nested    m = (1, .., 1, 0, .., 0) with k ones, P(k) ~ exp(-((k - mu) / sigma)^2), one k a batch, not scaled up.
A nested network is used with its first K channels, K the one of 1..D with the largest (accuracy on clean validation
samples) - 1e-5 (K - 1). A network without a mask, or with dropout, is used whole.

Stage two, from two networks A and B of stage one with different seeds: the batch is cut in halves H1 and H2. In
evaluation mode, cut off at K, A takes the floor((1 - r) |H1|) samples of smallest loss of H1, B those of H2; then A
steps on what B took and B on what A took, through a fresh mask (one k for both), the statistics of batch norm fixed.
They answer by the mean of their logits with the same K, chosen anew after every epoch.

Theorem 1. With L(x, y) = E_z[- log q(y|z)] and q~(y|x) ~ exp E_z log q(y|z),
    E L = E KL(p || q~) + E E_z KL(q~ || q) + H(Y|X),    bias and variance; it holds for every x.
``noisy-bias`` and ``noisy-variance`` are the two on training samples with their noisy labels: over-fitting is no bias.

Controls. Validation samples are clean and the same for every arm, and nobody's epoch is chosen by them: figures are
those of the last epoch (``best-accuracy``, beside it, is that of the best validation epoch, as in the paper).
``nested-pair`` fine-tunes the same two networks as long without leaving a sample out (r = 0): what is gained by two
networks and more epochs. ``toy-*`` is the paper's first picture: y = x with noise that grows with x.

Differences from the released code: the learning rate is not warmed up, and a nested K is never replaced by D where it
is 1. Not known are the width and the
noise of the toy; here two layers of 200 and a deviation of 0.4 x.

Many clients: weights are averaged for each network apart (A is never mixed with B), and clients send how many of their
validation samples are right for every K, which the server adds up. In the first round of stage two every client
chooses K for itself. Ordered channels mean the same everywhere. Small loss discards a client's rare classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed import seeds
from flowerbed.clients.co_teaching import halves, small_loss
from flowerbed.clients.data import CLEAN, Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound, Reply
from flowerbed.clients.teacher import teacher
from flowerbed.clients.training import Batches, batches_of, own_batches
from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.errors import require
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.measures import Measured
from flowerbed.experiments.parts import build_parts
from flowerbed.experiments.reproduction.central import CentralStep, central_run
from flowerbed.experiments.reproduction.claims import Claim, metric
from flowerbed.experiments.reproduction.engine import Reproduction
from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.experiments.reproduction.paper import Paper
from flowerbed.models.base import ModelSpec, Net, Shape
from flowerbed.models.batchnorm import fixed_statistics
from flowerbed.models.feature_masks import (
    LeadingLinear,
    best_cut,
    correct_by_channels,
    decomposition,
    dropout_mask,
    leading,
    nested_law,
    nested_mask,
)
from flowerbed.models.info import ModelInfo
from flowerbed.models.layers import ChannelsLast, image_shape
from flowerbed.models.pair import Pair, members
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.models.zoo import draw_net
from flowerbed.storage import Tensors
from flowerbed.strategies.base import ClientReply, Phase
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COUNTS, CHANNELS, BEST = "validation counts", "channels", "best"
MASK, TARGET = "mask", "target"
KEPT = "head.kept"
CHUNK = 512


@dataclass(frozen=True)
class CompressParams(FedAvgParams):
    """Hyper-parameters of both stages."""

    mask: str = "none"
    """none, dropout or nested."""
    p: float = 0.3
    """Share of the channels that dropout drops."""
    sigma: float = 10.0
    """Width of the law of k; no standard deviation."""
    mu: float = 0.0
    """Where it is largest."""
    kept: int = 0
    """Channels that the classifier is used with; 0: a nested network's are chosen, others use all."""
    network: int = 0
    """Number of the network: each has initial weights, an order of the data and masks of its own."""
    forget: float = 0.0
    """r, share of the samples that stage two leaves out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.mask in ("none", "dropout", "nested"),
            f"strategy.mask is '{self.mask}'; choose none, dropout or nested.",
        )
        require(0 <= self.p < 1, f"strategy.p is {self.p}; give a share of at least 0, below 1.")
        require(self.sigma > 0, f"strategy.sigma is {self.sigma}; give a number above 0.")
        require(
            0 <= self.forget < 1, f"strategy.forget is {self.forget}; give a share of at least 0, below 1."
        )
        for name in ("kept", "network"):
            require(getattr(self, name) >= 0, f"strategy.{name} is {getattr(self, name)}; give 0 or more.")

    def draw(self, seed: int, client: int, step: int, batch: int, channels: int) -> Tensor | None:
        """Return the mask of a step on the CPU: ``(D,)`` nested, ``(B, D)`` dropout, None where there is none."""
        if self.mask == "none":
            return None
        rng = seeds.torch_rng(seed, f"feature mask{self.stream}", client, step)
        if self.mask == "dropout":
            return dropout_mask(batch, channels, self.p, rng)
        return nested_mask(nested_law(channels, self.sigma, self.mu), rng)

    def cut(self, correct: Tensor, total: int) -> int:
        """Return the K to use, given the right answers for every K."""
        if self.kept:
            return self.kept
        return best_cut(correct, total) if self.mask == "nested" and total else len(correct)

    @property
    def stream(self) -> str:
        """What distinguishes this network's random streams."""
        return f" of network {self.network}" if self.network else ""


class CompressHalf(ClientHalf):
    """Trains through masked features; counts which of them are enough."""

    params: CompressParams

    def batches(self, local: LocalRound) -> Batches:
        stream, channels = self.params.stream, channels_of(local.info)
        plain = own_batches(local, local.local)
        if stream:
            plain = batches_of(local, local.local, local.train_data, stream)

        def batch(step: int) -> Batch:
            found = plain(step)
            mask = self.params.draw(local.seed, local.client, step, len(found["y"]), channels)
            return found if mask is None else {**found, MASK: mask.to(local.device)}

        return batch

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        z = model.features(batch["x"])
        return self.error(model.head(z * batch[MASK] if MASK in batch else z), batch, task), {}

    def error(self, outputs: Tensor, batch: Batch, task: Task) -> Tensor:
        """Return the loss of outputs."""
        return task.mean_loss(outputs, batch["y"])

    def run(self, local: LocalRound) -> Reply:
        reply = super().run(local)
        if local.open_validation is None and (self.params.kept or self.params.mask != "nested"):
            return reply
        correct, total = self.right(local)
        share = float(correct[self.params.cut(correct, total) - 1]) / max(1, total)
        counts = {"correct": correct, "total": torch.tensor(total)}
        return Reply({**reply.streams, COUNTS: counts}, {**reply.metrics, "validation": share})

    @torch.no_grad()
    def right(self, local: LocalRound) -> tuple[Tensor, int]:
        """Return the right answers on the client's validation samples for every K, and their number."""
        data = local.validation_data
        local.model.eval()
        pairs = []
        for net in self.networks(local.parts):
            parts = [net.features(x) for x in torch.split(data.x, CHUNK)]
            pairs.append((torch.cat(parts), net.parameters["head.weight"]))
        return correct_by_channels(pairs, data.y), len(data)

    def networks(self, model: ModelParts) -> tuple[ModelParts, ...]:
        """Return the networks that answer together."""
        return (model,)


class Compress(FedAvg):
    """FedAvg of one network; of clients' counts it makes the number of channels that the delivered model uses."""

    Params = CompressParams
    Half = CompressHalf
    params: CompressParams

    def model_spec(self, spec: ModelSpec) -> ModelSpec:
        own = {"draw": self.params.network} if self.params.network else {}
        return replace(spec, options={**spec.options, **own})

    def start_phase(self, phase: Phase, model: Tensors) -> Tensors:
        # A network that was cut off when it was delivered is trained whole.
        return cut_off(model, 0)

    def aggregate(self, server_round: int, current: Tensors, replies: list[ClientReply]) -> Tensors:
        model = super().aggregate(server_round, current, replies)
        sent = [reply.streams[COUNTS] for reply in replies if COUNTS in reply.streams]
        if sent:
            correct = torch.stack([s["correct"] for s in sent]).sum(0)
            total = sum(int(s["total"]) for s in sent)
            kept = self.params.cut(correct, total)
            self.state[CHANNELS] = {"kept": torch.tensor(kept)}
            reached = float(correct[kept - 1]) / max(1, total)
            before = self.state.get(f"{BEST} accuracy", {"reached": torch.tensor(-1.0)})["reached"]
            if reached > float(before):
                self.state[BEST] = cut_off(model, kept)
                self.state[f"{BEST} accuracy"] = {"reached": torch.tensor(reached, dtype=torch.float64)}
        return model

    def deliver(self, model: Tensors) -> Tensors:
        return cut_off(model, self.params.kept or int(self.state.get(CHANNELS, {}).get("kept", 0)))

    def alternatives(self, model: Tensors) -> Mapping[str, Tensors]:
        best = {BEST: self.state[BEST]} if BEST in self.state else {}
        return {"all": model, **best} if self.params.mask == "nested" else best


class CoTeachHalf(CompressHalf):
    """Two networks, each of which chooses the samples that the other one learns from."""

    def begin(self, local: LocalRound) -> Extras:
        found = local.received.get(CHANNELS)
        kept = int(found["kept"]) if found else self.params.cut(*self.right(local))
        return {CHANNELS: leading(channels_of(local.info), kept).to(local.device)}

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        nets, rows = members(model), halves(len(batch["y"]))
        taken = []
        for net, own in zip(nets, rows, strict=True):
            own = own.to(batch["y"].device)
            with teacher(net, {}) as quiet:
                outputs = quiet.head(quiet.features(batch["x"][own]) * extras[CHANNELS])
                taken.append(own[small_loss(task.loss(outputs, batch["y"][own]), self.params.forget)])
        losses = []
        with fixed_statistics(model.module):
            for net, learned in zip(nets, reversed(taken), strict=True):
                z = net.features(batch["x"][learned])
                if MASK in batch:
                    mask = batch[MASK]
                    z = z * (mask if mask.ndim == 1 else mask[learned])
                losses.append(task.mean_loss(net.head(z), batch["y"][learned]))
        # The networks share no parameter, so each moves along the gradient of its own loss.
        right = {}
        if CLEAN in batch:
            both = torch.cat(taken)
            right = {"taken-right": (batch["y"][both] == batch[CLEAN][both]).float().mean()}
        return losses[0] + losses[1], right

    def networks(self, model: ModelParts) -> tuple[ModelParts, ...]:
        return members(model)


class CoTeach(Compress):
    """FedAvg of each of two networks."""

    Half = CoTeachHalf

    def broadcast(self, server_round: int) -> Mapping[str, Mapping[str, Tensor]]:
        return {CHANNELS: self.state[CHANNELS]} if CHANNELS in self.state else {}


class FitHalf(CompressHalf):
    """Fits a number in place of a class."""

    def error(self, outputs: Tensor, batch: Batch, task: Task) -> Tensor:
        return F.mse_loss(outputs.squeeze(-1), batch[TARGET])


class Fit(Compress):
    """Regression through masked features."""

    Half = FitHalf


def channels_of(info: ModelInfo) -> int:
    """Return D, the channels before the classifier."""
    return next(shape[-1] for name, shape in info.shapes.items() if name.endswith("head.weight"))


def cut_off(model: Tensors, kept: int) -> Tensors:
    """Return the model that uses the first ``kept`` channels; 0 means all."""
    heads = [name for name in model if name.endswith(KEPT)]
    channels = {name: model[name.removesuffix("kept") + "weight"].shape[-1] for name in heads}
    return {**model, **{name: torch.full_like(model[name], kept or channels[name]) for name in heads}}


def ordered(input_shape: Shape, num_classes: int, *, of: str = "", width: int = 256, draw: int = 0) -> Net:
    """Return a network ``of`` any kind with a classifier that can be cut off, the ``draw``-th of its initial weights.

    Without ``of``: two convolutions with stride 2 (16 and 32 channels) and a dense layer, with batch norm.
    """
    for _ in range(draw + 1):
        net = draw_net(of, input_shape, num_classes) if of else _conv_dense(input_shape, width)
        net = Net(net.body, LeadingLinear(net.feature_dim, num_classes), net.feature_dim)
    return net


def _conv_dense(input_shape: Shape, width: int) -> Net:
    channels, height, across = image_shape("ordered", input_shape, 4)
    layers: list[nn.Module] = []
    for following in (16, 32):
        layers += [
            nn.Conv2d(channels, following, 3, 2, padding=1, bias=False),
            nn.BatchNorm2d(following),
            nn.ReLU(),
        ]
        channels, height, across = following, -(-height // 2), -(-across // 2)
    dense = nn.Linear(channels * height * across, width, bias=False)
    body = nn.Sequential(ChannelsLast(*layers), nn.Flatten(), dense, nn.BatchNorm1d(width), nn.ReLU())
    return Net(body, nn.Identity(), width)


def curve(input_shape: Shape, num_classes: int, *, width: int = 200) -> Net:
    """Return two dense layers of that width and one number at the end, which can be cut off."""
    body = nn.Sequential(nn.Linear(input_shape[0], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    return Net(body, LeadingLinear(width, 1), width)


def ramp(*, samples: int = 100, noise: float = 0.4, draw: int = 0) -> Dataset:
    """Return y = x + e with x in [0, 10] and e ~ N(0, (noise x)^2); the test set is the line itself."""
    rng = seeds.numpy_rng(draw, "compress features ramp")
    x = rng.uniform(0, 10, samples)
    y = x + noise * x * rng.standard_normal(samples)
    line = np.linspace(0, 10, 201)
    train, test = (
        Split(
            torch.from_numpy(a).float()[:, None],
            torch.zeros(len(a), dtype=torch.int64),
            {TARGET: torch.from_numpy(b).float()},
        )
        for a, b in ((x, y), (line, line))
    )
    return Dataset("ramp", train, test, ("y",), (5.0,), (2.9,), task="measured")


def memorised(measured: Measured) -> dict[str, float]:
    """Return the share of the (noisy) training labels that the model gives, and K with its share of D."""
    outputs, labels = measured.outputs(measured.dataset.train)
    return {"fits-noisy": float((outputs.argmax(-1) == labels).double().mean()), **_cut(measured.model)}


def _cut(model: nn.Module) -> dict[str, float]:
    head = next(m for m in model.modules() if isinstance(m, LeadingLinear))
    kept = min(int(head.kept), head.in_features)
    return {"kept": float(kept), "kept-share": kept / head.in_features}


def off_the_line(measured: Measured) -> dict[str, float]:
    """Return the root mean squared distance of the toy's prediction from y = x."""
    outputs, _ = measured.outputs()
    wanted = measured.dataset.test.extras[TARGET]
    return {
        "line-error": float((outputs.squeeze(-1) - wanted).square().mean().sqrt()),
        **_cut(measured.model),
    }


@torch.no_grad()
def theorem(run: Finished) -> dict[str, float]:
    """Return Theorem 1's bias and variance on 1,000 training samples and their noisy labels, for one network."""
    model, dataset = run.model, run.dataset
    asked = CompressParams(**run.simulation.strategy.options)
    if not isinstance(model, Net) or dataset.task == "measured" or asked.mask == "dropout":
        return {}
    split, weight, channels = dataset.train, weight_of(model), model.feature_dim
    law = nested_law(channels, asked.sigma, asked.mu) if asked.mask == "nested" else torch.ones(1)
    found = []
    for rows in torch.split(torch.arange(min(1000, len(split))), 100):
        z = model.features(dataset.prepare(split.inputs[rows]))
        every = (z.unsqueeze(1) * weight).cumsum(-1) if asked.mask == "nested" else (z @ weight.T)[..., None]
        log_q = every.permute(2, 0, 1).double().log_softmax(-1)
        p = F.one_hot(split.labels[rows], dataset.num_classes).double()
        found.append(torch.stack(decomposition(log_q, law, p)[:2]))
    bias, variance = torch.cat(found, 1).mean(1).tolist()
    return {"noisy-bias": bias, "noisy-variance": variance}


def central(simulation: Simulation) -> Tensors:
    """Return what a plain loop makes of a network of stage one; K is found by trying one after another."""
    asked = CompressParams(**simulation.strategy.options)

    def loss(step: CentralStep) -> Tensor:
        (net,) = _nets(step.net)
        z = net.features(step.x)
        mask = asked.draw(simulation.seed, 0, step.number, len(step.y), z.shape[1])
        return F.cross_entropy((z if mask is None else z * mask) @ weight_of(net).T, step.y)

    return _tried(simulation, central_run(simulation, loss))


def central_pair(simulation: Simulation) -> Tensors:
    """Return what a plain loop makes of two networks that teach each other."""
    asked = CompressParams(**simulation.strategy.options)
    kept, epoch = 0, -1

    def loss(step: CentralStep) -> Tensor:
        nonlocal kept, epoch
        step.net.eval()
        first, second = _nets(step.net)
        if step.epoch > epoch:
            kept, epoch = _best(simulation, (first, second)), step.epoch
        half, found = len(step.y) // 2, []
        for net, at in ((first, slice(half)), (second, slice(half, 2 * half))):
            with torch.no_grad():
                logits = net.features(step.x[at])[:, :kept] @ weight_of(net)[:, :kept].T
                losses = F.cross_entropy(logits, step.y[at], reduction="none")
            found.append(losses.sort(stable=True).indices[: int((1 - asked.forget) * half)])
        mask = asked.draw(simulation.seed, 0, step.number, len(step.y), first.feature_dim)
        total = torch.zeros(())
        for net, rows in ((first, half + found[1]), (second, found[0])):
            z = net.features(step.x[rows])
            if mask is not None:
                z = z * (mask if mask.ndim == 1 else mask[rows])
            total = total + F.cross_entropy(z @ weight_of(net).T, step.y[rows])
        return total

    return _tried(simulation, central_run(simulation, loss))


def weight_of(net: Net) -> Tensor:
    """Return the weights of the classifier, ``(C, D)``."""
    assert isinstance(net.head, LeadingLinear)
    return net.head.weight


def _nets(model: nn.Module) -> tuple[Net, ...]:
    if isinstance(model, Pair):
        return model.first, model.second
    assert isinstance(model, Net)
    return (model,)


def _tried(simulation: Simulation, tensors: Tensors) -> Tensors:
    net = build_parts(simulation).spec.model.build(simulation.seed)
    net.load_state_dict(tensors)
    return cut_off(tensors, _best(simulation, _nets(net.eval())))


@torch.no_grad()
def _best(simulation: Simulation, nets: tuple[Net, ...]) -> int:
    data, channels = build_parts(simulation).dataset, nets[0].feature_dim
    if CompressParams(**simulation.strategy.options).mask != "nested":
        return channels
    assert data.validation is not None
    z, scores = [net.features(data.prepare(data.validation.inputs)) for net in nets], []
    for k in range(1, channels + 1):
        each = [zi[:, :k] @ weight_of(net)[:, :k].T for zi, net in zip(z, nets, strict=True)]
        right = (torch.stack(each).sum(0).argmax(1) == data.validation.labels).double().mean()
        scores.append(float(right) - 1e-5 * (k - 1))
    return scores.index(max(scores)) + 1


@torch.no_grad()
def pictures(made: Reproduction) -> Figure:
    """Return accuracy by channels used, by what was memorised, and the toy."""
    from flowerbed.experiments.compare_report import INK
    from flowerbed.experiments.reproduction import figures

    figure, (cuts, fits, toy) = figures.canvas(3)
    shown: list[str] = [arm for arm in ("ce", "dropout-0.7", "nested-10") if arm in made.arms]
    for place, arm in enumerate(shown):
        curves = []
        for seed in made.seeds:
            run = made.finished(arm, seed)
            model, test = run.model, run.dataset.test
            assert isinstance(model, Net)
            z = model.features(run.dataset.prepare(test.inputs[:2000]))
            right = correct_by_channels([(z, weight_of(model))], test.labels[:2000])
            curves.append((right.double() / len(z)).tolist())
        # About ten points a decade, and the whole.
        whole = len(curves[0])
        x = sorted({k for n in range(40) if (k := round(10 ** (n / 10))) < whole} | {whole})
        figures.line(cuts, x, [[c[k - 1] for c in curves] for k in x], arm, place)
    cuts.set_xscale("log")
    figures.finish(cuts, "channels used, K", "test accuracy")
    for place, arm in enumerate(a for a in made.arms if not a.startswith("toy") and not a.endswith("second")):
        colour, _ = figures.look(place)
        known, reached = figures.values(made, arm, "fits-noisy"), figures.values(made, arm, "accuracy")
        fits.plot(known, reached, "os^D"[place // 6 % 4], color=colour, label=arm, markersize=5, mew=0)
    figures.finish(fits, "noisy training labels that it gives", "test accuracy")
    for place, arm in enumerate(a for a in made.arms if a.startswith("toy")):
        run = made.finished(arm, made.seeds[0])
        train, line = run.dataset.train, run.dataset.test
        if not place:
            toy.plot(
                train.inputs[:, 0],
                train.extras[TARGET],
                ".",
                color=INK,
                alpha=0.4,
                markersize=4,
                label="data",
            )
            toy.plot((0, 10), (0, 10), "--", color=INK, linewidth=1, label="y = x")
        said = run.model(run.dataset.prepare(line.inputs))
        toy.plot(line.inputs[:, 0], said[:, 0], color=figures.look(place)[0], linewidth=1.6, label=arm)
    figures.finish(toy, "x", "y")
    return figure


accuracy, fits, share, off = (
    metric("accuracy"),
    metric("fits-noisy"),
    metric("kept-share"),
    metric("line-error"),
)
PAPER = Paper(
    slug="compress-features",
    claims=(
        Claim(
            "nested dropout resists wrong labels",
            "A network with ordered features is clearly more accurate than plain training on the same labels.",
            accuracy["nested-10"] >= accuracy["ce"] + 0.035,
            mechanism=fits["nested-10"] <= fits["ce"] - 0.02,
        ),
        Claim(
            "dropout resists wrong labels",
            "Strong dropout of the features is far more accurate than plain training.",
            accuracy["dropout-0.7"] >= accuracy["ce"] + 0.1,
            mechanism=fits["dropout-0.7"] <= fits["ce"] - 0.02,
        ),
        Claim(
            "few channels are enough",
            "Clean validation samples choose at most half of the channels.",
            share["nested-10"] <= 0.5,
        ),
        Claim(
            "networks that teach each other",
            "Two nested networks that choose samples for each other are better than one alone.",
            accuracy["nested-co"] >= accuracy["nested-10"] + 0.01,
        ),
        Claim(
            "the choice of samples matters",
            "They are also better than the same two networks, tuned as long on all samples.",
            accuracy["nested-co"] >= accuracy["nested-pair"] + 0.005,
        ),
        Claim(
            "dropout networks teach each other as well",
            "Two dropout networks that choose samples for each other are better than one alone.",
            accuracy["dropout-co"] >= accuracy["dropout-0.7"] + 0.01,
        ),
        Claim(
            "the first channel knows the line",
            "The first of the ordered channels is nearer to the truth than a plain network.",
            off["toy-nested"] <= off["toy-plain"],
        ),
    ),
    measure=theorem,
    figure=pictures,
    central={
        **dict.fromkeys(("ce", "dropout-0.7", "nested-10"), central),
        **dict.fromkeys(("nested-co", "nested-pair"), central_pair),
    },
    uses=(
        "flowerbed.clients.co_teaching",
        "flowerbed.datasets.excerpt",
        "flowerbed.models.batchnorm",
        "flowerbed.models.feature_masks",
        "flowerbed.models.pair",
    ),
)
