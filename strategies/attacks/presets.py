"""The published attacks as compositions, with the constants of their papers or code.

===================  ==============================================================================
``dlg``              Zhu et al. 2019: l2, labels searched for as well, L-BFGS
``idlg``             Zhao et al. 2020: the label from the sign of the gradient, l2, L-BFGS
``ig``               Geiping et al. 2020 (Inverting Gradients): cosine, TV, signed Adam in the box
``modern``           the same with a softened sign, cosine decay and a warm-up
``wang``             Wang et al. 2019: l2, TV with exponents, L-BFGS in the box
``gradinversion``    Yin et al. 2021: norms, TV, norm, batch statistics, group term, noise
``tag``              Deng et al. 2021: l2 plus weighted l1, labels searched for, Adam, clipped
``fedavg``           Dimitrov et al. 2022: as ``ig``, epochs with samples of their own, matched and averaged
``readout``          the input of a first linear layer, divided out of its gradient
``imprint``          Fowl et al. 2022 (Robbing the Fed): the bins of an imprint layer
``trap``             Boenisch et al. 2021 (Curious Abandon Honesty): rows of trap weights that agree
``fishing``          Wen et al. 2022: the samples that a head made to fish let through, as ``modern`` finds them
``rgap``             Zhu and Blaschko 2021 (R-GAP): the input layer by layer, from the loss backwards
``lamp``             Balunovic et al. 2022: tokens, cosine, discrete moves, a language model of public text
``positions``        the tokens of one sequence from the gradient of a table of positions, solved for
``latent``           the latent code of a generator alone, cosine
``ggl``              Li et al. 2022: the same by CMA-ES on l2, with a penalty on the code
``gias``             Jeon et al. 2021: the latent code, then the generator's weights, cosine
``gifd``             Fang et al. 2023: the latent code, then feature maps in l1 balls, cosine
===================  ==============================================================================

Iterations are those of the papers; ``attack.steps`` makes them fit a budget. The last four need a prior. Of a generator
as small as ``gan32`` the feature maps have a few thousand values and not millions, and so have their l1 balls (GIFD's
1000 to 8000 are BigGAN's).
"""

from __future__ import annotations

from collections.abc import Callable

from flowerbed.errors import ConfigError
from flowerbed.registry import Registry
from flowerbed.strategies.attacks.analytic import BINS, READOUT, TRAP, ReadOut
from flowerbed.strategies.attacks.descents import Descent
from flowerbed.strategies.attacks.fishing import Fishing
from flowerbed.strategies.attacks.generative import Latent, Prior, shipped
from flowerbed.strategies.attacks.inversion import Inversion
from flowerbed.strategies.attacks.priors import BatchStatistics, Norm, SameSamples, TotalVariation
from flowerbed.strategies.attacks.recursive import Recursive
from flowerbed.strategies.attacks.spaces import Pixels
from flowerbed.strategies.attacks.text import PositionReadOut, Tokens

Attack = Inversion | ReadOut | Fishing | Recursive | PositionReadOut
Preset = Callable[[Prior | None], Attack]
ATTACKS: Registry[Preset] = Registry("attack")


def _plain(attack: Attack) -> None:
    """Register an attack without a generator."""
    ATTACKS.add(attack.name, lambda prior: attack)


_plain(
    Inversion(
        "dlg",
        Pixels(boxed=False, labels=True),
        objective="l2",
        descents=(Descent(steps=300, lr=1.0, method="lbfgs"),),
    )
)
_plain(
    Inversion(
        "idlg",
        Pixels(boxed=False),
        objective="l2",
        descents=(Descent(steps=300, lr=1.0, method="lbfgs"),),
        rule="idlg",
    )
)
_plain(
    Inversion(
        "ig",
        # 0.1 of the paper's code, where the two directions are summed and not averaged, is 0.2 here.
        priors=(TotalVariation(0.2),),
        descents=(Descent(steps=24_000, lr=0.1, sign="hard", schedule="steps"),),
    )
)
MODERN = Inversion(
    "modern",
    priors=(TotalVariation(0.1, p=2.0, q=0.5),),
    descents=(Descent(steps=24_000, lr=0.1, sign="soft", schedule="cosine", warmup=50),),
)
_plain(MODERN)
_plain(
    Inversion(
        "wang",
        objective="l2",
        priors=(TotalVariation(0.2352, p=2.0, q=1.25),),
        descents=(Descent(steps=400, lr=1.0, method="lbfgs"),),
    )
)
_plain(
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
    )
)
_plain(
    Inversion(
        "tag",
        Pixels(boxed=False, labels=True),
        objective="tag",
        descents=(Descent(steps=1000, lr=0.05, warmup=50, clip=1.0),),
    )
)

