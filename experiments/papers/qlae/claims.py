"""The claims about QLAE."""

from __future__ import annotations

from flowerbed.experiments.papers.qlae.central import central
from flowerbed.experiments.papers.qlae.figure import matrices
from flowerbed.experiments.reproduction.claims import Claim, metric
from flowerbed.experiments.reproduction.paper import Paper

DECAYS = (0.0, 0.1, 0.5)


infom, infoe, psnr, alike = metric("infom"), metric("infoe"), metric("psnr"), metric("infom-binned")
PAPER = Paper(
    slug="qlae",
    claims=(
        Claim(
            "quantisation makes codes modular",
            "At the same strong decay, quantised latents are more modular than continuous ones.",
            infom["qlae-0.5"] >= infom["ae-0.5"] + 0.10,
        ),
        Claim(
            "decay makes codes modular",
            "With a quantised latent, strong decay makes codes more modular.",
            infom["qlae-0.5"] >= infom["qlae-0"] + 0.05,
        ),
        Claim(
            "decay alone does not",
            "No decay of the grid makes the plain autoencoder or the beta-TCVAE as modular as QLAE.",
            tuple(infom["qlae-0.5"] >= infom[f"{m}-{d:g}"] for m in ("ae", "tcvae") for d in DECAYS),
        ),
        Claim(
            "further baselines",
            "Nor does any decay of the grid make the VAE, BioAE or the VQ-VAE as modular as QLAE.",
            tuple(
                infom["qlae-0.5"] >= infom[f"{m}-{d:g}"] for m in ("vae", "bioae", "vqvae") for d in DECAYS
            ),
        ),
        Claim(
            "learned codebooks",
            "Codebooks that each latent learns are more modular than one that all share and that stays.",
            infom["qlae-0.5"] >= infom["qlae-fixed-0.5"] + 0.02,
        ),
        Claim(
            "adversarial",
            "Quantised codes make the InfoWGAN-GP more modular and no less explicit.",
            (infom["qinfogan"] >= infom["infogan"] + 0.05, infoe["qinfogan"] >= infoe["infogan"]),
        ),
        Claim(
            "not the estimator",
            "The gain in modularity stays if one estimator of mutual information serves all latents.",
            alike["qlae-0.5"] >= alike["ae-0.5"] + 0.10,
        ),
        Claim(
            "explicitness",
            "QLAE's codes are at least as explicit as those of the beta-TCVAE, whatever its decay.",
            tuple(infoe["qlae-0.5"] >= infoe[f"tcvae-{d:g}"] for d in DECAYS),
        ),
        Claim(
            "reconstruction",
            "QLAE reconstructs no worse than the beta-TCVAE, whatever its decay.",
            tuple(psnr["qlae-0.5"] >= psnr[f"tcvae-{d:g}"] for d in DECAYS),
        ),
    ),
    central=dict.fromkeys(("ae-0.1", "tcvae-0.1", "qlae-0.1"), central),
    figure=matrices,
    uses=(
        "flowerbed.models.quantisers",
        "flowerbed.models.autoencoders",
        "flowerbed.models.disentanglement",
        "flowerbed.datasets.mini_shapes",
    ),
)
