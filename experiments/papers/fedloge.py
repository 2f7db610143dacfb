"""FedLoGe: what is claimed for a sparse simplex and realigned heads, and what the same realignment does for FedAvg.

Xiao et al., "FedLoGe: Joint Local and Generic Federated Learning under Long-tailed Data", ICLR 2024, arXiv 2401.08977;
code ZackZikaiXiao/FedLoGe. The method and its equations are in ``flowerbed.strategies.fedloge``; here are only its
claims. G = (W, b) is the averaged auxiliary head, L_k = (V, c) the own head of client k.

    GA (generic):   w_c <- 1.7 w_c / |w_c|                                                          (eq. 6)
    LA (personal):  G_k has the rows |v_c| w_c; client k predicts by L_k(f) + G_k(f)                (eq. 7)

GM is the accuracy on the balanced test set, PM the mean over all clients of that on test samples with the client's own
distribution; both of the last round. Classes are ``many``, ``medium`` and ``few`` by 75 % and 95 % of the training
samples, as in the released code. No class is masked for any arm; ``personal-*-masked`` are the same figures with the
classes that a client has never trained on forbidden, again for every arm: the released code masks FedLoGe alone.

Controls. ``realigned-fedavg`` is FedAvg, bit for bit, with own heads trained beside it on detached features and the
same GA and LA: what FedLoGe loses against it the simplex costs. Its auxiliary head is plain FedAvg; GA on it is the
tau-normalised classifier of Kang et al. (ICLR 2020) with bias. ``personal-uniform`` replaces the lengths |v_c| of LA
by their mean: what that loses is what the lengths say class by class.

The small network on pooled Fashion-MNIST is a first place to look. The paper's claim is about convolutions with batch
norm on CIFAR-10, so ``bn-*`` and ``gn-*`` are those, with both normalisations. gamma is 1, since 0.1 is a temperature
for 500 rounds and 512 features; ``*-short`` is 0.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowerbed.experiments.reproduction import figures
from flowerbed.experiments.reproduction.claims import Claim, metric
from flowerbed.experiments.reproduction.engine import Reproduction
from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.experiments.reproduction.paper import Paper
from flowerbed.models.base import Net
from flowerbed.models.sparse_etf import SPARSE, nearest_angles, simplex_angle
from flowerbed.storage import Tensors
from flowerbed.strategies.fedloge import FORMS, Head, added, auxiliary_head, logits
from flowerbed.strategies.personal import PERSONAL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NETS = {"": "small network", "bn-": "convolutions with batch norm", "gn-": "convolutions with group norm"}
"""What the arms' names begin with."""


def uniform_rows(auxiliary: Head, own: Head) -> Tensors:
    """Return LA's head with the mean length of the own head's rows in place of each: the control."""
    lengths = torch.linalg.vector_norm(own["weight"], dim=1)
    return {**auxiliary, "weight": auxiliary["weight"] * lengths.mean()}


def personal_heads(auxiliary: Head, own: Head) -> dict[str, Head]:
    """Return a client's head in every form, from the averaged and its own."""
    forms = {name: form(auxiliary, own) for name, form in FORMS.items()}
    return {**forms, "uniform": added(own, uniform_rows(auxiliary, own)), "auxiliary": auxiliary}


@torch.no_grad()
def measure(finished: Finished) -> dict[str, float]:
    """Return PM of every form of a client's head, as it is and with unseen classes forbidden; how much longer the
    auxiliary head's rows of frequent classes are; and of W_s the angle to its nearest row that is missing, in
    degrees, and the relative error of its lengths."""
    parts, net = finished.parts, finished.model
    assert isinstance(net, Net)
    data, tensors = finished.dataset, finished.tensors
    starts = range(0, len(data.test), 512)
    features = torch.cat([net.features(data.prepare(data.test.inputs[at : at + 512])) for at in starts])
    if finished.simulation.strategy.name != "fedloge":
        own_heads: list[dict[str, Head]] = [
            {"generic": dict(net.head.state_dict())}
        ] * parts.train.num_clients
        found: dict[str, float] = {}
    else:
        auxiliary = auxiliary_head(tensors)
        states = [finished.client(k)[PERSONAL] for k in range(parts.train.num_clients)]
        own_heads = [personal_heads(auxiliary, own) for own in states]
        lengths = torch.linalg.vector_norm(auxiliary["weight"], dim=1)
        by_size = torch.bincount(data.train.labels[torch.from_numpy(parts.train.samples.copy())]).argsort()
        found = {
            "row-length-ratio": float(lengths[by_size[-1]] / lengths[by_size[0]]),
            **simplex(tensors[SPARSE]),
        }
    present = torch.from_numpy(parts.train.class_counts(data.train.labels, data.num_classes)) > 0
    scores: dict[str, list[float]] = {}
    for k, heads in enumerate(own_heads):
        rows = torch.from_numpy(parts.test.indices(k).copy())
        if not len(rows):
            continue
        for name, head in heads.items():
            outputs = logits(head, features[rows])
            masked = outputs.masked_fill(~present[k], -torch.inf)
            for key, said in ((f"personal-{name}", outputs), (f"personal-{name}-masked", masked)):
                right = (said.argmax(1) == data.test.labels[rows]).double().mean()
                scores.setdefault(key, []).append(float(right))
    return {**found, **{name: sum(values) / len(values) for name, values in scores.items()}}


