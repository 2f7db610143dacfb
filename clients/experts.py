"""Two frozen models that name unlabelled samples: who is asked, who is believed, what the other says.

The *global* expert is the model that the client received, the *local* one that model after training on the client's
own labels. Everything here is a pure function of their outputs.

    p = softmax f(w; x);  var p = (|p|^2 - 1/C) / (C - 1) lies between 0 (uniform) and 1/C (one class)

so that comparing variances of probabilities is comparing collision probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flowerbed.clients.unlabelled import CORRECT, KEPT, TOTAL, pseudo_label_counts

ENTROPY_FLOOR = 1e-5
"""Keeps the inverse of a vanishing entropy finite, as released."""
BOTH, GLOBAL, LOCAL = "both", "global", "local"
EXPERTS = (BOTH, GLOBAL, LOCAL)

CHOSEN_GLOBAL, CHOSEN_GLOBAL_CORRECT = "chosen-global-kept-per-class", "chosen-global-correct-per-class"
"""Pseudo-labels used that the global expert wrote, by the class that they name, and those of them that are right."""
AGREED = "agreed-kept-per-class"
"""Pseudo-labels used on which both experts agree, by class."""
ALONE_KEPT, ALONE_CORRECT = "alone-kept-per-class", "alone-correct-per-class"
"""With ``global-`` or ``local-`` before it: what that expert alone would have given at the same threshold."""


def inverse_entropy(outputs: Tensor) -> Tensor:
    """Return 1 / (H(p) + 1e-5), H in nats."""
    entropy: Tensor = torch.special.entr(outputs.softmax(-1)).sum(-1)
    return 1 / (entropy + ENTROPY_FLOOR)


CONFIDENCES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "variance": lambda outputs: outputs.softmax(-1).var(-1),
    "entropy": inverse_entropy,
    "max-probability": lambda outputs: outputs.softmax(-1).amax(-1),
    "logit-variance": lambda outputs: outputs.var(-1),
}
"""h: outputs ``(B, C)`` to the confidence of each sample ``(B,)``, at least 0; all but the last see probabilities.

``logit-variance`` depends on the scale of each expert's outputs, so that the louder one wins.
"""


@dataclass(frozen=True)
class Verdict:
    """What two experts make of a batch; all fields are of the batch's B samples, in order."""

    labels: Tensor
    """int64: the class that the chosen expert names."""
    kept: Tensor
    """bool: whether the chosen expert is sure enough for the label to be used."""
    from_global: Tensor
    """bool: whether the global expert was chosen."""
    agreeing: Tensor
    """bool: whether both name the same class."""
    ratio: Tensor
    """Confidence of the expert that was not chosen over that of the chosen one, in [0, 1]."""


def judge(
    of_global: Tensor, of_local: Tensor, h: Callable[[Tensor], Tensor], beta: float, experts: str = BOTH
) -> Verdict:
    """Return the verdict on outputs ``(B, C)`` of both experts.

    The more confident one (``h``) names the sample, the global one where both are equally confident; the label is
    kept if its probability is strictly above ``beta``. ``experts`` may name the one that is always chosen. Where
    both confidences are equal, also where they are zero, their ratio is 1.
    """
    by_global, by_local = h(of_global), h(of_local)
    from_global = (
        by_global >= by_local if experts == BOTH else torch.full_like(by_global, experts == GLOBAL).bool()
    )
    chosen = torch.where(from_global[:, None], of_global, of_local)
    first = torch.where(from_global, by_global, by_local)
    second = torch.where(from_global, by_local, by_global)
    # Not below happens to equals, to two confidences of zero, and to an expert that is chosen whatever it says.
    ratio = torch.where(second < first, second / first, 1.0)
    return Verdict(
        labels=chosen.argmax(-1),
        kept=sure(chosen, beta),
        from_global=from_global,
        agreeing=of_global.argmax(-1) == of_local.argmax(-1),
        ratio=ratio,
    )


def sure(outputs: Tensor, beta: float) -> Tensor:
    """Return for outputs ``(B, C)`` whether the largest probability is strictly above ``beta``; bool ``(B,)``."""
    return outputs.softmax(-1).amax(-1) > beta


def verdict_counts(
    verdict: Verdict, of_global: Tensor, of_local: Tensor, truth: Tensor, beta: float
) -> dict[str, Tensor]:
    """Return how good pseudo-labels were and who wrote them: counts per class (int64) that add up.

    Beside those of ``pseudo_label_counts`` they say what each expert alone would have given. ``truth`` is int64
    ``(B,)`` and serves these numbers and nothing else.
    """
    classes = of_global.shape[-1]

    def counted(labels: Tensor, kept: Tensor) -> dict[str, Tensor]:
        return pseudo_label_counts(labels, kept, truth, classes)

    found = counted(verdict.labels, verdict.kept)
    written = counted(verdict.labels, verdict.kept & verdict.from_global)
    found |= {
        CHOSEN_GLOBAL: written[KEPT],
        CHOSEN_GLOBAL_CORRECT: written[CORRECT],
        AGREED: counted(verdict.labels, verdict.kept & verdict.agreeing)[KEPT],
    }
    for name, outputs in ((GLOBAL, of_global), (LOCAL, of_local)):
        alone = counted(outputs.argmax(-1), sure(outputs, beta))
        found |= {f"{name}-{ALONE_KEPT}": alone[KEPT], f"{name}-{ALONE_CORRECT}": alone[CORRECT]}
    return found


def no_counts(num_classes: int) -> dict[str, list[int]]:
    """Return the counts of a round in which nothing was asked."""
    names = (KEPT, CORRECT, TOTAL, CHOSEN_GLOBAL, CHOSEN_GLOBAL_CORRECT, AGREED)
    alone = (f"{name}-{count}" for name in (GLOBAL, LOCAL) for count in (ALONE_KEPT, ALONE_CORRECT))
    return {name: [0] * num_classes for name in (*names, *alone)}


def verdict_rates(metrics: Mapping[str, object]) -> dict[str, float]:
    """Return the shares that belong to the summed counts of a round.

    ``chosen-global-share`` and ``agreement`` are of the pseudo-labels used, ``chosen-global-precision`` and
    ``chosen-local-precision`` of those that one expert wrote; ``global-alone-correct-share`` and
    ``local-alone-correct-share`` are of all samples seen, as ``pseudo-correct-share`` is. 0 where there are none.
    """

    def total(name: str) -> float:
        counts = metrics.get(name)
        return float(sum(counts)) if isinstance(counts, list) else 0.0

    def share(part: float, whole: float) -> float:
        return part / whole if whole else 0.0

    kept, written, right = total(KEPT), total(CHOSEN_GLOBAL), total(CHOSEN_GLOBAL_CORRECT)
    return {
        "chosen-global-share": share(written, kept),
        "chosen-global-precision": share(right, written),
        "chosen-local-precision": share(total(CORRECT) - right, kept - written),
        "agreement": share(total(AGREED), kept),
        "global-alone-correct-share": share(total(f"{GLOBAL}-{ALONE_CORRECT}"), total(TOTAL)),
        "local-alone-correct-share": share(total(f"{LOCAL}-{ALONE_CORRECT}"), total(TOTAL)),
    }
