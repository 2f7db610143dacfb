"""How close a reconstruction comes to what the client had, beside what one gets without any gradient.

All figures of images are of pixels in [0, 1], clamped, one image at a time. Reconstructions are matched with the true
samples one to one, by least total squared error.

==============  ================================================================================================
``mse``         mean squared error
``psnr``        -10 log10 mse in dB, at most ``MOST_PSNR``
``hit``         whether psnr is at least ``HIT``: a copy
``ssim``        Wang et al. 2004: Gaussian window of 11 and 1.5, K 0.01 and 0.03, range 1, mean over channels
``labels``      1 - sum_c |n_c - n^_c| / 2B: the share of labels found, whatever their order
``top-1``       whether no other training image of the class is nearer to the reconstruction than the true one
``top-10``      whether at most nine are
``psnr: ...``   psnr against what the truth also is, where samples were encoded: ``original`` or ``encoded``
``fmse``        mean squared difference of all logits, where a model is given
``rfd``         random feature distance, and ``lpips`` where there are weights: see ``perceptual``
==============  ================================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed import seeds
from flowerbed.datasets.augment import Scale
from flowerbed.errors import require
from flowerbed.experiments.leakage.truth import Truth
from flowerbed.strategies.attacks.observation import Reconstruction

MOST_PSNR = 100.0
"""What an image without error scores: beyond it float32 says nothing."""
HIT = 30.0
WINDOW, SIGMA = 11, 1.5
RESAMPLES = 2000
ERRORS = ("mse", "fmse", "rfd", "lpips")
"""Figures whose smallest value leaks most."""
Distance = Callable[[Tensor, Tensor], Tensor]
"""Of images of pixels ``(N, C, H, W)``, ``(N,)``."""


@dataclass(frozen=True)
class Pool:
    """Training images by class: what identification and null models compare with."""

    x: Tensor
    """``(N, C, H, W)`` pixels."""
    y: Tensor
    index: Tensor
    """Rows of the training split."""

    def of(self, label: int) -> tuple[Tensor, Tensor]:
        """Return the images of a class and their rows."""
        chosen = self.y == label
        return self.x[chosen], self.index[chosen]


@dataclass(frozen=True)
class Score:
    """What an attack got from one victim."""

    images: Sequence[Mapping[str, float]]
    """Figures of every true sample, in its order."""
    order: tuple[int, ...]
    """Which reconstruction belongs to each true sample."""
    labels: float

    def mean(self, name: str) -> float:
        """Return the mean of a figure over the victim's samples."""
        return float(np.mean([image[name] for image in self.images]))


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared errors of images, ``(N,)``, as float64."""
    return (a.double() - b.double()).square().flatten(1).mean(1)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratios of images of pixels in [0, 1], ``(N,)`` in dB."""
    return (-10 * mse(a, b).log10()).clamp(max=MOST_PSNR)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarities of images ``(N, C, H, W)`` of pixels in [0, 1], ``(N,)``.

    The window does not leave the image; one that is smaller than the window has a smaller window.
    """
    a, b = a.double(), b.double()
    size = min(WINDOW, *a.shape[2:])
    places = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weights = torch.exp(-places.square() / (2 * SIGMA**2))
    weights = weights / weights.sum()

    def blurred(x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(flat, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))

    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    both = blurred(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    value = value / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return value.view(a.shape[0], -1).mean(1)


def matched(found: Tensor, true: Tensor) -> tuple[int, ...]:
    """Return which of ``found`` belongs to each of ``true``: one to one, of least total squared error."""
    from scipy.optimize import linear_sum_assignment

    costs = (true.double()[:, None] - found.double()[None]).square().flatten(2).mean(2)
    _, columns = linear_sum_assignment(costs.nan_to_num(nan=1e9).numpy())
    return tuple(int(column) for column in columns)


def label_accuracy(found: Tensor, true: Tensor) -> float:
    """Return the share of labels that were found, as multisets of the same size."""
    classes = int(max(found.max(), true.max())) + 1
    gap = torch.bincount(found, minlength=classes) - torch.bincount(true, minlength=classes)
    return 1 - float(gap.abs().sum()) / (2 * len(true))


def score(
    found: Reconstruction,
    truth: Truth,
    scale: Scale,
    pool: Pool | None = None,
    model: nn.Module | None = None,
    distances: Mapping[str, Distance] | None = None,
) -> Score:
    """Compare a reconstruction of images with the truth; ``pool`` adds identification, ``model`` fmse.

    ``distances``: further figures by name.
    """
    require(
        found.x.shape == truth.x.shape,
        f"A reconstruction of shape {tuple(found.x.shape)} cannot be compared with {tuple(truth.x.shape)}.",
    )
    made, true = scale.pixels(found.x), scale.pixels(truth.x)
    order = matched(made, true)
    ordered = made[list(order)]
    figures = {"mse": mse(ordered, true), "psnr": psnr(ordered, true), "ssim": ssim(ordered, true)}
    figures["hit"] = (figures["psnr"] >= HIT).double()
    figures |= {name: distance(ordered, true) for name, distance in (distances or {}).items()}
    if model is not None:
        with torch.no_grad():
            gap = model.eval()(found.x[list(order)]) - model(truth.x)
        figures["fmse"] = gap.double().square().mean(1)
    for name, other in truth.other.items():
        own = scale.pixels(other)
        figures[f"psnr: {name}"] = psnr(made[list(matched(made, own))], own)
    if pool is not None:
        ranks = torch.tensor([_rank(ordered[i], truth, i, pool) for i in range(len(true))])
        figures |= {f"top-{k}": (ranks <= k).double() for k in (1, 10)}
    images = [{name: float(value[i]) for name, value in figures.items()} for i in range(len(true))]
    return Score(images, order, label_accuracy(found.labels, truth.y))


def _rank(image: Tensor, truth: Truth, place: int, pool: Pool) -> int:
    """Return the true image's place among the training images of its class, by distance to ``image``."""
    images, index = pool.of(int(truth.y[place]))
    others = images[index != truth.index[place]]
    # Rounding must not decide between an image and itself.
    own = mse(image[None], _true_pixels(truth, place, pool))[0]
    return 1 + int((mse(image.expand_as(others), others) < own).sum())


