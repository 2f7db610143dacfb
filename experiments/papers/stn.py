"""Self-Tuning Networks: Bilevel Optimization of Hyperparameters using Structured Best-Response Functions (STN).

MacKay, Vicol, Lorraine, Duvenaud and Grosse, ICLR 2019, arXiv 1903.03088. Regularisation is tuned by gradient descent
while the network trains once. f is the training loss with regularisation, F the validation loss without any:

    lambda* = argmin F(lambda, w*(lambda)),    w*(lambda) = argmin_w f(lambda, w)

The weights become a compact function of the hyperparameters, the local best response (``flowerbed.models.gated``),

    w_phi(lambda): y = W x + b + (V lambda) * (U x) + (C lambda) * c

and two steps alternate, after a warm-up of the first alone:

    1. phi:             f(w_phi(lambda + eps), lambda + eps), an eps ~ N(0, diag(sigma^2)) for each sample
    2. lambda, sigma:   F(w_phi(lambda + eps)) - tau H,  H = sum_j log(sigma_j sqrt(2 pi e)), phi fixed, no dropout

Rates are functions r(lambda) of unconstrained numbers; lambda gets its gradient through the gates alone, never through
a dropout mask, so that even whole numbers can be tuned. ``tau`` keeps sigma from collapsing, where the response would
be flat, and a wide sigma biases lambda.

Why gates: for y = s . Q x with penalty e^lambda ||dy/dx||^2, in the principal axes of the inputs (X^T X = diag(d_j^2)),
the exact response is s_j(lambda) = s_j(-inf) sigmoid(log(d_j^2 / N) - lambda), a gate for each unit.

``ridge-*`` is this without any training noise: on ridge regression with penalty e^lambda the response w_0 + eps u is a
linear system (``response``), and its hypergradient is compared with the exact one. The split is fixed, so seeds agree.

Controls. ``fixed-*`` are ordinary networks of the same size with constant rates for the same epochs, a grid of five
("the best" is that by validation loss, seed by seed); ``untuned`` has gates and perturbed rates but no second step. All
figures are those at the best epoch by the validation loss at lambda itself, without perturbation.

Differences from the released code: the scalar on W x + b, which the theory does not know, is left out; V and C start at
0. ``centred`` lets the gates see lambda minus its current value, as in Delta-STN (Bae and Grosse, arXiv 2010.13514).

Many clients: each divides its own samples into training and validation. phi, lambda and s are averaged, lambda in the
unconstrained space: the average of the responses means something since all start a round from one lambda. With
``personal`` lambda and sigma stay at the client: a common response, and own rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed import seeds
from flowerbed.clients.bilevel import Level, alternate, held_out
from flowerbed.clients.data import Batch, ClientData
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import MODEL, Extras, LocalRound, Reply, shared_model
from flowerbed.clients.params import OPTIMIZERS
from flowerbed.clients.training import batches_of
from flowerbed.datasets.augment import Scale
from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.datasets.rated_augment import STRENGTHS, jitter
from flowerbed.errors import ClientError, require
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.measures import Measured
from flowerbed.experiments.parts import build_parts
from flowerbed.experiments.reproduction.claims import Claim, metric
from flowerbed.experiments.reproduction.engine import Reproduction
from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.experiments.reproduction.paper import Paper
from flowerbed.models.base import Shape
from flowerbed.models.gated import Conditioned, GatedConv2d, GatedLinear
from flowerbed.models.info import ModelInfo
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.server.callbacks import SERVER
from flowerbed.storage import Tensors
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HYPER, SPREAD, SCALE, UPPER = "hyper", "spread", "scale", " upper"
BEST, AT_BEST = "best-validation-loss", "test-loss-at-best"
FIXED = tuple(f"fixed-{i}" for i in range(5))
"""The grid of constant rates; the first are those that STN starts from."""


@dataclass(frozen=True)
class StnParams(FedAvgParams):
    """Hyper-parameters of the alternation."""

    tune: bool = True
    """Whether there is a second step; without it the rates stay what they are."""
    perturb: bool = True
    """Whether the first step draws lambda + eps; without it all samples see lambda."""
    train_steps: int = 2
    """T_train."""
    valid_steps: int = 1
    """T_valid."""
    warm_up: int = 0
    """Steps of the run before the first step on lambda."""
    tau: float = 1e-3
    """Weight of the entropy of the perturbations."""
    tune_scale: bool = True
    """Whether sigma is tuned as well; without it the second step perturbs nothing."""
    hyper_optimizer: str = "rmsprop"
    hyper_lr: float = 0.03
    valid: float = 0.4
    """Share of a client's samples that it holds out for validation."""
    personal: bool = False
    """Whether lambda and sigma stay at the client."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train_steps", "valid_steps"):
            value = getattr(self, name)
            require(value >= 1, f"strategy.{name} is {value}; give at least 1.")
        require(self.warm_up >= 0, f"strategy.warm_up is {self.warm_up}; give 0 steps or more.")
        require(self.tau >= 0, f"strategy.tau is {self.tau}; give 0 or more.")
        require(self.hyper_lr > 0, f"strategy.hyper_lr is {self.hyper_lr}; give a number above 0.")
        require(
            self.hyper_optimizer in OPTIMIZERS,
            f"strategy.hyper_optimizer is '{self.hyper_optimizer}'; choose from {', '.join(OPTIMIZERS)}.",
        )
        require(0 < self.valid < 1, f"strategy.valid is {self.valid}; give a share between 0 and 1.")


class StnHalf(ClientHalf):
    """Alternates between training the response and tuning what it responds to."""

    params: StnParams

    def private(self, info: ModelInfo) -> frozenset[str]:
        return frozenset({HYPER, SPREAD}) if self.params.personal else frozenset()

    def run(self, local: LocalRound) -> Reply:
        params, net = self.params, conditioned(local.model)
        if params.tune and not any(isinstance(m, GatedLinear | GatedConv2d) for m in net.modules()):
            raise ClientError("there are no gates for lambda to be tuned through; set model.gated=true")
        train_data, valid_data = held_out(local, params.valid)
        weights = frozenset(local.parts.parameters) - {HYPER, SPREAD}
        lower = Level(
            self.loss, weights, local.local, batches_of(local, local.local, train_data), params.train_steps
        )
        plain = replace(
            local.local,
            optimizer=params.hyper_optimizer,
            lr=params.hyper_lr,
            momentum=0.0,
            nesterov=False,
            weight_decay=0.0,
            clip_norm=0.0,
            schedule="constant",
            augment="none",
        )
        moves = frozenset({HYPER, SPREAD} if params.tune_scale else {HYPER})
        batches = batches_of(local, plain, valid_data, UPPER)
        upper = Level(self.validation, moves, plain, batches, params.valid_steps, UPPER)
        extras = {SCALE: train_data.scale}
        trained, tuned = alternate(local, lower, upper if params.tune else None, extras, params.warm_up)
        found = dict(trained.metrics)
        if tuned is not None:
            found["tuning-loss"] = tuned.metrics["loss"]
        found["validation-loss"] = validation_loss(net, valid_data, local.task)
        streams = {MODEL: shared_model(local, self.private(local.info))}
        return Reply(streams, {"num-examples": len(train_data), "steps": trained.steps, **found})

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return f at perturbed hyperparameters: dropout and augmentation as they say."""
        net = conditioned(model.module)
        raw = perturbed(net, len(batch["y"]), self.params.perturb).detach()
        x = regularised(net, batch["x"], raw, extras[SCALE])
        with net.at(raw):
            return task.mean_loss(model(x), batch["y"]), {}

    def validation(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return F at perturbed hyperparameters minus tau H; lambda's gradient comes through the gates."""
        # The next training step puts the module back into training mode.
        net = conditioned(model.module.eval())
        with net.at(perturbed(net, len(batch["y"]), self.params.tune_scale)):
            value = task.mean_loss(model(batch["x"]), batch["y"])
        return value - self.params.tau * entropy(net), {}


class Stn(FedAvg):
    """FedAvg over clients that tune their own regularisation; averages lambda and sigma like weights."""

    Params = StnParams
    Half = StnHalf


def conditioned(module: nn.Module) -> Conditioned:
    """Return the model; raises ``ClientError`` if it has no hyperparameters of its own."""
    if not isinstance(module, Conditioned):
        raise ClientError(
            f"{type(module).__name__} has no hyperparameters to tune; choose a model whose builder returns a "
            "flowerbed.models.gated.Conditioned"
        )
    return module


def perturbed(net: Conditioned, count: int, perturb: bool) -> Tensor:
    """Return lambda + eps, a row for each of ``count`` samples."""
    if not perturb:
        return net.hyper.expand(count, -1)
    eps = torch.randn(count, len(net.knobs), device=net.hyper.device)
    return net.hyper + F.softplus(net.spread) * eps


def entropy(net: Conditioned) -> Tensor:
    """Return H, the entropy of the perturbations."""
    return (F.softplus(net.spread).log() + 0.5 * math.log(2 * math.pi * math.e)).sum()


def regularised(net: Conditioned, x: Tensor, raw: Tensor, scale: Scale) -> Tensor:
    """Return the inputs under the augmentations among the hyperparameters."""
    strengths = {name: value for name, value in net.values(raw).items() if name in STRENGTHS}
    return jitter(x, strengths, scale) if strengths else x


@torch.no_grad()
def validation_loss(net: Conditioned, data: ClientData, task: Task) -> float:
    """Return the mean loss of samples at lambda itself, in evaluation mode."""
    net.eval()
    pieces = zip(torch.split(data.x, 512), torch.split(data.y, 512), strict=True)
    return math.fsum(float(task.mean_loss(net(x), y)) * len(y) for x, y in pieces) / len(data)


def hyperparameters(measured: Measured) -> dict[str, float]:
    """Return every hyperparameter, its sigma, and ``moved``: the least distance of one from where it started."""
    net = conditioned(measured.model)
    values = {name: float(value) for name, value in net.values().items()}
    sigma = F.softplus(net.spread.detach())
    spreads = {f"sigma-{knob.name}": float(s) for knob, s in zip(net.knobs, sigma, strict=True)}
    return {**values, **spreads, "moved": min(abs(values[knob.name] - knob.start) for knob in net.knobs)}


# The exact test: ridge regression.

LAMBDAS = tuple(range(-5, 2))


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


def response(gram: Tensor, right: Tensor, lambda_: float, sigma: float) -> tuple[Tensor, Tensor]:
    """Return w_0 and u ``(d,)`` that minimise E f(lambda + eps, w_0 + eps u) over eps ~ N(0, sigma^2).

    f is ||y - X w||^2 / N + e^lambda ||w||^2; ``gram`` is X^T X / N, ``right`` X^T y / N. With m_k the mean of
    e^(lambda + eps) eps^k,

        (X^T X / N + m_0) w_0 + m_1 u = X^T y / N          m_1 w_0 + (sigma^2 X^T X / N + m_2) u = 0
    """
    m0 = math.exp(lambda_ + sigma**2 / 2)
    m1, m2 = sigma**2 * m0, (sigma**2 + sigma**4) * m0
    one = torch.eye(len(right), dtype=gram.dtype)
    upper = torch.cat([gram + m0 * one, m1 * one], 1)
    lower = torch.cat([m1 * one, sigma**2 * gram + m2 * one], 1)
    w, u = torch.linalg.solve(torch.cat([upper, lower]), torch.cat([right, 0 * right])).chunk(2)
    return w, u


def exact_response(gram: Tensor, right: Tensor, lambda_: float) -> tuple[Tensor, Tensor]:
    """Return w*(lambda) and its derivative."""
    shifted = gram + math.exp(lambda_) * torch.eye(len(right), dtype=gram.dtype)
    w = torch.linalg.solve(shifted, right)
    return w, -math.exp(lambda_) * torch.linalg.solve(shifted, w)


@dataclass(frozen=True)
class RidgeParams(FedAvgParams):
    """How far around lambda the response is fitted."""

    sigma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.sigma > 0, f"strategy.sigma is {self.sigma}; give a number above 0.")


