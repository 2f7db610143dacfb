"""FedSAM: sharpness-aware minimisation on the clients.

References: Qu et al., "Generalized Federated Learning via Sharpness Aware Minimization", ICML 2022, Algorithm 1;
Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021, equations 2, 3.

Client k, each step, with g the gradient of the batch at w and the norm over all trained parameters:

    e = rho g / ||g||,   w <- w - eta * (gradient of the same batch at w + e)

Server: as in FedAvg. rho = 0 is FedAvg bit for bit; otherwise a step costs two forward and backward passes.

The reported loss is the one at w. Both passes are made in training mode, so BatchNorm's running statistics take
in every batch twice and dropout draws anew in the second pass.

Default: rho = 0.05, as in Foret et al.; the federated papers tune it from 0.01 to 0.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flowerbed.clients.half import ClientHalf
from flowerbed.clients.training import Compute, StepGradients, backpropagate
from flowerbed.errors import require
from flowerbed.strategies.base import STRATEGIES
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class FedSamParams(FedAvgParams):
    """Hyper-parameters of FedSAM."""

    rho: float = 0.05
    """Radius of the neighbourhood whose worst loss is minimised (Euclidean, over all parameters)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rho >= 0, f"strategy.rho is {self.rho}; give 0 (FedAvg) or more.")


class FedSamHalf(ClientHalf):
    """Takes the gradient at the worst point nearby."""

    def estimate(self, compute: Compute, parameters: Mapping[str, Tensor]) -> StepGradients:
        value, metrics, gradients = backpropagate(compute, parameters)
        if not self.params.rho:
            return value, metrics, gradients
        touched = {n: g for n, g in gradients.items() if g is not None}
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in touched.values()]))
        scale = self.params.rho / norm.clamp_min(SMALLEST_NORM)
        before = {n: parameters[n].detach().clone() for n in touched}
        with torch.no_grad():
            for name, gradient in touched.items():
                parameters[name].add_(scale * gradient)
        _, _, gradients = backpropagate(compute, parameters)
        with torch.no_grad():
            for name, w in before.items():
                parameters[name].copy_(w)
        return value, metrics, gradients


@STRATEGIES.register("fedsam")
class FedSam(FedAvg):
    """FedAvg's server."""

    Params = FedSamParams
    Half = FedSamHalf
    params: FedSamParams
