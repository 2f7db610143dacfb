"""The claims about adaptive guidance."""

from __future__ import annotations

from flowerbed.experiments.papers.adaptive_guidance.central import central_exact, central_unet
from flowerbed.experiments.papers.adaptive_guidance.figure import pictures
from flowerbed.experiments.papers.adaptive_guidance.probes import analyse
from flowerbed.experiments.reproduction.claims import Claim, metric
from flowerbed.experiments.reproduction.paper import Paper

nfe, mse, control = metric("train:nfe"), metric("mse"), metric("control-mse")
early, late = metric("train:guided-early"), metric("train:guided-late")


def _claims(prior: str, model: str) -> tuple[Claim, ...]:
    ag, note = f"{prior}-ag", f" ({model})"
    return (
        Claim(
            f"fewer calls, {prior}",
            "AG saves a fifth of the calls and stays far closer to full guidance than as many guided steps at the "
            "start" + note + ".",
            (nfe[ag] <= 32, mse[ag] <= 0.1 * control[ag]),
            mechanism=mse[ag] <= control[ag],
        ),
        Claim(
            f"guidance matters early, {prior}",
            "Guidance in the first half of the steps is far closer to full guidance than in the last half"
            + note
            + ".",
            mse[f"{prior}-first"] <= 0.2 * mse[f"{prior}-last"],
        ),
        Claim(
            f"linear estimates, {prior}",
            "LinearAG at 25 calls is closer to full guidance than the label alone" + note + ".",
            (mse[f"{prior}-linear"] <= 0.5 * mse[f"{prior}-conditional"], nfe[f"{prior}-linear"] <= 25),
        ),
    )


PAPER = Paper(
    slug="adaptive-guidance",
    claims=(
        *_claims("exact", "exact model"),
        *_claims("unet", "trained model"),
        Claim(
            "the search finds it",
            "A searched policy has more guided steps in the first half than in the second.",
            early["exact-search"] >= late["exact-search"] + 1,
        ),
    ),
    analyse=analyse,
    central={"unet": central_unet, "exact": central_exact},
    figure=pictures,
    uses=(
        "flowerbed.models.diffusion",
        "flowerbed.strategies.diffusion",
        "flowerbed.datasets.symmetric",
        "flowerbed.experiments.generation",
    ),
)
