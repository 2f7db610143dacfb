"""FedAvg with FixMatch at the clients: confident hard pseudo-labels across weak and strong views.

References: Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence", NeurIPS
2020, equations (3) and (4); server: McMahan et al. 2017.

Client k, on B labelled and mu B unlabelled samples u_b at every step, q_b = softmax f(weak(u_b)):

    L_u = 1 / (mu B)  sum_b  1[max q_b >= tau]  CE(argmax q_b, f(strong(u_b)))

    L   = L_s + lambda_u L_u

The pseudo-label is a constant: no gradient flows through the weak view. Defaults are the paper's for CIFAR-10 (tau
0.95, mu 7, lambda_u 1; there with batch 64, SGD 0.03, Nesterov momentum 0.9, weight decay 5e-4).

Deviations: unlabelled samples are those whose label is hidden (the paper adds the labelled ones); no average of the
weights over steps is evaluated (the paper: decay 0.999), and no cosine over 7/16 of a period
(``local.schedule``). The three forward passes of a step are separate, so that BatchNorm normalises each view by its
own batch while its running statistics see all of them. tau above 1 trains on the labelled samples alone, with the
weights of ``labels_only`` bit for bit (where every client has a label, and for models without dropout, whose masks
are drawn per pass).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from flowerbed.strategies.base import STRATEGIES
from flowerbed.strategies.semi_supervised import ConsistencyHalf, ConsistencyParams, PseudoLabelFedAvg


class FedFixMatchHalf(ConsistencyHalf):
    """The strong view learns the class that the weak view names."""

    def unlabelled_loss(self, weak: Tensor, strong: Tensor) -> Tensor:
        return F.cross_entropy(strong, weak.argmax(-1), reduction="none")


@STRATEGIES.register("fedfixmatch")
class FedFixMatch(PseudoLabelFedAvg):
    """FedAvg on the clients' models."""

    Params = ConsistencyParams
    Half = FedFixMatchHalf
    params: ConsistencyParams
