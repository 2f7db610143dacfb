"""The frozen encoders that a run can put before its model: ``encoder=NAME``.

Those that are fitted here see the server's own samples alone (``data.server_per_class``), which no client has, so that
the federation's data stay unseen. Encoders and embeddings are kept in the data cache, by everything that they depend
on: the arms and repetitions of an experiment share them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from flowerbed.clients.data import Batch
from flowerbed.clients.embeddings import embedded
from flowerbed.clients.local_round import Extras
from flowerbed.clients.params import LocalParams
from flowerbed.clients.training import train
from flowerbed.datasets.cache import default_cache_dir
from flowerbed.datasets.dataset import Dataset
from flowerbed.errors import ConfigError, require
from flowerbed.experiments.config import build
from flowerbed.models import encoders
from flowerbed.models.base import ModelSpec
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Classification, Task
from flowerbed.registry import Registry
from flowerbed.storage import atomic_write
from flowerbed.strategies.server_side import ServerSide

VERSION = 1
"""Part of every key: raise it when what an encoder computes changes."""


@dataclass(frozen=True)
class Material:
    """What an encoder can be made from."""

    dataset: Dataset
    server: ServerSide
    """The server's own samples, and how to train on them."""
    seed: int
    device: torch.device

    @property
    def images(self) -> Tensor:
        """The server's images, in [0, 1]."""
        return encoders.pixels(self.dataset.train.inputs[torch.from_numpy(self.server.samples.copy())])


class Encoder(Protocol):
    """A way to make a frozen encoder; a frozen dataclass whose fields are its options."""

    def make(self, material: Material) -> nn.Module:
        """Return the encoder, or one with room for the weights that an earlier ``make`` left in the cache."""


ENCODERS: Registry[type] = Registry("encoder")
"""Name -> frozen dataclass with a method ``make(material)``."""


@ENCODERS.register("none")
@dataclass(frozen=True)
class NoEncoder:
    """The model sees the data as they are."""

    def make(self, material: Material) -> nn.Module:
        """Return the flattened input."""
        return encoders.frozen(nn.Flatten())


@ENCODERS.register("patches")
@dataclass(frozen=True)
class Patches:
    """Whitened patches against k-means atoms, averaged in four quadrants; fitted without labels in seconds."""

    patch: int = 6
    """Side of a patch in pixels."""
    atoms: int = 128
    """Atoms (K); embeddings have 4 K numbers."""
    threshold: float = 0.25
    """What a similarity must exceed."""
    regulariser: float = 0.1
    """Added to the eigenvalues in whitening."""

    def __post_init__(self) -> None:
        for name in ("patch", "atoms"):
            require(getattr(self, name) >= 1, f"encoder.{name} is {getattr(self, name)}; give at least 1.")
        require(self.regulariser > 0, f"encoder.regulariser is {self.regulariser}; give a number above 0.")

    def make(self, material: Material) -> nn.Module:
        """Fit the encoder to the server's images."""
        fitted = encoders.fit_patch_encoder(
            material.images,
            material.seed,
            patch=self.patch,
            atoms=self.atoms,
            threshold=self.threshold,
            regulariser=self.regulariser,
        )
        return encoders.frozen(fitted)


@ENCODERS.register("trained")
@dataclass(frozen=True)
class Trained:
    """The body of a network that the server trains on its own images, on rotations or on labels, and then freezes."""

    model: str = "resnet8"
    """A model of the zoo, or package.module:Builder."""
    options: Mapping[str, Any] | None = None
    """Its options; null means group norm where the model has a choice."""
    task: str = "rotation"
    """rotation (which of four quarter turns, no labels: Gidaris et al. 2018) or labels."""
    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.05
    """Where the cosine schedule begins; momentum is 0.9, weight decay 5e-4."""
    augment: str = "none"
    """Augmentation of the images, see ``flowerbed.datasets.augment``."""

    def __post_init__(self) -> None:
        require(
            self.task in ("rotation", "labels"),
            f"encoder.task is '{self.task}'; choose rotation or labels.",
        )
        require(self.epochs >= 1, f"encoder.epochs is {self.epochs}; give at least 1.")
        require(self.batch_size >= 1, f"encoder.batch_size is {self.batch_size}; give at least 1.")

    def make(self, material: Material) -> nn.Module:
        """Train the network, by the loop that trains clients."""
        dataset, server = material.dataset, material.server
        if not len(server.samples):
            raise ConfigError(
                "encoder=trained learns from images of the server's own and there are none; set "
                "data.server_per_class, for example to 100."
            )
        classes = 4 if self.task == "rotation" else dataset.num_classes
        options = (
            {"norm": "gn"} if self.options is None and self.model.startswith("resnet") else self.options or {}
        )
        spec = ModelSpec(self.model, dataset.input_shape, classes, dict(options))
        local = LocalParams(
            epochs=self.epochs, batch_size=self.batch_size, lr=self.lr, momentum=0.9, weight_decay=5e-4,
            schedule="cosine", augment=self.augment,
        )  # fmt: skip
        side = ServerSide(server.seed, server.client, spec, dataset, server.samples, str(material.device))
        opened = side.open(spec.build(material.seed).state_dict(), local, 1, 1)
        train(opened, rotation_loss if self.task == "rotation" else label_loss, extras={})
        body = encoders.body_of(opened.model)
        return encoders.frozen(encoders.Normalised(body, dataset.mean, dataset.std))


