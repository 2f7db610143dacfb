"""Neural Collapse in Deep Linear Networks: From Balanced to Imbalanced Data.

Dang, Tho Tran, Osher, Hung Tran-The, Ho and Nguyen, ICML 2023, arXiv 2301.00437. With M linear layers on features H_1
that are free parameters (rows here, d wide), K classes of n_k samples, N in all, and one-hot Y, the objective is

    F = 1/(2N) ||W_M ... W_1 H_1 - Y||^2 + 1/2 lambda_W sum_j ||W_j||^2 + 1/2 lambda_H ||H_1||^2

Its global minimisers for d >= K and no bias (section 4), with P = W_M ... W_1 and class means mu_k:

    b_k       = M N / n_k (N lambda_W^M lambda_H)^(1/M)
    x_k       = argmin over x >= 0 of g(x) = 1 / (x^M + 1) + b_k x
              = 0 if b_k > b*, the class is lost;  b* = (M-1)^((M-1)/M) / M,  and 1 for M = 1
                else the largest root of b_k = M x^(M-1) / (x^M + 1)^2;  M = 1: x = 1/sqrt(b_k) - 1
    sigma_k^2 = N lambda_H x_k^M            singular values of P, shared by the layers in equal parts: sigma_k^(1/M)
    mu_k . mu_l = 0,  ||mu_k||^2 = sigma_k^2 / (sigma_k^2 + N lambda_H)^2
    P P^T     = diag(sigma_k^2),  P mu = diag(sigma_k^2 / (sigma_k^2 + N lambda_H))
    F         = sum_k n_k / (2N) g(x_k)

and no variance within a class. So a larger class has a longer classifier and a SHORTER mean. With a last bias that is
not penalised, and balanced classes, every diagonal matrix above becomes that number times I - 1 1^T / K, after taking
the global mean away; the bias is 1/K; F is (K-1)/K times as large.

Arms: free features (all closed forms can be checked in absolute terms), and a ReLU network with a linear layer on 1,500
images of unequal classes, where the frame is predicted as far as the features are free. The loss scale matters: a mean
over N K numbers, as common square losses have it, is another pair of lambdas, which normalised metrics on balanced data
hide.

Controls: the frame of balanced classes, held against an unbalanced run, must miss. The plain lengths without their
normalisation are claimed too. ``ce-1`` is the cross entropy under one layer, whose frame is a simplex. The paper claims
that for every M; but with four classes and M = 3 a square in the plane has a lower F, so none is claimed.

Differences from the released code: it takes the largest root without looking whether g is below 1 there, so it keeps
classes that are lost. The network is held against the lambdas that it was trained with. They are larger than the
released ones (1e-5), so that lengths settle within 3,000 steps; at lambda_H = 1e-3 its features died in a probe.

Many clients: samples and their free features belong to clients, layers are averaged by n_c / N. The objective of a
client is 1/2 mean (||P h - y||^2 + N lambda_H ||h||^2) + 1/2 lambda_W sum ||W_j||^2 over its samples, or over a batch,
with N that of all clients; free features move with n_c / N of their gradient. Then one full-batch step at every client
is one step on F.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound
from flowerbed.errors import ConfigError, require
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.measures import Measured
from flowerbed.experiments.reproduction.central import CentralStep, central_run
from flowerbed.experiments.reproduction.claims import Claim, Inequality, metric
from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.experiments.reproduction.paper import Paper
from flowerbed.models.collapse import class_means, distance, equiangular, variability
from flowerbed.models.deep_linear import TABLE
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors
from flowerbed.strategies.base import ClientReply
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flowerbed.experiments.reproduction.engine import Reproduction

SAMPLES, ALL = "samples", "all"
"""The stream that tells clients N, and its one tensor."""


@dataclass(frozen=True)
class DeepLinearParams(FedAvgParams):
    """What F is made of."""

    lambda_w: float = 5e-4
    """lambda_W, penalty on each linear layer."""
    lambda_h: float = 5e-4
    """lambda_H, penalty on the features that enter the first of them."""
    loss: str = "mse"
    """mse as above, or ce: the mean cross entropy in its place."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lambda_w", "lambda_h"):
            value = getattr(self, name)
            require(value > 0, f"strategy.{name} is {value}; give a number above 0.")
        require(self.loss in ("mse", "ce"), f"strategy.loss is '{self.loss}'; choose mse or ce.")
        require(self.server_lr == 1, f"strategy.server_lr is {self.server_lr}; it has to be 1 here.")


