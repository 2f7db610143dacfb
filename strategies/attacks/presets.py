"""The published attacks as compositions, with the constants of their papers or code.

===================  ==============================================================================
``dlg``              Zhu et al. 2019: l2, labels searched for as well, L-BFGS
``idlg``             Zhao et al. 2020: the label from the sign of the gradient, l2, L-BFGS
``ig``               Geiping et al. 2020 (Inverting Gradients): cosine, TV, signed Adam in the box
``modern``           the same with a softened sign, cosine decay and a warm-up
``wang``             Wang et al. 2019: l2, TV with exponents, L-BFGS in the box
``gradinversion``    Yin et al. 2021: norms, TV, norm, batch statistics, group term, noise
``tag``              Deng et al. 2021: l2 plus weighted l1, AdamW's step, clipped
===================  ==============================================================================

Iterations are those of the papers; ``attack.steps`` makes them fit a budget.
"""

from __future__ import annotations

from flowerbed.registry import Registry
from flowerbed.strategies.attacks.inversion import Descent, Inversion
from flowerbed.strategies.attacks.priors import BatchStatistics, Norm, TotalVariation
from flowerbed.strategies.attacks.spaces import Pixels

ATTACKS: Registry[Inversion] = Registry("attack")

ATTACKS.add(
    "dlg",
    Inversion(
        "dlg",
        Pixels(boxed=False, labels=True),
        objective="l2",
        descents=(Descent(steps=300, lr=1.0, method="lbfgs"),),
    ),
)
ATTACKS.add(
    "idlg",
    Inversion(
        "idlg",
        Pixels(boxed=False),
        objective="l2",
        descents=(Descent(steps=300, lr=1.0, method="lbfgs"),),
        rule="idlg",
    ),
)
ATTACKS.add(
    "ig",
    Inversion(
        "ig",
        # 0.1 of the paper's code, where the two directions are summed and not averaged, is 0.2 here.
        priors=(TotalVariation(0.2),),
        descents=(Descent(steps=24_000, lr=0.1, sign="hard", schedule="steps"),),
    ),
)
ATTACKS.add(
    "modern",
    Inversion(
        "modern",
        priors=(TotalVariation(0.1, p=2.0, q=0.5),),
        descents=(Descent(steps=24_000, lr=0.1, sign="soft", schedule="cosine", warmup=50),),
    ),
)
ATTACKS.add(
    "wang",
    Inversion(
        "wang",
        objective="l2",
        priors=(TotalVariation(0.2352, p=2.0, q=1.25),),
        descents=(Descent(steps=400, lr=1.0, method="lbfgs"),),
    ),
)
ATTACKS.add(
    "gradinversion",
    Inversion(
        "gradinversion",
        objective="norms",
        objective_scale=1e-3,
        priors=(TotalVariation(1e-4), Norm(1e-6)),
        statistics=BatchStatistics(0.1, first=10.0),
        group=0.01,
        descents=(Descent(steps=20_000, lr=0.1, schedule="cosine", warmup=50, noise=0.2),),
        rule="minimum",
        restarts=4,
    ),
)
ATTACKS.add(
    "tag",
    Inversion(
        "tag",
        Pixels(boxed=False, labels=True),
        objective="tag",
        descents=(Descent(steps=1000, lr=0.05, warmup=50, clip=1.0),),
    ),
)