def simplex(sparse: Tensor) -> dict[str, float]:
    """Return how far W_s ``(C, d)`` is from its targets; {} where there is none."""
    if not bool(sparse.any()):
        return {}
    rows = sparse.double()
    lengths = torch.linalg.vector_norm(rows, dim=1)
    return {
        "simplex-angle-missing": simplex_angle(len(rows)) - float(nearest_angles(rows.T).mean()),
        "simplex-length-deviation": float(lengths.std() / lengths.mean()),
    }


GROUPS = ("many", "medium", "few")
VARIANTS = {
    "FedAvg": ("auxiliary-", "realigned-fedavg"),
    "FedAvg, GA": ("", "realigned-fedavg"),
    "FedLoGe, W_s": ("fixed-", "fedloge"),
    "FedLoGe, auxiliary head": ("auxiliary-", "fedloge"),
    "FedLoGe, GA": ("", "fedloge"),
}
"""Prefix of the metric, and arm, by the name in the picture."""
PERSONAL_FORMS = {
    "auxiliary head": "personal-auxiliary",
    "own head": "personal-local",
    "sum": "personal-sum",
    "LA": "personal-code",
    "LA, equal lengths": "personal-uniform",
    "README form": "personal-readme",
}


def figure(made: Reproduction) -> Figure:
    """Return the accuracy on frequent, middle and rare classes by head, and below it PM by form of the head."""
    drawn, axes = figures.canvas(3, 2, 4.6, 3.4)
    for axis, (prefix, title) in zip(axes[:3], NETS.items(), strict=True):
        for place, (label, (head, arm)) in enumerate(VARIANTS.items()):
            of_group = [
                figures.values(made, prefix + arm, f"{head}accuracy-{group}-share-75-95")
                if prefix + arm in made.arms
                else []
                for group in GROUPS
            ]
            figures.line(axis, range(len(GROUPS)), of_group, label, place)
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(GROUPS)), ["head", "middle", "tail"])
        figures.finish(axis, "classes, by 75 % and 95 % of the samples", "test accuracy")
    for axis, prefix in zip(axes[3:], NETS, strict=True):
        for place, arm in enumerate(("realigned-fedavg", "fedloge")):
            if prefix + arm in made.arms:
                of_form = [figures.values(made, prefix + arm, name) for name in PERSONAL_FORMS.values()]
                figures.line(axis, range(len(PERSONAL_FORMS)), of_form, ("FedAvg", "FedLoGe")[place], place)
        axis.set_xticks(range(len(PERSONAL_FORMS)), list(PERSONAL_FORMS), rotation=30, ha="right")
        figures.finish(axis, "", "PM, mean over clients")
    return drawn


gm, auxiliary = metric("accuracy"), metric("auxiliary-accuracy")
few, auxiliary_few = metric("accuracy-few-share-75-95"), metric("auxiliary-accuracy-few-share-75-95")
pm, pm_sum = metric("clients:personal-accuracy-mean"), metric("clients:sum-accuracy-mean")
pm_auxiliary = metric("clients:auxiliary-accuracy-mean")


def of_net(prefix: str, name: str) -> tuple[Claim, ...]:
    """Return the claims that are made for every network, for the one whose arms begin with ``prefix``."""
    method, control = f"{prefix}fedloge", f"{prefix}realigned-fedavg"
    where = f" ({name})" if prefix else ""
    return (
        Claim(
            f"GA{where}",
            "Rows of equal length make the averaged head better, above all on rare classes.",
            (gm[method] >= auxiliary[method] + 0.015, few[method] >= auxiliary_few[method] + 0.04),
        ),
        Claim(
            f"LA{where}",
            "The own rows' lengths make personal models better than the sum of both heads and than the averaged head.",
            (pm[method] >= pm_sum[method] + 0.003, pm[method] >= pm_auxiliary[method] + 0.01),
        ),
        Claim(
            f"whole{where}",
            "The whole method beats plain FedAvg in the generic model and in the personal ones.",
            (gm[method] >= auxiliary[control] + 0.005, pm[method] >= pm_auxiliary[control] + 0.005),
        ),
        Claim(
            f"simplex{where}",
            "Features that learn for the sparse simplex beat FedAvg's under the same realignment.",
            (gm[method] >= gm[control], pm[method] >= pm[control]),
        ),
        Claim(
            f"lengths{where}",
            "LA is better than the same sum with one length for all rows.",
            metric("personal-code")[method] >= metric("personal-uniform")[method],
        ),
    )


PAPER = Paper(
    slug="fedloge",
    claims=(
        *(claim for prefix, name in NETS.items() for claim in of_net(prefix, name)),
        Claim(
            "GA on FedAvg",
            "The same realignment helps plain FedAvg as much.",
            (
                gm["realigned-fedavg"] >= auxiliary["realigned-fedavg"] + 0.015,
                few["realigned-fedavg"] >= auxiliary_few["realigned-fedavg"] + 0.04,
            ),
        ),
        Claim(
            "construction",
            "The sparse simplex keeps the angles of the dense one, and rows of one length.",
            (
                metric("simplex-angle-missing")["fedloge"] <= 0.25,
                metric("simplex-length-deviation")["fedloge"] <= 0.01,
            ),
        ),
    ),
    measure=measure,
    figure=figure,
    uses=(
        "flowerbed.strategies.fedloge",
        "flowerbed.strategies.tau_norm",
        "flowerbed.models.sparse_etf",
        "flowerbed.models.strided",
        "flowerbed.datasets.shrunk",
    ),
)
