"""Disentanglement via Latent Quantization (QLAE).

Hsu, Dorrell, Whittington, Wu and Finn, NeurIPS 2023, arXiv 2305.18378. The latent of an autoencoder is a tuple of
scalars, each snapped to a small codebook of its own, and all weights decay unusually strongly. The encoder then has to
build its codes from few re-used values, and the decoder to give every value one meaning.

    z_c  = encoder(x)                                     n_z scalars, twice as many as factors
    z_qj = the nearest of V_j in R^10                     V_j starts as linspace(-1/2, 1/2)
    z_^  = z_c + sg(z_q - z_c)                            what the decoder reads
    loss = BCE(decoder(z_^), x), mean over pixels,
           + l_q mean_j (sg(z_c) - z_q)^2 + l_c mean_j (z_c - sg(z_q))^2

Adam; decoupled decay (w <- w - lr wd w, as in AdamW) and elementwise clipping of the gradient at 1 for weights only,
neither biases nor codebooks. The gradient of the reconstruction never reaches V.

InfoMEC (``flowerbed.models.disentanglement``) on the test split, whose factors are known: modularity InfoM,
explicitness InfoE, compactness InfoC; beside it the PSNR. As in the paper mutual information is counted for codes and
estimated from neighbours for continuous latents. The two are biased differently, so ``infom-binned`` has one estimator
for all: continuous latents are cut into ten equal parts of their range.

The method's second form, the quantised InfoWGAN-GP, is in ``flowerbed.experiments.papers.qlae.adversarial``.

Baselines: the plain autoencoder; the beta-TCVAE (Chen et al., NeurIPS 2018): BCE plus KL + (beta - 1) TC a pixel, TC
estimated within the batch, with beta = 1 the VAE; BioAE (Whittington et al., ICLR 2023): BCE plus the mean of
max(-z, 0) and a tenth of that of z^2; VQ-VAE (van den Oord et al. 2017): twelve vectors of 64 numbers from one codebook
of 512, l_q = 1, l_c = 1/4. Controls: every baseline has the same grid of decays, so that neither decay nor quantisation
alone explains the gain. ``learned=false`` is the ablation with one fixed codebook for all latents.

Differences from the paper: the images are our own (``flowerbed.datasets.mini_shapes``), since its four sets are large
downloads. In quick runs they have 16x16 pixels and the networks are MLPs. Decay acts within 1 / (lr wd) steps, 10,000
in the paper, whose runs last twenty times that; quick runs end after 10,000 steps, hence decay 0.5 beside the paper's
0.1. The weights of the beta-TCVAE are those of Chen et al., per pixel.

Many clients: encoder, decoder and codebooks are averaged, each V_j sorted first, since its order means nothing and
would break the mean. (That of a VQ-VAE's vectors means nothing either, and they have none to be put in.) Decay acts at
the clients, once a step. A client that sees few values of a factor leaves values of V unused. InfoE of a single factor
measures what the codes, if they were sent, would leak of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import MODEL, Extras
from flowerbed.errors import require
from flowerbed.models.base import ModelSpec
from flowerbed.models.info import ModelInfo
from flowerbed.models.parts import ModelParts
from flowerbed.models.quantisers import looked_up, nearest, nearest_vector, pulls, split, straight_through
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors
from flowerbed.strategies.base import ClientReply
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

VALUES = "head.latent.values"
"""The codebooks V, ``(n_z, levels)``."""


@dataclass(frozen=True)
class AeParams(FedAvgParams):
    """Hyper-parameters that all autoencoders share."""

    n_z: int = 12
    """Latents; the paper has twice as many as factors."""
    clip: float = 1.0
    """Largest absolute entry of the gradient of what decays; 0 means no clipping."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.n_z >= 1, f"strategy.n_z is {self.n_z}; give at least 1.")
        require(self.clip >= 0, f"strategy.clip is {self.clip}; give 0 (off) or more.")

    def model(self) -> Mapping[str, Any]:
        """Return the options of the model that these parameters decide."""
        return {"latent": "plain", "n_z": self.n_z}


@dataclass(frozen=True)
class QlaeParams(AeParams):
    """Hyper-parameters of QLAE."""

    levels: int = 10
    """Values of each codebook."""
    l_q: float = 0.01
    """Weight of the quantisation loss, which moves the values."""
    l_c: float = 0.01
    """Weight of the commitment loss, which moves the encoder."""
    learned: bool = True
    """False: the values stay where they start, the same for all latents."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.levels >= 2, f"strategy.levels is {self.levels}; give at least 2.")
        for name in ("l_q", "l_c"):
            require(
                getattr(self, name) >= 0, f"strategy.{name} is {getattr(self, name)}; give 0 (off) or more."
            )

    def model(self) -> Mapping[str, Any]:
        latent = "quantised" if self.learned else "fixed"
        return {"latent": latent, "n_z": self.n_z, "levels": self.levels}


@dataclass(frozen=True)
class TcvaeParams(AeParams):
    """Hyper-parameters of the beta-TCVAE."""

    beta: float = 3.0
    """Weight of the total correlation; 1 is the plain variational autoencoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta >= 0, f"strategy.beta is {self.beta}; give 0 or more.")

    def model(self) -> Mapping[str, Any]:
        return {"latent": "gaussian", "n_z": self.n_z}


