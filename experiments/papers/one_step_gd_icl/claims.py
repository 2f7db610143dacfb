"""The claims about one step of gradient descent in context."""

from __future__ import annotations

from flowerbed.experiments.papers.one_step_gd_icl.central import central
from flowerbed.experiments.papers.one_step_gd_icl.figure import against_theory
from flowerbed.experiments.reproduction.claims import Claim, Inequality, metric
from flowerbed.experiments.reproduction.paper import Paper

loss, gd, ridge, error = metric("loss"), metric("gd-loss"), metric("ridge-loss"), metric("matrix-error")
leftover, plain_gd, step_error = metric("leftover"), metric("plain-gd-loss"), metric("eta-error")
THEOREMS = ("isotropic", "anisotropic", "relu")
GRID = tuple(f"n{n}-noise{noise}" for n in (10, 40, 160) for noise in (0.0, 0.5, 2.0))


def learned(arm: str) -> tuple[Inequality, Inequality]:
    """Return that the layer of an arm is the theory's: A within 5 %, and nothing else in it."""
    return error[arm] <= 0.05, leftover[arm] <= 0.05


PAPER = Paper(
    slug="one-step-gd-icl",
    claims=(
        Claim(
            "one step",
            "On isotropic linear problems the trained layer is one step of gradient descent of the predicted size.",
            learned("isotropic"),
        ),
        Claim(
            "preconditioned step",
            "On anisotropic inputs it is one step preconditioned by the inverse covariance.",
            (*learned("anisotropic"), plain_gd["anisotropic"] >= 1.05 * loss["anisotropic"]),
        ),
        Claim(
            "nonlinear targets",
            "On nonlinear functions with a rotation-invariant law it is still one plain step of gradient descent.",
            learned("relu"),
        ),
        Claim(
            "same loss",
            "On new prompts the layer is as good as that step, within half a per cent.",
            tuple(
                bound
                for arm in THEOREMS
                for bound in (loss[arm] <= 1.005 * gd[arm], loss[arm] >= 0.995 * gd[arm])
            ),
        ),
        Claim(
            "not Bayes",
            "One layer is far from ridge regression, which is Bayes' rule here.",
            (loss["isotropic"] >= 2 * ridge["isotropic"], loss["anisotropic"] >= 2 * ridge["anisotropic"]),
        ),
        Claim(
            "step size",
            "The step is 1 / (n + d + 1 + sigma^2) within 2 % for all lengths of the prompt and noises.",
            tuple(step_error[arm] <= 0.02 for arm in GRID),
        ),
        Claim(
            "bound by one layer",
            "Two layers do better than the optimum of one.",
            loss["two-layers"] <= 0.9 * gd["two-layers"],
        ),
        Claim(
            "compromise",
            "Over two distributions, in one client or a client each, the layer is the predicted compromise.",
            (*learned("pooled"), *learned("federated")),
        ),
    ),
    central={arm: central for arm in (*THEOREMS, "pooled", "two-layers")},
    figure=against_theory,
    uses=("flowerbed.clients.streams", "flowerbed.datasets.prompts"),
)
