"""Latent quantisation without an autoencoder: the quantised InfoWGAN-GP, and the InfoWGAN-GP it is compared with.

A generator G draws an image from a code, an encoder E reads the code back from the image, and a critic D on the
encoder's last hidden layer tells made images from real ones (Chen et al. 2016; Gulrajani et al. 2017). Codes are drawn
evenly from the codebooks, z_j from V_j; E's answer is quantised like that of QLAE. With z^ the straight-through answer
to G(z), the encoder with its critic moves in every step on

    D(G(z)) - D(x) + gamma (|dD/dx~| - 1)^2 + mu mean_j (z^_j - z_j)^2 + quantisation and commitment of E(G(z)),

x~ at a random place between x and G(z), and the generator with the codebooks in every fifth on

    - D(G(z)) + mu mean_j (z^_j - z_j)^2 + quantisation and commitment of E(G(z)).

Codes are differentiable with respect to V, so unlike in QLAE the codebooks follow every term of the second loss.
``quantised=false`` is the InfoWGAN-GP: z_j uniform in [0, 1], E's answer as it is, no codebooks. Both have Adam without
momentum (``local.momentum=1e-8``, ``local.beta2=0.9``), the decay and the clipping of QLAE.

Everything drawn comes from the modules' stream. Many clients: all networks are averaged, codebooks sorted first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowerbed.clients.data import Batch
from flowerbed.clients.local_round import MODEL, Extras, LocalRound, Reply, Trained, shared_model
from flowerbed.clients.training import Hooks, train
from flowerbed.errors import ConfigError, require
from flowerbed.experiments.papers.qlae import VALUES, Qlae, QlaeHalf, QlaeParams
from flowerbed.models.autoencoders import Autoencoder
from flowerbed.models.parts import ModelParts
from flowerbed.models.quantisers import looked_up, nearest, pulls, straight_through
from flowerbed.models.tasks import Task

READS = ("body.", "head.critic.")
"""What the encoder's step moves; the generator's moves the rest."""


@dataclass(frozen=True)
class InfoGanParams(QlaeParams):
    """Hyper-parameters of the (quantised) InfoWGAN-GP."""

    quantised: bool = True
    """False: continuous codes."""
    gamma: float = 10.0
    """Weight of the gradient penalty."""
    mu: float = 200.0
    """Weight of the code read back."""
    period: int = 5
    """Steps of the encoder to one of the generator."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gamma", "mu"):
            require(
                getattr(self, name) >= 0, f"strategy.{name} is {getattr(self, name)}; give 0 (off) or more."
            )
        require(self.period >= 1, f"strategy.period is {self.period}; give at least 1.")
        require(self.learned, "A quantised InfoWGAN-GP learns its codebooks; leave strategy.learned=true.")

    def model(self) -> Mapping[str, Any]:
        codes = super().model() if self.quantised else {"latent": "plain", "n_z": self.n_z}
        return {**codes, "critic": True}


class InfoGanHalf(QlaeHalf):
    """Moves encoder and critic in every step, generator and codebooks in some."""

    params: InfoGanParams

    def run(self, local: LocalRound) -> Reply:
        names = set(local.parts.parameters)
        reads = {name for name in names if name.startswith(READS)}
        steps, start = local.clock.all_steps, local.clock.all_steps.start
        made: dict[str, list[Trained]] = {"encoder": [], "generator": []}

        def move(scope: str, loss: Any, moving: set[str], steps: range) -> None:
            trained = train(
                local,
                loss,
                extras={},
                hooks=Hooks(correct=self.correct),
                frozen=frozenset(names - moving),
                steps=steps,
                batches=batches,
                decayed=self.decayed(local.info),
                scope=scope,
            )
            made[scope].append(trained)

        batches = self.batches(local)
        for step in steps:
            turn = (step + 1) % self.params.period == 0
            if turn or step == steps[-1]:
                move("encoder", self.encoder_loss, reads, range(start, step + 1))
                start = step + 1
            if turn:
                move("generator", self.generator_loss, names - reads, range(step, step + 1))
        metrics = {
            f"{scope}-{name}": sum(t.steps * t.metrics[name] for t in found) / sum(t.steps for t in found)
            for scope, found in made.items()
            for name in (found[0].metrics if found else ())
        }
        counted = {"num-examples": len(local.train_data), "steps": len(steps)}
        loss = metrics["encoder-loss"]
        return Reply({MODEL: shared_model(local, frozenset())}, {**counted, "loss": loss, **metrics})

    def encoder_loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss of encoder and critic."""
        net, real = network(model), batch["x"]
        with torch.no_grad():
            z = self._drawn(net, real)
            fake = net.head(z).sigmoid()
        share = torch.rand(len(real), *[1] * (real.ndim - 1), device=real.device)
        between = (share * real + (1 - share) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(net.value(between).sum(), between, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        distance = net.value(fake).mean() - net.value(real).mean()
        value = distance + self.params.gamma * penalty + self._read(net, fake, z)
        return value, {"distance": distance, "penalty": penalty}

    def generator_loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss of generator and codebooks."""
        net = network(model)
        z = self._drawn(net, batch["x"])
        fake = net.head(z).sigmoid()
        return self._read(net, fake, z) - net.value(fake).mean(), {}

    def _drawn(self, net: Autoencoder, real: Tensor) -> Tensor:
        """Return as many codes as there are images, ``(B, n)``."""
        shape = (len(real), self.params.n_z)
        if not self.params.quantised:
            return torch.rand(shape, device=real.device)
        values: Tensor = net.get_parameter(VALUES)
        return looked_up(torch.randint(values.shape[1], shape, device=real.device), values)

    def _read(self, net: Autoencoder, fake: Tensor, z: Tensor) -> Tensor:
        """Return what the encoder's answer to made images costs."""
        said: Tensor = net.body(fake)
        if not self.params.quantised:
            return self.params.mu * (said - z).square().mean()
        values = net.get_parameter(VALUES)
        z_q = looked_up(nearest(said, values), values)
        quantisation, commitment = pulls(said, z_q)
        read = self.params.mu * (straight_through(said, z_q) - z).square().mean()
        return read + self.params.l_q * quantisation + self.params.l_c * commitment


def network(model: ModelParts) -> Autoencoder:
    """Return the model; raises ``ConfigError`` if it is no autoencoder."""
    if not isinstance(model.module, Autoencoder):
        raise ConfigError(
            f"An InfoWGAN-GP has the networks of an autoencoder, not {type(model.module).__name__}; set "
            "model=flowerbed.models.autoencoders:autoencoder."
        )
    return model.module


class InfoGan(Qlae):
    """FedAvg of InfoWGAN-GPs."""

    Params, Half = InfoGanParams, InfoGanHalf
