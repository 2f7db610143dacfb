"""Whether a generator is fit to be a prior: how near its parts come to images, and how its samples differ.

``reach`` is the range test: images are fitted by plain squared error, first by the latent code, then by the feature
maps of the opened generator, each stage from where the last one ended. A prior under which the code alone is no better
than the class mean teaches an attack nothing; one whose feature maps reach no further leaves GIFD nothing to gain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowerbed import seeds
from flowerbed.experiments.leakage.scoring import Pool, psnr
from flowerbed.strategies.attacks.descents import Descent
from flowerbed.strategies.attacks.generative import Latent, Prior
from flowerbed.strategies.attacks.spaces import Rows, Space, clamped

LRS = (0.1, 0.05)
"""Adam's for the code, and for feature maps."""


def reach(
    prior: Prior, x: Tensor, labels: Tensor, *, steps: int = 100, radii: tuple[float, ...] = (), seed: int = 0
) -> Tensor:
    """Return the PSNR of every image ``(N, C, H, W)`` of the model's inputs after each stage, ``(stages, N)``.

    ``radii`` are the l1 balls of the feature maps, none means free.
    """
    stages = prior.generator.layers - 1
    space: Space = Latent(prior, stages=stages, radii=radii)
    classes = int(labels.max()) + 1
    rows = Rows(1, 1, len(x), prior.shape, classes, prior.scale, seed)
    variables, given = space.open(rows), labels[None]
    true, found = prior.scale.pixels(x), []
    for stage in range(stages + 1):
        descent = Descent(steps, LRS[min(stage, 1)], schedule="ilo")
        optimizer = torch.optim.Adam([v.requires_grad_() for v in variables.values()])
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = descent.lr_at(step)
            made = space.decode({n: v[0] for n, v in variables.items()}, labels)
            loss = (prior.scale.pixels(made) - true).square().sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                space.constrain(variables, rows)
        variables = {n: v.detach() for n, v in variables.items()}
        made = space.decode({n: v[0] for n, v in variables.items()}, labels)
        found.append(psnr(prior.scale.pixels(clamped(made, prior.scale)), true))
        following = space.advance(variables, given)
        if following is not None:
            space, variables = following
    return torch.stack(found)


@torch.no_grad()
def samples(prior: Prior, label: int, count: int, seed: int) -> Tensor:
    """Return samples of one class, pixels ``(count, C, H, W)``."""
    rng = seeds.torch_rng(seed, "samples of a prior", label)
    z = torch.randn(count, *prior.generator.latent, generator=rng)
    return prior.scale.pixels(prior.image(z, torch.full((count,), label), 0))


def variety(images: Tensor) -> float:
    """Return the standard deviation over images of one class, the mean over pixels; 0 if all are the same."""
    return float(images.double().std(0, correction=0).mean())


def best_sample(prior: Prior, x: Tensor, labels: Tensor, count: int, seed: int) -> Tensor:
    """Return the PSNR of each image against the nearest of ``count`` samples of its class: an oracle's choice."""
    true, found = prior.scale.pixels(x), []
    for image, label in zip(true, labels.tolist(), strict=True):
        drawn = samples(prior, label, count, seed)
        found.append(psnr(image.expand_as(drawn), drawn).max())
    return torch.stack(found)


def null_scores(x: Tensor, labels: Tensor, public: Pool) -> dict[str, Tensor]:
    """Return the PSNR of pixels ``(N, C, H, W)`` against the class mean and the nearest image of the class (an oracle)
    in a pool that has none of them."""
    found: dict[str, list[Tensor]] = {"class mean": [], "nearest image": []}
    for image, label in zip(x, labels.tolist(), strict=True):
        others, _ = public.of(label)
        found["class mean"].append(psnr(image[None], others.mean(0, keepdim=True))[0])
        found["nearest image"].append(psnr(image.expand_as(others), others).max())
    return {name: torch.stack(values) for name, values in found.items()}
