"""Defences of a client against attacks on its update: what it sends instead.

Let u = w_k - w_t be the update of honest training over the model's parameters; the client sends w_t + T(u). Buffers,
other streams and metrics stay as they are. Statistics are by tensor, as in the attacks' literature.

===========  =====================================================================  ==================================
name         T(u)                                                                   an attacker who knows of it
===========  =====================================================================  ==================================
``noise``    u + N(0, s^2), s = ``std`` (times the RMS of u, if relative)           expects D > 0 at the truth
``clip``     u min(1, c / |u|), over all tensors together                           need not care: a cosine is blind
``prune``    the ``keep`` share of the largest |u| of each tensor, 0 elsewhere      compares the rest alone
``sign``     sign(u) times the mean of |u|                                          compares soft signs
``qsgd``     |u|_2 sign(u) l / levels, l drawn so that the mean is u                need not care: it has no bias
``soteria``  the head's input features that tell most of x for their size lose      sees the columns that are 0
             their columns of the head's weight (Sun et al. 2021)
===========  =====================================================================  ==================================

``prune`` with feedback adds what it left out to the next update (as in Deep Gradient Compression, Lin et al. 2018,
without its momentum and warm-up): a residual that the client keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flowerbed.clients import updates
from flowerbed.clients.local_round import MODEL, LocalRound, Reply
from flowerbed.clients.training import own_batches
from flowerbed.clients.transforms import ClientTransform
from flowerbed.clients.updates import Update
from flowerbed.errors import ClientError, require
from flowerbed.models.base import Net
from flowerbed.registry import Registry

DEFENCES: Registry[type[Defence]] = Registry("defence")
RESIDUAL = "defence residual"


class Defence(ClientTransform):
    """Base of defences: a change of the update of the model's parameters."""

    imitation: str = "none"
    """What of it an attacker can repeat on candidates: see ``flowerbed.strategies.attacks.inversion``."""

    @property
    def floor(self) -> float:
        """The cosine distance to expect between the true update and the defended one, as far as that is noise."""
        return 0.0

    def changed(self, update: Update, local: LocalRound) -> Update:
        """Return what is sent in place of ``update``, float64 tensors by stream and name."""
        return update

    def reply(self, local: LocalRound, reply: Reply) -> Reply:
        start = {n: v.to(local.device) for n, v in local.received[MODEL].items()}
        update = updates.update_of({MODEL: reply.streams[MODEL]}, start, local.info.parameters)
        changed = self.changed(update, local)
        return replace(reply, streams=updates.with_update(reply.streams, start, changed))


@DEFENCES.register("none")
@dataclass(frozen=True)
class NoDefence(Defence):
    """The update as it is."""


@DEFENCES.register("noise")
@dataclass(frozen=True)
class Noise(Defence):
    """Gaussian noise on every coordinate, without any clipping: no differential privacy."""

    std: float = 1.0
    """Standard deviation of the noise."""
    relative: bool = True
    """Whether in units of the update's root mean square over all tensors."""

    def __post_init__(self) -> None:
        require(self.std >= 0, f"defence.std is {self.std}; give 0 or more.")

    @property
    def floor(self) -> float:
        # |u + n|^2 is about (1 + q^2) |u|^2 and <u, n> about 0.
        return 1 - 1 / math.sqrt(1 + self.std**2) if self.relative else 0.0

    def changed(self, update: Update, local: LocalRound) -> Update:
        count = sum(value.numel() for value in update.values())
        std = self.std * (updates.norm(update) / count**0.5 if self.relative else 1.0)
        generator = local.generator("defence noise")
        return {key: value + updates.gaussian_like(value, std, generator) for key, value in update.items()}


@DEFENCES.register("clip")
@dataclass(frozen=True)
class Clip(Defence):
    """A bound on the norm of the whole update."""

    bound: float = 1.0
    """c, the largest norm."""

    def __post_init__(self) -> None:
        require(self.bound > 0, f"defence.bound is {self.bound}; give a number above 0.")

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

    imitation = "mask"

    def __post_init__(self) -> None:
        require(0 < self.keep <= 1, f"defence.keep is {self.keep}; give a share above 0, at most 1.")

    @property
    def stateful(self) -> bool:
        return self.feedback

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


@DEFENCES.register("sign")
@dataclass(frozen=True)
class Sign(Defence):
    """One bit an entry and one size a tensor."""

    imitation = "sign"

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

    imitation = "mask"

    def __post_init__(self) -> None:
        require(0 <= self.prune < 1, f"defence.prune is {self.prune}; give a share, at least 0, below 1.")
        require(self.epsilon > 0, f"defence.epsilon is {self.epsilon}; give a number above 0.")

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
    return "head" if isinstance(head, nn.Linear) else None


def _largest(value: Tensor, share: float) -> Tensor:
    count = max(1, round(share * value.numel()))
    flat = value.flatten()
    kept = torch.zeros_like(flat)
    chosen = flat.abs().argsort(descending=True, stable=True)[:count]
    kept[chosen] = flat[chosen]
    return kept.view(value.shape)