@ENCODERS.register("zoo")
@dataclass(frozen=True)
class Zoo:
    """The body of a model of the zoo with weights from a file."""

    weights: str = ""
    """State dict of the whole model: .safetensors, or saved by torch."""
    model: str = "resnet18"
    options: Mapping[str, Any] | None = None
    classes: int = 10
    """Classes of the head that the weights have."""

    def make(self, material: Material) -> nn.Module:
        """Build the model and load the file."""
        if not self.weights:
            raise ConfigError(
                "encoder=zoo without weights would encode at random; give encoder.weights=FILE."
            )
        dataset = material.dataset
        model = ModelSpec(self.model, dataset.input_shape, self.classes, dict(self.options or {})).build(0)
        encoders.load_weights(model, self.weights)
        return encoders.frozen(encoders.Normalised(encoders.body_of(model), dataset.mean, dataset.std))


@ENCODERS.register("timm")
@dataclass(frozen=True)
class Timm:
    """A model of the timm library without its classifier."""

    model: str = "resnet18"
    weights: str = ""
    """File with its state dict (without classifier)."""
    pretrained: bool = False
    """Let timm download its own weights instead."""
    size: int = 0
    """Side that images are resized to; 0 means the model's own."""

    def make(self, material: Material) -> nn.Module:
        """Build the model; needs timm."""
        return encoders.timm_encoder(self.model, self.weights, self.pretrained, self.size)


@ENCODERS.register("open_clip")
@dataclass(frozen=True)
class OpenClip:
    """The image tower of CLIP, by the open_clip library; ViT-B-32 is what GGEUR's released code encodes with."""

    model: str = "ViT-B-32"
    weights: str = ""
    """File with its weights."""
    pretrained: bool = False
    """Let open_clip download the weights called ``tag`` instead."""
    tag: str = "openai"

    def make(self, material: Material) -> nn.Module:
        """Build the tower; needs open-clip-torch."""
        return encoders.open_clip_encoder(self.model, self.weights, self.pretrained, self.tag)


def embedded_dataset(
    name: str, options: Mapping[str, Any], material: Material, cache_dir: str | None
) -> Dataset:
    """Return ``material.dataset`` as embeddings of the encoder called ``name``, made or found in the cache."""
    if material.dataset.train.inputs.dtype == torch.int64:
        raise ConfigError(
            f"encoder={name} takes images, and '{material.dataset.name}' has token ids; use encoder=none."
        )
    encoder: Encoder = build(ENCODERS.get(name), options, "encoder")
    root = (Path(cache_dir).expanduser() if cache_dir else default_cache_dir()) / "embeddings"
    key = _key(name, options, material)
    return embedded(
        material.dataset,
        lambda: _made(encoder, material, root / f"{key}.safetensors"),
        material.device,
        root / f"{material.dataset.name}-{name}-{key}",
    )


def _made(encoder: Encoder, material: Material, path: Path) -> nn.Module:
    """Make the encoder and keep its weights beside the embeddings, for a user who wants them."""
    made = encoder.make(material)
    state = {n: v.detach().cpu().contiguous().clone() for n, v in made.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, save(state))
    return made


def _key(name: str, options: Mapping[str, Any], material: Material) -> str:
    """Return a hash of all that the embeddings depend on."""
    dataset = material.dataset
    found = hashlib.sha256(json.dumps([VERSION, name, sorted(options.items()), dataset.name, material.seed],
                                      default=str).encode())  # fmt: skip
    weights = options.get("weights")
    if weights and Path(weights).expanduser().is_file():
        found.update(hashlib.sha256(Path(weights).expanduser().read_bytes()).digest())
    for tensor in (dataset.train.inputs, dataset.test.inputs, dataset.train.labels):
        found.update(np.ascontiguousarray(tensor.numpy()).data)
    found.update(material.server.samples.tobytes())
    return found.hexdigest()[:20]


def rotation_loss(
    model: ModelParts, batch: Batch, extras: Extras, task: Task
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Return the cross entropy of telling by how many quarter turns an image was rotated, over all four."""
    x = batch["x"]
    turned = torch.cat([torch.rot90(x, turns, (2, 3)) for turns in range(4)])
    turns = torch.arange(4, device=x.device).repeat_interleave(len(x))
    return Classification(4).loss(model(turned), turns).mean(), {}


def label_loss(
    model: ModelParts, batch: Batch, extras: Extras, task: Task
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Return the cross entropy of the server's labels."""
    return task.loss(model(batch["x"]), batch["y"]).mean(), {}
