"""What of a client's defence an attacker repeats on its candidates, and what it reads of the defence off the update.

With u the candidate's gradient (or update), v the observed one and y the candidate's labels, D(u, v) becomes

============  ==================================================================  =====================================
name          compared are                                                        read off v
============  ==================================================================  =====================================
``none``      u and v
``mask``      both where v is not 0: pruning, top-k, Soteria's columns            the share of entries that are left
``top``       as many of u's largest entries as v has, in each tensor             the same
``clip``      u min(1, c / |u|) and v                                             the bound c = |v|
``sign``      a soft sign of u, and v
``drop``      both without the tensors under the names ``layers``
``smooth``    u for labels (1 - s) y + s / C, s = ``share``
``dpsgd``     the mean of u's examples, each clipped to ``clip``, and v
============  ==================================================================  =====================================

An imitation is named, or a mapping of its name and constants: ``{name: drop, layers: [head.weight]}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from flowerbed.errors import ConfigError, require, unknown_name
from flowerbed.registry import Registry
from flowerbed.strategies.attacks.candidates import soft_sign
from flowerbed.strategies.attacks.observation import Gradient

IMITATIONS: Registry[type[Imitation]] = Registry("imitation")
Compared = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Imitation:
    """Base of imitations: as it stands, of no defence. All methods are pure and work under ``vmap``."""

    @property
    def smoothing(self) -> float:
        """The share of a label that all classes divide between them."""
        return 0.0

    @property
    def example_clip(self) -> float:
        """The largest norm of the gradient of one example; 0 is none."""
        return 0.0

    def targets(self, labels: Tensor, classes: int) -> Tensor:
        """Return what the loss compares outputs with: labels ``(B,)``, or probabilities ``(B, C)``."""
        return labels

    def compared(self, candidate: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Compared:
        """Return both sides of the objective; it takes the names of the second."""
        return candidate, observed

    def read(self, observed: Gradient) -> Mapping[str, float]:
        """Return the constants of the defence that can be read off what was observed."""
        return {}


IMITATIONS.add("none", Imitation)


@IMITATIONS.register("mask")
@dataclass(frozen=True)
class Mask(Imitation):
    """Entries that are 0 in the observed gradient take no part."""

    def compared(self, candidate: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Compared:
        return {n: candidate[n] * (v != 0).to(v.dtype) for n, v in observed.items()}, observed

    def read(self, observed: Gradient) -> Mapping[str, float]:
        return {"keep": _left(observed)}


@IMITATIONS.register("top")
@dataclass(frozen=True)
class Top(Imitation):
    """As many of the candidate's largest entries in each tensor as the observed one has."""

    def compared(self, candidate: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Compared:
        return {n: _as_sparse(candidate[n], v) for n, v in observed.items()}, observed

    def read(self, observed: Gradient) -> Mapping[str, float]:
        return {"keep": _left(observed)}


@IMITATIONS.register("clip")
@dataclass(frozen=True)
class ClipWhole(Imitation):
    """The candidate is bounded by the norm of what was observed, which is the bound if it was clipped."""

    def compared(self, candidate: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Compared:
        own, bound = _norm({n: candidate[n] for n in observed}), _norm(observed)
        factor = (bound / own.clamp(min=1e-24)).clamp(max=1.0)
        return {n: candidate[n] * factor for n in observed}, observed

    def read(self, observed: Gradient) -> Mapping[str, float]:
        return {"bound": float(_norm(observed))}


@IMITATIONS.register("sign")
@dataclass(frozen=True)
class Signs(Imitation):
    """A soft sign of the candidate."""

    def compared(self, candidate: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Compared:
        return soft_sign(candidate), observed


@IMITATIONS.register("drop")
@dataclass(frozen=True)
class Drop(Imitation):
    """Tensors whose names begin with one of ``layers`` take no part."""

    layers: tuple[str, ...] = ("head",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))

    def compared(self, candidate: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Compared:
        kept = {n: v for n, v in observed.items() if not n.startswith(self.layers)}
        require(bool(kept), f"attack.imitation drops {list(self.layers)}, and nothing is left to compare.")
        return candidate, kept


@IMITATIONS.register("smooth")
@dataclass(frozen=True)
class Smooth(Imitation):
    """Labels are softened."""

    share: float = 0.1

    def __post_init__(self) -> None:
        require(0 <= self.share < 1, f"attack.imitation: share is {self.share}; give a share below 1.")

    @property
    def smoothing(self) -> float:
        return self.share

    def targets(self, labels: Tensor, classes: int) -> Tensor:
        if labels.is_floating_point():
            return labels
        # Not F.one_hot, which looks at the labels and so does not work under vmap.
        said = (labels[..., None] == torch.arange(classes, device=labels.device)).to(
            torch.get_default_dtype()
        )
        return (1 - self.share) * said + self.share / classes


@IMITATIONS.register("dpsgd")
@dataclass(frozen=True)
class ClipExamples(Imitation):
    """The gradient of every example of a candidate is clipped before the mean."""

    clip: float = 1.0

    def __post_init__(self) -> None:
        require(self.clip > 0, f"attack.imitation: clip is {self.clip}; give a norm above 0.")

    @property
    def example_clip(self) -> float:
        return self.clip


def imitation_of(said: str | Mapping[str, Any]) -> Imitation:
    """Return the imitation of a name, or of a mapping of name and constants; raises ``ConfigError`` for others."""
    given = {"name": said} if isinstance(said, str) else dict(said)
    if "name" not in given:
        raise ConfigError(f"attack.imitation is {dict(given)}; write {{name: NAME, CONSTANT: VALUE}}.")
    kind = IMITATIONS.get(given.pop("name"))
    known = [f.name for f in fields(kind)]
    for key in given:
        require(key in known, unknown_name(f"constant of imitation {kind.__name__}", key, known))
    return kind(**given)


def _left(observed: Gradient) -> float:
    """Return the share of entries that are not 0."""
    return sum(int((v != 0).sum()) for v in observed.values()) / sum(v.numel() for v in observed.values())


def _as_sparse(candidate: Tensor, observed: Tensor) -> Tensor:
    """Return the candidate with only as many entries, its largest, as the observed tensor has."""
    sizes = candidate.detach().abs().flatten()
    # The rank of every entry; a count that differs by row is no shape, so nothing is sliced.
    ranks = sizes.argsort(descending=True).argsort()
    kept = (ranks < (observed != 0).sum()).to(candidate.dtype)
    return candidate * kept.view(candidate.shape)


def _norm(values: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([v.square().sum() for v in values.values()]).sum().add(1e-30).sqrt()
