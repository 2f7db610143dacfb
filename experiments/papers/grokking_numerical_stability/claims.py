"""The claims about StableMax and perpGrad."""

from __future__ import annotations

from flowerbed.experiments.papers.grokking_numerical_stability.central import central
from flowerbed.experiments.papers.grokking_numerical_stability.figure import curves
from flowerbed.experiments.papers.grokking_numerical_stability.probes import diagnosis
from flowerbed.experiments.reproduction.claims import Claim, metric
from flowerbed.experiments.reproduction.paper import Paper

accuracy, grokked, onset, gone = (metric(n) for n in ("accuracy", "grokked-at", "collapsed-at", "collapsed"))
PAPER = Paper(
    slug="grokking-numerical-stability",
    claims=(
        Claim(
            "perpGrad generalises at once",
            "Without any regularisation perpGrad reaches 95 % test accuracy within 150 epochs.",
            (grokked["perp"] <= 150, accuracy["perp"] >= 0.95),
        ),
        Claim(
            "plain training never does",
            "Without regularisation AdamW fits the training data and predicts nothing (control of the gain).",
            (accuracy["plain"] <= 0.1, metric("train-accuracy")["plain"] >= 1),
        ),
        Claim(
            "decay does, later",
            "Strong weight decay generalises too, within 100 to 300 epochs, but after perpGrad (strong baseline).",
            (grokked["decay"] >= 100, grokked["decay"] <= 300, grokked["decay"] >= grokked["perp"] + 1),
        ),
        Claim(
            "descent grows the weights",
            "After fitting, plain descent points along the weights of the last layer.",
            metric("cosine-3")["plain"] >= 0.7,
        ),
        Claim(
            "collapse stops parity",
            "The cross entropy does not learn parity and its softmax collapses.",
            (accuracy["parity-ce"] <= 0.60, gone["parity-ce"] >= 0.3),
            mechanism=gone["parity-ce"] >= 0.3,
        ),
        Claim(
            "StableMax learns parity",
            "StableMax learns parity without regularisation, on logits under which a softmax would collapse.",
            (accuracy["parity-stablemax"] >= 0.85, metric("softmax-collapsed")["parity-stablemax"] >= 0.9),
            mechanism=accuracy["parity-stablemax"] >= accuracy["parity-ce"] + 0.1,
        ),
        Claim(
            "precision decides the onset",
            "The softmax collapses by epoch 500 in float16, from 1,250 to 2,250 in float32, not by 3,000 in float64.",
            (
                onset["onset-float16"] <= 500,
                onset["onset-float32"] >= 1250,
                onset["onset-float32"] <= 2250,
                onset["onset-float64"] >= 3001,
            ),
            mechanism=(
                onset["onset-float16"] <= onset["onset-float32"] - 1,
                onset["onset-float32"] <= onset["onset-float64"] - 1,
            ),
        ),
    ),
    measure=diagnosis,
    figure=curves,
    central=dict.fromkeys(("plain", "decay", "stablemax", "onset-float16", "parity-stablemax"), central),
    uses=("flowerbed.models.softmax", "flowerbed.datasets.algorithmic"),
)
