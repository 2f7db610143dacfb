"""FedAvg with a tau-normalised head: the data-free control for long-tailed methods.

Reference: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020,
section 4.1, equation (2).

Training is FedAvg's, bit for bit. The model that is evaluated and delivered has W_c / ||W_c||^tau in place of
each row W_c of its linear head; training goes on with the original one. The common length of the rows matters
beside a bias alone: ``scale=1.7 keep_bias=true`` is the realignment of FedLoGe on FedAvg's model.

The rows of frequent classes grow longest, which biases the prediction towards them; tau = 1 makes all lengths
equal, tau = 0 changes nothing. The released code leaves the bias out (``keep_bias=false``) and tries tau from
0 to 2.

Evaluated is the renormalised model, on the server and by the clients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flowerbed.errors import require
from flowerbed.storage import Tensors
from flowerbed.strategies.base import STRATEGIES, Setting
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams
from flowerbed.strategies.heads import linear_head


@dataclass(frozen=True)
class TauNormParams(FedAvgParams):
    """FedAvg's parameters and those of the renormalisation."""

    tau: float = 1.0
    """Power of the norm that each row is divided by."""
    keep_bias: bool = False
    """Keep the head's bias; otherwise it is zero in the delivered model."""
    scale: float = 1.0
    """Factor of all rows after that."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tau >= 0, f"strategy.tau is {self.tau}; give 0 (keep the rows) or more.")
        require(self.scale > 0, f"strategy.scale is {self.scale}; give a number above 0.")


def tau_normalised(weight: torch.Tensor, tau: float) -> torch.Tensor:
    """Return the rows of ``weight`` ``(C, D)`` divided by their norm to the power tau; zero rows stay zero."""
    norms = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    return weight / torch.where(norms > 0, norms, 1.0).pow(tau)


@STRATEGIES.register("tau_norm")
class TauNorm(FedAvg):
    """FedAvg that delivers a renormalised head."""

    Params = TauNormParams
    params: TauNormParams

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        self._weight, self._bias = linear_head(setting, "tau-normalisation")

    def deliver(self, model: Tensors) -> Tensors:
        head = {self._weight: self.params.scale * tau_normalised(model[self._weight], self.params.tau)}
        if self._bias is not None and not self.params.keep_bias:
            head[self._bias] = torch.zeros_like(model[self._bias])
        return {**model, **head}
