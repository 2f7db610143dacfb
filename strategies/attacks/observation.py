"""What a server sees of one client in one round, what else an attacker may know, and the gradient that follows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowerbed.clients.params import LocalParams
from flowerbed.datasets.augment import PIXELS, Scale
from flowerbed.errors import CheckpointError, ConfigError
from flowerbed.models.base import ModelSpec, parameter_names
from flowerbed.storage import Tensors, atomic_write, load_groups, save_groups

SENT, RETURNED = "sent", "returned"
NORMALISATIONS = ("eval", "train")
COHORT = -1
"""Stands for the client where a whole cohort was observed, as its mean."""
Gradient = dict[str, Tensor]
"""Named tensors shaped like the model's trainable parameters."""


@dataclass(frozen=True)
class Observation:
    """One exchange with one client, or the mean of those with a cohort, from the server's side."""

    client: int
    """The client's number in a simulation, or its node id; ``COHORT`` for a mean."""
    round: int
    """From 1."""
    model: ModelSpec
    sent: Tensors
    """Parameters and buffers that went out."""
    returned: Tensors
    """Those that came back, by the same names; what stayed at the client is missing."""
    examples: int | None = None
    """The number of training samples that the client told; of a cohort, of all together."""
    members: tuple[int, ...] = ()
    """The cohort whose mean ``returned`` is; () for a single client."""

    @property
    def who(self) -> str:
        """What sent it, for messages."""
        return f"the cohort of {len(self.members)}" if self.members else f"client {self.client}"

    def save(self, stem: Path) -> None:
        """Write ``stem``.safetensors (the tensors) and ``stem``.json (the rest)."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        save_groups(_suffixed(stem, ".safetensors"), {SENT: self.sent, RETURNED: self.returned})
        # The weights' file is of another machine, and what it held was sent.
        model = {key: value for key, value in asdict(self.model).items() if key != "weights"}
        told: dict[str, Any] = {
            "client": self.client,
            "round": self.round,
            "examples": self.examples,
            "model": model,
        }
        if self.members:
            told["members"] = list(self.members)
        atomic_write(_suffixed(stem, ".json"), (json.dumps(told, indent=1) + "\n").encode())

    @classmethod
    def load(cls, stem: Path) -> Observation:
        """Read what ``save`` wrote; raises ``CheckpointError`` if it is damaged."""
        try:
            told = json.loads(_suffixed(stem, ".json").read_text())
            model = ModelSpec(**{**told["model"], "input_shape": tuple(told["model"]["input_shape"])})
            groups = load_groups(_suffixed(stem, ".safetensors"))
            members = tuple(told.get("members", ()))
            return cls(
                told["client"],
                told["round"],
                model,
                groups[SENT],
                groups[RETURNED],
                told["examples"],
                members,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"The observation {stem} cannot be read ({error!r}).") from error

    def module(self) -> nn.Module:
        """Return the model as it was sent.

        Raises ``ConfigError`` naming the first tensor that is missing, is of another shape, or is not finite.
        """
        module = self.model.build(0)
        own = module.state_dict()
        who = f"The observation of {self.who} in round {self.round}"
        for name, value in own.items():
            for what, tensors in ((SENT, self.sent), (RETURNED, self.returned)):
                if name not in tensors:
                    if what == RETURNED:
                        continue
                    raise ConfigError(
                        f"{who} has no tensor '{name}', which the model '{self.model.name}' has."
                    )
                if tensors[name].shape != value.shape:
                    raise ConfigError(
                        f"{who} does not fit the model '{self.model.name}': '{name}' was {what} as "
                        f"{tuple(tensors[name].shape)}, the model has {tuple(value.shape)}."
                    )
                if not torch.isfinite(tensors[name]).all():
                    raise ConfigError(f"{who} holds numbers in '{name}' ({what}) that are not finite.")
        strange = sorted((self.sent.keys() | self.returned.keys()) - own.keys())
        if strange:
            raise ConfigError(f"{who} holds '{strange[0]}', which the model '{self.model.name}' lacks.")
        module.load_state_dict(self.sent)
        return module


@dataclass(frozen=True)
class SideInfo:
    """What the threat model grants the attacker beside the observation; None is what it does not know."""

    local: LocalParams | None = None
    """How clients train."""
    rounds: int | None = None
    """Rounds of the run, which some learning-rate schedules depend on."""
    batch: int | None = None
    """Samples behind one gradient, where the client did not tell."""
    labels: Tensor | None = None
    """int64 ``(B,)``, where labels are given."""
    scale: Scale = PIXELS
    """How the model's inputs relate to pixels in [0, 1]."""
    normalisation: str = "eval"
    """How normalisation layers ran at the client: eval (the buffers that were sent), train (the batch's own)."""
    surrogate: Tensor | None = None
    """Public inputs ``(N, ...)`` as the model takes them; noise stands in where there are none."""

    def __post_init__(self) -> None:
        if self.normalisation not in NORMALISATIONS:
            raise ConfigError(
                f"normalisation is '{self.normalisation}'; choose from {', '.join(NORMALISATIONS)}."
            )

    def demand(self, attack: str, *names: str) -> None:
        """Raise ``ConfigError`` naming what ``attack`` needs and the threat model does not grant."""
        known = {f.name for f in fields(self)}
        assert known.issuperset(names), names
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise ConfigError(
                f"The attack '{attack}' needs to know {' and '.join(missing)}; grant it in the side information, "
                "or choose another attack."
            )


