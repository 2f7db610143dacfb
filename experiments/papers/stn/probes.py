"""What the reproduction of self-tuning networks runs on, and what it measures."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed import seeds
from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.experiments.measures import Measured
from flowerbed.experiments.papers.stn import LAMBDAS, conditioned, normal_equations
from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.models.base import Shape
from flowerbed.server.callbacks import SERVER

BEST, AT_BEST = "best-validation-loss", "test-loss-at-best"
FIXED = tuple(f"fixed-{i}" for i in range(5))
"""The grid of constant rates; the first are those that STN starts from."""


def hyperparameters(measured: Measured) -> dict[str, float]:
    """Return every hyperparameter, its sigma, and ``moved``: the least distance of one from where it started."""
    net = conditioned(measured.model)
    values = {name: float(value) for name, value in net.values().items()}
    sigma = F.softplus(net.spread.detach())
    spreads = {f"sigma-{knob.name}": float(s) for knob, s in zip(net.knobs, sigma, strict=True)}
    return {**values, **spreads, "moved": min(abs(values[knob.name] - knob.start) for knob in net.knobs)}


def diabetes() -> Dataset:
    """Return scikit-learn's diabetes data, standardised: 150 patients to train on, the others for validation.

    scikit-learn defines no split; ours is one fixed permutation (stream ``diabetes split``, seed 0).
    """
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    order = seeds.numpy_rng(0, "diabetes split").permutation(len(y))
    train, valid = (
        Split(
            torch.from_numpy(x[rows]).float(),
            torch.zeros(len(rows), dtype=torch.int64),
            {"target": torch.from_numpy(y[rows])},
        )
        for rows in (order[:150], order[150:])
    )
    return Dataset("diabetes", train, valid, ("progression",), (0.0,), (1.0,), task="measured")


class Responses(nn.Module):
    """The response of ridge regression around each of ``LAMBDAS``: w_0 and u, ``(7, d)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w, self.u = (
            nn.Parameter(torch.zeros(len(LAMBDAS), width, dtype=torch.float64)) for _ in range(2)
        )


def responses(input_shape: Shape, num_classes: int) -> Responses:
    """Return the responses, all 0."""
    return Responses(input_shape[0])


def exact_response(gram: Tensor, right: Tensor, lambda_: float) -> tuple[Tensor, Tensor]:
    """Return w*(lambda) and its derivative."""
    shifted = gram + math.exp(lambda_) * torch.eye(len(right), dtype=gram.dtype)
    w = torch.linalg.solve(shifted, right)
    return w, -math.exp(lambda_) * torch.linalg.solve(shifted, w)


@torch.no_grad()
def hypergradients(measured: Measured) -> dict[str, float]:
    """Return the largest relative error of dF/dlambda over ``LAMBDAS``, and how many have the wrong sign."""
    data, net = measured.dataset, measured.model
    assert isinstance(net, Responses)
    train, valid = (normal_equations(s.inputs, s.extras["target"]) for s in (data.train, data.test))

    def slope(w: Tensor, direction: Tensor) -> float:
        return float(2 * (valid[0] @ w - valid[1]) @ direction)

    errors = {}
    for at, w, u in zip(LAMBDAS, net.w.cpu(), net.u.cpu(), strict=True):
        exact = slope(*exact_response(*train, at))
        errors[f"ratio-{at}"] = slope(w, u) / exact
    ratios = list(errors.values())
    return {
        **errors,
        "hypergradient-error": max(abs(ratio - 1) for ratio in ratios),
        "wrong-signs": float(sum(ratio < 0 for ratio in ratios)),
    }


# What is made of the runs.


def at_best(finished: Finished) -> dict[str, float]:
    """Return the validation loss of the best epoch by it, and the test loss and error there; {} for ridge."""
    valid, tested = {}, {}
    for record in finished.records:
        if record.phase == SERVER:
            tested[record.round] = record.metrics
        elif "validation-loss" in record.metrics:
            valid[record.round] = float(record.metrics["validation-loss"])
    if not valid:
        return {}
    best = min(valid, key=lambda round_: valid[round_])
    return {
        BEST: valid[best],
        AT_BEST: float(tested[best]["loss"]),
        "test-error-at-best": 1 - float(tested[best]["accuracy"]),
        "best-epoch": float(best),
    }


def best_of_grid(runs: Mapping[str, Finished]) -> dict[str, dict[str, float]]:
    """Return for STN the losses of the fixed run that is best by validation, of the same seed."""
    if not runs.keys() >= {"stn", *FIXED}:
        return {}
    best = min((runs[arm].values for arm in FIXED), key=lambda values: values[BEST])
    return {"stn": {"grid-validation-loss": best[BEST], "grid-test-loss": best[AT_BEST]}}
