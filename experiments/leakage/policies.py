"""Searches for ATS's policies: ``python -m flowerbed.experiments.leakage.policies dataset=... model=... [KEY=VALUE]``.

Reference: Gao et al., "Privacy-preserving Collaborative Learning with Automatic Transformation Search", CVPR 2021. Of
random policies of three operations those are kept that promise the better accuracy, and of these the ones whose
gradients tell least are best. For a policy T, images x and labels y, both averaged over images:

    S_pri(T)  area under  s(b) = mean over tensors of cos(g(b T(x) + (1 - b) n, y), g(T(x), y)),  b from 0 to 1, n noise
    S_acc(T)  -sum_i log(v_i + k) + 1 / (v_i + k),  v the eigenvalues of the correlations of d sum(f(T(x))) / d x

The noise has uniform pixels. The paper measures S_pri on a half-trained model (initial.weights=FILE) and S_acc on a
random one, and keeps policies with S_acc above -85, a figure of its networks and batches; here the better half is kept.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import vmap

from flowerbed import seeds
from flowerbed.clients.encodings import LENGTH, POOL, transformed
from flowerbed.datasets.augment import Scale
from flowerbed.errors import require
from flowerbed.strategies.attacks import candidates
from flowerbed.strategies.attacks.observation import Gradient

POINTS = 20
"""Steps of the way from noise to image."""
SMALL = 1e-5
"""k."""
TRIED, IMAGES, SHOWN = 100, 20, 5


@dataclass(frozen=True)
class Ranked:
    """A policy with its scores."""

    policy: tuple[int, ...]
    privacy: float
    """Lower tells less."""
    accuracy: float
    """Higher promises more."""


def search(
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    scale: Scale,
    *,
    tried: int = TRIED,
    kept: float = 0.5,
    seed: int = 0,
) -> list[Ranked]:
    """Return the share ``kept`` of ``tried`` random policies with the best accuracy scores, least telling ones first.

    ``x`` are images as the model takes them, ``(N, C, H, W)``. Raises ``ConfigError`` for a share that keeps none.
    """
    require(
        tried >= 1 and 0 < kept <= 1,
        f"{tried} policies of which {kept} are kept leave nothing to choose from.",
    )
    rng = seeds.torch_rng(seed, "ats policies")
    pixels, found = scale.pixels(x), []
    for _ in range(tried):
        policy = tuple(torch.randint(len(POOL), (LENGTH,), generator=rng).tolist())
        made = scale.values(transformed(pixels, policy, rng))
        noise = scale.values(torch.rand(pixels.shape, generator=rng))
        found.append(Ranked(policy, privacy_score(module, made, noise, y), accuracy_score(module, made)))
    found.sort(key=lambda ranked: -ranked.accuracy)
    return sorted(found[: max(1, round(kept * tried))], key=lambda ranked: ranked.privacy)


def privacy_score(module: nn.Module, x: Tensor, noise: Tensor, y: Tensor) -> float:
    """Return S_pri of images that were transformed already; 1 for gradients that do not notice what they are of."""
    module = module.eval()
    parameters = {n: p.detach() for n, p in module.named_parameters()}
    buffers = dict(module.named_buffers())

    def gradient(image: Tensor, label: Tensor) -> Gradient:
        return candidates.gradient(module, parameters, buffers, image[None], label[None])[0]

    whole = vmap(gradient)(x, y)
    heights = []
    for point in range(POINTS + 1):
        part = point / POINTS
        found = vmap(gradient)(part * x + (1 - part) * noise, y)
        cosines = [
            nn.functional.cosine_similarity(found[n].flatten(1), whole[n].flatten(1)).mean() for n in whole
        ]
        heights.append(float(torch.stack(cosines).mean()))
    return sum(a + b for a, b in itertools.pairwise(heights)) / (2 * POINTS)


def accuracy_score(module: nn.Module, x: Tensor) -> float:
    """Return S_acc of images that were transformed already: high where the model tells them apart."""
    x = x.detach().clone().requires_grad_()
    (jacobian,) = torch.autograd.grad(module.eval()(x).sum(), x)
    correlations = torch.corrcoef(jacobian.flatten(1).double()).nan_to_num()
    values = torch.linalg.eigvalsh(correlations).clamp(min=0) + SMALL
    return float(-(values.log() + 1 / values).sum())


def main(arguments: Sequence[str]) -> None:
    """Search with the data and the model of a run's settings, and print the best policies."""
    from flowerbed.experiments.composition import compose_simulations
    from flowerbed.experiments.parts import build_parts

    (simulation,) = compose_simulations(list(arguments))
    parts = build_parts(simulation)
    data = parts.dataset
    require(len(data.input_shape) == 3, f"ATS transforms images, and '{data.name}' has none.")
    # Public data: what is found is to be shared by all clients.
    x, y = data.prepare(data.test.inputs[:IMAGES]), data.test.labels[:IMAGES]
    module = parts.spec.model.build(simulation.seed)
    scale = Scale(data.mean, data.std)
    found = search(module, x, y, scale, tried=TRIED, seed=simulation.seed)[:SHOWN]
    for ranked in found:
        print(
            f"{'-'.join(map(str, ranked.policy)):12} privacy {ranked.privacy:.4f}  accuracy {ranked.accuracy:.1f}"
        )
    best = ",".join(f"[{','.join(map(str, ranked.policy))}]" for ranked in found[:2])
    print(f"Use the best two with: defence=ats defence.policies=[{best}]")


if __name__ == "__main__":
    main(sys.argv[1:])