class DeepLinearHalf(ClientHalf):
    """Descends F: penalties on the head's weights and on what enters it, nothing on other layers and biases."""

    params: DeepLinearParams

    def begin(self, local: LocalRound) -> Extras:
        return {ALL: local.received[SAMPLES][ALL], "share": len(local.train_data)}

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        z = model.features(batch["x"])
        fit = fitted(model.head(z), batch["y"], self.params.loss)
        weights = [p for name, p in model.parameters.items() if name.startswith("head.") and p.ndim == 2]
        decay = torch.stack([w.square().sum() for w in weights]).sum()
        size = z.square().sum(1).mean() * extras[ALL]
        return fit + self.params.lambda_w / 2 * decay + self.params.lambda_h / 2 * size, {}

    def correct(self, gradients: Tensors, parameters: Mapping[str, Tensor], extras: Extras) -> Tensors:
        if TABLE not in gradients:
            return gradients
        return {**gradients, TABLE: gradients[TABLE] * (extras["share"] / extras[ALL])}


def fitted(outputs: Tensor, labels: Tensor, loss: str) -> Tensor:
    """Return the first term of F, or the cross entropy in its place."""
    if loss == "ce":
        return F.cross_entropy(outputs, labels)
    return (outputs - F.one_hot(labels, outputs.shape[1])).square().sum(1).mean() / 2


class DeepLinear(FedAvg):
    """Averages layers by samples; the free features of a sample are those of the client that has it."""

    Params, Half = DeepLinearParams, DeepLinearHalf

    def broadcast(self, server_round: int) -> Mapping[str, Mapping[str, Tensor]]:
        if self.setting is None:
            raise ConfigError("DeepLinear needs to know the number of samples; call setup() before the run.")
        return {SAMPLES: {ALL: torch.tensor(float(sum(self.setting.class_counts)), dtype=torch.float64)}}

    def aggregate(self, server_round: int, current: Tensors, replies: list[ClientReply]) -> Tensors:
        if len(replies) == 1:
            # A mean of one, without the rounding of n x / n that float64 models would see.
            return dict(replies[0].model)
        averaged = super().aggregate(server_round, current, replies)
        if TABLE in averaged:
            rows = current[TABLE].clone()
            for reply in replies:
                own = (reply.model[TABLE] != current[TABLE]).any(1)
                rows[own] = reply.model[TABLE][own]
            averaged = {**averaged, TABLE: rows}
        return averaged


