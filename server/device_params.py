"""What a run makes of devices that differ: how much they train, what they send, and which of them are asked."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowerbed.errors import require

NONE = "none"
COMPRESSIONS = (NONE, "top-k", "int8", "top-k-int8")
WORK = ("full", "speed")


@dataclass(frozen=True)
class DeviceParams:
    """Rules over the devices' capabilities. Real ones report theirs; those of simulated ones are drawn here."""

    work: str = "full"
    """full: every client makes all steps of its round; speed: a client of speed below 1 makes that share of them, the
    first ones (partial work as in FedProx; FedNova weighs it rightly, FedAvg does not)."""
    least_work: float = 0.1
    """Smallest share of a round's steps."""
    compression: str = NONE
    """How updates travel to the server: none; top-k, the largest numbers; int8, all in 8 bits; top-k-int8."""
    keep: float = 0.1
    """Share of the numbers that top-k sends (k / d)."""
    feedback: bool = True
    """Whether a client keeps what compression left out for its next update (error feedback)."""
    streams: tuple[str, ...] = ("arrays",)
    """What is compressed: arrays, the model; other names are streams whose values are changes (SCAFFOLD's control)."""
    slow_mbit: float = 0.0
    """Upload bandwidth in Mbit/s below which a client compresses; 0 means that every client does."""
    reply_mb: float = 0.0
    """Largest reply that is accepted, in MB; 0 means no limit."""
    quota_mb: float = 0.0
    """MB of replies that one client may send in a run (counted since the server's process started); 0: no limit."""
    deadline: float = 0.0
    """Seconds within which a round is expected to end; federation.sampling=able asks no client that needs longer, by
    its speed, its bandwidth and its steps. 0 means no limit."""
    step_seconds: float = 0.01
    """Seconds that a device of speed 1 needs for a step, for that estimate."""
    ram_mb: int = 0
    """Memory that a client must have; federation.sampling=able asks no other."""
    weak: float = 0.0
    """Share of simulated clients that are weak, drawn by the run's seed; the others have speed 1 and all else ample."""
    weak_speed: float = 0.25
    """Speed of weak simulated clients."""
    weak_mbit: float = 1.0
    """Upload bandwidth of weak simulated clients in Mbit/s."""
    weak_ram_mb: int = 512
    """Memory of weak simulated clients in MB."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "streams", tuple(self.streams))
        require(self.work in WORK, f"devices.work is '{self.work}'; choose from {', '.join(WORK)}.")
        require(
            0 < self.least_work <= 1,
            f"devices.least_work is {self.least_work}; give a share above 0, at most 1.",
        )
        require(
            self.compression in COMPRESSIONS,
            f"devices.compression is '{self.compression}'; choose from {', '.join(COMPRESSIONS)}.",
        )
        require(0 < self.keep <= 1, f"devices.keep is {self.keep}; give a share above 0, at most 1.")
        require(
            bool(self.streams) or self.compression == NONE,
            "devices.streams is empty, so that devices.compression compresses nothing; name arrays.",
        )
        for name in ("slow_mbit", "reply_mb", "quota_mb", "deadline", "ram_mb"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, f"devices.{name} is {value}; give 0 (off) or more.")
        for name in ("step_seconds", "weak_speed", "weak_mbit", "weak_ram_mb"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, f"devices.{name} is {value}; give a number above 0.")
        require(0 <= self.weak <= 1, f"devices.weak is {self.weak}; give a share between 0 and 1.")

    @property
    def top_k(self) -> float:
        """The share of the numbers that travels."""
        return self.keep if self.compression.startswith("top-k") else 1.0

    @property
    def bits(self) -> int:
        """The bits of a number that travels."""
        return 8 if self.compression.endswith("int8") else 32

    @property
    def acts(self) -> bool:
        """Whether messages or replies are any different for these rules."""
        return bool(self.work != "full" or self.compression != NONE or self.reply_mb or self.quota_mb)
