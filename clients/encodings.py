"""Defences that train on something else than the samples: mixtures, transformed images, softened labels.

=============  ========================================================================================  ============
name           a sample becomes                                                                          leakage is
=============  ========================================================================================  ============
``mixup``      x~ = sum_i l_i x_i, y~ = sum_i l_i y_i over k of the client's samples, the first its own  of originals
               and l ~ Dirichlet(3, 1, ..., 1) with every l_i within [``low``, ``high``]
``instahide``  the same, then every value of x~ times a random sign                                      of originals
``ats``        T(x), T a policy of three image operations drawn from ``policies``                        of T(x)
``labels``     y~ = (1 - s) y' + s / C, y' the label, or with probability ``flip`` a uniformly drawn one of x
=============  ========================================================================================  ============

References: Zhang et al. 2018 (mixup) and Huang et al. 2020 (InstaHide), with the coefficients of Huang et al. 2021
("Evaluating Gradient Inversion Attacks and Defenses"); Gao et al. 2021 (ATS); Szegedy et al. 2016 (label smoothing),
Warner 1965 (randomised response).

Signs act on what the model takes, as in InstaHide, where images are normalised. Coefficients, partners and policies are
drawn for every step. ATS's policies are triples of its 50 operations; ``flowerbed.experiments.leakage.policies``
searches for them. Its operations have strengths but no probabilities (the published code ignores those it lists).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.clients.data import Batch, ClientData
from flowerbed.clients.defence import Encoding, share
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.params import LocalParams
from flowerbed.datasets import image_ops
from flowerbed.datasets.dataset import Dataset
from flowerbed.errors import require
from flowerbed.models.base import ModelSpec
from flowerbed.models.bottleneck import UNBIASED

ATTEMPTS = 1000
"""Draws of coefficients before their bounds are called impossible."""
FIRST = 3.0
"""Dirichlet weight of the sample itself; its partners have 1."""


@dataclass(frozen=True)
class MixUp(Encoding):
    """Trains on mixtures of a client's samples and of their labels (Zhang et al. 2018)."""

    k: int = 4
    """Samples in a mixture."""
    low: float = 0.0
    """Least coefficient."""
    high: float = 0.65
    """Largest coefficient."""

    soft = True
    sees_original = True

    def __post_init__(self) -> None:
        require(self.k >= 2, f"defence.k is {self.k}; mix at least 2 samples.")
        share("low", self.low)
        share("high", self.high)
        require(
            self.low < 1 / self.k < self.high,
            f"defence.low={self.low} and defence.high={self.high} leave no coefficients for {self.k} samples; "
            f"{1 / self.k:g} must lie between them.",
        )

    def known(self, local: LocalParams) -> Mapping[str, Any]:
        return {"joint": True}

    def encoded(self, batch: Batch, data: ClientData, classes: int, rng: torch.Generator) -> Batch:
        return {**batch, **self._mixture(batch, data, classes, rng)}

    def _mixture(self, batch: Batch, data: ClientData, classes: int, rng: torch.Generator) -> Batch:
        count, device = len(batch["y"]), batch["x"].device
        weights = coefficients(count, self.k, self.low, self.high, rng).to(device)
        partners = torch.randint(len(data), (self.k - 1, count), generator=rng, device=device)
        x = _weighed(weights[:, 0], batch["x"])
        y = _weighed(weights[:, 0], F.one_hot(batch["y"], classes).to(x.dtype))
        for i, rows in enumerate(partners, 1):
            x = x + _weighed(weights[:, i], data.x[rows])
            y = y + _weighed(weights[:, i], F.one_hot(data.y[rows], classes).to(x.dtype))
        return {"x": x, "y": y}


@dataclass(frozen=True)
class InstaHide(MixUp):
    """Trains on mixtures of samples whose values have random signs (Huang et al. 2020)."""

    def known(self, local: LocalParams) -> Mapping[str, Any]:
        return {"joint": True, "encoded": True}

    def encoded(self, batch: Batch, data: ClientData, classes: int, rng: torch.Generator) -> Batch:
        mixed = self._mixture(batch, data, classes, rng)
        signs = 2 * torch.randint(2, mixed["x"].shape, generator=rng, device=mixed["x"].device) - 1
        return {**batch, "x": mixed["x"] * signs, "y": mixed["y"]}

    def check(self, half: ClientHalf, module: nn.Module, local: LocalParams, dataset: Dataset) -> None:
        super().check(half, module, local, dataset)
        require(
            local.augment == "none",
            f"defence=instahide has no use for local.augment={local.augment}, which partners do not get; set it to "
            "none.",
        )


