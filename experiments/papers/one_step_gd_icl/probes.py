"""What the reproduction of one step of gradient descent in context runs on, and what it measures."""

from __future__ import annotations

import torch

from flowerbed import seeds
from flowerbed.datasets.prompts import COUNT, Prompts
from flowerbed.experiments.measures import Measured
from flowerbed.experiments.papers.one_step_gd_icl import CHUNK, LinearAttention, optimum, population_loss


@torch.no_grad()
def judged(measured: Measured) -> dict[str, float]:
    """Return the squared errors of attention and its rivals on the same new prompts, and how far A is from theory.

    ``loss`` is attention's, ``gd-loss`` that of the theorems' step, ``plain-gd-loss`` that of gradient descent without
    preconditioner, ``ridge-loss`` that of ridge regression, ``best-loss`` L*. Of one layer also ``matrix-error``,
    ``leftover`` (both relative, Frobenius), ``eta-error`` (relative, of the nearest multiple of the theory's A),
    ``step`` (the mean of its diagonal), ``off-diagonal`` and ``diagonal-i``.
    """
    test = measured.dataset.test
    extras = {name: rows.to(measured.device) for name, rows in test.extras.items()}
    table = Prompts.of(test.inputs, extras)
    a, step = optimum(table)
    matrices = {"gd-loss": a.float(), "plain-gd-loss": step * torch.eye(table.d, device=a.device)}
    rng = seeds.torch_rng(measured.seed, "judged prompts", device=measured.device.type)
    total = int(extras[COUNT].sum())
    sums = dict.fromkeys(("loss", *matrices, "ridge-loss"), 0.0)
    for start in range(0, total, CHUNK):
        tokens, y, rows = table.draw(min(CHUNK, total - start), rng)
        x, query = tokens[:, :-1, :-1], tokens[:, -1, :-1]
        s = torch.einsum("bid,bi->bd", x, tokens[:, :-1, -1])
        # A little is added, so that a prompt of fewer pairs than dimensions without noise has a solution.
        penalty = torch.diag_embed(table.noise[rows][:, None] ** 2 * table.spectrum[rows] + 1e-6)
        ridge = torch.linalg.solve((x.mT @ x + penalty).double(), s.double()).float()
        guesses = {name: torch.einsum("bd,de,be->b", s, m, query) for name, m in matrices.items()}
        guesses |= {"loss": measured.model(tokens), "ridge-loss": (ridge * query).sum(-1)}
        for name, guess in guesses.items():
            sums[name] += float((y - guess).double().square().sum())
    found = {name: value / total for name, value in sums.items()} | {"best-loss": population_loss(table, a)}
    if not isinstance(measured.model, LinearAttention) or len(measured.model.layers) > 1:
        return found
    mine, *others = (part.double() / table.n for part in measured.model.effective())
    size = a.norm()
    found["matrix-error"] = float((mine - a).norm() / size)
    found["leftover"] = max(float(part.norm() / size) for part in others)
    found["eta-error"] = abs(float((mine * a).sum() / size**2) - 1)
    found["step"] = float(mine.diagonal().mean())
    found["off-diagonal"] = float((mine - torch.diag(mine.diagonal())).abs().max())
    return found | {f"diagonal-{i}": float(value) for i, value in enumerate(mine.diagonal())}
