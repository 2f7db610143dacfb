"""The claims about RED-diff."""

from __future__ import annotations

from flowerbed.experiments.papers.red_diff.figure import pictures
from flowerbed.experiments.papers.red_diff.probes import analyse
from flowerbed.experiments.reproduction.claims import Claim, metric
from flowerbed.experiments.reproduction.paper import Paper

dB, seconds, second = metric("train:psnr"), metric("train:step-seconds"), metric("second-margin")


def _claims(prior: str, model: str) -> tuple[Claim, ...]:
    return (
        Claim(
            f"fidelity, {prior}",
            f"In two of three tasks RED-diff is at least 0.3 dB better than both DPS and PiGDM ({model} model).",
            second[f"{prior}-red-random"] >= 0.3,
            mechanism=second[f"{prior}-red-random"] >= 0,
        ),
        Claim(
            f"cheap steps, {prior}",
            f"A step without the network's derivative takes at most 0.7 of one of DPS ({model} model).",
            seconds[f"{prior}-red-random"] <= 0.7 * seconds[f"{prior}-dps-random"],
        ),
    )


PAPER = Paper(
    slug="red-diff",
    claims=(
        *_claims("exact", "exact"),
        *_claims("unet", "trained"),
        Claim(
            "the linear weight",
            "The weight 1 / SNR is no worse than a constant one and better than its square.",
            (
                dB["exact-red-random"] >= dB["exact-weight-const"] - 0.1,
                dB["exact-red-random"] >= dB["exact-weight-square"] + 0.3,
            ),
        ),
    ),
    analyse=analyse,
    figure=pictures,
    uses=(
        "flowerbed.models.diffusion",
        "flowerbed.models.inverse",
        "flowerbed.models.restoration",
        "flowerbed.strategies.diffusion",
        "flowerbed.datasets.symmetric",
    ),
)
