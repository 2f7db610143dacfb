"""The Implicit Regularization of Dynamical Stability in Stochastic Gradient Descent.

Wu and Su, ICML 2023, arXiv 2305.17490. At which minima of zero loss can an optimizer stay? With the loss
L(theta) = 1/(2n) sum_i (f(x_i; theta) - y_i)^2, g_i the gradient of f(x_i; .) at a minimum theta*, and
d = theta - theta*, SGD with one sample a step, drawn uniformly with replacement, is to first order

    d_{t+1} = d_t - eta g_xi (g_xi . d_t)

and its second moment S_t = E d d^T obeys, with G = (1/n) sum_i g_i g_i^T, which is the Hessian there,

    T(S) = S - eta (G S + S G) + eta^2 (1/n) sum_i g_i (g_i^T S g_i) g_i^T.

Stable in mean square (spectral radius of T at most 1)  =>  tr G <= 2 / eta.  GD: stable <=> lambda_max(G) <= 2 / eta.
With B samples a step:  (1 - 1/B) tr G^2 + (1/B) (tr G)^2 <= (2 / eta) tr G, between the two.

What the trace controls. Diagonal linear network f(x) = <a * b, x>, beta = a * b:
tr G = sum_j (a_j^2 + b_j^2) mean_i x_ij^2 >= 2 E[x^2] |beta|_1. Two layers f(x) = sum_j a_j relu(w_j . x), x on the
sphere of radius sqrt(d): tr G = 1/2 sum_j (|w_j|^2 + d a_j^2) >= sqrt(d) sum_j |a_j| |w_j|, sqrt(d) times the path
norm. Equal iff the layers are balanced. So SGD with a large rate is forced to simple solutions, and GD, which minds one
eigenvalue only, is not.

Escape: start 1e-6 from a minimum with the rate c 2 / tr G. The exact critical rate is where the spectral radius of T is
1: eta_c = min_S <S, G S + S G> / <S, M(S)> with M the last sum of T, found in the coordinates that the n x n Gram
matrix gives.

Controls. GD from the same start with the same rates; GD with a small start, which is sparse without any noise, so the
starts here are large; SGD through permutations in place of independent draws. Rates are constant and there is no
momentum: the bound is about the rate at the end. It holds at zero loss only, so the claims ask for that as well.

There is no released code to differ from. Gradients are clipped at 100, so that the first steps with the largest rates
survive (whether the authors clip is unknown), except in the escape. The test error is relative: the mean square error
over the mean square of the target. The bound for B samples is ours, by the paper's argument.

Many clients: a round of one step of one sample on each of N clients is a step with B = N samples, so more clients a
round loosen the bound. With several steps T acts with each client's own G. Clients may report tr G of their own data
(``report``); weighted by their samples, the mean is that of all data exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flowerbed import seeds
from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound, Reply
from flowerbed.datasets.regression import TARGET
from flowerbed.errors import require
from flowerbed.models.curvature import flat, output_gradients, power_iteration
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors
from flowerbed.strategies.base import Phase
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

CHUNK = 64
"""Samples whose gradients are computed at a time."""


@dataclass(frozen=True)
class StabilityParams(FedAvgParams):
    """How training starts, and at which rate."""

    c: float = 0.0
    """The learning rate in units of 2 / tr G at the run's initial model, on the client's data; 0 means local.lr."""
    perturbation: float = 0.0
    """Length of the random displacement of the initial model, before the first round."""
    report: bool = False
    """Whether clients report tr G of their own data at the model that they receive, as the metric ``own-trace``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.c >= 0, f"strategy.c is {self.c}; give 0 (use local.lr) or more.")
        require(self.perturbation >= 0, f"strategy.perturbation is {self.perturbation}; give 0 or more.")


class StabilityHalf(ClientHalf):
    """Trains on half the square loss."""

    params: StabilityParams

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        outputs = model(batch["x"])
        return 0.5 * (outputs - batch[TARGET].to(outputs.dtype)).square().mean(), {}

    def run(self, local: LocalRound) -> Reply:
        further = {"own-trace": trace_of(local.model, local.train_data.x)} if self.params.report else {}
        if self.params.c:
            received = local.received_model()
            local.load(local.open_initial())
            lr = self.params.c * 2 / trace_of(local.model, local.train_data.x)
            local.load(received)
            local.local = replace(local.local, lr=lr)
        reply = super().run(local)
        return replace(reply, metrics={**reply.metrics, **further})


class Stability(FedAvg):
    """FedAvg from a model that may be displaced."""

    Params = StabilityParams
    Half = StabilityHalf
    params: StabilityParams

    def start_phase(self, phase: Phase, model: Tensors) -> Tensors:
        if not self.params.perturbation:
            return model
        rng = seeds.torch_rng(self.setting.seed if self.setting else 0, "displacement")
        moving = self.parameters(model)
        drawn = {
            n: torch.randn(v.shape, generator=rng, dtype=v.dtype) for n, v in model.items() if n in moving
        }
        scale = self.params.perturbation / torch.linalg.vector_norm(flat(drawn))
        return {n: v + scale * drawn[n] if n in drawn else v for n, v in model.items()}


def trace_of(model: nn.Module, x: Tensor) -> float:
    """Return tr G on the inputs ``x``: the mean squared length of the output's gradients."""
    return float(output_gradients(model, x, CHUNK).double().square().sum(1).mean())


def coordinates(matrix: Tensor) -> Tensor:
    """Return the n gradients in an orthonormal basis of their span, ``(n, r)``, given their Gram matrix J J^T / n.

    In it G is diagonal.
    """
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > 1e-12 * values[-1]
    found: Tensor = vectors[:, kept] * (len(matrix) * values[kept]).sqrt()
    return found


def next_moment(rows: Tensor, moment: Tensor, eta: float) -> Tensor:
    """Return T(S), the second moment after a step with the rate eta."""
    g = rows.T @ rows / len(rows)
    return moment - eta * (g @ moment + moment @ g) + eta**2 * pulled(rows, moment)


def critical_rate(matrix: Tensor) -> float:
    """Return eta_c, above which linearised SGD leaves the minimum, given the Gram matrix J J^T / n.

    T is self-adjoint and its largest eigenvalue has a positive semidefinite S, so it is at most 1 iff
    eta <S, M(S)> <= <S, G S + S G> for all S.
    """
    rows = coordinates(matrix)
    g = rows.square().mean(0)
    weight = (g[:, None] + g).sqrt()

    def product(vector: Tensor) -> Tensor:
        return (pulled(rows, vector.view_as(weight) / weight) / weight).flatten()

    value, _ = power_iteration(product, (torch.eye(len(g), dtype=g.dtype) * weight).flatten(), most=100_000)
    return 1 / value


def pulled(rows: Tensor, moment: Tensor) -> Tensor:
    """Return M(S) = (1/n) sum_i g_i (g_i^T S g_i) g_i^T for gradients ``(n, r)`` and S ``(r, r)``."""
    along = torch.einsum("ij,jk,ik->i", rows, moment, rows)
    return rows.T @ (along[:, None] * rows) / len(rows)
