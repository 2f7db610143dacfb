"""The claims about neural collapse in deep linear networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flowerbed.experiments.papers.nc_deep_linear.central import central
from flowerbed.experiments.papers.nc_deep_linear.figure import lengths
from flowerbed.experiments.papers.nc_deep_linear.probes import EXACT, geometry
from flowerbed.experiments.reproduction.claims import Claim, Inequality, metric
from flowerbed.experiments.reproduction.paper import Paper


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
