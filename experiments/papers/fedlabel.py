"""FedLabel: what is claimed for pseudo-labels of the more confident of two experts, and what they are compared with.

Cho, Joshi and Dimitriadis, "Local or Global: Selective Knowledge Assimilation for Federated Learning with Limited
Labels", ICCV 2023, arXiv 2307.08809; code microsoft/msrflute. The method, its equations and its two variants are in
``flowerbed.strategies.fedlabel``; here are only its claims. Of each unlabelled sample the global expert w and the local
expert w_L are asked, the more confident one s* names it, and the student learns from it:

    y = argmax s*, kept if max softmax s* > beta                                                        (eq. 4)
    CE(f(w_U; strong), y) + 1[argmax s = y] lambda KL(softmax s || softmax f(w_U; strong))              (eq. 8)

Two statements are apart. *The choice works*: of all unlabelled samples seen, more get a right label that is used
(coverage times precision, ``train:pseudo-correct-share``) than if one expert always wrote it. The arms ``*-expert`` are
trainings with one expert; ``train:global-alone-correct-share`` and its like judge by the same two models, sample by
sample. *It helps*: the accuracy exceeds that of labels alone.

All arms of one setting make as many optimizer steps at every client, the method half of them on pseudo-labels, with
RandAugment at strengths for small images, drawn anew at every step. Accuracy is the mean over the last three
evaluations (rounds 32, 36 and 40), pseudo-labels are those of the last three rounds; no round is picked.

Controls: labels alone with all steps, and with those that the local expert has (``labels-only-tau``), which tells what
the student adds from what it takes away; each expert alone; FixMatch; all labels. ``central-*`` ask whether
consistency training pays in a setting at all: where it does not, no way of choosing labels can.

Settings: pooled Fashion-MNIST with 5 % of the labels, once of all classes and once of half of each client's
(``mismatch-*``); MNIST with 1 % (``mnist-*``), with the ablations: confidence, threshold, half merge, anchor,
burn-in, and half of the summed step; CIFAR-10 with 20 % and convolutions under batch and group norm (``bn-*``,
``gn-*``), the paper's own kind of network and images.

The paper's tables need 2000 rounds of a ResNet-50; its gains of 8 to 24 points are not what is claimed here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowerbed.experiments.reproduction import figures
from flowerbed.experiments.reproduction.claims import Claim, metric
from flowerbed.experiments.reproduction.engine import Reproduction
from flowerbed.experiments.reproduction.paper import Paper

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETTINGS = {
    "": "Fashion-MNIST, 5 % of the labels",
    "mismatch-": "Fashion-MNIST, labels of half of a client's classes",
    "mnist-": "MNIST, 1 % of the labels",
}
"""What the arms' names begin with."""
DRAWN = {
    "FedLabel": "fedlabel",
    "global expert": "global-expert",
    "local expert": "local-expert",
    "FixMatch": "fixmatch",
    "labels only": "labels-only",
}
CURVES = {
    "train:pseudo-coverage": "coverage of pseudo-labels",
    "train:pseudo-precision": "precision of pseudo-labels",
    "accuracy": "test accuracy",
}


def figure(made: Reproduction) -> Figure:
    """Return coverage and precision of pseudo-labels and the test accuracy by round, for every setting."""
    drawn, axes = figures.canvas(len(CURVES), len(SETTINGS), 4.6, 3.2)
    places = [(prefix, name) for prefix in SETTINGS for name in CURVES]
    for axis, (prefix, name) in zip(axes, places, strict=True):
        for place, (label, arm) in enumerate(DRAWN.items()):
            if prefix + arm in made.arms:
                figures.curve(axis, made, prefix + arm, name, label, place)
        axis.set_title(SETTINGS[prefix], fontsize=9)
        figures.finish(axis, "round", CURVES[name])
    return drawn


accuracy, correct = metric("accuracy"), metric("train:pseudo-correct-share")
by_global, by_local = metric("train:global-alone-correct-share"), metric("train:local-alone-correct-share")
sent = metric("cost:bytes_up")


def of_setting(prefix: str) -> tuple[Claim, ...]:
    """Return the claims that are made for every setting, for the one whose arms begin with ``prefix``."""
    method = f"{prefix}fedlabel"
    where = f" ({prefix.removesuffix('-')})" if prefix else ""
    return (
        Claim(
            f"choice{where}",
            "The more confident expert gives as many right pseudo-labels as the better of the two would alone.",
            (
                correct[method] >= correct[f"{prefix}global-expert"] - 0.01,
                correct[method] >= correct[f"{prefix}local-expert"] - 0.01,
            ),
        ),
        Claim(
            f"choice in the same models{where}",
            "It gives as many as either expert of the very same round.",
            (correct[method] >= by_global[method] - 0.01, correct[method] >= by_local[method] - 0.01),
        ),
        helps(prefix, where),
    )


def helps(prefix: str, where: str) -> Claim:
    """Return the claim that it helps, for the arms that begin with ``prefix``."""
    method = accuracy[f"{prefix}fedlabel"]
    return Claim(
        f"helps{where}",
        "FedLabel beats training on the labels alone with as many steps, and FixMatch at the clients.",
        (method >= accuracy[f"{prefix}labels-only"] + 0.01, method >= accuracy[f"{prefix}fixmatch"]),
        mechanism=method >= accuracy["labels-only-tau"] if not prefix else (),
    )


PAPER = Paper(
    slug="fedlabel",
    claims=(
        *(claim for prefix in SETTINGS for claim in of_setting(prefix)),
        helps("bn-", " (cifar bn)"),
        helps("gn-", " (cifar gn)"),
        *(
            Claim(
                f"precondition ({name})",
                "In one place FixMatch beats training on the labels alone by two points: pseudo-labels can pay.",
                accuracy[f"central-{name}-fixmatch"] >= accuracy[f"central-{name}-labels-only"] + 0.02,
            )
            for name in ("fashion", "mnist")
        ),
        Claim(
            "beyond all labels",
            "With few labels FedLabel beats federated training on all labels.",
            accuracy["fedlabel"] >= accuracy["all-labels"],
        ),
        Claim(
            "traffic",
            "It sends what FedAvg sends; the released form sends two models.",
            (sent["fedlabel"] <= 1.1 * sent["labels-only"], sent["flute"] >= 1.5 * sent["labels-only"]),
        ),
    ),
    figure=figure,
    uses=(
        "flowerbed.strategies.fedlabel",
        "flowerbed.clients.experts",
        "flowerbed.clients.unlabelled",
        "flowerbed.models.strided",
        "flowerbed.datasets.shrunk",
    ),
)
