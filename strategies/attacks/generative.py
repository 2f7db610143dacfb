"""Search spaces of a generative prior: its latent codes, the feature maps inside it, its weights.

====================  ==========================================================================================
``Latent``            z, as in GGL (Li et al. 2022) and the first stage of GIAS and GIFD
``FeatureMaps``       h_k of the opened generator, within an l1 ball of where the stage began (GIFD, Fang et al. 2023)
``Weights``           a copy of the generator's weights for every image, z fixed (GIAS, Jeon et al. 2021)
====================  ==========================================================================================

GIFD goes z, h_1, h_2, ...: each stage begins with what the last one's result is after one more layer, so the image
does not jump between stages.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call, vmap

from flowerbed.datasets.augment import Scale
from flowerbed.errors import ConfigError, require
from flowerbed.models.base import Shape
from flowerbed.models.generators import Generator, Layered
from flowerbed.models.published_generators import published
from flowerbed.strategies.attacks.spaces import Rows, Space, Variables

Z, H = "z", "h"
AVERAGE = "average."
WEIGHTS = Path(__file__).parent / "weights"
PICKLED = (".pt", ".pth", ".bin")


@dataclass(frozen=True, eq=False)
class Prior:
    """A generator of images, and how its pixels become a model's inputs."""

    generator: Layered
    shape: Shape
    """(C, H, W) of the model's inputs: the middle of what is generated."""
    scale: Scale

    def inputs(self, pixels: Tensor) -> Tensor:
        """Return pixels ``(B, C, S, S)`` as the model takes them."""
        down, right = (made - wanted for made, wanted in zip(pixels.shape[-2:], self.shape[1:], strict=True))
        height, width = self.shape[1:]
        middle = pixels[..., down // 2 : down // 2 + height, right // 2 : right // 2 + width]
        return self.scale.values(middle)

    def image(self, h: Tensor, labels: Tensor, first: int) -> Tensor:
        """Return inputs ``(B, C, H, W)`` for h_first."""
        condition = self.generator.condition(labels)
        return self.inputs(self.generator.part(h, condition, first, self.generator.layers))

    @classmethod
    def load(cls, path: str | Path, shape: Shape, classes: int, scale: Scale, device: torch.device) -> Prior:
        """Read the generator that strategy ``gan`` trained: a run's model.safetensors, or the average alone.

        ``path`` may also be the name of a prior that comes with the package (``shipped``), or a file with a user's
        weights of StyleGAN2 or BigGAN (``flowerbed.models.published_generators``). Raises ``ConfigError`` for a file
        that holds none, or one of other images or classes.
        """
        given = _read(shipped().get(str(path), Path(path)))
        foreign = published(given, shape)
        if foreign is not None:
            wanted_classes = getattr(foreign, "classes", classes)
            require(
                wanted_classes == classes,
                f"attack.prior={path} knows {wanted_classes} classes, the attacked model {classes}; attack a model of "
                "the same ones.",
            )
            return cls(foreign.eval().requires_grad_(False).to(device), shape, scale)
        own = {n.removeprefix(AVERAGE): v for n, v in given.items() if n.startswith(AVERAGE)} or dict(given)
        wanted = ("embedding.weight", "stem.weight", "out.weight")
        if not all(name in own for name in wanted):
            raise ConfigError(f"attack.prior={path} holds no generator; train one with strategy=gan.")
        known, embedding = own["embedding.weight"].shape
        require(
            known == classes,
            f"attack.prior={path} knows {known} classes, the attacked model {classes}; train one on their data.",
        )
        channels, width = own["out.weight"].shape[0], own["stem.weight"].shape[0] // 64
        generator = Generator(channels, classes, own["stem.weight"].shape[1] - embedding, embedding, width)
        generator.load_state_dict(own)
        require(
            channels == shape[0] and max(shape[1:]) <= generator.side,
            f"attack.prior={path} makes images of {channels} x {generator.side} x {generator.side}, the attacked "
            f"model takes {' x '.join(map(str, shape))}.",
        )
        return cls(generator.eval().requires_grad_(False).to(device), shape, scale)


@dataclass(frozen=True, eq=False)
class Latent:
    """z ~ N(0, I)."""

    prior: Prior
    kl: float = 0.0
    """Weight of -1/2 (1 + log s^2 - m^2 - s^2), m and s the mean and the deviation over z's entries (GGL)."""
    stages: int = 0
    """Feature maps h_1 .. h_stages that are searched afterwards."""
    radii: Sequence[float] = ()
    """Of the l1 balls of h_1, h_2, ...; the last goes on, none means free."""
    weights: bool = False
    """Whether the generator's weights are searched afterwards."""

    @property
    def fixed(self) -> Variables:
        return {}

    def open(self, rows: Rows) -> Variables:
        return {Z: rows.draws("latent", rows.batch, *self.prior.generator.latent)}

    def decode(self, variables: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        return self.prior.image(variables[Z], labels, 0)

    def penalty(self, variables: Mapping[str, Tensor]) -> Tensor:
        """Return the penalty of one row."""
        z = variables[Z].flatten(1)
        mean, variance = z.mean(1), z.var(1, unbiased=False)
        return self.kl * -0.5 * (1 + (variance + 1e-12).log() - mean**2 - variance).sum()

    def constrain(self, variables: Variables, rows: Rows) -> None:
        """z may go anywhere."""

    def advance(self, variables: Variables, labels: Tensor) -> tuple[Space, Variables] | None:
        if self.weights:
            return Weights.after(self.prior, variables[Z], labels)
        if self.stages:
            return FeatureMaps.after(self.prior, 0, variables[Z], labels, self.stages, self.radii)
        return None


@dataclass(frozen=True, eq=False)
class FeatureMaps:
    """h_k of every row, with k at least 1."""

    prior: Prior
    k: int
    start: Tensor
    """``(rows, B, ...)``, where the stage began."""
    stages: int
    radii: Sequence[float] = ()

    @property
    def fixed(self) -> Variables:
        return {}

    @classmethod
    def after(
        cls, prior: Prior, k: int, h: Tensor, labels: Tensor, stages: int, radii: Sequence[float]
    ) -> tuple[Space, Variables] | None:
        """Return the stage that follows h_k, and where it begins; None if that was the last one."""
        if k >= stages or k + 1 >= prior.generator.layers:
            return None

        def through(one: Tensor, y: Tensor) -> Tensor:
            return prior.generator.part(one, prior.generator.condition(y), k, k + 1)

        with torch.no_grad():
            start = vmap(through)(h, labels)
        return cls(prior, k + 1, start, stages, radii), {H: start.clone()}

    def open(self, rows: Rows) -> Variables:
        return {H: self.start.clone()}

    def decode(self, variables: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        return self.prior.image(variables[H], labels, self.k)

    def penalty(self, variables: Mapping[str, Tensor]) -> Tensor:
        """Return 0: the ball is enough."""
        return variables[H].new_zeros(())

    def constrain(self, variables: Variables, rows: Rows) -> None:
        if self.radii:
            radius = self.radii[min(self.k, len(self.radii)) - 1]
            moved = variables[H] - self.start
            variables[H].copy_(self.start + onto_l1_ball(moved.flatten(2), radius).view_as(moved))

    def advance(self, variables: Variables, labels: Tensor) -> tuple[Space, Variables] | None:
        return self.after(self.prior, self.k, variables[H], labels, self.stages, self.radii)


@dataclass(frozen=True, eq=False)
class Weights:
    """A copy of the generator's weights for every image; z stays where it was found."""

    prior: Prior
    z: Tensor
    """``(rows, B, ...)``."""

    @classmethod
    def after(cls, prior: Prior, z: Tensor, labels: Tensor) -> tuple[Space, Variables]:
        """Return the stage that follows z, and where it begins."""
        assert isinstance(prior.generator, nn.Module)
        copies = {
            name: value.detach().expand(*z.shape[:2], *value.shape).clone()
            for name, value in prior.generator.named_parameters()
        }
        return cls(prior, z.detach()), copies

    @property
    def fixed(self) -> Variables:
        return {Z: self.z}

    def open(self, rows: Rows) -> Variables:
        raise NotImplementedError("weights are searched after a latent code")

    def decode(self, variables: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        generator = self.prior.generator
        assert isinstance(generator, nn.Module)
        own = {n: v for n, v in variables.items() if n != Z}

        def one(weights: Mapping[str, Tensor], z: Tensor, y: Tensor) -> Tensor:
            pixels: Tensor = functional_call(generator, dict(weights), (z[None], y[None]))
            return pixels[0]

        return self.prior.inputs(vmap(one)(own, variables[Z], labels))

    def penalty(self, variables: Mapping[str, Tensor]) -> Tensor:
        """Return 0."""
        return self.z.new_zeros(())

    def constrain(self, variables: Variables, rows: Rows) -> None:
        """Weights may go anywhere."""

    def advance(self, variables: Variables, labels: Tensor) -> tuple[Space, Variables] | None:
        return None


def _read(path: Path) -> dict[str, Any]:
    """Return the tensors of a safetensors file, or of one that ``torch.save`` wrote."""
    try:
        if path.suffix in PICKLED:
            given: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return given
        return dict(load_file(path))
    except (OSError, SafetensorError, pickle.UnpicklingError) as error:
        raise ConfigError(f"attack.prior={path} cannot be read: {error}.") from error


def shipped() -> dict[str, Path]:
    """Return the priors that come with the package, by name; each file's header says how it was made."""
    return {path.stem: path for path in sorted(WEIGHTS.glob("*.safetensors"))}


def onto_l1_ball(v: Tensor, radius: float) -> Tensor:
    """Return the nearest points with sum |v| <= radius, along the last axis (Duchi et al. 2008)."""
    sizes = v.abs()
    ordered = sizes.sort(-1, descending=True).values
    sums = ordered.cumsum(-1)
    count = torch.arange(1, v.shape[-1] + 1, device=v.device, dtype=v.dtype)
    kept = (ordered * count > sums - radius).sum(-1, keepdim=True).clamp(min=1)
    theta = (sums.gather(-1, kept - 1) - radius) / kept
    shrunk = v.sign() * (sizes - theta.clamp(min=0)).clamp(min=0)
    return torch.where(sums[..., -1:] <= radius, v, shrunk)