@dataclass(frozen=True)
class Reconstruction:
    """What an attack says that the client had."""

    x: Tensor
    """float32 ``(B, ...)``, as the model takes it."""
    labels: Tensor
    """int64 ``(B,)``."""
    cost: float
    """What it was chosen by: visible to the attacker, 0 for a perfect explanation of the update."""
    evaluations: int = 0
    """Gradients of the victim's model that were computed for it, over all restarts."""
    seconds: float = 0.0
    curve: tuple[float, ...] = ()
    """The cost of the chosen restart on the way."""
    found: Mapping[str, Any] = field(default_factory=dict)
    """Anything else that an attack has to say, for example which rows an analytic one read."""


def batch_size(observation: Observation, side: SideInfo) -> int:
    """Return B, the samples behind the observed gradient; raises ``ConfigError`` if nobody told."""
    size, local = side.batch or observation.examples, side.local
    if not size:
        raise ConfigError(
            f"Nobody told how many samples are behind the update of {observation.who}; give batch=N."
        )
    if side.batch is None and local is not None and local.steps == 1 and local.batch_size:
        # A cohort's clients send a batch each; who has fewer samples than that is not told apart.
        return min(local.batch_size * max(1, len(observation.members)), size)
    return size


def why_inexact(observation: Observation, side: SideInfo) -> str | None:
    """Return why the observed difference is not one gradient times a known factor; None if it is."""
    local = side.local
    if local is None:
        return "the attacker does not know how clients train"
    if local.optimizer != "sgd":
        return f"a step of {local.optimizer} is no multiple of the gradient"
    if local.clip_norm:
        return "gradients were clipped (local.clip_norm)"
    if local.persist and local.momentum and observation.round > 1:
        return "momentum was carried over from earlier rounds (local.persist)"
    if local.lr == 0:
        return "the learning rate was 0"
    if observation.examples is None and not (local.steps == 1 or local.batch_size == 0):
        return "nobody told how many samples the client has, hence how many steps it made"
    # Of a cohort, an average client's.
    steps = local.steps_per_round(-(-(observation.examples or 1) // max(1, len(observation.members))))
    if steps > 1:
        return f"the client made {steps} steps"
    if local.schedule == "cosine" and side.rounds is None:
        return "the learning rate depends on the number of rounds, which the attacker does not know"
    return None


def gradient_of(observation: Observation, side: SideInfo) -> Gradient:
    """Return the gradient of the client's mean loss at the parameters that were sent.

    One plain step moves them by ``lr (g + weight_decay w)``, with Nesterov's momentum by ``(1 + momentum)`` times
    that, so the gradient follows but for rounding. Parameters that did not come back are left out. Raises
    ``ConfigError`` where the difference is no such step, or is 0 in every entry.
    """
    reason = why_inexact(observation, side)
    if reason is not None:
        raise ConfigError(
            f"The update of {observation.who} is no single gradient: {reason}. Use an attack that imitates "
            "the local steps."
        )
    local = side.local
    assert local is not None
    lr = local.lr_at(observation.round - 1, 1, side.rounds or observation.round)
    factor = lr * (1 + local.momentum if local.nesterov else 1)
    found = {}
    for name in parameter_names(observation.module()):
        if name in observation.returned:
            moved = observation.sent[name].double() - observation.returned[name].double()
            gradient = moved / factor - local.weight_decay * observation.sent[name].double()
            found[name] = gradient.to(observation.sent[name].dtype)
    if not any(bool(value.any()) for value in found.values()):
        raise ConfigError(f"The update of {observation.who} is 0 everywhere; it tells nothing.")
    return found


def _suffixed(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)
