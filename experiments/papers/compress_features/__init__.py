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

import torch
from torch import Tensor
from torch.nn import functional as F

from flowerbed import seeds
from flowerbed.clients.co_teaching import halves, small_loss
from flowerbed.clients.data import CLEAN, Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound, Reply
from flowerbed.clients.teacher import teacher
from flowerbed.clients.training import Batches, batches_of, own_batches
from flowerbed.errors import require
from flowerbed.models.base import ModelSpec
from flowerbed.models.batchnorm import fixed_statistics
from flowerbed.models.feature_masks import (
    best_cut,
    correct_by_channels,
    dropout_mask,
    leading,
    nested_law,
    nested_mask,
)
from flowerbed.models.info import ModelInfo
from flowerbed.models.pair import members
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors
from flowerbed.strategies.base import ClientReply, Phase
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

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