@dataclass(frozen=True)
class BioParams(AeParams):
    """Hyper-parameters of BioAE."""

    nonnegative: float = 1.0
    """Weight of the mean of max(-z, 0)."""
    activity: float = 0.1
    """Weight of the mean of z^2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("nonnegative", "activity"):
            require(
                getattr(self, name) >= 0, f"strategy.{name} is {getattr(self, name)}; give 0 (off) or more."
            )


@dataclass(frozen=True)
class VqParams(QlaeParams):
    """Hyper-parameters of the VQ-VAE."""

    levels: int = 512
    l_q: float = 1.0
    l_c: float = 0.25
    size: int = 64
    """Numbers of a latent, which is a vector."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.size >= 1, f"strategy.size is {self.size}; give at least 1.")
        require(self.learned, "The codebook of a VQ-VAE learns; leave strategy.learned=true.")

    def model(self) -> Mapping[str, Any]:
        return {"latent": "vectors", "n_z": self.n_z, "levels": self.levels, "size": self.size}


def decays(name: str) -> bool:
    """Return whether a parameter decays and is clipped: all but biases and the latent."""
    return not (name.endswith("bias") or name.startswith("head.latent."))


class AeHalf(ClientHalf):
    """Trains an autoencoder whose weights decay."""

    params: AeParams

    def decayed(self, info: ModelInfo) -> frozenset[str]:
        return frozenset(filter(decays, info.parameters))

    def correct(self, gradients: Tensors, parameters: Mapping[str, Tensor], extras: Extras) -> Tensors:
        clip = self.params.clip or math.inf
        return {n: g.clamp(-clip, clip) if decays(n) else g for n, g in gradients.items()}

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        value = F.binary_cross_entropy_with_logits(model.head(model.features(batch["x"])), batch["x"])
        return value, {"reconstruction": value}


class QlaeHalf(AeHalf):
    """Trains an autoencoder with a quantised latent."""

    params: QlaeParams

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        values = (model.parameters if self.params.learned else model.buffers)[VALUES]
        z_c = model.features(batch["x"])
        z_q = self.quantised(z_c, values)
        logits = model.head(straight_through(z_c, z_q))
        reconstruction = F.binary_cross_entropy_with_logits(logits, batch["x"])
        quantisation, commitment = pulls(z_c, z_q)
        value = reconstruction + self.params.l_q * quantisation + self.params.l_c * commitment
        return value, {"reconstruction": reconstruction, "distance": commitment}

    def quantised(self, z_c: Tensor, values: Tensor) -> Tensor:
        """Return z_q."""
        return looked_up(nearest(z_c, values), values)


class VqHalf(QlaeHalf):
    """Trains a VQ-VAE."""

    def quantised(self, z_c: Tensor, values: Tensor) -> Tensor:
        return values[nearest_vector(split(z_c, values.shape[1]), values)].flatten(-2)


class BioHalf(AeHalf):
    """Trains an autoencoder whose code shall be small and not negative."""

    params: BioParams

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        z = model.features(batch["x"])
        reconstruction = F.binary_cross_entropy_with_logits(model.head(z), batch["x"])
        negative, activity = F.relu(-z).mean(), z.square().mean()
        value = reconstruction + self.params.nonnegative * negative + self.params.activity * activity
        return value, {"reconstruction": reconstruction, "negative": negative, "activity": activity}


class TcvaeHalf(AeHalf):
    """Trains a beta-TCVAE."""

    params: TcvaeParams

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        mean, log_var = model.features(batch["x"]).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        reconstruction = F.binary_cross_entropy_with_logits(model.head(z), batch["x"])
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean()
        tc = total_correlation(z, mean, log_var)
        value = reconstruction + (kl + (self.params.beta - 1) * tc) / batch["x"][0].numel()
        return value, {"reconstruction": reconstruction, "kl": kl, "tc": tc}


def total_correlation(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Return KL(q(z) || prod_j q(z_j)) of samples ``(B, n)``, q being the mixture of the batch's own posteriors."""
    away = (z[:, None] - mean) ** 2 * (-log_var).exp()
    log_q = -0.5 * (away + log_var + math.log(2 * math.pi))
    joint = log_q.sum(2).logsumexp(1) - math.log(len(z))
    marginal = (log_q.logsumexp(1) - math.log(len(z))).sum(1)
    return (joint - marginal).mean()


class Ae(FedAvg):
    """FedAvg of autoencoders."""

    Params, Half = AeParams, AeHalf
    params: AeParams

    def model_spec(self, spec: ModelSpec) -> ModelSpec:
        return replace(spec, options={**spec.options, **self.params.model()})


class Qlae(Ae):
    """FedAvg of autoencoders with a quantised latent."""

    Params, Half = QlaeParams, QlaeHalf

    def aggregate(self, server_round: int, current: Tensors, replies: list[ClientReply]) -> Tensors:
        if len(replies) > 1:
            replies = [replace(r, streams={**r.streams, MODEL: in_order(r.model)}) for r in replies]
        return super().aggregate(server_round, current, replies)


class Bio(Ae):
    """FedAvg of BioAEs."""

    Params, Half = BioParams, BioHalf


class Vq(Ae):
    """FedAvg of VQ-VAEs."""

    Params, Half = VqParams, VqHalf


class Tcvae(Ae):
    """FedAvg of beta-TCVAEs."""

    Params, Half = TcvaeParams, TcvaeHalf


def in_order(model: Tensors) -> Tensors:
    """Return a model whose codebooks are sorted: the same function, and codebooks that can be averaged."""
    return {n: v.sort(-1).values if n == VALUES else v for n, v in model.items()}
