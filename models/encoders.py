"""Frozen encoders: modules that turn images in [0, 1] into embeddings ``(N, d)`` and are never trained again.

An encoder is in evaluation mode, without gradients, and treats every image by itself, so that an embedding does not
depend on the batch it is computed in.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed import seeds
from flowerbed.errors import ConfigError
from flowerbed.models.base import Net

BATCH, CPU_BATCH = 500, 32
"""Images that are encoded at a time; on a CPU few, whose maps stay in its cache."""
CONTRAST_FLOOR = 10 / 255**2
"""What is added to the variance of a patch before it is divided by, for pixels in [0, 1] (10 for grey levels)."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of the channels that most released networks expect."""


def frozen(module: nn.Module) -> nn.Module:
    """Return ``module`` in evaluation mode, its parameters without gradients."""
    module.eval()
    return module.requires_grad_(False)


@torch.no_grad()
def encode(
    encoder: nn.Module,
    images: Tensor,
    device: torch.device,
    prepare: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the embeddings of ``images`` ``(N, ...)``, float32 ``(N, d)`` on the CPU.

    ``prepare`` turns a batch as it is stored into what the encoder takes; by default ``pixels``. Raises
    ``ConfigError`` if what comes out is no finite ``(N, d)``.
    """
    encoder = encoder.to(device)
    prepare, batch = prepare or pixels, CPU_BATCH if device.type == "cpu" else BATCH
    found = [
        encoder(prepare(images[i : i + batch].to(device))).float().cpu() for i in range(0, len(images), batch)
    ]
    embeddings = torch.cat(found)
    if embeddings.ndim != 2 or not bool(torch.isfinite(embeddings).all()):
        raise ConfigError(
            f"The encoder must return one finite vector an image, it returned shape {tuple(embeddings.shape)}"
            f"{'' if torch.isfinite(embeddings).all() else ' with numbers that are not finite'}; choose another."
        )
    return embeddings


def pixels(images: Tensor) -> Tensor:
    """Return images as float32 in [0, 1]; what is floating already is left alone."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


# Patches: an encoder without labels and without gradients, fitted in seconds.


class PatchEncoder(nn.Module):
    """Similarities of every patch to learned atoms, rectified and averaged in four quadrants: d = 4 K.

    For a patch p (all channels, flattened), c = (p - mean p) / sqrt(var p + floor), whitened c' = Z (c - m), and
    atom a_k of unit length, the map is max(0, <a_k, c'> - threshold), as in Coates and Ng 2012. Embeddings are
    standardised with ``shift`` and ``spread``.
    """

    def __init__(self, filters: Tensor, offset: Tensor, threshold: float) -> None:
        """``filters`` ``(K, C, p, p)`` are a_k^T Z, each with mean zero; ``offset`` ``(K,)`` is a_k^T Z m."""
        super().__init__()
        self.threshold = threshold
        self.filters: Tensor
        self.offset: Tensor
        self.shift: Tensor
        self.spread: Tensor
        self.register_buffer("filters", filters)
        self.register_buffer("offset", offset)
        self.register_buffer("shift", torch.zeros(4 * len(filters)))
        self.register_buffer("spread", torch.ones(4 * len(filters)))

    def forward(self, x: Tensor) -> Tensor:
        size = self.filters.shape[-1]
        mean = F.avg_pool2d(x.mean(1, keepdim=True), size, 1)
        square = F.avg_pool2d(x.square().mean(1, keepdim=True), size, 1)
        deviation = (square - mean.square()).clamp(min=0).add(CONTRAST_FLOOR).sqrt()
        # Filters have mean zero, so the patch's own need not be subtracted.
        maps = F.conv2d(x, self.filters) / deviation - self.offset[:, None, None]
        found = F.adaptive_avg_pool2d((maps - self.threshold).relu(), 2).flatten(1)
        return (found - self.shift) / self.spread


def fit_patch_encoder(
    images: Tensor,
    seed: int,
    *,
    patch: int = 6,
    atoms: int = 128,
    threshold: float = 0.25,
    regulariser: float = 0.1,
    patches: int = 100_000,
    rounds: int = 20,
) -> PatchEncoder:
    """Fit a ``PatchEncoder`` to ``images`` ``(N, C, H, W)`` in [0, 1]; a pure function of its arguments.

    ZCA whitening (eigenvalues plus ``regulariser``) of ``patches`` random contrast-normalised patches, then ``rounds``
    of spherical k-means. Raises ``ConfigError`` for images smaller than two patches or too few of them.
    """
    if images.ndim != 4 or min(images.shape[2:]) < patch + 1:
        raise ConfigError(
            f"encoder=patches takes images larger than its patches of {patch} pixels, not inputs of shape "
            f"{tuple(images.shape[1:])}; choose a smaller encoder.patch."
        )
    if len(images) < 2:
        raise ConfigError(
            "encoder=patches is fitted to images of the server's own and there are none; set data.server_per_class, "
            "for example to 100."
        )
    rng = seeds.torch_rng(seed, "patch encoder")
    taken = _random_patches(images, patch, patches, rng).double()
    taken = taken - taken.mean(1, keepdim=True)
    taken = taken / (taken.square().mean(1, keepdim=True) + CONTRAST_FLOOR).sqrt()
    centre = taken.mean(0)
    taken = taken - centre
    values, vectors = torch.linalg.eigh(taken.T @ taken / len(taken))
    whiten = vectors @ torch.diag((values.clamp(min=0) + regulariser).rsqrt()) @ vectors.T
    found = _spherical_kmeans(taken @ whiten, atoms, rounds, rng)
    filters = found @ whiten
    offset = filters @ centre
    # Every contrast-normalised patch has mean zero already, so the filters' means say nothing.
    filters = filters - filters.mean(1, keepdim=True)
    shape = (atoms, images.shape[1], patch, patch)
    encoder = PatchEncoder(filters.reshape(shape).float(), offset.float(), threshold)
    embeddings = encode(frozen(encoder), images, torch.device("cpu"))
    encoder.shift = embeddings.mean(0)
    # An atom that nothing resembles is left at zero.
    encoder.spread = embeddings.std(0).clamp(min=1e-3)
    return encoder


def _random_patches(images: Tensor, size: int, count: int, rng: torch.Generator) -> Tensor:
    """Return ``count`` random patches, flattened ``(count, C size size)``."""
    which = torch.randint(len(images), (count,), generator=rng)
    top = torch.randint(images.shape[2] - size + 1, (count,), generator=rng)
    left = torch.randint(images.shape[3] - size + 1, (count,), generator=rng)
    steps = torch.arange(size)
    rows, columns = top[:, None] + steps, left[:, None] + steps
    found = images[which[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return found.permute(0, 3, 1, 2).flatten(1)


def _spherical_kmeans(points: Tensor, count: int, rounds: int, rng: torch.Generator) -> Tensor:
    """Return ``count`` unit vectors.

    Every point goes to the atom of largest inner product, which turns towards the sum of its points, each weighted by
    that product.
    """
    atoms = points[torch.randperm(len(points), generator=rng)[:count]]
    atoms = F.normalize(atoms, dim=1)
    for _ in range(rounds):
        value, nearest = (points @ atoms.T).max(1)
        sums = torch.zeros_like(atoms).index_add_(0, nearest, value[:, None] * points)
        # An atom without points stays where it is.
        used = sums.norm(dim=1, keepdim=True) > 0
        atoms = torch.where(used, F.normalize(sums, dim=1), atoms)
    return atoms


# Networks.


class Normalised(nn.Module):
    """A network behind what its weights expect of images in [0, 1]: a size, three channels, mean and deviation."""

    def __init__(
        self, body: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], size: int = 0
    ) -> None:
        """``size`` is the side that images are resized to; 0 leaves them."""
        super().__init__()
        self.body = body
        self.size = size
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1 and len(self.mean) == 3:
            x = x.expand(-1, 3, -1, -1)
        if self.size and tuple(x.shape[2:]) != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        y: Tensor = self.body((x - self.mean) / self.std)
        return y


def body_of(model: nn.Module) -> nn.Module:
    """Return the part of a zoo model before its head."""
    if not isinstance(model, Net):
        raise ConfigError(
            f"{type(model).__name__} has no separate body to encode with; choose a model of the zoo."
        )
    return model.body


def load_weights(module: nn.Module, path: str) -> None:
    """Put the weights in a .safetensors file, or a state dict saved by torch, into ``module``.

    Raises ``ConfigError`` naming the file and what does not fit.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"encoder.weights={path} does not exist; give the path of a .safetensors or .pt file."
        )
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
        module.load_state_dict(state)
    except Exception as error:
        # Readers meet foreign files with errors of every kind; the user needs the file's name.
        raise ConfigError(
            f"encoder.weights={path} cannot be used ({type(error).__name__}: {str(error).splitlines()[0]}); give the "
            "state dict of exactly this model."
        ) from error


def timm_encoder(model: str, weights: str, pretrained: bool, size: int) -> nn.Module:
    """Return a model of timm without its classifier; raises ``ConfigError`` without timm or weights."""
    timm = _optional("timm", "timm", "encoder=timm")
    _require_weights("timm", weights, pretrained)
    if not timm.is_model(model):
        raise ConfigError(f"timm has no model '{model}'; list them with: flowerbed list models 'timm:*'.")
    body = timm.create_model(model, pretrained=pretrained and not weights, num_classes=0)
    if weights:
        load_weights(body, weights)
    facts = timm.data.resolve_data_config({}, model=body)
    return frozen(Normalised(body, tuple(facts["mean"]), tuple(facts["std"]), size or facts["input_size"][1]))


def open_clip_encoder(model: str, weights: str, pretrained: bool, tag: str) -> nn.Module:
    """Return the image tower of an open_clip model; raises ``ConfigError`` without open_clip or weights."""
    open_clip = _optional("open_clip", "open-clip-torch", "encoder=open_clip")
    _require_weights("open_clip", weights, pretrained)
    if model not in open_clip.list_models():
        raise ConfigError(
            f"open_clip has no model '{model}'; it has {', '.join(open_clip.list_models()[:8])} ..."
        )
    clip = open_clip.create_model(model, pretrained=weights or tag)
    tower = clip.visual
    size = tower.image_size[0] if isinstance(tower.image_size, tuple) else int(tower.image_size)
    mean = getattr(tower, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    std = getattr(tower, "image_std", None) or open_clip.OPENAI_DATASET_STD
    return frozen(Normalised(tower, tuple(mean), tuple(std), size))


def _require_weights(name: str, weights: str, pretrained: bool) -> None:
    if not weights and not pretrained:
        raise ConfigError(
            f"encoder={name} without weights would encode at random; give encoder.weights=FILE, or "
            "encoder.pretrained=true to let the library download them."
        )


def _optional(module: str, package: str, wanted: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # RuntimeError: its torchvision was built for another torch
        raise ConfigError(
            f"{wanted} needs {package}, which cannot be imported ({error}). Install it with: pip install {package}"
        ) from error


def digest(module: nn.Module) -> str:
    """Return a short hash of a module's class and weights."""
    import hashlib

    found = hashlib.sha256(type(module).__name__.encode())
    for name, value in module.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:20]
