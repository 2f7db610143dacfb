"""What the reproduction of dynamical stability of SGD runs on, and what it measures."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flowerbed.datasets.regression import TARGET
from flowerbed.errors import require
from flowerbed.experiments.measures import Measured
from flowerbed.experiments.papers.sgd_dynamical_stability import CHUNK, critical_rate, trace_of
from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.models.base import Shape, require_at_least_one
from flowerbed.models.curvature import flat, gram, output_gradients, sizes

RATES, GD_RATES = (0.002, 0.01, 0.02, 0.03), (0.004, 0.02, 0.1)


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
