"""The claims about compressed features."""

from __future__ import annotations

from flowerbed.experiments.papers.compress_features.central import central, central_pair
from flowerbed.experiments.papers.compress_features.figure import pictures
from flowerbed.experiments.papers.compress_features.probes import theorem
from flowerbed.experiments.reproduction.claims import Claim, metric
from flowerbed.experiments.reproduction.paper import Paper

accuracy, fits, share, off = (
    metric("accuracy"),
    metric("fits-noisy"),
    metric("kept-share"),
    metric("line-error"),
)
PAPER = Paper(
    slug="compress-features",
    claims=(
        Claim(
            "nested dropout resists wrong labels",
            "A network with ordered features is clearly more accurate than plain training on the same labels.",
            accuracy["nested-10"] >= accuracy["ce"] + 0.035,
            mechanism=fits["nested-10"] <= fits["ce"] - 0.02,
        ),
        Claim(
            "dropout resists wrong labels",
            "Strong dropout of the features is far more accurate than plain training.",
            accuracy["dropout-0.7"] >= accuracy["ce"] + 0.1,
            mechanism=fits["dropout-0.7"] <= fits["ce"] - 0.02,
        ),
        Claim(
            "few channels are enough",
            "Clean validation samples choose at most half of the channels.",
            share["nested-10"] <= 0.5,
        ),
        Claim(
            "networks that teach each other",
            "Two nested networks that choose samples for each other are better than one alone.",
            accuracy["nested-co"] >= accuracy["nested-10"] + 0.01,
        ),
        Claim(
            "the choice of samples matters",
            "They are also better than the same two networks, tuned as long on all samples.",
            accuracy["nested-co"] >= accuracy["nested-pair"] + 0.005,
        ),
        Claim(
            "dropout networks teach each other as well",
            "Two dropout networks that choose samples for each other are better than one alone.",
            accuracy["dropout-co"] >= accuracy["dropout-0.7"] + 0.01,
        ),
        Claim(
            "the first channel knows the line",
            "The first of the ordered channels is nearer to the truth than a plain network.",
            off["toy-nested"] <= off["toy-plain"],
        ),
    ),
    measure=theorem,
    figure=pictures,
    central={
        **dict.fromkeys(("ce", "dropout-0.7", "nested-10"), central),
        **dict.fromkeys(("nested-co", "nested-pair"), central_pair),
    },
    uses=(
        "flowerbed.clients.co_teaching",
        "flowerbed.datasets.excerpt",
        "flowerbed.models.batchnorm",
        "flowerbed.models.feature_masks",
        "flowerbed.models.pair",
    ),
)
