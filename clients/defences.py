"""Defences of a client against attacks on its update: what it sends instead, and all names.

Let u = w_k - w_t be the update of honest training over the model's parameters; the client sends w_t + T(u). Buffers,
other streams and metrics stay as they are. Statistics are by tensor, as in the attacks' literature.

===========  =====================================================================  ==================================
name         T(u)                                                                   an attacker who knows of it
===========  =====================================================================  ==================================
``noise``    u + N(0, s^2) or Laplace of that deviation, s = ``std`` (times the     l1 for Laplace (the cosine is the
             RMS of u, if relative)                                                 likelihood of Gaussian noise)
``clip``     u min(1, c / |u|), over all tensors together                           bounds candidates alike
``prune``    the ``keep`` share of the largest |u| of each tensor, 0 elsewhere      compares the rest alone
``dgc``      the same of what has been owed so far, with momentum                   compares the rest alone
``sign``     sign(u) times the mean of |u|                                          compares soft signs
``qsgd``     |u|_2 sign(u) l / levels, l drawn so that the mean is u                need not care: it has no bias
``soteria``  the head's input features that tell most of x for their size lose      leaves the layer out
             their columns of the head's weight (Sun et al. 2021)
===========  =====================================================================  ==================================

``prune`` with feedback adds what it left out to the next update: a residual that the client keeps. The others are in
``flowerbed.clients.dpsgd`` (gradients of single examples), ``flowerbed.clients.encodings`` (what is trained on) and
``flowerbed.clients.model_defences`` (what is trained); docs/defences.md has all of them with what breaks them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowerbed.clients import updates
from flowerbed.clients.defence import DEFENCES, Defence
from flowerbed.clients.dpsgd import DpSgd
from flowerbed.clients.encodings import Ats, InstaHide, LabelProtection, MixUp
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import MODEL, LocalRound
from flowerbed.clients.model_defences import Precode
from flowerbed.clients.params import LocalParams
from flowerbed.clients.training import own_batches
from flowerbed.clients.updates import Update
from flowerbed.datasets.dataset import Dataset
from flowerbed.errors import ClientError, require, unknown_name
from flowerbed.models.base import Net

__all__ = ["DEFENCES", "Clip", "Dgc", "NoDefence", "Noise", "Prune", "Qsgd", "Sign", "Soteria", "last_linear"]
"""The table is exported from here, where it is full."""

RESIDUAL = "defence residual"
MOMENTUM = "defence momentum"
KINDS = ("gaussian", "laplace")
HEAD = "head"
WARMUP = 0.25
"""Share of the entries that DGC keeps in its first round; its powers follow."""


@DEFENCES.register("none")
@dataclass(frozen=True)
class NoDefence(Defence):
    """The update as it is."""


@DEFENCES.register("noise")
@dataclass(frozen=True)
class Noise(Defence):
    """Noise on every coordinate, without any clipping: no differential privacy."""

    std: float = 1.0
    """Standard deviation of the noise."""
    relative: bool = True
    """Whether in units of the update's root mean square over all tensors."""
    kind: str = "gaussian"
    """gaussian or laplace."""

    def __post_init__(self) -> None:
        require(self.std >= 0, f"defence.std is {self.std}; give 0 or more.")
        require(self.kind in KINDS, unknown_name("kind of noise", self.kind, KINDS))

    def known(self, local: LocalParams) -> Mapping[str, Any]:
        if self.kind == "laplace":
            return {"objective": "l1-relative"}
        # |u + n|^2 is about (1 + q^2) |u|^2 and <u, n> about 0.
        floor = 1 - 1 / math.sqrt(1 + self.std**2)
        return {"floor": floor} if self.relative else {"update_noise": self.std}

    def changed(self, update: Update, local: LocalRound) -> Update:
        count = sum(value.numel() for value in update.values())
        std = self.std * (updates.norm(update) / count**0.5 if self.relative else 1.0)
        generator = local.generator("defence noise")
        draw = updates.gaussian_like if self.kind == "gaussian" else _laplace_like
        return {key: value + draw(value, std, generator) for key, value in update.items()}


@DEFENCES.register("clip")
@dataclass(frozen=True)
class Clip(Defence):
    """A bound on the norm of the whole update."""

    bound: float = 1.0
    """c, the largest norm."""

    def __post_init__(self) -> None:
        require(self.bound > 0, f"defence.bound is {self.bound}; give a number above 0.")

    def known(self, local: LocalParams) -> Mapping[str, Any]:
        return {"imitation": "clip"}

    def changed(self, update: Update, local: LocalRound) -> Update:
        factor = updates.clip_factor(updates.norm(update), self.bound)
        return {key: value * factor for key, value in update.items()}