@dataclass(frozen=True)
class Frame:
    """The global minimiser of F. All tensors are float64 and by class."""

    sigma: Tensor
    """Singular values of P, ``(K,)``; 0 for a class that is lost."""
    b: Tensor
    minimum: float
    """F there."""
    shape: Tensor
    """What the numbers multiply: I, or I - 11^T / K with a bias, ``(K, K)``."""
    noise: float
    """N lambda_H."""
    depth: int

    @property
    def lost(self) -> Tensor:
        """Which classes are zero, bool ``(K,)``."""
        return self.sigma == 0

    def targets(self, level: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return mu mu^T of what enters layer ``level``, P P^T of the layers from there on, and P mu: ``(K, K)``."""
        each = self.sigma ** (1 / self.depth)
        product = self.sigma**2 / (self.sigma**2 + self.noise)
        means = self.sigma / (self.sigma**2 + self.noise) * each**level
        layers = each ** (self.depth - level)
        return means**2 * self.shape, layers**2 * self.shape, product * self.shape


def root(b: float, depth: int) -> float:
    """Return x_k for b_k: the minimiser of 1 / (x^M + 1) + b x over x >= 0; at b* the one that is not 0."""
    if depth == 1:
        return b**-0.5 - 1 if b < 1 else 0.0
    if b > threshold(depth):
        return 0.0
    low = math.pow((depth - 1) / (depth + 1), 1 / depth)
    high = math.pow(depth / b, 1 / (depth + 1))
    for _ in range(200):
        x = (low + high) / 2
        low, high = (x, high) if depth * x ** (depth - 1) / (x**depth + 1) ** 2 > b else (low, x)
    return (low + high) / 2


def threshold(depth: int) -> float:
    """Return b*, beyond which a class is lost."""
    return 1.0 if depth == 1 else float((depth - 1) ** ((depth - 1) / depth) / depth)


def frame(counts: Sequence[int], depth: int, lambda_w: float, lambda_h: float, bias: bool = False) -> Frame:
    """Return the minimiser for classes of these sizes; widths of at least K are assumed.

    Raises ``ConfigError`` for a bias with classes of different sizes, for which there is no closed form here.
    """
    require(not bias or len(set(counts)) == 1, "With a bias the closed form is that of equal class sizes.")
    n = torch.tensor(list(counts), dtype=torch.float64)
    total, classes = float(n.sum()), len(n)
    b = depth * total / n * (total * lambda_w**depth * lambda_h) ** (1 / depth)
    x = torch.tensor([root(float(one), depth) for one in b], dtype=torch.float64)
    least = float((n / (2 * total) * (1 / (x**depth + 1) + b * x)).sum())
    eye = torch.eye(classes, dtype=torch.float64)
    shape, share = (equiangular(classes), (classes - 1) / classes) if bias else (eye, 1.0)
    noise = total * lambda_h
    return Frame((noise * x**depth).sqrt(), b, share * least, shape, noise, depth)


@torch.no_grad()
def geometry(finished: Finished) -> dict[str, float]:
    """Return how the delivered model compares with the minimiser: see the words beside each number."""
    asked = DeepLinearParams(**finished.simulation.strategy.options)
    data, model = finished.dataset, finished.model.double()
    rows = torch.cat([torch.as_tensor(finished.parts.train.indices(c).copy())
                      for c in range(finished.parts.train.num_clients)]).sort().values  # fmt: skip
    x, y = data.prepare(data.train.inputs[rows]), data.train.labels[rows]
    classes = data.num_classes
    z = model.body(x.double() if x.is_floating_point() else x)  # type: ignore[operator]
    layers = list(model.head)  # type: ignore[arg-type]
    weights: list[Tensor] = [layer.weight for layer in layers]
    bias: Tensor | None = layers[-1].bias
    counts = y.bincount(minlength=classes).tolist()
    outputs = model.head(z)  # type: ignore[operator]
    decay = sum(float(w.square().sum()) for w in weights)
    objective = (
        float(fitted(outputs, y, asked.loss))
        + (asked.lambda_w * decay + asked.lambda_h * float(z.square().sum())) / 2
    )
    found = {
        "objective": objective,
        "train-error": float((outputs.argmax(1) != y).double().mean()),
        "balancedness": max(
            [distance(a @ a.T, c.T @ c) for a, c in pairwise(weights)], default=0.0
        ),  # W_j W_j^T against W_(j+1)^T W_(j+1)
    }
    simplex = asked.loss == "ce" or bias is not None
    target = frame(counts, len(weights), asked.lambda_w, asked.lambda_h, simplex)
    flat = frame([1] * classes, len(weights), asked.lambda_w, asked.lambda_h, simplex)
    by_level: dict[str, list[float]] = {}
    for level in range(len(weights)):
        mu = class_means(z, y, classes)
        mu = mu - mu.mean(0) if simplex else mu
        tail = torch.linalg.multi_dot([*reversed(weights[level:]), torch.eye(z.shape[1], dtype=z.dtype)])
        grams = {"means": mu @ mu.T, "classifier": tail @ tail.T, "product": tail @ mu.T}
        expected = dict(zip(grams, target.targets(level), strict=True))
        by_level.setdefault("nc1", []).append(variability(z, y, classes))
        by_level.setdefault("nc3", []).append(distance(grams["product"], expected["product"]))
        for name in ("means", "classifier"):
            by_level.setdefault(f"nc2-{name}", []).append(distance(grams[name], expected[name]))
            # The frame of balanced classes; no metric of ours but the negative control.
            by_level.setdefault(f"nc2-{name}-equal", []).append(distance(grams[name], flat.shape))
        if level == 0:
            found |= _absolute(grams, expected, target, objective)
        z = z @ weights[level].T
    # The worst level counts.
    found |= {name: max(values) for name, values in by_level.items()}
    if bias is not None:
        found["bias-error"] = float((bias - 1 / classes).abs().max())
    return found


def _absolute(
    grams: Mapping[str, Tensor], expected: Mapping[str, Tensor], target: Frame, objective: float
) -> dict[str, float]:
    """Return errors without normalisation; a diagonal's is relative, over the classes that are kept."""
    kept, off = ~target.lost, ~torch.eye(len(target.b), dtype=torch.bool)
    ratios = [(g.diagonal() / expected[n].diagonal() - 1)[kept].abs().max() for n, g in grams.items()]
    squares = grams["means"].diagonal()
    numbers = {f"mean-{k}": float(v) for k, v in enumerate(squares)}
    numbers |= {f"mean-{k}-predicted": float(v) for k, v in enumerate(expected["means"].diagonal())}
    numbers |= {f"row-{k}": float(v) for k, v in enumerate(grams["classifier"].diagonal())}
    numbers |= {f"row-{k}-predicted": float(v) for k, v in enumerate(expected["classifier"].diagonal())}
    return {
        "gap": abs(objective - target.minimum),  # to the minimum of F
        "diagonal": float(torch.stack(ratios).max()),
        "off-diagonal": max(float((g - expected[n])[off].abs().max()) for n, g in grams.items()),
        "lost": float(target.lost.sum()),  # classes that should be zero
        "lost-length": float(squares[target.lost].max()) if target.lost.any() else 0.0,
        **numbers,
    }


def collapse(measured: Measured) -> dict[str, float]:
    """Return NC1 and the distance of the means from an orthogonal frame of equal lengths, for curves over rounds."""
    net, train = measured.model, measured.dataset.train
    with torch.no_grad():
        z = torch.cat([net.body(x).cpu() for x in measured.batches(train)])  # type: ignore[operator]
    mu = class_means(z, train.labels, measured.dataset.num_classes)
    return {
        "variability": variability(z, train.labels, len(mu)),
        "unequal": distance(mu @ mu.T, torch.eye(len(mu))),
    }


def central(simulation: Simulation) -> Tensors:
    """Return what a plain loop makes of an arm: descent on F as it is written."""
    asked = DeepLinearParams(**simulation.strategy.options)

    def objective(step: CentralStep) -> Tensor:
        z = step.net.body(step.x)  # type: ignore[operator]
        fit = fitted(step.net.head(z), step.y, asked.loss)  # type: ignore[operator]
        decay = torch.stack([layer.weight.square().sum() for layer in step.net.head]).sum()  # type: ignore[union-attr]
        size = z.square().sum(1).mean() * torch.tensor(float(step.examples), dtype=torch.float64)
        value: Tensor = fit + asked.lambda_w / 2 * decay + asked.lambda_h / 2 * size
        return value

    return central_run(simulation, objective)


def lengths(made: Reproduction) -> Figure:
    """Return the lengths that were found over those of the closed form; NC1 over rounds; the network by class size."""
    from flowerbed.experiments.reproduction import figures

    drawn, (left, middle, right) = figures.canvas(3)
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_yscale("log")
    found = {}
    for place, arm in enumerate(EXACT):
        colour, _ = figures.look(place)
        for kind, marker in (("mean", "o"), ("row", "^")):
            pairs = [
                (sum(figures.values(made, arm, f"{kind}-{k}-predicted")) / len(made.seeds), value)
                for k in range(4)
                for value in figures.values(made, arm, f"{kind}-{k}")
            ]
            found[arm, kind] = [(x, y) for x, y in pairs if x > 0]
            if found[arm, kind]:
                label = arm if kind == "mean" else None
                face = "none" if place < len(EXACT) - 1 else colour
                left.plot(*zip(*found[arm, kind], strict=True), marker, color=colour, label=label, mfc=face)
        curves = [dict(o.curves.get("variability", ())) for o in made.of(arm)]
        rounds = sorted(set.intersection(*(set(curve) for curve in curves)))
        figures.line(middle, rounds, [[max(c[r], 1e-32) for c in curves] for r in rounds], arm, place)
    ends = [x for points in found.values() for x, _ in points]
    if ends:
        left.plot([min(ends), max(ends)], [min(ends), max(ends)], color="grey", linewidth=0.8)
    middle.set_yscale("log")
    outcomes = [o.values for o in made.of("network")]
    sizes = made.scale.arms["network"].settings["dataset"]["sizes"]
    for place, (kind, label) in enumerate((("mean", "mean feature"), ("row", "classifier row"))):
        by_size: dict[int, list[float]] = {size: [] for size in sizes}
        predicted: dict[int, float] = {}
        for k, size in enumerate(sizes):
            by_size[size] += [v[f"{kind}-{k}"] for v in outcomes if f"{kind}-{k}" in v]
            for found_values in outcomes[:1]:
                predicted[size] = found_values.get(f"{kind}-{k}-predicted", math.nan)
        figures.line(right, list(by_size), list(by_size.values()), label, place)
        colour, _ = figures.look(place)
        right.plot(
            list(predicted), list(predicted.values()), ":", color=colour, label=f"{label}, closed form"
        )
    figures.finish(left, "squared length in the closed form", "found (circles means, triangles rows)")
    figures.finish(middle, "round", "NC1 of the features")
    figures.finish(right, "samples of the class (network)", "squared length")
    return drawn


EXACT = (
    *(f"{kind}-{m}" for kind in ("balanced", "imbalanced", "steep") for m in (1, 3)),
    "minority",
    "bias-3",
)
"""Arms whose minimiser is known in every number."""


def below(bounds: Mapping[str, float], arms: Sequence[str]) -> tuple[Inequality, ...]:
    """Return that every metric is at most its bound in each of the arms."""
    return tuple(metric(name)[arm] <= bound for arm in arms for name, bound in bounds.items())


lost, means, rows = metric("lost"), metric("nc2-means"), metric("nc2-classifier")
equal_means, equal_rows = metric("nc2-means-equal"), metric("nc2-classifier-equal")
PAPER = Paper(
    slug="nc-deep-linear",
    claims=(
        Claim(
            "the minimum is reached",
            "Training ends at the minimum of the objective that the closed form gives.",
            below({"gap": 1e-5}, EXACT),
        ),
        Claim(
            "lengths",
            "Means, classifier and their products have the lengths of the closed form and no other component.",
            below({"diagonal": 0.01, "off-diagonal": 1e-4}, EXACT),
        ),
        Claim(
            "collapse at every layer",
            "Within-class variance goes to 0 and the frames to those of the theory, at each linear layer.",
            below({"nc1": 1e-3, "nc2-means": 0.01, "nc2-classifier": 0.01, "nc3": 0.01}, EXACT),
        ),
        Claim(
            "minority collapse",
            "A class is lost if and only if b_k is above b*.",
            (
                *below({"lost-length": 1e-3, "diagonal": 0.01}, ("minority",)),
                lost["minority"] >= 2,
                *below({"lost": 0, "diagonal": 0.01}, ("imbalanced-1", "imbalanced-3", "steep-1", "steep-3")),
            ),
        ),
        Claim(
            "bias",
            "A last bias without penalty turns the orthogonal frame into a simplex and is 1/K itself.",
            below({"bias-error": 1e-3, "off-diagonal": 1e-4, "nc2-means": 0.01}, ("bias-3",)),
        ),
        Claim(
            "class sizes count",
            "The frame of balanced classes is not that of unbalanced ones (control: it must miss).",
            tuple(m[f"imbalanced-{d}"] >= 0.1 for m in (equal_means, equal_rows) for d in (1, 3)),
        ),
        Claim(
            "cross entropy, one layer",
            "Under one layer the cross entropy collapses to a simplex too.",
            below({"nc1": 1e-3, "nc2-means": 0.01, "nc2-classifier": 0.01}, ("ce-1",)),
        ),
        Claim(
            "a network collapses to unequal lengths",
            "The means and the classifier of a ReLU network fit the predicted lengths far better than equal ones.",
            (
                means["network"] <= 0.5 * equal_means["network"],
                rows["network"] <= 0.5 * equal_rows["network"],
            ),
        ),
    ),
    measure=geometry,
    figure=lengths,
    central=dict.fromkeys(("imbalanced-3", "bias-3", "ce-1", "network"), central),
    uses=("flowerbed.models.collapse", "flowerbed.models.deep_linear", "flowerbed.datasets.class_sizes"),
)