def _true_pixels(truth: Truth, place: int, pool: Pool) -> Tensor:
    return pool.x[pool.index == truth.index[place]]


def nulls(truth: Truth, scale: Scale, pool: Pool, seed: int) -> dict[str, list[float]]:
    """Return the PSNR of every true image against what needs no gradient but the label, by name.

    ``class mean``: the mean training image of its class; ``mean colour``: its own mean colour, which no attacker
    has; ``random image``: another of its class; ``nearest image``: the nearest other one, an oracle.
    """
    true = scale.pixels(truth.x)
    found: dict[str, list[float]] = {}
    rng = seeds.torch_rng(seed, "null models")
    for place, image in enumerate(true):
        images, index = pool.of(int(truth.y[place]))
        others = images[index != truth.index[place]]
        if not len(others):
            continue
        ratios = psnr(image.expand_as(others), others)
        drawn = int(torch.randint(len(others), (1,), generator=rng))
        flat = image.mean((1, 2), keepdim=True).expand_as(image)
        for name, value in (
            ("class mean", psnr(image[None], others.mean(0, keepdim=True))[0]),
            ("mean colour", psnr(image[None], flat[None])[0]),
            ("random image", ratios[drawn]),
            ("nearest image", ratios.max()),
        ):
            found.setdefault(name, []).append(float(value))
    return found


@dataclass(frozen=True)
class Summary:
    """A figure over victims."""

    mean: float
    low: float
    """Of the bootstrapped 95 % interval of the mean."""
    high: float
    worst: float
    """Of the victim that was served worst: the largest figure (the least, of errors)."""


def summarised(values: Sequence[float], seed: int, *, larger_leaks: bool = True) -> Summary:
    """Return mean, interval and worst case of a figure, victims resampled with replacement."""
    array = np.asarray(values, dtype=np.float64)
    if not len(array) or not np.isfinite(array).all():
        return Summary(math.nan, math.nan, math.nan, math.nan)
    rng = seeds.numpy_rng(seed, "bootstrap")
    means = array[rng.integers(0, len(array), (RESAMPLES, len(array)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    worst = array.max() if larger_leaks else array.min()
    return Summary(float(array.mean()), float(low), float(high), float(worst))
