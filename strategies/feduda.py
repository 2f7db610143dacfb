"""FedAvg with UDA at the clients: sharpened soft pseudo-labels across weak and strong views.

References: Xie et al., "Unsupervised Data Augmentation for Consistency Training", NeurIPS 2020, equation (1) and
section 3.2 (confidence mask, sharpening); server: McMahan et al. 2017.

Client k, on B labelled and mu B unlabelled samples u_b at every step, z_b = f(weak(u_b)):

    L_u = 1 / (mu B)  sum_b  1[max softmax(z_b) >= tau]  KL( softmax(z_b / T) || softmax f(strong(u_b)) )

    L   = L_s + lambda_u L_u

The target is a constant. Defaults are the paper's for CIFAR-10 (T 0.4, tau 0.8, which it calls beta, lambda_u 1)
with FixMatch's mu. The mask uses the unsharpened confidence, as released.

Deviations: the weak view is ``local.augment`` (the paper: the plain image); training signal annealing, which drops
confident labelled samples early on, is left out; its samples are those without a label. For BatchNorm see
``fedfixmatch``. Identical views and T = 1 give L_u = 0 exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flowerbed.errors import require
from flowerbed.strategies.base import STRATEGIES
from flowerbed.strategies.semi_supervised import ConsistencyHalf, ConsistencyParams, PseudoLabelFedAvg


@dataclass(frozen=True)
class FedUDAParams(ConsistencyParams):
    """Those of the joint loss, and the sharpening."""

    tau: float = 0.8
    """Confidence from which a soft pseudo-label is used; above 1 none is."""
    T: float = 0.4
    """Temperature of the target; below 1 sharpens it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.T > 0, f"strategy.T is {self.T}; give a number above 0.")


class FedUDAHalf(ConsistencyHalf):
    """The strong view learns the sharpened distribution of the weak view."""

    params: FedUDAParams

    def unlabelled_loss(self, weak: Tensor, strong: Tensor) -> Tensor:
        target = (weak / self.params.T).log_softmax(-1)
        return (target.exp() * (target - strong.log_softmax(-1))).sum(-1)


@STRATEGIES.register("feduda")
class FedUDA(PseudoLabelFedAvg):
    """FedAvg on the clients' models."""

    Params = FedUDAParams
    Half = FedUDAHalf
    params: FedUDAParams
