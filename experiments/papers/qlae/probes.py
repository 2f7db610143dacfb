"""What the reproduction of QLAE runs on, and what it measures."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flowerbed.datasets.mini_shapes import EXTRA
from flowerbed.errors import ConfigError
from flowerbed.experiments.measures import Measured
from flowerbed.models.autoencoders import Autoencoder
from flowerbed.models.disentanglement import InfoMec, binned, infomec
from flowerbed.models.quantisers import Codebooks


@torch.no_grad()
def measured_codes(measured: Measured) -> tuple[InfoMec, Mapping[str, float]]:
    """Return InfoMEC of the delivered model on the test split, and all its figures by name."""
    net = measured.model
    if not isinstance(net, Autoencoder):
        raise ConfigError(
            f"Disentanglement is that of an autoencoder's codes, and the model is {type(net).__name__}; set "
            "model=flowerbed.models.autoencoders:autoencoder."
        )
    latent, codes, errors = net.head.latent, [], []
    for x in measured.batches(measured.dataset.test):
        said = net.body(x)
        code = latent(said)
        codes.append((latent.codes(said) if isinstance(latent, Codebooks) else code).cpu())
        errors.append((net.head(code).sigmoid() - x).square().flatten(1).mean(1).cpu())
    found = torch.cat(codes).numpy()
    factors = measured.dataset.test.extras[EXTRA].numpy()
    mec = infomec(found if isinstance(latent, Codebooks) else found.astype(float), factors)
    if isinstance(latent, Codebooks):
        alike = mec.modularity
    else:
        alike = infomec(binned(found[:, mec.active]), factors).modularity
    return mec, {
        "infom": mec.modularity,
        "infoe": mec.explicitness,
        "infoc": mec.compactness,
        "infom-binned": alike,
        "psnr": float(-10 * torch.cat(errors).clamp_min(1e-10).log10().mean()),
        "active-latents": float(mec.active.sum()),
    }


def disentangled(measured: Measured) -> Mapping[str, float]:
    """Return InfoM, InfoE, InfoC, InfoM with one estimator for all latents, PSNR in dB, and the active latents."""
    return measured_codes(measured)[1]
