"""Grokking at the Edge of Numerical Stability: StableMax and perpGrad.

Prieto, Barsbey, Mediano and Birdal, ICLR 2025, arXiv 2501.04697. After the training data are fitted, the cross entropy
without regularisation falls mostly by growing the logits along the weights as they are (naive loss minimisation). That
delays generalisation and ends in softmax collapse: in the working precision

    sum_k exp(z_k - max z) = 1     exactly, and the loss and the gradient of that sample are 0

Two remedies. StableMax, a softmax whose s grows slowly, never collapses:

    p_i = s(z_i) / sum_k s(z_k),   s(z) = z + 1 for z >= 0,  1 / (1 - z) for z < 0

perpGrad removes what points along the weights from the gradient, tensor by tensor, before any optimizer:

    g_perp = g - (w.g / w.w) w                     eq. 12
    g_perp <- g_perp ||g|| / ||g_perp||            ``variant=as_coded``, the default: the released code keeps the norm

Diagnostics: the share of collapsed training samples, in the precision of the loss (another one hides it), and for each
tensor cos(w, -grad L), which is near 1 where growing the weights is all that descent does.

Controls. ``decay`` is the strong baseline: weight decay 8 at the same learning rate generalises without either
remedy, only later than perpGrad. Public discussion of the released code shows the same at p = 113, so perpGrad is no
win over regularisation but works without any. All arms share Adam's epsilon, 1e-25 as released for the plain arms: a
larger one slows descent once gradients are small, which is another failure than that of precision.

Differences from the released code: epsilon is the same in all arms, where the wrapper of perpGrad drops what it is
given and uses 1e-8; beta_2 is 0.99 for the cross entropy on addition, else 0.999. A tensor of one element, and one
whose gradient is along it up to rounding, get a gradient of 0 rather than rounding noise at full length. Weight decay
is decoupled; coupled decay would come after the projection. The transformer of the paper runs at full scale only. The
order of the full batch, hence rounding, differs from epoch to epoch, as released.

Many clients: both remedies are local. The projection is along the client's current weights; Adam's moments stay with
the client. Averaging drifted clients shrinks norms, which acts like decay; perp-SGD steps can only grow them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras
from flowerbed.clients.training import Hooks
from flowerbed.errors import require
from flowerbed.models.parts import ModelParts
from flowerbed.models.softmax import LOSSES, collapsed, dtype_of
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

COLLAPSED = "collapsed"
NOISE = 16
"""What is below this many units of rounding of ||g|| is no direction."""


@dataclass(frozen=True)
class StabilityParams(FedAvgParams):
    """What the loss is, how exactly it is computed, and which gradient moves."""

    loss: str = "ce"
    """ce or stablemax."""
    precision: str = "float32"
    """Of logits and loss: float16, float32 or float64; weights and network keep theirs."""
    gradient: str = "plain"
    """plain or perp."""
    variant: str = "as_coded"
    """perpGrad: as_coded (rescaled to the norm of g) or paper (eq. 12 as it stands)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        dtype_of(self.precision)
        for name, choices in (
            ("loss", tuple(LOSSES)),
            ("gradient", ("plain", "perp")),
            ("variant", ("as_coded", "paper")),
        ):
            given = getattr(self, name)
            require(given in choices, f"strategy.{name} is '{given}'; choose from {', '.join(choices)}.")


def perpendicular(g: Tensor, w: Tensor, keep_norm: bool) -> Tensor:
    """Return g without its part along w, both flattened; 0 where nothing but rounding would be left."""
    along = (w * g).sum() / (w.square().sum() + 1e-30)
    rest = g - along * w
    size, whole = rest.norm(), g.norm()
    if size <= NOISE * torch.finfo(g.dtype).eps * whole:
        return torch.zeros_like(g)
    return rest * (whole / size) if keep_norm else rest


class StabilityHalf(ClientHalf):
    """Another loss, another precision, another gradient; each alone or together."""

    params: StabilityParams

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        outputs, dtype = model(batch["x"]), dtype_of(self.params.precision)
        value = LOSSES[self.params.loss](outputs, batch["y"], dtype)
        right = (outputs.detach().argmax(-1) == batch["y"]).float().mean()
        return value, {COLLAPSED: collapsed(outputs, dtype).float().mean(), "fitted": right}

    def correct(self, gradients: Tensors, parameters: Mapping[str, Tensor], extras: Extras) -> Tensors:
        keep = self.params.variant == "as_coded"
        return {n: perpendicular(g, parameters[n], keep) for n, g in gradients.items()}

    def hooks(self) -> Hooks:
        return super().hooks() if self.params.gradient == "perp" else Hooks()


class Stability(FedAvg):
    """FedAvg over clients that mind their numbers."""

    Params, Half = StabilityParams, StabilityHalf
