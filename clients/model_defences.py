"""Defences that change what is trained: PRECODE's variational bottleneck.

Reference: Scheliga et al., "PRECODE - A Generic Model Extension to Prevent Deep Gradient Leakage", WACV 2022. Between
the features r and the head stands

    (m, v) = W r + b,    z = m + exp(v / 2) e,  e ~ N(0, I),    r' = W' z + b',

and the loss gains beta KL(N(m, exp v) | N(0, I)), mean over the batch. A server that does not know e cannot repeat the
step. It leaves every layer in front of it as it was: the input of a first linear layer is still its weight's gradient
over its bias's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flowerbed.clients.defence import Defence
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import LocalRound
from flowerbed.clients.params import LocalParams
from flowerbed.datasets.dataset import Dataset
from flowerbed.errors import require
from flowerbed.models.base import ModelSpec
from flowerbed.models.bottleneck import BOTTLENECKED, divergence
from flowerbed.models.parts import ModelParts


@dataclass(frozen=True)
class Precode(Defence):
    """Puts a variational bottleneck between features and head (Scheliga et al. 2022)."""

    size: int = 256
    """Numbers in the bottleneck (k)."""
    beta: float = 1e-3
    """Weight of the divergence from the standard normal distribution in the loss."""

    def __post_init__(self) -> None:
        require(self.size >= 1, f"defence.size is {self.size}; give at least 1.")
        require(self.beta >= 0, f"defence.beta is {self.beta}; give 0 or more.")

    def known(self, local: LocalParams) -> Mapping[str, Any]:
        return {"bottleneck": self.size}

    def model_spec(self, spec: ModelSpec) -> ModelSpec:
        inner = {"base": spec.name, "options": dict(spec.options), "size": self.size, "beta": self.beta}
        return ModelSpec(BOTTLENECKED, spec.input_shape, spec.num_classes, inner)

    def check(self, half: ClientHalf, module: nn.Module, local: LocalParams, dataset: Dataset) -> None:
        require(
            dataset.task == "classification",
            f"defence=precode stands between features and a head of classes; '{dataset.name}' is of another task.",
        )

    def begin(self, local: LocalRound) -> None:
        def term(parts: ModelParts) -> Tensor:
            return divergence(parts.module)

        local.term = term
