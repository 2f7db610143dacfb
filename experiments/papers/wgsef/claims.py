"""The claims about the group sparse envelope."""

from __future__ import annotations

from flowerbed.experiments.papers.wgsef import UNCUT
from flowerbed.experiments.papers.wgsef.central import central
from flowerbed.experiments.papers.wgsef.figure import sparsity_and_price
from flowerbed.experiments.papers.wgsef.probes import LASSO, along_the_path, tuned
from flowerbed.experiments.reproduction.claims import Claim, Linear, metric
from flowerbed.experiments.reproduction.paper import Paper

accuracy, error = metric("accuracy"), metric("relative-error")
held_out, share = metric("held-out:relative-error"), metric(f"{UNCUT}-share-of-groups")
PAPER = Paper(
    slug="wgsef",
    claims=(
        Claim(
            "nothing left to cut",
            "The final cut to k groups costs at most 0.3 points of accuracy.",
            metric(f"{UNCUT}-accuracy")["wgsef"] - accuracy["wgsef"] <= 0.003,
        ),
        Claim(
            "better than group lasso",
            "With k groups it is more accurate than group lasso at the best of its grid, whose survivors are shrunk.",
            accuracy["wgsef"] >= sum((metric("chosen:accuracy")[arm] for arm in LASSO), Linear()) + 0.003,
        ),
        Claim(
            "hits k",
            "Growing lambda, the groups that are not exactly zero come within 5 % of k before any cut.",
            (share["wgsef"] <= 1.05 * 0.2, share["wgsef"] >= 0.95 * 0.2),
        ),
        Claim(
            "regression",
            "In sparse regression with the true k its error is at most nine tenths of that of group lasso, both where "
            "group lasso has k groups and where held-out samples choose its lambda.",
            (
                held_out["regression-envelope"] <= 0.9 * error["regression-lasso"],
                held_out["regression-envelope"] <= 0.9 * held_out["regression-lasso"],
            ),
        ),
    ),
    central={"wgsef": central},
    measure=along_the_path,
    analyse=tuned,
    figure=sparsity_and_price,
    uses=("flowerbed.models.groups",),
)
