"""The settings of what stands between clients and algorithms, as frozen, checked values.

What they mean is in ``flowerbed.strategies.privacy`` and ``flowerbed.clients.byzantine``; importing this module
imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flowerbed.errors import require

MODES = ("none", "central", "local")
SAMPLING = ("fixed-size", "poisson", "none")
NONE, INNER_PRODUCT, BACKDOOR = "none", "inner-product", "backdoor"
ATTACKS = (NONE, "sign-flip", "noise", "scaling", "label-flip", BACKDOOR, INNER_PRODUCT)


@dataclass(frozen=True)
class PrivacyParams:
    """Differential privacy of whole clients; off unless ``mode`` is set."""

    mode: str = "none"
    """none; central: the server clips and adds noise to the mean; local: every client does it to its own update."""
    clip: float = 1.0
    """Largest norm of a client's update over all parameters (C); where adaptive clipping starts."""
    noise: float = 1.0
    """Standard deviation of the noise over the clip norm (z): of the sum (central), of each update (local)."""
    delta: float = 1e-5
    """Failure probability at which epsilon is reported; should be below one over the number of clients."""
    adaptive: bool = False
    """Let the clip norm follow a quantile of the clients' norms (central only)."""
    quantile: float = 0.5
    """Share of clients that shall not be clipped (gamma)."""
    clip_lr: float = 0.2
    """Learning rate of the clip norm (eta_C)."""
    bit_noise: float = 0.0
    """Standard deviation of the noise on the number of unclipped clients (sigma_b); 0 means a cohort / 20."""
    sampling: str = "fixed-size"
    """What accounting assumes of the cohorts (central): fixed-size, which is how they are drawn (neighbours
    replace a client, n is public); poisson, independent draws, a tighter figure that fixed-size draws do not
    strictly earn (neighbours add or remove a client); none, no amplification by sampling (neighbours zero a
    client's update)."""
    allow_buffers: bool = False
    """Accept that BatchNorm statistics leave the clients without any protection."""

    def __post_init__(self) -> None:
        require(self.mode in MODES, f"privacy.mode is '{self.mode}'; choose from {', '.join(MODES)}.")
        require(
            math.isfinite(self.clip) and self.clip > 0,
            f"privacy.clip is {self.clip}; give a finite norm above 0.",
        )
        require(
            math.isfinite(self.noise) and self.noise >= 0,
            f"privacy.noise is {self.noise}; give a finite number, 0 (clipping only) or more.",
        )
        require(0 < self.delta < 1, f"privacy.delta is {self.delta}; give a probability between 0 and 1.")
        require(
            not self.adaptive or self.mode == "central",
            "privacy.adaptive needs privacy.mode=central: the server sees no norms otherwise.",
        )
        require(0 < self.quantile < 1, f"privacy.quantile is {self.quantile}; give a share between 0 and 1.")
        require(
            math.isfinite(self.clip_lr) and self.clip_lr > 0,
            f"privacy.clip_lr is {self.clip_lr}; give a finite number above 0.",
        )
        require(
            math.isfinite(self.bit_noise) and self.bit_noise >= 0,
            f"privacy.bit_noise is {self.bit_noise}; give 0 (a cohort / 20) or more.",
        )
        require(
            self.sampling in SAMPLING,
            f"privacy.sampling is '{self.sampling}'; choose from {', '.join(SAMPLING)}.",
        )


@dataclass(frozen=True)
class ByzantineParams:
    """Which clients are dishonest, and what they do."""

    attack: str = NONE
    """none, sign-flip, noise, scaling, label-flip, backdoor or inner-product."""
    fraction: float = 0.0
    """Share of the clients that is byzantine, drawn by the run's seed; rounded to whole clients."""
    clients: Sequence[int] = ()
    """The byzantine clients by number, instead of ``fraction``."""
    scale: float = 1.0
    """What the dishonest update is multiplied by (s); the standard deviation of noise."""
    target: int = 0
    """Class that the backdoor turns images into."""
    poison: float = 0.5
    """Share of a backdoor client's images that carry the trigger."""
    trigger: int = 2
    """Side of the backdoor's trigger in pixels: a bright square in the lower right corner."""

    def __post_init__(self) -> None:
        require(
            self.attack in ATTACKS, f"byzantine.attack is '{self.attack}'; choose from {', '.join(ATTACKS)}."
        )
        require(0 <= self.fraction <= 1, f"byzantine.fraction is {self.fraction}; give a share in [0, 1].")
        require(
            not (self.fraction and len(self.clients)),
            "byzantine.fraction and byzantine.clients both say who is byzantine; give one of them.",
        )
        require(
            self.attack != NONE or not (self.fraction or len(self.clients)),
            "byzantine clients without a byzantine.attack would be honest; choose an attack.",
        )
        require(
            len(set(self.clients)) == len(self.clients),
            f"byzantine.clients {list(self.clients)} repeats one.",
        )
        require(
            math.isfinite(self.scale) and self.scale >= 0,
            f"byzantine.scale is {self.scale}; give a finite number, 0 or more.",
        )
        require(self.target >= 0, f"byzantine.target is {self.target}; give a class number.")
        require(0 < self.poison <= 1, f"byzantine.poison is {self.poison}; give a share in (0, 1].")
        require(self.trigger >= 1, f"byzantine.trigger is {self.trigger}; give at least 1 pixel.")


@dataclass(frozen=True)
class SecureParams:
    """Secure aggregation: the server sees the mean of the updates, not the updates."""

    enabled: bool = False
    neighbours: int = 0
    """Clients with which each one shares masks and secrets (k), an even number; 0 means all."""
    threshold: float = 0.67
    """Share of the neighbours that must answer so that a client's masks can be removed (t / k)."""
    clip: float = 4.0
    """Largest size of a coordinate of an update; beyond it is clipped, see the metric ``secure-clipped``."""
    bits: int = 22
    """Bits to which a coordinate is rounded."""

    def __post_init__(self) -> None:
        require(
            self.neighbours >= 0 and self.neighbours % 2 == 0,
            f"secure.neighbours is {self.neighbours}; give an even number, or 0 for all.",
        )
        require(
            0.5 < self.threshold <= 1,
            f"secure.threshold is {self.threshold}; give a share above 0.5 (else two halves of the neighbours could "
            "be told different things) and at most 1.",
        )
        require(
            math.isfinite(self.clip) and self.clip > 0,
            f"secure.clip is {self.clip}; give a finite size above 0.",
        )
        require(1 <= self.bits <= 30, f"secure.bits is {self.bits}; give a number between 1 and 30.")