@DEFENCES.register("prune")
@dataclass(frozen=True)
class Prune(Defence):
    """The largest entries of every tensor, 0 elsewhere."""

    keep: float = 0.05
    """Share of the entries of a tensor that are kept, at least one of them."""
    feedback: bool = False
    """Whether what was left out is added to the client's next update."""

    def __post_init__(self) -> None:
        require(0 < self.keep <= 1, f"defence.keep is {self.keep}; give a share above 0, at most 1.")

    @property
    def stateful(self) -> bool:
        return self.feedback

    def known(self, local: LocalParams) -> Mapping[str, Any]:
        return {"imitation": "mask"}

    def changed(self, update: Update, local: LocalRound) -> Update:
        owed = local.state.get(RESIDUAL, {}) if self.feedback else {}
        whole = {
            key: value + owed[key[1]].to(value.device) if key[1] in owed else value
            for key, value in update.items()
        }
        sent = {key: _largest(value, self.keep) for key, value in whole.items()}
        if self.feedback:
            local.state[RESIDUAL] = {key[1]: whole[key] - sent[key] for key in whole}
        return sent


@DEFENCES.register("dgc")
@dataclass(frozen=True)
class Dgc(Defence):
    """Deep Gradient Compression: the largest entries of what a client owes, with momentum (Lin et al. 2018).

    v <- m v + u,  r <- r + v,  M marks the largest entries of |r| in each tensor: sent is r M, and r and v are 0 there
    afterwards (accumulation, momentum correction and momentum factor masking of the paper).
    """

    keep: float = 0.001
    """Share of the entries of a tensor that are sent after the warm-up, at least one of them."""
    momentum: float = 0.9
    """m. It takes the place of local.momentum, and like that makes steps 1 / (1 - m) times as long."""
    warmup: int = 4
    """Rounds in which more is sent: a quarter of the entries, then a quarter of that, and so on."""
    bound: float = 0.0
    """Largest norm of an update before it is added up; 0 is none."""

    stateful = True

    def __post_init__(self) -> None:
        require(0 < self.keep <= 1, f"defence.keep is {self.keep}; give a share above 0, at most 1.")
        require(0 <= self.momentum < 1, f"defence.momentum is {self.momentum}; give a number in [0, 1).")
        require(self.warmup >= 0, f"defence.warmup is {self.warmup}; give 0 (none) or more rounds.")
        require(self.bound >= 0, f"defence.bound is {self.bound}; give 0 (none) or more.")

    def known(self, local: LocalParams) -> Mapping[str, Any]:
        return {"imitation": "mask"}

    def check(self, half: ClientHalf, module: nn.Module, local: LocalParams, dataset: Dataset) -> None:
        require(
            not (self.momentum and local.momentum and local.optimizer == "sgd"),
            "defence=dgc has a momentum of its own (defence.momentum), which takes the place of local.momentum; set "
            "one of them to 0.",
        )

    def keep_at(self, round_: int) -> float:
        """Return the share that is sent in a round, from 1."""
        return max(self.keep, WARMUP**round_) if round_ <= self.warmup else self.keep

    def changed(self, update: Update, local: LocalRound) -> Update:
        factor = updates.clip_factor(updates.norm(update), self.bound) if self.bound else 1.0
        owed, moving = (local.state.get(group, {}) for group in (RESIDUAL, MOMENTUM))
        sent, residuals, velocities = {}, {}, {}
        for key, value in update.items():
            name = key[1]
            velocity = factor * value
            if name in moving:
                velocity = velocity + self.momentum * moving[name].to(value.device)
            residual = velocity + owed[name].to(value.device) if name in owed else velocity
            sent[key] = _largest(residual, self.keep_at(local.clock.round))
            left = (sent[key] == 0).to(value.dtype)
            residuals[name], velocities[name] = residual * left, velocity * left
        local.state[RESIDUAL], local.state[MOMENTUM] = residuals, velocities
        return sent


@DEFENCES.register("sign")
@dataclass(frozen=True)
class Sign(Defence):
    """One bit an entry and one size a tensor."""

    def known(self, local: LocalParams) -> Mapping[str, Any]:
        return {"imitation": "sign"}

    def changed(self, update: Update, local: LocalRound) -> Update:
        return {key: value.sign() * value.abs().mean() for key, value in update.items()}


