"""The claims about MSBReg."""

from __future__ import annotations

from collections.abc import Sequence

from flowerbed.experiments.papers.msbreg.central import central
from flowerbed.experiments.papers.msbreg.figure import clouds
from flowerbed.experiments.reproduction.claims import Claim, metric
from flowerbed.experiments.reproduction.paper import Paper

probe, share, wide = metric("probe"), metric("rank-share"), metric("spread")
WITH_S: Sequence[str] = ("m-s", "msb")
WITHOUT_S: Sequence[str] = ("m", "m-b")
PAPER = Paper(
    slug="msbreg",
    claims=(
        Claim(
            "dispersed embeddings are better",
            "With all three terms the features are better than with the centroid alone, and than random ones.",
            (probe["msb"] >= probe["m"] + 0.015, probe["msb"] >= probe["random"] + 0.03),
        ),
        Claim(
            "singular values disperse",
            "The term on singular values makes the embeddings fill their space.",
            tuple(share[arm] >= 25 / 32 for arm in WITH_S) + tuple(wide[arm] >= 0.5 for arm in WITH_S),
        ),
        Claim(
            "the pull alone collapses",
            "Without it they collapse, at least in part, where no batch norm prevents it.",
            tuple(share[arm] <= 17 / 32 for arm in WITHOUT_S) + tuple(wide[arm] <= 0.25 for arm in WITHOUT_S),
        ),
        Claim(
            "kicks cost nothing",
            "The Brownian term changes the probe by at most one point at this size.",
            (probe["msb"] >= probe["m-s"] - 0.01, probe["msb"] <= probe["m-s"] + 0.01),
        ),
        Claim(
            "no layer is needed",
            "Without batch norm BYOL collapses and MSBReg does not.",
            (wide["byol"] <= 0.25, wide["msb"] >= 0.5),
        ),
        Claim(
            "they stabilise other methods",
            "With the two regularisers BYOL does not collapse either, and is better.",
            (wide["byol-sb"] >= 0.5, probe["byol-sb"] >= probe["byol"]),
        ),
        Claim(
            "as good as BYOL",
            "MSBReg's features are as good as those of BYOL with batch norm.",
            probe["msb"] >= probe["byol-bn"] - 0.01,
        ),
    ),
    central=dict.fromkeys(("msb", "byol-bn"), central),
    figure=clouds,
    uses=("flowerbed.clients.momentum", "flowerbed.datasets.views", "flowerbed.models.probes"),
)
