"""A class-conditional generator, trained by clients: the prior of generative attacks, or a model of one's data.

Reference: Goodfellow et al. 2014 with the hinge loss (Lim and Ye 2017; Miyato et al. 2018) and a projection
discriminator (Miyato and Koyama 2018). In every local step, on a batch of images x with labels y, first the
discriminator D, then the generator G moves:

    L_D = mean max(0, 1 - D(x, y)) + mean max(0, 1 + D(G(z, y), y))
    L_G = - mean D(G(z', y), y)              z, z' ~ N(0, I)

with Adam, D at ``critic`` times the learning rate of G. What is delivered beside both is the running average of G's
weights, with decay ``ema`` a step; its normalisation uses G's own running statistics.

So trained, the small generator ends with one image a class. The mode-seeking term (Mao et al. 2019) keeps it from that:
L_G gains ``seek`` / (mean |G(z', y) - G(z'', y)| / mean |z' - z''| + 1e-5) for a second code z''.

The model is one with ``generator``, ``discriminator`` and ``average``, such as ``flowerbed.models.generators:gan32``.
With several clients all three are averaged (FedAvg); momentum stays at the client with ``local.persist=true``.

Adam's beta_1 is that of ``local.momentum``; GANs want none, and since 0 there means torch's 0.9, give 1e-8; and
``local.beta2=0.9``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from flowerbed import seeds
from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import MODEL, Extras, LocalRound, Reply, Step, Trained, shared_model
from flowerbed.clients.training import Batches, Hooks, own_batches, train
from flowerbed.datasets.augment import Scale
from flowerbed.errors import ConfigError, require
from flowerbed.models.generators import SIDE, Gan
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.strategies.base import STRATEGIES, Setting
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

MODEL_PATH = "flowerbed.models.generators:gan32"
LATENT, SECOND, SEEK, SCALE = "latent", "second latent", "seek", "scale"
CRITIC, AVERAGE = "discriminator.", "average."


@dataclass(frozen=True)
class GanParams(FedAvgParams):
    """Hyper-parameters of the training of a generator."""

    critic: float = 1.5
    """Learning rate of the discriminator over that of the generator."""
    seek: float = 0.0
    """Weight of the mode-seeking term; 0 leaves it out."""
    ema: float = 0.995
    """Decay of the running average of the generator's weights, a step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.critic > 0, f"strategy.critic is {self.critic}; give a number above 0.")
        require(self.seek >= 0, f"strategy.seek is {self.seek}; give 0 (none) or more.")
        require(0 <= self.ema < 1, f"strategy.ema is {self.ema}; give a number in [0, 1).")


class GanHalf(ClientHalf):
    """Moves discriminator and generator in turn."""

    params: GanParams

    def run(self, local: LocalRound) -> Reply:
        data = local.train_data
        batches = own_batches(local, local.local)
        names = set(local.parts.parameters)
        critic = {name for name in names if name.startswith(CRITIC)}
        moving = {name for name in names - critic if not name.startswith(AVERAGE)}
        faster = replace(local.local, lr=local.local.lr * self.params.critic)
        done: list[tuple[Trained, Trained]] = []
        purposes = ("critic", "generator", "second") if self.params.seek else ("critic", "generator")
        for step in local.clock.all_steps:
            once = range(step, step + 1)
            batch = batches(step)
            codes = {what: self._codes(local, what, step, len(batch["y"])) for what in purposes}
            first = train(
                local, critic_loss, extras={LATENT: codes["critic"], SCALE: data.scale},
                frozen=frozenset(names - critic),
                params=faster, steps=once, batches=_always(batch), scope="critic",
            )  # fmt: skip
            second = train(
                local, generator_loss,
                extras={LATENT: codes["generator"], SECOND: codes.get("second"), SEEK: self.params.seek},
                hooks=Hooks(after_step=self.after_step), frozen=frozenset(names - moving), steps=once,
                batches=_always(batch), scope="generator",
            )  # fmt: skip
            done.append((first, second))
        means = [sum(pair[place].metrics["loss"] for pair in done) / len(done) for place in (0, 1)]
        return Reply(
            {MODEL: shared_model(local, frozenset())},
            {"num-examples": len(data), "steps": len(done), "critic-loss": means[0], "loss": means[1]},
        )

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Move the running average, and give it the generator's statistics."""
        module = gan_of(step.parts)
        for average, own in zip(module.average.parameters(), module.generator.parameters(), strict=True):
            average.lerp_(own, 1 - self.params.ema)
        for kept, statistics in zip(module.average.buffers(), module.generator.buffers(), strict=True):
            kept.copy_(statistics)

    def _codes(self, local: LocalRound, purpose: str, step: int, count: int) -> Tensor:
        rng = seeds.torch_rng(local.seed, f"latent {purpose}", local.client, step, device=local.device.type)
        shape = gan_of(local.parts).generator.latent
        return torch.randn(count, *shape, generator=rng, device=local.device)


def _always(batch: Batch) -> Batches:
    """Return one batch for every step: both networks move on it."""
    return lambda step: batch


def critic_loss(
    model: ModelParts, batch: Batch, extras: Extras, task: Task
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Return L_D."""
    module, y = gan_of(model), batch["y"]
    with torch.no_grad():
        made = module.generator(extras[LATENT], y)
    real = module.discriminator(framed(batch["x"], extras[SCALE]), y)
    return F.relu(1 - real).mean() + F.relu(1 + module.discriminator(made, y)).mean(), {}


def generator_loss(
    model: ModelParts, batch: Batch, extras: Extras, task: Task
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Return L_G."""
    module, y = gan_of(model), batch["y"]
    made = module.generator(extras[LATENT], y)
    value = -module.discriminator(made, y).mean()
    if extras[SEEK]:
        gap = (made - module.generator(extras[SECOND], y)).abs().mean()
        value = value + extras[SEEK] / (gap / (extras[LATENT] - extras[SECOND]).abs().mean() + 1e-5)
    return value, {}


def framed(x: Tensor, scale: Scale) -> Tensor:
    """Return inputs of a model as pixels in [0, 1], centred in 32x32 black ones."""
    pixels = scale.pixels(x)
    missing = [SIDE - side for side in pixels.shape[-2:]]
    return F.pad(
        pixels, (missing[1] // 2, missing[1] - missing[1] // 2, missing[0] // 2, missing[0] - missing[0] // 2)
    )


def gan_of(model: ModelParts) -> Gan:
    """Return the model; raises ``ConfigError`` if it is no GAN."""
    if not isinstance(model.module, Gan):
        raise ConfigError(
            f"strategy=gan trains a GAN, not {type(model.module).__name__}; set model={MODEL_PATH}."
        )
    return model.module


@STRATEGIES.register("gan")
class FedGan(FedAvg):
    """FedAvg over generator, discriminator and average."""

    Params = GanParams
    Half = GanHalf

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        require(
            any(name.startswith(AVERAGE) for name in setting.info.roles),
            f"strategy=gan trains generator and discriminator; set model={MODEL_PATH}.",
        )