@dataclass(frozen=True)
class LabelProtection(Encoding):
    """Softens or randomises labels, or takes the head's bias away, so that gradients tell less of them."""

    smoothing: float = 0.1
    """s, the share of a label that all classes divide between them."""
    flip: float = 0.0
    """Probability that a label is replaced by one drawn from all classes (randomised response)."""
    bias: bool = True
    """Whether the last linear layer keeps its bias, whose gradient counts labels."""

    soft = True

    def __post_init__(self) -> None:
        require(0 <= self.smoothing < 1, f"defence.smoothing is {self.smoothing}; give a share below 1.")
        share("flip", self.flip)

    def known(self, local: LocalParams) -> Mapping[str, Any]:
        return {"imitation": {"name": "smooth", "share": self.smoothing}} if self.smoothing else {}

    def model_spec(self, spec: ModelSpec) -> ModelSpec:
        if self.bias:
            return spec
        inner = {"base": spec.name, "options": dict(spec.options)}
        return ModelSpec(UNBIASED, spec.input_shape, spec.num_classes, inner)

    def encoded(self, batch: Batch, data: ClientData, classes: int, rng: torch.Generator) -> Batch:
        labels, device = batch["y"], batch["y"].device
        drawn = torch.randint(classes, labels.shape, generator=rng, device=device)
        kept = torch.rand(labels.shape, generator=rng, device=device) >= self.flip
        said = F.one_hot(torch.where(kept, labels, drawn), classes).to(batch["x"].dtype)
        return {**batch, "y": (1 - self.smoothing) * said + self.smoothing / classes}


Operation = tuple[str, int]
"""The name of an image operation and its level, 0 to 9."""
POOL: tuple[Operation, ...] = (
    ("invert", 7), ("contrast", 6), ("rotate", 2), ("translate_x", 9), ("sharpness", 1),
    ("sharpness", 3), ("shear_y", 2), ("translate_y", 2), ("autocontrast", 5), ("equalize", 2),
    ("shear_y", 5), ("posterize", 5), ("color", 3), ("brightness", 5), ("sharpness", 9),
    ("brightness", 9), ("equalize", 5), ("equalize", 1), ("contrast", 7), ("sharpness", 5),
    ("color", 5), ("translate_x", 5), ("equalize", 7), ("autocontrast", 8), ("translate_y", 3),
    ("sharpness", 6), ("brightness", 6), ("color", 8), ("solarize", 0), ("invert", 0),
    ("equalize", 0), ("autocontrast", 0), ("equalize", 8), ("equalize", 4), ("color", 5),
    ("equalize", 5), ("autocontrast", 4), ("solarize", 4), ("brightness", 3), ("color", 0),
    ("solarize", 1), ("autocontrast", 0), ("translate_y", 3), ("translate_y", 3), ("autocontrast", 1),
    ("solarize", 1), ("equalize", 5), ("invert", 0), ("translate_y", 3), ("autocontrast", 1),
)  # fmt: skip
"""ATS's 50 operations, by the numbers that its policies use."""
LENGTH = 3
"""Operations in a policy."""
TOP = 9
"""The highest level."""


