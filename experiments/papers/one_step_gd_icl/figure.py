"""The picture of one step of gradient descent in context."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowerbed.datasets.prompts import Prompts, prompts
from flowerbed.experiments.compare_report import INK
from flowerbed.experiments.papers.one_step_gd_icl import optimum
from flowerbed.experiments.reproduction.engine import Reproduction

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def against_theory(made: Reproduction) -> Figure:
    """Return the learned diagonal of A over the eigenvalues beside theory, and learned over predicted steps by n."""
    from flowerbed.experiments.reproduction import figures

    figure, (left, right) = figures.canvas(2)
    for place, arm in enumerate(("isotropic", "anisotropic", "relu")):
        table = _table(made, arm)
        spectrum, exact = table.spectrum[0].tolist(), optimum(table)[0].diagonal().tolist()
        found = [figures.values(made, arm, f"diagonal-{i}") for i in range(table.d)]
        figures.line(left, spectrum, found, arm, place)
        left.plot(spectrum, exact, "x", color=INK, markersize=7, label="theory" if place == 2 else None)
    left.set_xscale("log")
    left.set_yscale("log")
    figures.finish(left, "eigenvalue of the inputs' covariance", "diagonal of A")
    grid = [arm for arm in made.arms if arm.startswith("n")]
    for place, noise in enumerate(dict.fromkeys(arm.partition("-noise")[2] for arm in grid)):
        arms = [arm for arm in grid if arm.endswith(f"-noise{noise}")]
        tables = [_table(made, arm) for arm in arms]
        ratios = [
            [step / optimum(table)[1] for step in figures.values(made, arm, "step")]
            for arm, table in zip(arms, tables, strict=True)
        ]
        figures.line(right, [float(table.n) for table in tables], ratios, f"noise {noise}", place)
    for bound in (0.98, 1.0, 1.02):
        right.axhline(bound, color=INK, linewidth=0.8, linestyle="-" if bound == 1 else ":")
    right.set_xscale("log")
    figures.finish(right, "pairs in the prompt, n", "learned step / predicted step")
    return figure


def _table(made: Reproduction, arm: str) -> Prompts:
    """Return the distributions of an arm."""
    options = dict(made.scale.arms[arm].settings["dataset"])
    options.pop("name")
    train = prompts(**options).train
    return Prompts.of(train.inputs, train.extras)
