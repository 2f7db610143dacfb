"""The claims about Weight Compander."""

from __future__ import annotations

from flowerbed.experiments.papers.weight_compander.central import central
from flowerbed.experiments.papers.weight_compander.figure import weights_and_curve
from flowerbed.experiments.papers.weight_compander.probes import RATES, STANDARD, at_the_best_rate
from flowerbed.experiments.reproduction.claims import Claim, Linear, metric
from flowerbed.experiments.reproduction.paper import Paper


def at_best(name: str, method: str) -> Linear:
    """Return a metric of a method at the rate that is best for plain training."""
    return sum((metric(f"best-rate:{name}")[f"{method}-{rate}"] for rate in RATES), Linear())


accuracy, nll, naught = metric("accuracy"), metric("loss"), metric("near-zero")
largest, kurtosis = metric("largest-weight"), metric("kurtosis")
plain, wc = f"plain-{STANDARD}", f"wc-{STANDARD}"
PAPER = Paper(
    slug="weight-compander",
    claims=(
        Claim(
            "likelihood",
            "On top of weight decay the fixed curve has a better likelihood, at the rate that is best without it.",
            at_best("loss", "wc") <= 0.95 * at_best("loss", "plain"),
            mechanism=nll[wc] <= 0.95 * nll[plain],
            seeds=4,
        ),
        Claim(
            "accuracy",
            "It leaves the accuracy there within half a point (at this size a gain is not claimed).",
            (
                at_best("accuracy", "wc") >= at_best("accuracy", "plain") - 0.005,
                at_best("accuracy", "wc") <= at_best("accuracy", "plain") + 0.005,
            ),
            seeds=4,
        ),
        Claim(
            "companding",
            "Large weights are smaller, fewer weights are near zero, and the tails are thin.",
            (
                largest[wc] <= largest[plain],
                naught[wc] <= naught[plain] - 0.03,
                kurtosis[wc] <= 0.5 * kurtosis[plain],
            ),
            seeds=4,
        ),
        Claim(
            "not the step size",
            "Plain weights with the larger step that the curve has near zero do not reach its likelihood.",
            nll[wc] <= nll["slope-only"],
            seeds=4,
        ),
        Claim(
            "learned curve",
            "Learning the curve within bounds costs at most 0.1 points of accuracy.",
            accuracy["wc-learned"] >= accuracy[plain] - 0.001,
        ),
        Claim(
            "folds",
            "The folded network has the outputs of the reparametrised one.",
            tuple(metric("fold-gap")[arm] <= 1e-4 for arm in (wc, "wc-naive", "wc-learned")),
        ),
    ),
    central={plain: central, wc: central, "wc-naive": central},
    analyse=at_the_best_rate,
    figure=weights_and_curve,
    uses=("flowerbed.models.reparametrised", "flowerbed.models.sparsity"),
)
