"""GGEUR: what is claimed for embeddings spread along the global class covariance, and what is measured.

Ma, Dai, Huang and Chen, "Geometric Knowledge-Guided Localized Global Distribution Alignment for Federated Learning",
CVPR 2025, arXiv 2503.06457; code WeiDai-David/2025CVPR_GGEUR. The method, its equations and where paper and released
code differ are in ``flowerbed.strategies.ggeur``; here are only its claims.

    Sigma_i = (1/N_i) [ sum_k n_k Sigma_k + sum_k n_k (mu_k - mu_i)(mu_k - mu_i)^T ]                     (eq. 4)
    x~ = x_j + sum_m eps_m sqrt(lambda_m) xi_m,   (lambda_m, xi_m) the eigenpairs of Sigma_i             (eq. 5)

until every class has T embeddings at every client, then rounds of any algorithm on a linear head.

Every arm makes as many optimizer steps with the same learning rate on the same embeddings, and is judged by its last
round; the released code reports the best round on the test set. The encoder (whitened patches, k-means atoms) has seen
none of the clients' images: it stands in for CLIP, so the paper's tables are not what is compared, its sentences are.

Controls: ``duplicate`` balances classes without any noise, ``global-mean`` draws from N(mu_i, Sigma_i) around a mean
that the server knows anyway, ``raw`` and ``raw-uniform`` do nothing. Balanced clients weigh the same, so of the two
the second isolates what the embeddings add; the first is what FedAvg's user has. ``one-shot-*`` are the released
loop, in which no client ever receives the mean, for both sides of the comparison.

Ablations: spread, guides, rank, T, other clients' prototypes; other encoders (none, and features learned with
labels); less skew; four other algorithms underneath. On a linear head MOON and FedProto are FedAvg, so they are left
out. Privacy: a floor on the counts, and noise on the statistics (``train:dp-epsilon`` at delta 1e-5), with
their cost in accuracy.

One client that has everything is ``one-place``: plain central training, to the bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from flowerbed.experiments.config import Simulation
from flowerbed.experiments.reproduction import figures
from flowerbed.experiments.reproduction.central import CentralStep, central_run
from flowerbed.experiments.reproduction.claims import Claim, mean, metric
from flowerbed.experiments.reproduction.engine import Reproduction
from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.experiments.reproduction.paper import Paper
from flowerbed.storage import Tensors
from flowerbed.strategies.ggeur_geometry import Moments, total

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASES = ("fedprox", "scaffold", "feddyn", "fedntd")


def pooled_covariance(x: Tensor, y: Tensor, classes: int) -> Tensor:
    """Return the biased covariance of each class ``(C, d, d)`` of all samples at once, in float64 and two passes."""
    found = []
    for c in range(classes):
        own = x[y == c].double()
        centred = own - own.mean(0)
        found.append(centred.T @ centred / len(own))
    return torch.stack(found)


def measure(finished: Finished) -> dict[str, float]:
    """Return for the method's arm how far the clients' covariance is from the pooled one, relative to its largest
    entry; {} for the others."""
    if finished.arm != "ggeur":
        return {}
    data, train = finished.dataset, finished.parts.train
    classes = data.num_classes

    def of(rows: Tensor) -> tuple[Tensor, Tensor]:
        return data.prepare(data.train.inputs[rows]).flatten(1), data.train.labels[rows]

    clients = [of(torch.from_numpy(train.indices(k).copy())) for k in range(train.num_clients)]
    together = total([Moments.of(x, y, classes) for x, y in clients]).covariance
    x, y = (torch.cat(parts) for parts in zip(*clients, strict=True))
    direct = pooled_covariance(x, y, classes)
    return {"covariance-error": float((together - direct).abs().max() / direct.abs().max())}


def central(simulation: Simulation) -> Tensors:
    """Return what a plain loop over all embeddings makes of the head."""

    def loss(step: CentralStep) -> Tensor:
        return F.cross_entropy(step.net(step.x), step.y)

    return central_run(simulation, loss)


PANELS = (
    ("Fashion-MNIST, Dirichlet 0.03, every round broadcast", "accuracy", {
        "FedAvg": "raw", "FedAvg, uniform mean": "raw-uniform", "duplication": "duplicate", "GGEUR": "ggeur",
        "GGEUR, eq. 5 as printed": "ggeur-lambda", "GGEUR, prototypes": "ggeur-prototypes",
        "global class means": "global-mean", "all in one place": "one-place",
    }),
    ("one shot, as released", "accuracy", {
        "raw": "one-shot-raw", "duplication": "one-shot-duplicate", "GGEUR": "one-shot-ggeur",
    }),
    ("statistics protected", "accuracy", {
        "off": "ggeur", "floor 2": "ggeur-floor-2", "floor 5": "ggeur-floor-5", "floor 20": "ggeur-floor-20",
        "server, z = 0.5": "ggeur-dp-server-0.5", "server, z = 1": "ggeur-dp-server-1",
        "server, z = 2": "ggeur-dp-server-2", "clients, z = 1": "ggeur-dp-clients-1",
    }),
    ("four domains, mean of their accuracies", "accuracy-domains-mean", {
        "FedAvg": "domains-raw", "duplication": "domains-duplicate", "Algorithm 1": "domains-step-1",
        "Algorithm 2": "domains-steps-1-2", "prototypes alone": "domains-step-2",
        "global class means": "domains-global-mean",
    }),
)  # fmt: skip
"""Title, metric, arms by their name in the picture."""


def figure(made: Reproduction) -> Figure:
    """Return the accuracy by arm: rounds, one shot, protected statistics, domains."""
    drawn, axes = figures.canvas(2, 2, 5.6, 2.9)
    for axis, (title, name, arms) in zip(axes, PANELS, strict=True):
        figures.arms_by_place(axis, made, name, arms)
        axis.set_title(title, fontsize=9)
        figures.finish(axis, "test accuracy, last round", "")
    return drawn


accuracy, spread = metric("accuracy"), metric("accuracy-domains-std")
domains = metric("accuracy-domains-mean")
PAPER = Paper(
    slug="ggeur",
    claims=(
        Claim(
            "label skew",
            "Under label skew GGEUR beats averaging on raw embeddings and balancing by repetition.",
            (
                accuracy["ggeur"] >= accuracy["raw-uniform"] + 0.008,
                accuracy["ggeur"] >= accuracy["duplicate"] + 0.008,
            ),
        ),
        Claim(
            "label skew under a weighted mean",
            "It beats FedAvg also where FedAvg weighs clients by their samples, as it is defined.",
            accuracy["ggeur"] >= accuracy["raw"] + 0.008,
        ),
        Claim(
            "one shot",
            "Where no client ever receives the mean, as in the released code, the gain is large.",
            accuracy["one-shot-ggeur"] >= accuracy["one-shot-raw"] + 0.05,
        ),
        Claim(
            "exact covariance",
            "The clients' statistics give the covariance of the pooled embeddings exactly (eq. 4).",
            metric("covariance-error")["ggeur"] <= 1e-10,
        ),
        Claim(
            "domains",
            "With one domain a client, the other domains' prototypes add to the mean and even out the domains.",
            (
                domains["domains-steps-1-2"] >= domains["domains-step-1"] + 0.03,
                spread["domains-steps-1-2"] <= spread["domains-step-1"],
            ),
        ),
        Claim(
            "domains against FedAvg",
            "Algorithm 2 beats FedAvg and repetition on the mean of the domains.",
            (
                domains["domains-steps-1-2"] >= domains["domains-raw"] + 0.03,
                domains["domains-steps-1-2"] >= domains["domains-duplicate"] + 0.03,
            ),
        ),
        Claim(
            "any algorithm",
            "It improves the algorithms that it is put under, on average by 0.8 points and none for the worse.",
            (
                mean(accuracy[f"{b}-ggeur"] for b in BASES)
                >= mean(accuracy[f"{b}-raw"] for b in BASES) + 0.008,
                *(accuracy[f"{b}-ggeur"] >= accuracy[f"{b}-raw"] for b in BASES),
            ),
        ),
        Claim(
            "own centres",
            "Own samples are no worse as centres than the global class means, which the server holds as well.",
            accuracy["ggeur"] >= accuracy["global-mean"],
        ),
        Claim(
            "roots",
            "Eigenvalues in place of their roots (eq. 5 as printed) are worse on embeddings that are not scaled down.",
            accuracy["ggeur"] >= accuracy["ggeur-lambda"] + 0.01,
        ),
        Claim(
            "floor",
            "Statistics that leave out classes with fewer than five samples cost at most a point.",
            accuracy["ggeur-floor-5"] >= accuracy["ggeur"] - 0.01,
        ),
    ),
    measure=measure,
    figure=figure,
    central={"one-place": central},
    uses=(
        "flowerbed.strategies.ggeur",
        "flowerbed.strategies.ggeur_generation",
        "flowerbed.strategies.ggeur_geometry",
        "flowerbed.strategies.ggeur_privacy",
        "flowerbed.experiments.encoders",
    ),
)
