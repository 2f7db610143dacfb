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

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flowerbed import seeds
from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound, Reply
from flowerbed.datasets.regression import TARGET
from flowerbed.errors import require
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.measures import Measured
from flowerbed.experiments.parts import build_parts
from flowerbed.experiments.reproduction.central import CentralStep, central_run
from flowerbed.experiments.reproduction.claims import Claim, metric
from flowerbed.experiments.reproduction.engine import Reproduction
from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.experiments.reproduction.paper import Paper
from flowerbed.models.base import Shape, require_at_least_one
from flowerbed.models.curvature import flat, gram, output_gradients, power_iteration, sizes
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors
from flowerbed.strategies.base import Phase
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


class Diagonal(nn.Module):
    """f(x) = <a * b, x>."""

    def __init__(self, d: int, r0: float, scale: float) -> None:
        super().__init__()
        if r0:
            a = torch.randn(d) * math.sqrt(0.1)
            b = torch.randn(d).sign() * (r0 + math.sqrt(r0 * r0 - 1)) * a
        else:
            a, b = torch.randn(d) * scale, torch.randn(d) * scale
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.a.dtype) @ (self.a * self.b)

    def norm(self) -> tuple[Tensor, Tensor]:
        """Return |beta|_1, and r = sum(a^2 + b^2) / (2 |beta|_1), which is 1 where the layers are balanced."""
        size = (self.a * self.b).abs().sum()
        return size, (self.a.square() + self.b.square()).sum() / (2 * size)


class TwoLayer(nn.Module):
    """f(x) = sum_j a_j relu(w_j . x)."""

    def __init__(self, d: int, m: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(m))
        self.w = nn.Parameter(torch.randn(m, d) * d**-0.25)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.relu(x.to(self.a.dtype) @ self.w.T) @ self.a
        return y

    def norm(self) -> tuple[Tensor, Tensor]:
        """Return the path norm sum_j |a_j| |w_j|, and sum(|w|^2 + d a^2) / (2 sqrt(d) path norm)."""
        rows, d = torch.linalg.vector_norm(self.w, dim=1), self.w.shape[1]
        path = (self.a.abs() * rows).sum()
        return path, (rows.square() + d * self.a.square()).sum() / (2 * math.sqrt(d) * path)


def diagonal(
    input_shape: Shape, num_classes: int, *, scale: float = 1.0, r0: float = 0.0, double: bool = False
) -> Diagonal:
    """Return the diagonal network; a, b from N(0, scale^2), or, with ``r0``, of imbalance r = r0.

    Then a is from N(0, 0.1) and b = +-(r0 + sqrt(r0^2 - 1)) a. ``double`` computes in float64.
    """
    require(r0 == 0 or r0 >= 1, f"model.r0 is {r0}; give 1 (balanced) or more, or 0 for independent layers.")
    net = Diagonal(math.prod(input_shape), r0, scale)
    return net.double() if double else net


def two_layer(input_shape: Shape, num_classes: int, *, m: int = 100) -> TwoLayer:
    """Return the two-layer ReLU network of ``m`` units; a from N(0, 1), w from N(0, I / sqrt(d))."""
    require_at_least_one("two_layer", m=m)
    return TwoLayer(math.prod(input_shape), m)


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


def pulled(rows: Tensor, moment: Tensor) -> Tensor:
    """Return M(S) = (1/n) sum_i g_i (g_i^T S g_i) g_i^T for gradients ``(n, r)`` and S ``(r, r)``."""
    along = torch.einsum("ij,jk,ik->i", rows, moment, rows)
    return rows.T @ (along[:, None] * rows) / len(rows)


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


