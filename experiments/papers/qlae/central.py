"""Plain twins of QLAE, without any federation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.experiments.config import Simulation
from flowerbed.experiments.papers.qlae import decays, total_correlation
from flowerbed.experiments.reproduction.central import CentralStep, central_run
from flowerbed.models.autoencoders import Autoencoder
from flowerbed.models.quantisers import ScalarCodebooks
from flowerbed.storage import Tensors


def central(simulation: Simulation) -> Tensors:
    """Return what a plain loop makes of an arm, with torch's own parameter groups."""
    kind, options = simulation.strategy.name.rpartition(":")[2], simulation.strategy.options

    def clipped(net: nn.Module) -> None:
        for name, parameter in net.named_parameters():
            if decays(name):
                parameter.register_hook(lambda g: g.clamp(-1.0, 1.0))  # type: ignore[no-untyped-call]

    def loss(step: CentralStep) -> Tensor:
        net, x = step.net, step.x
        assert isinstance(net, Autoencoder)
        said: Tensor = net.body(x)
        if kind == "Tcvae":
            mean, log_var = said.chunk(2, -1)
            z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
            likelihood = F.binary_cross_entropy_with_logits(net.head(z), x)
            kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean()
            tc = total_correlation(z, mean, log_var)
            bound: Tensor = likelihood + (kl + (options["beta"] - 1) * tc) / x[0].numel()
            return bound
        if kind == "Ae":
            return F.binary_cross_entropy_with_logits(net.head(said), x)
        books = net.head.latent
        assert isinstance(books, ScalarCodebooks)
        z_q = torch.stack([v[(z[:, None] - v).abs().argmin(1)] for v, z in zip(books.values, said.T)], 1)
        value = F.binary_cross_entropy_with_logits(net.head(said + (z_q - said).detach()), x)
        moved, held = (z_q - said.detach()).square().mean(), (said - z_q.detach()).square().mean()
        return value + 0.01 * moved + 0.01 * held

    return central_run(simulation, loss, before=clipped, decayed=decays)