class RidgeHalf(ClientHalf):
    """Solves for the best responses, without any training."""

    params: RidgeParams

    def run(self, local: LocalRound) -> Reply:
        gram, right = normal_equations(local.train_data.x, local.train_data.extras["target"])
        pairs = [response(gram, right, at, self.params.sigma) for at in LAMBDAS]
        found = {"w": torch.stack([w for w, _ in pairs]), "u": torch.stack([u for _, u in pairs])}
        return Reply({MODEL: found}, {"num-examples": len(local.train_data), "steps": 0})


class Ridge(FedAvg):
    """Averages the clients' responses."""

    Params = RidgeParams
    Half = RidgeHalf


def normal_equations(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return X^T X / N and X^T y / N in float64, on the CPU."""
    x, y = x.double().cpu(), y.double().cpu()
    return x.T @ x / len(y), x.T @ y / len(y)


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


def central(simulation: Simulation) -> Tensors:
    """Return what a plain loop makes of an arm: alternating steps, each level with its optimizer and random stream."""
    asked, local, parts = StnParams(**simulation.strategy.options), simulation.local, build_parts(simulation)
    train, mine = parts.dataset.train, parts.train.indices(0).copy()
    x, y = parts.dataset.prepare(train.inputs[mine]), train.labels[mine]
    order = seeds.numpy_rng(simulation.seed, "validation samples", 0).permutation(len(y))
    held = round(asked.valid * len(y))
    levels = [torch.from_numpy(np.sort(rows)) for rows in (order[held:], order[:held])]
    net = conditioned(parts.spec.model.build(simulation.seed))
    weights = [p for name, p in net.named_parameters() if name not in (HYPER, SPREAD)]
    sgd = torch.optim.SGD(weights, lr=local.lr, momentum=local.momentum)
    rms = torch.optim.RMSprop([net.hyper, net.spread], lr=asked.hyper_lr)
    streams = []
    for purpose in ("modules", f"modules{UPPER}"):
        with seeds.torch_stream(simulation.seed, purpose, 0):
            streams.append(torch.get_rng_state())

    def step(level: int, number: int, optimizer: torch.optim.Optimizer) -> None:
        rows, batch = levels[level], local.batch_size
        epoch, place = divmod(number, -(-len(rows) // batch))
        purpose = ("data order", f"data order{UPPER}")[level]
        shuffled = seeds.numpy_rng(simulation.seed, purpose, 0, epoch).permutation(len(rows))
        chosen = rows[torch.from_numpy(shuffled)[place * batch : (place + 1) * batch]]
        net.train(not level)
        net.zero_grad()
        torch.set_rng_state(streams[level])
        raw = net.hyper.expand(len(chosen), -1)
        if level or asked.perturb:
            raw = raw + F.softplus(net.spread) * torch.randn(len(chosen), len(net.knobs))
        with net.at(raw if level else raw.detach()):
            loss = F.cross_entropy(net(x[chosen]), y[chosen])
        if level:
            loss = loss - asked.tau * entropy(net)
        loss.backward()  # type: ignore[no-untyped-call]
        streams[level] = torch.get_rng_state()
        optimizer.step()

    with seeds.torch_stream(simulation.seed, "modules", 0):
        for number in range(simulation.federation.rounds * local.steps):
            step(0, number, sgd)
            turn, rest = divmod(number + 1, asked.train_steps)
            if asked.tune and not rest and number + 1 > asked.warm_up:
                for own in range((turn - 1) * asked.valid_steps, turn * asked.valid_steps):
                    step(1, own, rms)
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def learning_to_regularise(made: Reproduction) -> Figure:
    """Return the rates by epoch, the validation loss of STN and the grid, and ridge's hypergradient by sigma."""
    from flowerbed.experiments.reproduction import figures

    figure, (rates, losses, exact) = figures.canvas(3)
    found = [dict(outcome.curves.items()) for outcome in made.of("stn")]
    names = [n for n in found[0] if n.startswith(("dropout-", *STRENGTHS))] if found else []
    for place, name in enumerate(names):
        curves = [dict(curve[name]) for curve in found]
        rounds = sorted(set.intersection(*(set(curve) for curve in curves)))
        figures.line(rates, rounds, [[curve[r] for curve in curves] for r in rounds], name, place)
    figures.finish(rates, "epoch", "hyperparameter of STN")
    lowest = []
    for place, arm in enumerate(a for a in made.arms if not a.startswith("ridge")):
        curves = [dict(outcome.curves.get("train:validation-loss", ())) for outcome in made.of(arm)]
        rounds = sorted(set.intersection(*(set(curve) for curve in curves)))
        figures.line(losses, rounds, [[curve[r] for curve in curves] for r in rounds], arm, place)
        lowest += [min(curve.values()) for curve in curves if curve]
    if lowest:
        # Where the arms differ: the first epochs and the worst overfitting lie above.
        losses.set_ylim(0.95 * min(lowest), 2 * min(lowest))
    figures.finish(losses, "epoch", "validation loss")
    arms = [arm for arm in made.arms if arm.startswith("ridge")]
    for place, arm in enumerate(arms):
        ratios = [figures.values(made, arm, f"ratio-{at}") for at in LAMBDAS]
        figures.line(exact, LAMBDAS, ratios, arm.replace("ridge-", "sigma "), place)
    figures.finish(exact, "log penalty of ridge regression", "hypergradient / exact one")
    return figure


best, tested, error = metric(BEST), metric(AT_BEST), metric("hypergradient-error")
PAPER = Paper(
    slug="stn",
    claims=(
        Claim(
            "one run replaces a grid",
            "The validation loss of one run is that of the best of five runs with fixed rates.",
            best["stn"] <= metric("grid-validation-loss")["stn"] + 0.005,
        ),
        Claim(
            "better than its start",
            "It is clearly better than the same training with the rates that it starts from.",
            best["stn"] <= best["fixed-0"] - 0.012,
        ),
        Claim(
            "test loss",
            "On test data it is as good as the best fixed run, within the noise.",
            tested["stn"] <= metric("grid-test-loss")["stn"] + 0.015,
        ),
        Claim(
            "rates move",
            "Every rate moves far from where it started.",
            metric("moved")["stn"] >= 0.15,
        ),
        Claim(
            "the response is the exact one",
            "On ridge regression the hypergradient is exact for small perturbations, and worse the wider they are.",
            (
                error["ridge-0.1"] <= 0.03,
                error["ridge-0.25"] <= 0.12,
                error["ridge-0.1"] <= error["ridge-0.25"],
                error["ridge-0.25"] <= error["ridge-0.5"],
                error["ridge-0.5"] <= error["ridge-1.0"],
            ),
        ),
    ),
    measure=at_best,
    analyse=best_of_grid,
    figure=learning_to_regularise,
    central=dict.fromkeys(("stn", "untuned", "fixed-0"), central),
    uses=(
        "flowerbed.clients.bilevel",
        "flowerbed.datasets.rated_augment",
        "flowerbed.models.gated",
        "flowerbed.models.gated_nets",
    ),
)