def sharpness(measured: Measured) -> dict[str, float]:
    """Return the loss, the sizes of G on the training inputs, the norm that its trace bounds, and the test error."""
    model, train = measured.model, measured.dataset.train
    outputs, _ = measured.outputs(train)
    said, _ = measured.outputs()
    target = measured.dataset.test.extras[TARGET]
    x = torch.cat(list(measured.batches(train)))
    found = sizes(gram(output_gradients(model, x, CHUNK)).cpu())
    assert isinstance(model, Diagonal | TwoLayer)
    with torch.no_grad():
        norm, imbalance = model.norm()
    return {
        "train-loss": 0.5 * float((outputs.double() - train.extras[TARGET]).square().mean()),
        "trace": found.trace,
        "frobenius": found.frobenius,
        "largest": found.largest,
        "norm": float(norm),
        "imbalance": float(imbalance),
        "test-error": float((said.double() - target).square().mean() / target.square().mean()),
    }


def stability(run: Finished) -> dict[str, float]:
    """Return how far the minimum is inside each bound (1 is its edge), and how far it is from where the run began.

    ``threshold`` is eta_c in units of 2 / tr G, where the model is in float64.
    """
    simulation, x = run.simulation, run.dataset.prepare(run.dataset.train.inputs)
    start = run.parts.spec.model.build(run.seed).eval()
    c, batch = simulation.strategy.options["c"], simulation.local.batch_size
    eta = c * 2 / trace_of(start, x) if c else simulation.local.lr
    share = 1 / batch if batch else 0.0
    trace, frobenius = run.values["trace"], run.values["frobenius"]
    began = {n: p.detach() for n, p in start.named_parameters()}
    moved = {n: run.tensors[n] - p for n, p in began.items()}
    found = {
        "eta": eta,
        "trace-bound": eta * trace / 2,
        "batch-bound": eta / 2 * ((1 - share) * frobenius**2 / trace + share * trace),
        "gd-bound": eta * run.values["largest"] / 2,
        "distance": float(torch.linalg.vector_norm(flat(moved))),
    }
    if simulation.model.options.get("double"):
        matrix = gram(output_gradients(run.model, x, CHUNK))
        found["threshold"] = critical_rate(matrix) * trace / 2
    return found


def central(simulation: Simulation) -> Tensors:
    """Return what a plain loop makes of an arm."""
    parts = build_parts(simulation)
    target = parts.dataset.train.extras[TARGET][torch.from_numpy(parts.train.indices(0).copy())]

    def loss(step: CentralStep) -> Tensor:
        outputs = step.net(step.x)
        value: Tensor = 0.5 * (outputs - target[step.rows].to(outputs.dtype)).square().mean()
        return value

    return central_run(simulation, loss)


RATES, GD_RATES = (0.002, 0.01, 0.02, 0.03), (0.004, 0.02, 0.1)
STAYS = (0.5, 0.8)
trace, bound, fit = metric("trace"), metric("trace-bound"), metric("train-loss")
error, distance, imbalance = metric("test-error"), metric("distance"), metric("imbalance")


def by_rate(made: Reproduction) -> Figure:
    """Return trace and test error over the rate for SGD and GD, and where an escape from a minimum ends."""
    from flowerbed.experiments.reproduction import figures

    figure, (left, middle, right) = figures.canvas(3)
    for place, (method, rates) in enumerate((("sgd", RATES), ("gd", GD_RATES))):
        for axis, name in ((left, "trace"), (middle, "test-error")):
            found = [figures.values(made, f"{method}-{rate}", name) for rate in rates]
            figures.line(axis, rates, found, method.upper(), place)
        multiples = [
            float(arm.rpartition("-")[2]) for arm in made.arms if arm.startswith(f"escape-{method}-")
        ]
        ends = [figures.values(made, f"escape-{method}-{c}", "distance") for c in multiples]
        figures.line(right, multiples, ends, method.upper(), place)
    edge = sorted({*RATES, *GD_RATES})
    left.plot(edge, [2 / rate for rate in edge], "--", color="black", linewidth=1, label="2 / learning rate")
    right.axvline(1.0, linestyle="--", color="black", linewidth=1, label="2 / tr G")
    for axis in (left, middle):
        axis.set_xscale("log")
    for axis in (left, middle, right):
        axis.set_yscale("log")
    figures.finish(left, "learning rate", "tr G at the end")
    figures.finish(middle, "learning rate", "relative test error")
    figures.finish(
        right, "learning rate in units of 2 / tr G (no point: diverged)", "distance from the minimum"
    )
    return figure


