"""The server's learning rate over the rounds of a run; shared by every strategy that has one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowerbed.errors import require

SCHEDULES = ("constant", "cosine", "exponential")


@dataclass(frozen=True)
class ServerRate:
    """eta_s as a function of the round; parameter classes inherit it."""

    server_lr: float = 1.0
    """eta_s in the first round."""
    server_schedule: str = "constant"
    """constant; cosine (to zero after the last round); exponential (times ``server_lr_decay`` at each step)."""
    server_lr_decay: float = 1.0
    """Factor of the exponential schedule."""
    server_decay_every: int = 1
    """Rounds between two steps of the exponential schedule; above 1 it is a staircase."""

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.server_lr) and self.server_lr > 0,
            f"strategy.server_lr is {self.server_lr}; give a finite number above 0.",
        )
        require(
            self.server_schedule in SCHEDULES,
            f"strategy.server_schedule is '{self.server_schedule}'; choose from {', '.join(SCHEDULES)}.",
        )
        require(
            self.server_lr_decay > 0,
            f"strategy.server_lr_decay is {self.server_lr_decay}; give a number above 0.",
        )
        require(
            self.server_decay_every >= 1,
            f"strategy.server_decay_every is {self.server_decay_every}; give at least 1.",
        )

    def server_lr_at(self, server_round: int, rounds: int) -> float:
        """Return eta_s in ``server_round`` (from 1) of a run of ``rounds`` rounds.

        Raises ``ConfigError`` for a cosine schedule without end (``rounds`` is 0).
        """
        if self.server_schedule == "cosine":
            require(
                rounds > 0,
                "strategy.server_schedule is 'cosine', which ends with the run, but the number of rounds is "
                "unknown; call setup() before the run, or choose another schedule.",
            )
            return 0.5 * self.server_lr * (1 + math.cos(math.pi * min(server_round - 1, rounds) / rounds))
        if self.server_schedule == "exponential":
            return float(
                self.server_lr * self.server_lr_decay ** ((server_round - 1) // self.server_decay_every)
            )
        return self.server_lr