_plain(
    Inversion(
        "fedavg",
        priors=(TotalVariation(0.002),),
        order=SameSamples(0.01),
        descents=(Descent(steps=1000, lr=0.1, schedule="cosine"),),
    )
)
_plain(
    Inversion(
        "lamp",
        Tokens(),
        descents=(Descent(steps=100, lr=0.1),),
    )
)
_plain(PositionReadOut())
_plain(READOUT)
_plain(BINS)
_plain(TRAP)
_plain(Fishing(search=MODERN))
_plain(Recursive())

TAMPERINGS = {"trap": "trap_weights", "fishing": "class_fishing"}
"""What the server of a run does for attacks that need a malicious one, unless ``tampering`` says otherwise."""
WITHOUT_SEARCH = frozenset({"readout", "imprint", "trap", "rgap", "positions"})
"""Attacks that have no candidates, hence nothing to repeat a defence on."""
TEXT = frozenset({"lamp", "positions"})
"""Attacks on language models; all others are on images."""
GENERATIVE = {"latent": "cosine", "ggl": "means", "gias": "cosine", "gifd": "cosine"}
"""Attacks that search inside a generator, with their objective."""
STAGED = frozenset({"gias", "gifd"})
"""Attacks of several stages, which an expected distance ends."""
IMAGES = (TotalVariation(1e-4), Norm(1e-6))
"""The weak terms on images that GIFD's code gives all generative attacks."""


@ATTACKS.register("latent")
def latent(prior: Prior | None) -> Inversion:
    """Return the search of the latent code alone."""
    return Inversion(
        "latent",
        Latent(_needed("latent", prior)),
        priors=IMAGES,
        descents=(Descent(steps=1000, lr=0.1, schedule="ilo"),),
        restarts=4,
    )


@ATTACKS.register("ggl")
def ggl(prior: Prior | None) -> Inversion:
    """Return the gradient-free search of the latent code."""
    return Inversion(
        "ggl",
        Latent(_needed("ggl", prior), kl=0.1),
        objective="means",
        descents=(Descent(steps=500, lr=1.0, method="cma", population=50),),
    )


@ATTACKS.register("gias")
def gias(prior: Prior | None) -> Inversion:
    """Return the search of the latent code, then of the generator's weights."""
    return Inversion(
        "gias",
        Latent(_needed("gias", prior), weights=True),
        priors=(TotalVariation(1e-6),),
        descents=(Descent(steps=1000, lr=0.03), Descent(steps=5000, lr=1e-3, schedule="steps")),
        restarts=4,
    )


@ATTACKS.register("gifd")
def gifd(prior: Prior | None) -> Inversion:
    """Return the search of the latent code, then of all feature maps but the image."""
    found = _needed("gifd", prior)
    return Inversion(
        "gifd",
        Latent(found, stages=found.generator.layers - 1, radii=(300.0, 600.0, 1200.0)),
        priors=IMAGES,
        descents=(Descent(steps=1000, lr=0.1, schedule="ilo"),),
        restarts=4,
    )


def _needed(name: str, prior: Prior | None) -> Prior:
    if prior is None:
        raise ConfigError(
            f"The attack '{name}' searches inside a generator; give attack.prior=FILE, the model.safetensors of a "
            f"run of strategy=gan, or one that is here: {', '.join(shipped()) or 'none'}."
        )
    return prior
