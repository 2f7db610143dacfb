"""Is Complexity Required for Neural Network Pruning? A Case Study on Global Magnitude Pruning (Global MP).

Gupta, Camci, Keneta, Vaidyanathan, Kanodia, Foo, Wu and Lin, arXiv 2209.14624. All weights of the network are ranked
together by absolute value, the smallest are deleted until the sparsity is reached, and the rest is fine-tuned:

    m = 1[ |w| is not among the round(s n) smallest of all n prunable weights ],   w <- w m after every step

Prunable are the weights of all convolutions and linear layers, first and last included; biases and normalisation are
not. At extreme sparsity whole layers vanish (layer collapse). A minimum number of weights that every layer keeps
(``least``, MT in the paper, per cent of all weights) cures it.

Gradual: with ``ramp_rounds=T`` the sparsity of round t is s (1 - (1 - t/T)^3), with a new threshold at every round on
the averaged weights; what is pruned stays pruned.

Baselines at the same budget: ``scope=uniform`` (magnitude, the same sparsity in every layer, first and last included),
``scope=erk`` (layer sparsities of Evci et al., ICML 2020), and other scores ranked globally: ``random``; ``snip``,
|w g| with the gradient g over all training data (Lee et al., ICLR 2019); ``taylor``, the mean over batches of
(w g_b)^2.

Server: keeps the mask, broadcasts it, and averages what clients send. Client: trains under the mask and sends kept
entries only, so the upload falls by the factor 1 - s. Its state is nothing.

Differences from the released code: its pool of weights starts with an uninitialised element and keeps ties, here the
number is exact; its MT scales other layers' sparsities up until the whole is reached (``variant=as_coded``), while the
default spends what MT saves on the globally smallest weights. The two agree where MT binds nowhere.

The scale of a convolution before batch norm is arbitrary, so magnitudes compare only because weight decay acts on all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowerbed import seeds
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import MODEL, Extras, LocalRound, Reply, Step, Trained
from flowerbed.clients.training import own_batches
from flowerbed.errors import ConfigError, require
from flowerbed.models.sparsity import Masks, Scores, erdos_renyi_kernel, keep_by_layer, keep_largest, prunable
from flowerbed.storage import Tensors
from flowerbed.strategies.base import ClientReply, Phase
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

MASK, KEPT = "mask", "kept"
SCORES = ("magnitude", "random", "snip", "taylor")
GRADIENT, SQUARES = "gradient", "squares"


@dataclass(frozen=True)
class GlobalMpParams(FedAvgParams):
    """Hyper-parameters of global magnitude pruning and of what it is compared with."""

    s: float = 0.9
    """Share of the prunable weights that go."""
    least: float = 0.0
    """MT: weights that every layer keeps, in per cent of all prunable weights; the paper's code has 0.05."""
    variant: str = "greedy"
    """What MT saves is taken from: greedy (the smallest weights left), or as_coded (all other layers in proportion)."""
    score: str = "magnitude"
    """magnitude, random, snip or taylor."""
    scope: str = "global"
    """global (one threshold), uniform (the same sparsity in every layer) or erk."""
    ramp_rounds: int = 0
    """T, rounds over which the sparsity grows; 0 prunes at once, before the first round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.s < 1, f"strategy.s is {self.s}; give a sparsity of at least 0, below 1.")
        require(0 <= self.least <= 100, f"strategy.least is {self.least}; give per cent, 0 to 100.")
        require(self.ramp_rounds >= 0, f"strategy.ramp_rounds is {self.ramp_rounds}; give 0 or more.")
        for name, choices in (
            ("variant", ("greedy", "as_coded")),
            ("score", SCORES),
            ("scope", ("global", "uniform", "erk")),
        ):
            given = getattr(self, name)
            require(given in choices, f"strategy.{name} is '{given}'; choose from {', '.join(choices)}.")
        require(
            not self.ramp_rounds or not self.asks,
            f"strategy.score={self.score} is measured once, before the first round; set strategy.ramp_rounds=0.",
        )

    @property
    def asks(self) -> bool:
        """Whether the score needs gradients, hence a round of statistics before training."""
        return self.score in ("snip", "taylor")

    def sparsity(self, round_: int) -> float:
        """Return the sparsity of a training round."""
        if not self.ramp_rounds:
            return self.s
        return self.s * (1 - (1 - min(round_ / self.ramp_rounds, 1.0)) ** 3)


class GlobalMpHalf(ClientHalf):
    """Trains under the mask that it is sent."""

    params: GlobalMpParams

    def begin(self, local: LocalRound) -> Extras:
        return {MASK: {name: mask.to(local.device) for name, mask in local.received[MASK].items()}}

    def correct(self, gradients: Tensors, parameters: Mapping[str, Tensor], extras: Extras) -> Tensors:
        # So that no momentum gathers where nothing can move.
        return {n: g * extras[MASK][n] if n in extras[MASK] else g for n, g in gradients.items()}

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        for name, mask in step.extras[MASK].items():
            step.parts.parameters[name].mul_(mask)

    def end(self, local: LocalRound, trained: Trained, extras: Extras) -> Mapping[str, Mapping[str, Tensor]]:
        model = dict(super().end(local, trained, extras)[MODEL])
        kept = {name: model.pop(name)[mask] for name, mask in extras[MASK].items()}
        return {MODEL: model, KEPT: kept}

    def query(self, local: LocalRound) -> Reply:
        """Return the summed gradient, and the summed squares (w g_b)^2, over one pass, in evaluation mode."""
        names = prunable(local.info)
        weights = {name: local.parts.parameters[name] for name in names}
        gradient = {name: torch.zeros_like(w) for name, w in weights.items()}
        squares = {name: torch.zeros_like(w) for name, w in weights.items()}
        batch_at, count = own_batches(local, local.local), len(local.train_data)
        local.model.eval()
        for step in range(local.local.batches_per_epoch(count)):
            batch = batch_at(step)
            size = len(batch["y"])
            loss = local.task.loss(local.model(batch["x"]), batch["y"]).mean()
            found = torch.autograd.grad(loss, list(weights.values()))
            for name, g in zip(names, found, strict=True):
                gradient[name] += size * g
                squares[name] += size * (weights[name].detach() * g) ** 2
        return Reply({GRADIENT: gradient, SQUARES: squares}, {"num-examples": count})


class GlobalMp(FedAvg):
    """FedAvg under one mask for all clients, made from the averaged weights."""

    Params = GlobalMpParams
    Half = GlobalMpHalf
    params: GlobalMpParams
    sums_in_queries = True

    def phases(self, rounds: int) -> list[Phase]:
        asking = [Phase("score", 1, "query", everyone=True, preparatory=True)] if self.params.asks else []
        return [*asking, *super().phases(rounds)]

    def start_phase(self, phase: Phase, model: Tensors) -> Tensors:
        return model if phase.name == "score" else self._pruned(model, 1)

    def broadcast(self, server_round: int) -> Mapping[str, Mapping[str, Tensor]]:
        return {} if self.phase.name == "score" else {MASK: self.state[MASK]}

    def aggregate(self, server_round: int, current: Tensors, replies: list[ClientReply]) -> Tensors:
        if self.phase.name == "score":
            for stream in (GRADIENT, SQUARES):
                sent = [reply.streams[stream] for reply in replies]
                self.state[stream] = {name: torch.stack([s[name] for s in sent]).sum(0) for name in sent[0]}
            return {}
        whole = [replace(reply, streams={MODEL: self._dense(reply, current)}) for reply in replies]
        averaged = super().aggregate(server_round, current, whole)
        return self._pruned(averaged, server_round + 1)

    def _dense(self, reply: ClientReply, current: Tensors) -> Tensors:
        """Return the model of a reply, zeros where it was pruned."""
        kept = {
            name: torch.zeros_like(current[name]).masked_scatter(self.state[MASK][name], values)
            for name, values in reply.streams[KEPT].items()
        }
        return {name: kept.get(name, reply.model.get(name, value)) for name, value in current.items()}

    def _pruned(self, model: Tensors, round_: int) -> Tensors:
        """Make the mask of a round and return the model under it; without a ramp there is but one."""
        if MASK not in self.state or self.params.ramp_rounds:
            before = self.state.get(MASK)
            found = self.masks(model, self.params.sparsity(round_))
            self.state[MASK] = found if before is None else {n: m & before[n] for n, m in found.items()}
        return {n: v * self.state[MASK][n] if n in self.state[MASK] else v for n, v in model.items()}

    def masks(self, model: Tensors, sparsity: float) -> Masks:
        """Return the masks of a model at a sparsity."""
        if self.setting is None:
            raise ConfigError("GlobalMp needs to know the model; call setup() before the run.")
        weights = {name: model[name] for name in prunable(self.setting.info)}
        total = sum(w.numel() for w in weights.values())
        scores, least = self._scores(weights), math.floor(total * self.params.least / 100)
        if self.params.scope == "uniform":
            return keep_by_layer(scores, dict.fromkeys(scores, sparsity))
        if self.params.scope == "erk":
            shapes = {name: tuple(w.shape) for name, w in weights.items()}
            return keep_by_layer(scores, erdos_renyi_kernel(shapes, sparsity))
        if self.params.variant == "as_coded" and least:
            sizes = {name: w.numel() for name, w in weights.items()}
            return keep_by_layer(scores, refined(keep_largest(scores, sparsity), sizes, sparsity, least))
        return keep_largest(scores, sparsity, least)

    def _scores(self, weights: Tensors) -> Scores:
        if self.params.score == "random":
            rng = seeds.torch_rng(self.setting.seed if self.setting else 0, "random pruning")
            return {name: torch.rand(w.shape, generator=rng) for name, w in weights.items()}
        if self.params.score == "snip":
            return {name: (w * self.state[GRADIENT][name]).abs() for name, w in weights.items()}
        return (
            self.state[SQUARES] if self.params.score == "taylor" else {n: w.abs() for n, w in weights.items()}
        )


def refined(masks: Masks, sizes: Mapping[str, int], sparsity: float, least: int) -> dict[str, float]:
    """Return each layer's sparsity after MT as released: clamped, and the others scaled until the whole is reached."""
    total = sum(sizes.values())
    p = {name: 1 - float(mask.float().mean()) for name, mask in masks.items()}

    def whole() -> float:
        return sum(p[n] * size for n, size in sizes.items()) / total

    def clamp() -> None:
        for n, size in sizes.items():
            if size < least:
                p[n] = 0.0
            elif size > least:
                p[n] = min(p[n], 1 - least / size)

    for _ in range(1000):
        scale = sparsity / whole() if whole() else 1.0
        for n in p:
            p[n] *= scale
        clamp()
        if whole() >= sparsity - 0.5 / total:
            return p
    raise ConfigError(f"A sparsity of {sparsity} cannot be reached while every layer keeps {least} weights.")
