"""Training of a generator: one step against a plain twin, the running average, frames."""

from __future__ import annotations

import copy

import pytest
import torch
import worlds
from torch import Tensor
from torch.nn import functional as F

from flowerbed import seeds
from flowerbed.datasets.augment import Scale
from flowerbed.errors import ConfigError
from flowerbed.models.generators import Gan, gan32
from flowerbed.strategies.gan import GanParams, framed

MODEL = {"name": "test_gan:tiny_gan"}
LOCAL = {
    "steps": 2,
    "batch_size": 16,
    "optimizer": "adam",
    "momentum": 1e-8,
    "beta2": 0.9,
    "lr": 0.01,
    "persist": True,
}


def tiny_gan(input_shape: tuple[int, ...], num_classes: int) -> Gan:
    """Return a GAN of a few hundred weights."""
    return Gan(input_shape[0], num_classes, 4, 3, 2)


def twin(net: Gan, x: Tensor, y: Tensor, scale: Scale, rounds: int, steps: int, ema: float) -> None:
    """Train by the book: torch's Adam, discriminator first, on the documented batches and codes."""
    betas = (1e-8, 0.9)
    critic = torch.optim.Adam(net.discriminator.parameters(), 0.015, betas)
    generator = torch.optim.Adam(net.generator.parameters(), 0.01, betas)
    per_epoch = -(-len(y) // 16)
    net.train()
    for step in range(rounds * steps):
        epoch, place = divmod(step, per_epoch)
        rows = torch.from_numpy(seeds.numpy_rng(3, "data order", 0, epoch).permutation(len(y)))
        rows = rows[place * 16 : (place + 1) * 16]
        real, labels = framed(x[rows], scale), y[rows]
        codes = [
            torch.randn(len(labels), 4, generator=seeds.torch_rng(3, f"latent {what}", 0, step))
            for what in ("critic", "generator", "second")
        ]
        made = net.generator(codes[0], labels).detach()
        loss = F.relu(1 - net.discriminator(real, labels)).mean()
        loss = loss + F.relu(1 + net.discriminator(made, labels)).mean()
        critic.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        critic.step()
        generator.zero_grad()
        made, other = net.generator(codes[1], labels), net.generator(codes[2], labels)
        ratio = (made - other).abs().mean() / (codes[1] - codes[2]).abs().mean()
        (-net.discriminator(made, labels).mean() + 0.1 / (ratio + 1e-5)).backward()
        generator.step()
        with torch.no_grad():
            for average, own in zip(net.average.parameters(), net.generator.parameters(), strict=True):
                average.mul_(ema).add_(own, alpha=1 - ema)
            for kept, own in zip(net.average.buffers(), net.generator.buffers(), strict=True):
                kept.copy_(own)


def test_one_client_is_the_plain_training_of_a_gan() -> None:
    world = worlds.run(
        "gan", {"ema": 0.9, "seek": 0.1}, model=MODEL, local=LOCAL, federation={"clients": 1, "rounds": 2}
    )
    parts = world.parts
    data = parts.dataset
    chosen = torch.from_numpy(parts.train.indices(0).copy())
    net = parts.spec.model.build(3)
    assert isinstance(net, Gan)
    before = copy.deepcopy(net.state_dict())
    twin(
        net,
        data.prepare(data.train.inputs[chosen]),
        data.train.labels[chosen],
        Scale(data.mean, data.std),
        2,
        2,
        0.9,
    )
    for name, value in net.state_dict().items():
        torch.testing.assert_close(world.result.model[name], value, rtol=1e-4, atol=1e-5, msg=name)
    moved = [n for n, v in before.items() if not torch.equal(v, net.state_dict()[n])]
    assert {n.partition(".")[0] for n in moved} == {"generator", "discriminator", "average"}


def test_smaller_images_are_centred_in_black() -> None:
    scale = Scale((0.5,), (0.25,))
    pixels = torch.rand(2, 1, 28, 30)
    found = framed(scale.values(pixels), scale)
    assert found.shape == (2, 1, 32, 32)
    torch.testing.assert_close(found[:, :, 2:30, 1:31], pixels)
    assert float(found.sum()) == pytest.approx(float(pixels.sum()), rel=1e-5)


def test_the_gan_says_how_real_an_image_is_for_every_class() -> None:
    net = tiny_gan((1, 32, 32), 3).eval()
    x = torch.rand(2, 1, 32, 32)
    scores = net(x)
    assert scores.shape == (2, 3)
    torch.testing.assert_close(scores[:, 1], net.discriminator(x, torch.tensor([1, 1])))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"critic": 0.0}, "strategy.critic is 0"),
        ({"ema": 1.0}, "strategy.ema is 1"),
        ({"seek": -1.0}, "strategy.seek is -1"),
    ],
)
def test_wrong_parameters_are_refused(options: dict[str, float], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        GanParams(**options)  # type: ignore[arg-type]


def test_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="set model=flowerbed"):
        worlds.run("gan")
    with pytest.raises(ConfigError, match="makes images of 32x32"):
        gan32((1, 40, 40), 3)
