"""The claims about global magnitude pruning."""

from __future__ import annotations

from flowerbed.experiments.papers.global_mp.central import central
from flowerbed.experiments.papers.global_mp.figure import by_sparsity
from flowerbed.experiments.reproduction.claims import Claim, Linear, mean, metric
from flowerbed.experiments.reproduction.paper import Paper

HIGH = (0.9, 0.95, 0.98)
"""The sparsities over which the headline claims average."""
accuracy, share, emptiest = metric("accuracy"), metric("sparsity"), metric("emptiest-layer")


def over(method: str) -> Linear:
    """Return the mean accuracy of a method over ``HIGH``."""
    return mean(accuracy[f"{method}-{s}"] for s in HIGH)


PAPER = Paper(
    slug="global-mp",
    claims=(
        Claim(
            "one threshold beats uniform sparsity",
            "Ranking all weights together is more accurate than the same sparsity in every layer.",
            over("magnitude") >= over("uniform") + 0.01,
        ),
        Claim(
            "magnitude is enough",
            "Magnitude is as good a global score as the gradient-based one of SNIP.",
            over("magnitude") >= over("snip") - 0.002,
        ),
        Claim(
            "magnitude carries information",
            "Magnitude beats a random global mask of the same size.",
            over("magnitude") >= over("random") + 0.01,
        ),
        Claim(
            "layer collapse",
            "At extreme sparsity a plain global threshold empties a layer, and the network guesses.",
            (emptiest["collapse"] <= 0, accuracy["collapse"] <= 0.12),
            mechanism=emptiest["collapse"] <= 0,
        ),
        Claim(
            "a minimum per layer cures it",
            "With a minimum number of weights in every layer the same sparsity learns.",
            (accuracy["collapse-mt"] >= 0.3, emptiest["collapse-mt"] >= 1),
            mechanism=emptiest["collapse-mt"] >= 1,
        ),
        Claim(
            "the target is met",
            "The sparsity of the whole network is the target's, with and without a minimum per layer.",
            tuple(
                bound
                for arm, s in (
                    *((f"magnitude-{s}", s) for s in HIGH),
                    ("collapse-mt", 0.995),
                    ("collapse", 0.995),
                )
                for bound in (share[arm] >= s - 1e-4, share[arm] <= s + 1e-4)
            ),
        ),
    ),
    central={"magnitude-0.9": central},
    figure=by_sparsity,
    uses=("flowerbed.models.sparsity",),
)
