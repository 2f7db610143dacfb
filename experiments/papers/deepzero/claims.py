"""The claims about DeepZero."""

from __future__ import annotations

from flowerbed.experiments.papers.deepzero.central import central
from flowerbed.experiments.papers.deepzero.figure import by_queries
from flowerbed.experiments.papers.deepzero.probes import half_way
from flowerbed.experiments.reproduction.claims import Claim, metric
from flowerbed.experiments.reproduction.paper import Paper

accuracy, half, budget = metric("accuracy"), metric("half-accuracy"), metric("budget")
RANDOM = tuple(f"rge-{q}-{lr}" for q in ("many", "few") for lr in (0.03, 0.1, 0.3, 1.0))
EQUAL = ("cge", "sparse", "uniform", *RANDOM)


PAPER = Paper(
    slug="deepzero",
    measure=half_way,
    claims=(
        Claim(
            "as good as backpropagation",
            "CGE is as accurate as backpropagation after as many steps.",
            accuracy["cge"] >= accuracy["backprop"] - 0.01,
        ),
        Claim(
            "coordinates beat random directions",
            "With half of the queries CGE is as accurate as random directions with all of them, few or many a step, "
            "at every learning rate.",
            tuple(half["cge"] >= accuracy[arm] for arm in RANDOM),
            mechanism=tuple(accuracy["cge"] >= accuracy[arm] for arm in RANDOM),
        ),
        Claim(
            "sparse gradients are enough",
            "Sparse CGE reaches the accuracy of dense CGE with half of its queries.",
            half["sparse"] >= accuracy["cge"],
            mechanism=accuracy["sparse"] >= accuracy["cge"],
        ),
        Claim(
            "equal budgets",
            "Control: all arms that estimate spend the same number of losses, to 2 %.",
            tuple(b for arm in EQUAL for b in (budget[arm] <= 1.0 + 1e-9, budget[arm] >= 0.98)),
        ),
    ),
    central=dict.fromkeys(("backprop", "cge"), central),
    figure=by_queries,
    uses=("flowerbed.models.zeroth_order", "flowerbed.models.sparsity"),
)
