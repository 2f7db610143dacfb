"""What a client does in one local round, as one frozen, checked value."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowerbed.errors import require

OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop")
ENGINES = ("strict", "fast")
PRECISIONS = ("float32", "bfloat16")
SCHEDULES = ("constant", "cosine", "exponential", "multistep")
ENDS_WITH_THE_RUN = ("cosine", "multistep")
"""Schedules that depend on the number of rounds of the run."""


@dataclass(frozen=True)
class LocalParams:
    """The local training of one round.

    The local clock counts optimizer steps from the start of the *run*, also for rounds in which the client
    was not asked: round ``t`` covers the steps ``[(t - 1) S, t S)`` with ``S`` steps a round. Data order and
    learning rate are functions of that clock alone, so R rounds of E epochs visit the same batches at the
    same learning rates as R*E central epochs.
    """

    epochs: int = 1
    """Passes over the client's data in one round (E in McMahan et al. 2017)."""
    steps: int = 0
    """Optimizer steps in one round; 0 means that ``epochs`` decides."""
    batch_size: int = 32
    """Samples a step (B); 0 means the whole client data at once."""
    drop_last: bool = False
    """Leave out the last, smaller batch of an epoch (never the only one)."""
    replacement: bool = False
    """Draw every sample of every step independently, with replacement, instead of going through a permutation; all
    batches then have ``batch_size`` samples, and an epoch is but a number of steps."""
    optimizer: str = "sgd"
    """sgd, adam, adamw or rmsprop, as in ``torch.optim``."""
    lr: float = 0.1
    """Learning rate at the first step."""
    momentum: float = 0.0
    """Heavy-ball momentum (sgd, rmsprop) or beta_1 (adam, adamw; 0 means torch's 0.9)."""
    nesterov: bool = False
    beta2: float = 0.999
    """beta_2 of adam and adamw, the memory of squared gradients."""
    eps: float = 1e-8
    """Added to the denominator of adam, adamw and rmsprop, as in ``torch.optim``."""
    weight_decay: float = 0.0
    schedule: str = "constant"
    """constant; cosine (to zero at the end of the run, per step); exponential (``lr * lr_decay**(t - 1)``);
    multistep (times ``lr_decay`` at every milestone)."""
    lr_decay: float = 1.0
    """Factor a round of the exponential schedule, or a milestone of the multistep one."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Shares of the run's steps after which the multistep schedule lowers the learning rate."""
    clip_norm: float = 0.0
    """Largest gradient norm of a step; 0 means no clipping."""
    persist: bool = False
    """Keep optimizer state and module generators across rounds (makes one client equal a central run)."""
    augment: str = "none"
    """Name of a batch augmentation, see ``flowerbed.datasets.augment``."""
    engine: str = "strict"
    """strict: a client's steps are a plain PyTorch loop to the bit. fast, on CPUs, for losses that are the task's own:
    large dense layers and dropout are computed another way (``flowerbed.clients.engine_fast``); a round's update
    then differs by rounding, about 1e-5 of its length, and dropout draws other masks."""
    precision: str = "float32"
    """bfloat16: local steps compute the model in that type, by autocast; weights, losses and updates stay float32."""

    def __post_init__(self) -> None:
        require(self.epochs >= 1, f"local.epochs is {self.epochs}; give at least 1.")
        require(self.steps >= 0, f"local.steps is {self.steps}; give 0 (let epochs decide) or more.")
        require(self.batch_size >= 0, f"local.batch_size is {self.batch_size}; give 0 (all data) or more.")
        require(
            self.optimizer in OPTIMIZERS,
            f"local.optimizer is '{self.optimizer}'; choose from {', '.join(OPTIMIZERS)}.",
        )
        require(
            self.engine in ENGINES,
            f"local.engine is '{self.engine}'; choose from {', '.join(ENGINES)}.",
        )
        require(
            self.precision in PRECISIONS,
            f"local.precision is '{self.precision}'; choose from {', '.join(PRECISIONS)}.",
        )
        require(
            self.schedule in SCHEDULES,
            f"local.schedule is '{self.schedule}'; choose from {', '.join(SCHEDULES)}.",
        )
        require(
            math.isfinite(self.lr) and self.lr >= 0,
            f"local.lr is {self.lr}; give a finite number that is not negative.",
        )
        require(0 <= self.momentum < 1, f"local.momentum is {self.momentum}; give a number in [0, 1).")
        require(
            not self.nesterov or (self.optimizer == "sgd" and self.momentum > 0),
            "local.nesterov needs local.optimizer=sgd and a local.momentum above 0.",
        )
        require(self.weight_decay >= 0, f"local.weight_decay is {self.weight_decay}; give 0 or more.")
        require(0 < self.beta2 < 1, f"local.beta2 is {self.beta2}; give a number in (0, 1).")
        require(math.isfinite(self.eps) and self.eps > 0, f"local.eps is {self.eps}; give a number above 0.")
        require(self.clip_norm >= 0, f"local.clip_norm is {self.clip_norm}; give 0 (off) or more.")
        require(self.lr_decay > 0, f"local.lr_decay is {self.lr_decay}; give a number above 0.")
        object.__setattr__(self, "milestones", tuple(self.milestones))
        require(
            all(0 < share < 1 for share in self.milestones),
            f"local.milestones is {list(self.milestones)}; give shares of the run between 0 and 1.",
        )

    def batches_per_epoch(self, examples: int) -> int:
        """Return how many steps one pass over ``examples`` samples takes."""
        size = self.batch_size or examples
        if self.drop_last:
            return max(1, examples // size)
        return math.ceil(examples / size)

    def steps_per_round(self, examples: int) -> int:
        """Return S, the optimizer steps of one round for a client with ``examples`` samples."""
        return self.steps or self.epochs * self.batches_per_epoch(examples)

    def lr_at(self, step: int, steps_per_round: int, rounds: int) -> float:
        """Return the learning rate at clock ``step`` of a run of ``rounds`` rounds."""
        if self.schedule == "cosine":
            return 0.5 * self.lr * (1 + math.cos(math.pi * step / (steps_per_round * rounds)))
        if self.schedule == "exponential":
            return float(self.lr * self.lr_decay ** (step // steps_per_round))
        if self.schedule == "multistep":
            # Rounded, so that a share such as 0.7 of 10 steps ends with the seventh.
            ends = (round(share * steps_per_round * rounds) for share in self.milestones)
            return float(self.lr * self.lr_decay ** sum(step >= end for end in ends))
        return self.lr