PAPER = Paper(
    slug="sgd-dynamical-stability",
    measure=stability,
    claims=(
        Claim(
            "trace bound",
            "Minima that SGD stays at have tr G <= 2 / eta, at every rate.",
            tuple(b for rate in RATES for b in (bound[f"sgd-{rate}"] <= 1.02, fit[f"sgd-{rate}"] <= 1e-8)),
        ),
        Claim(
            "not of gd",
            "Control: full-batch gradient descent stays at minima far above the bound of SGD.",
            tuple(b for rate in GD_RATES[1:] for b in (bound[f"gd-{rate}"] >= 4, fit[f"gd-{rate}"] <= 1e-8)),
        ),
        Claim(
            "generalisation",
            "The test error of SGD falls with the rate, that of GD does not.",
            (
                error["sgd-0.03"] <= 0.1 * error["sgd-0.002"],
                error["gd-0.1"] >= 0.8 * error["gd-0.004"],
            ),
        ),
        Claim(
            "stays below",
            "SGD that starts beside a minimum stays there with rates below 2 / tr G.",
            (fit["minimum"] <= 1e-20, *(distance[f"escape-sgd-{c}"] <= 1e-3 for c in STAYS)),
        ),
        Claim(
            "leaves above",
            "At 1.2 times that rate SGD leaves for a flatter minimum that obeys the bound.",
            (
                distance["escape-sgd-1.2"] >= 1,
                bound["escape-sgd-1.2"] <= 1,
                fit["escape-sgd-1.2"] <= 1e-8,
                trace["escape-sgd-1.2"] <= 0.9 * trace["minimum"],
            ),
            mechanism=distance["escape-sgd-1.2"] >= 1,
        ),
        Claim(
            "diverges far above",
            "At twice the rate it diverges.",
            metric("diverged")["escape-sgd-2.0"] >= 1,
        ),
        Claim(
            "gd stays",
            "Control: gradient descent stays at the same minimum with all of these rates.",
            tuple(distance[f"escape-gd-{c}"] <= 1e-3 for c in (*STAYS, 1.2, 2.0)),
        ),
        Claim(
            "exact threshold",
            "The exact critical rate of the linearised dynamics lies just below 2 / tr G.",
            (metric("threshold")["minimum"] >= 0.8, metric("threshold")["minimum"] <= 1),
        ),
        Claim(
            "clients loosen it",
            "With eight clients a round the same rate regularises less, as far as the bound for B allows.",
            (
                trace["sgd-batch-8"] >= 4 * trace["sgd-0.03"],
                metric("batch-bound")["sgd-batch-8"] <= 1.02,
                fit["sgd-batch-8"] <= 1e-8,
            ),
        ),
        Claim(
            "balance",
            "SGD with a large rate balances the layers, GD keeps their imbalance.",
            (imbalance["balance-sgd"] <= 1.5, imbalance["balance-gd"] >= 0.8 * 8),
            mechanism=imbalance["balance-sgd"] <= 0.5 * imbalance["balance-gd"],
        ),
        Claim(
            "two layers",
            "The trace bound holds for two-layer ReLU networks, whose path norm falls with the rate.",
            (
                *(
                    b
                    for at in ("small", "large")
                    for b in (bound[f"relu-sgd-{at}"] <= 1.02, fit[f"relu-sgd-{at}"] <= 1e-8)
                ),
                metric("norm")["relu-sgd-large"] <= 0.8 * metric("norm")["relu-sgd-small"],
            ),
        ),
    ),
    central=dict.fromkeys(("sgd-0.03", "gd-0.1", "relu-sgd-small"), central),
    figure=by_rate,
    uses=("flowerbed.models.curvature", "flowerbed.datasets.regression"),
)
