"""The claims about self-tuning networks."""

from __future__ import annotations

from flowerbed.experiments.papers.stn.central import central
from flowerbed.experiments.papers.stn.figure import learning_to_regularise
from flowerbed.experiments.papers.stn.probes import AT_BEST, BEST, at_best, best_of_grid
from flowerbed.experiments.reproduction.claims import Claim, metric
from flowerbed.experiments.reproduction.paper import Paper

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
