"""The claims about DR-Tune."""

from __future__ import annotations

from flowerbed.experiments.papers.dr_tune.central import central
from flowerbed.experiments.papers.dr_tune.figure import pictures
from flowerbed.experiments.papers.dr_tune.probes import FAMILIES, choose, on_raw_features
from flowerbed.experiments.reproduction.claims import Claim, Linear, mean, metric
from flowerbed.experiments.reproduction.paper import Paper

accuracy, chosen, raw = metric("accuracy"), metric("chosen"), metric("raw-accuracy")
before, after = metric("train:centres-before"), metric("train:centres-after")
far, near = metric("train:residual-before"), metric("train:residual-after")
WEIGHTS = {"l2-sp": ("0.005", "0.05", "0.5"), **dict.fromkeys(FAMILIES[1:], ("0.1", "0.3", "1.0"))}


def best(family: str) -> Linear:
    """Return the accuracy of a family at the weight that validation chose."""
    return mean(chosen[f"{family}-{w}"] for w in WEIGHTS[family])


PAPER = Paper(
    slug="dr-tune",
    claims=(
        Claim(
            "the head keeps what was pretrained",
            "A head under distribution regularisation knows pretrained features of unseen images, a fine-tuned one "
            "does not.",
            raw["many-dr-1.0"] >= raw["many-fine-tune"] + 0.06,
        ),
        Claim(
            "calibration brings the clouds together",
            "The translation removes four fifths of the distance between class centres, the rotation lowers what is "
            "left between the two clouds.",
            (after["full-1.0"] <= 0.2 * before["full-1.0"], near["full-1.0"] <= far["full-1.0"]),
        ),
        Claim(
            "no harm",
            "Full DR-Tune costs at most two points against plain fine-tuning.",
            (
                best("full") >= accuracy["fine-tune"] - 0.02,
                accuracy["many-full-0.1"] >= accuracy["many-fine-tune"] - 0.02,
            ),
        ),
        Claim(
            "better than fine-tuning",
            "The paper's claim: full DR-Tune is more accurate than plain fine-tuning.",
            best("full") >= accuracy["fine-tune"] + 0.005,
        ),
        Claim(
            "calibration repairs",
            "With calibration it is more accurate than without.",
            best("full") >= best("dr"),
        ),
        Claim(
            "better than an anchor",
            "It is more accurate than L2-SP, which holds the weights of the encoder.",
            best("full") >= best("l2-sp"),
        ),
    ),
    measure=on_raw_features,
    analyse=choose,
    figure=pictures,
    central=dict.fromkeys(("fine-tune", "l2-sp-0.05", "dr-1.0"), central),
    uses=(
        "flowerbed.clients.queues",
        "flowerbed.clients.rates",
        "flowerbed.datasets.excerpt",
        "flowerbed.models.alignment",
        "flowerbed.models.batchnorm",
    ),
)
