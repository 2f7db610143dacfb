"""The claims about dynamical stability of SGD."""

from __future__ import annotations

from flowerbed.experiments.papers.sgd_dynamical_stability.central import central
from flowerbed.experiments.papers.sgd_dynamical_stability.figure import by_rate
from flowerbed.experiments.papers.sgd_dynamical_stability.probes import GD_RATES, RATES, stability
from flowerbed.experiments.reproduction.claims import Claim, metric
from flowerbed.experiments.reproduction.paper import Paper

STAYS = (0.5, 0.8)
trace, bound, fit = metric("trace"), metric("trace-bound"), metric("train-loss")
error, distance, imbalance = metric("test-error"), metric("distance"), metric("imbalance")


PAPER = Paper(
    slug="sgd-dynamical-stability",
    measure=stability,
    claims=(
        Claim(
            "trace bound",
            "Minima that SGD stays at have tr G <= 2 / eta, at every rate.",
            tuple(b for rate in RATES for b in (bound[f"sgd-{rate}"] <= 1.02, fit[f"sgd-{rate}"] <= 1e-8)),
        ),
        Claim(
            "not of gd",
            "Control: full-batch gradient descent stays at minima far above the bound of SGD.",
            tuple(b for rate in GD_RATES[1:] for b in (bound[f"gd-{rate}"] >= 4, fit[f"gd-{rate}"] <= 1e-8)),
        ),
        Claim(
            "generalisation",
            "The test error of SGD falls with the rate, that of GD does not.",
            (
                error["sgd-0.03"] <= 0.1 * error["sgd-0.002"],
                error["gd-0.1"] >= 0.8 * error["gd-0.004"],
            ),
        ),
        Claim(
            "stays below",
            "SGD that starts beside a minimum stays there with rates below 2 / tr G.",
            (fit["minimum"] <= 1e-20, *(distance[f"escape-sgd-{c}"] <= 1e-3 for c in STAYS)),
        ),
        Claim(
            "leaves above",
            "At 1.2 times that rate SGD leaves for a flatter minimum that obeys the bound.",
            (
                distance["escape-sgd-1.2"] >= 1,
                bound["escape-sgd-1.2"] <= 1,
                fit["escape-sgd-1.2"] <= 1e-8,
                trace["escape-sgd-1.2"] <= 0.9 * trace["minimum"],
            ),
            mechanism=distance["escape-sgd-1.2"] >= 1,
        ),
        Claim(
            "diverges far above",
            "At twice the rate it diverges.",
            metric("diverged")["escape-sgd-2.0"] >= 1,
        ),
        Claim(
            "gd stays",
            "Control: gradient descent stays at the same minimum with all of these rates.",
            tuple(distance[f"escape-gd-{c}"] <= 1e-3 for c in (*STAYS, 1.2, 2.0)),
        ),
        Claim(
            "exact threshold",
            "The exact critical rate of the linearised dynamics lies just below 2 / tr G.",
            (metric("threshold")["minimum"] >= 0.8, metric("threshold")["minimum"] <= 1),
        ),
        Claim(
            "clients loosen it",
            "With eight clients a round the same rate regularises less, as far as the bound for B allows.",
            (
                trace["sgd-batch-8"] >= 4 * trace["sgd-0.03"],
                metric("batch-bound")["sgd-batch-8"] <= 1.02,
                fit["sgd-batch-8"] <= 1e-8,
            ),
        ),
        Claim(
            "balance",
            "SGD with a large rate balances the layers, GD keeps their imbalance.",
            (imbalance["balance-sgd"] <= 1.5, imbalance["balance-gd"] >= 0.8 * 8),
            mechanism=imbalance["balance-sgd"] <= 0.5 * imbalance["balance-gd"],
        ),
        Claim(
            "two layers",
            "The trace bound holds for two-layer ReLU networks, whose path norm falls with the rate.",
            (
                *(
                    b
                    for at in ("small", "large")
                    for b in (bound[f"relu-sgd-{at}"] <= 1.02, fit[f"relu-sgd-{at}"] <= 1e-8)
                ),
                metric("norm")["relu-sgd-large"] <= 0.8 * metric("norm")["relu-sgd-small"],
            ),
        ),
    ),
    central=dict.fromkeys(("sgd-0.03", "gd-0.1", "relu-sgd-small"), central),
    figure=by_rate,
    uses=("flowerbed.models.curvature", "flowerbed.datasets.regression"),
)