@dataclass(frozen=True)
class Ats(Encoding):
    """Trains on images transformed by searched policies of three operations each (Gao et al. 2021)."""

    policies: tuple[tuple[int, ...], ...] = ((3, 1, 7), (43, 18, 18))
    """Policies, of which every image gets one: numbers of operations in the pool of 50. The default is the paper's pair
    for CIFAR-100 and ResNet20."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "policies", tuple(tuple(policy) for policy in self.policies))
        require(bool(self.policies), "defence.policies is empty; give lists of numbers of operations.")
        for policy in self.policies:
            require(
                bool(policy) and all(0 <= number < len(POOL) for number in policy),
                f"defence.policies holds {list(policy)}; operations have numbers from 0 to {len(POOL) - 1}.",
            )

    def check(self, half: ClientHalf, module: nn.Module, local: LocalParams, dataset: Dataset) -> None:
        require(
            len(dataset.input_shape) == 3,
            f"defence=ats transforms images, and '{dataset.name}' has none; choose another defence.",
        )

    def encoded(self, batch: Batch, data: ClientData, classes: int, rng: torch.Generator) -> Batch:
        chosen = torch.randint(
            len(self.policies), (len(batch["y"]),), generator=rng, device=batch["x"].device
        )
        pixels = data.scale.pixels(batch["x"])
        result = pixels.clone()
        for number, policy in enumerate(self.policies):
            rows = torch.nonzero(chosen == number).flatten()
            if len(rows):
                result[rows] = transformed(pixels[rows], policy, rng)
        return {**batch, "x": data.scale.values(result)}


def transformed(pixels: Tensor, policy: Sequence[int], rng: torch.Generator) -> Tensor:
    """Return images ``(B, C, H, W)`` of pixels in [0, 1] after the policy's operations, one after another.

    Where an operation has a direction, each image draws its own.
    """
    for number in policy:
        name, level = POOL[number]
        drawn = torch.randint(2, (len(pixels),), generator=rng, device=pixels.device)
        pixels = OPERATIONS[name](pixels, level / TOP, (2 * drawn - 1).to(pixels.dtype)).clamp(0, 1)
    return pixels


Strength = Callable[[Tensor, float, Tensor], Tensor]
"""Takes pixels, a strength in [0, 1] and a sign for each image."""


def _moving(operation: Callable[[Tensor, Tensor], Tensor], most: float) -> Strength:
    """Return an operation whose strength goes both ways from 0 to ``most``."""
    return lambda pixels, strength, sign: operation(pixels, sign * (most * strength))


def _enhancing(operation: Callable[[Tensor, Tensor], Tensor]) -> Strength:
    """Return an operation whose factor goes both ways from 1, by a half at most."""
    return lambda pixels, strength, sign: operation(pixels, 1 + sign * (0.5 * strength))


OPERATIONS: Mapping[str, Strength] = {
    "invert": lambda pixels, strength, sign: 1 - pixels,
    "autocontrast": lambda pixels, strength, sign: image_ops.autocontrast(pixels),
    "equalize": lambda pixels, strength, sign: image_ops.equalize(pixels),
    "posterize": lambda pixels, strength, sign: image_ops.posterize(
        pixels, torch.full_like(sign, round(8 - 4 * strength))
    ),
    "solarize": lambda pixels, strength, sign: image_ops.solarize(
        pixels, torch.full_like(sign, 1 - strength)
    ),
    "shear_y": _moving(image_ops.shear_y, 0.3),
    "translate_x": _moving(image_ops.translate_x, 150 / 331),
    "translate_y": _moving(image_ops.translate_y, 150 / 331),
    # The only one that goes one way.
    "rotate": lambda pixels, strength, sign: image_ops.rotate(pixels, torch.full_like(sign, 30 * strength)),
    "color": _enhancing(image_ops.color),
    "contrast": _enhancing(image_ops.contrast),
    "sharpness": _enhancing(image_ops.sharpness),
    "brightness": _enhancing(image_ops.brightness),
}


def coefficients(count: int, k: int, low: float, high: float, rng: torch.Generator) -> Tensor:
    """Return ``(count, k)`` weights that add up to 1, from Dirichlet(3, 1, ..., 1), drawn again while out of bounds."""
    alpha = torch.ones(k)
    alpha[0] = FIRST
    found = torch.empty(count, k)
    missing = torch.arange(count)
    for _ in range(ATTEMPTS):
        drawn = torch._standard_gamma(alpha.expand(len(missing), k).contiguous(), generator=_on_cpu(rng))
        found[missing] = drawn / drawn.sum(1, keepdim=True)
        own = found[missing]
        missing = missing[(own.amax(1) > high) | (own.amin(1) < low)]
        if not len(missing):
            return found
    require(False, f"defence.low={low} and defence.high={high} hardly leave any coefficients; widen them.")
    return found


def _on_cpu(rng: torch.Generator) -> torch.Generator:
    """Return a generator on the CPU, which goes on with ``rng``'s numbers if that is elsewhere."""
    if rng.device.type == "cpu":
        return rng
    seed = torch.randint(2**62, (1,), generator=rng, device=rng.device)
    return torch.Generator().manual_seed(int(seed))


def _weighed(weights: Tensor, values: Tensor) -> Tensor:
    return weights.view(-1, *[1] * (values.ndim - 1)) * values