@DEFENCES.register("qsgd")
@dataclass(frozen=True)
class Qsgd(Defence):
    """Stochastic rounding to a few levels of every tensor's norm (Alistarh et al. 2017)."""

    levels: int = 16
    """Steps between 0 and the norm."""

    def __post_init__(self) -> None:
        require(self.levels >= 1, f"defence.levels is {self.levels}; give at least 1.")

    def changed(self, update: Update, local: LocalRound) -> Update:
        generator = local.generator("defence rounding")
        return {key: self._rounded(value, generator) for key, value in update.items()}

    def _rounded(self, value: Tensor, generator: torch.Generator) -> Tensor:
        size = value.norm()
        if float(size) == 0:
            return value
        place = value.abs() / size * self.levels
        drawn = torch.rand(value.shape, generator=generator, dtype=value.dtype, device=value.device)
        levels = place.floor() + (drawn < place - place.floor()).to(value.dtype)
        rounded: Tensor = value.sign() * size * levels / self.levels
        return rounded


@DEFENCES.register("soteria")
@dataclass(frozen=True)
class Soteria(Defence):
    """Perturbs the representation: columns of the head's weight update are 0 for its most telling features.

    Score of feature i: sum over the batch of |d r_i / d x|_2 / (|r_i| + epsilon), r the input of the last linear layer
    at the received parameters. The paper prunes the *smallest* scores, features whose change needs most of x.
    """

    prune: float = 0.1
    """Share of the features whose columns are 0."""
    epsilon: float = 0.1

    def __post_init__(self) -> None:
        require(0 <= self.prune < 1, f"defence.prune is {self.prune}; give a share, at least 0, below 1.")
        require(self.epsilon > 0, f"defence.epsilon is {self.epsilon}; give a number above 0.")

    def known(self, local: LocalParams) -> Mapping[str, Any]:
        # Balunovic et al. 2022; imitation=mask reads the columns off the gradient and uses the others (as GGL does).
        return {"imitation": {"name": "drop", "layers": [f"{HEAD}.weight"]}}

    def check(self, half: ClientHalf, module: nn.Module, local: LocalParams, dataset: Dataset) -> None:
        require(
            last_linear(module) is not None,
            "defence=soteria changes a last linear layer, and the model has none; choose another model or defence.",
        )

    def changed(self, update: Update, local: LocalRound) -> Update:
        name = last_linear(local.model)
        if name is None or (MODEL, f"{name}.weight") not in update:
            raise ClientError("defence=soteria changes the last linear layer, and the client sends none")
        scores = self._scores(local)
        gone = scores.argsort(stable=True)[: round(self.prune * len(scores))]
        weight = update[MODEL, f"{name}.weight"].clone()
        weight[:, gone] = 0
        return {**update, (MODEL, f"{name}.weight"): weight}

    def _scores(self, local: LocalRound) -> Tensor:
        """Return every feature's score on the samples of this round."""
        batches = own_batches(local, local.local)
        trained = {n: v.detach().clone() for n, v in local.model.state_dict().items()}
        local.load(local.received[MODEL])
        training = local.model.training
        local.model.eval()
        try:
            total = torch.zeros(())
            for step in local.clock.all_steps:
                x = batches(step)["x"].detach().clone().requires_grad_()
                r = local.parts.features(x)
                # One backward pass a feature: of the batch's sum, whose samples do not meet in eval mode.
                sizes = torch.stack(
                    [
                        torch.autograd.grad(r[:, i].sum(), x, retain_graph=True)[0].flatten(1).norm(dim=1)
                        for i in range(r.shape[1])
                    ],
                    1,
                )
                total = total.to(r.device) + (sizes / (r.detach().abs() + self.epsilon)).sum(0)
        finally:
            local.load(trained)
            local.model.train(training)
        return total


def last_linear(module: nn.Module) -> str | None:
    """Return the name of a model's last layer, if it is its head and linear."""
    head = module.head if isinstance(module, Net) else None
    return HEAD if isinstance(head, nn.Linear) else None


def _largest(value: Tensor, share: float) -> Tensor:
    count = max(1, round(share * value.numel()))
    flat = value.flatten()
    kept = torch.zeros_like(flat)
    chosen = flat.abs().argsort(descending=True, stable=True)[:count]
    kept[chosen] = flat[chosen]
    return kept.view(value.shape)


def _laplace_like(value: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Return independent Laplace numbers of standard deviation ``std``: scale std / sqrt(2)."""
    drawn = torch.rand(value.shape, generator=generator, dtype=torch.float64, device=value.device) - 0.5
    # The inverse of the distribution function; 1 - 2 |u| is above 0 but for u = -1/2 itself.
    size = -(1 - 2 * drawn.abs()).clamp(min=torch.finfo(torch.float64).tiny).log()
    return drawn.sign() * size * (std / math.sqrt(2))


for _name, _kind in {
    "dpsgd": DpSgd,
    "mixup": MixUp,
    "instahide": InstaHide,
    "labels": LabelProtection,
    "ats": Ats,
    "precode": Precode,
}.items():
    DEFENCES.add(_name, _kind)
