"""Mixtures, signs, labels and policies: by hand, by their distributions, and in what the attacker's side is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import worlds
from torch import Tensor
from torch.nn import functional as F

from flowerbed.clients.data import ClientData
from flowerbed.clients.encodings import (
    POOL,
    Ats,
    InstaHide,
    LabelProtection,
    MixUp,
    coefficients,
    transformed,
)
from flowerbed.datasets.augment import Scale

CLASSES = 5


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 12, channels: int = 1, side: int = 8) -> ClientData:
    x = torch.rand(count, channels, side, side, generator=rng(3))
    y = torch.randint(0, CLASSES, (count,), generator=rng(4))
    return ClientData(x, y, torch.arange(count), {}, Scale())


def test_coefficients_keep_to_their_bounds_and_their_law() -> None:
    bounded = coefficients(3000, 4, 0.05, 0.5, rng())
    torch.testing.assert_close(bounded.sum(1), torch.ones(3000))
    assert float(bounded.min()) >= 0.05
    assert float(bounded.max()) <= 0.5
    free = coefficients(30_000, 4, 0.0, 1.0, rng())
    # Dirichlet(3, 1, 1, 1): means 1/2 and 1/6, variance of the first 3 * 3 / (36 * 7).
    torch.testing.assert_close(free.mean(0), torch.tensor([0.5, 1 / 6, 1 / 6, 1 / 6]), rtol=0, atol=0.01)
    assert float(free[:, 0].var()) == pytest.approx(9 / 252, rel=0.05)


def test_a_mixture_is_linear_in_samples_and_labels() -> None:
    """Samples that are their own class tell the coefficients; the labels must say the same ones."""
    y = torch.arange(CLASSES)
    data = ClientData(F.one_hot(y, CLASSES).float(), y, y, {})
    found = MixUp(k=3, high=0.9).encoded(data.batch(slice(0, 4)), data, CLASSES, rng())
    torch.testing.assert_close(found["x"], found["y"])
    torch.testing.assert_close(found["x"].sum(1), torch.ones(4))
    assert bool((found["x"].diagonal() > 0).all()), "the sample itself is in its mixture"
    assert bool((found["x"].diagonal() < 1).any())
    assert torch.equal(found["index"], torch.arange(4))


def test_instahide_is_the_mixture_with_signs() -> None:
    data = images()
    batch = data.batch(slice(0, 6))
    mixed = MixUp().encoded(batch, data, CLASSES, rng())
    hidden = InstaHide().encoded(batch, data, CLASSES, rng())
    torch.testing.assert_close(hidden["x"].abs(), mixed["x"].abs())
    torch.testing.assert_close(hidden["y"], mixed["y"])
    negative = float((hidden["x"] < 0).float().mean())
    assert 0.4 < negative < 0.6


def test_labels_are_softened_and_flipped() -> None:
    data = ClientData(
        torch.zeros(20_000, 1), torch.zeros(20_000, dtype=torch.int64), torch.arange(20_000), {}
    )
    soft = LabelProtection(smoothing=0.2).encoded(data.batch(slice(0, 2)), data, CLASSES, rng())["y"]
    assert soft[0].tolist() == pytest.approx([0.84, 0.04, 0.04, 0.04, 0.04])
    flipped = LabelProtection(smoothing=0.0, flip=0.5).encoded(
        data.batch(slice(0, 20_000)), data, CLASSES, rng()
    )["y"]
    # Half keep their label, the other half draws from all classes.
    assert float(flipped[:, 0].mean()) == pytest.approx(0.5 + 0.5 / CLASSES, abs=0.02)


def test_policies_by_hand() -> None:
    pixels = images(4, channels=3).x
    torch.testing.assert_close(transformed(pixels, (29,), rng()), 1 - pixels)
    # Twice inverted is the image; level 0 of a colour change is none.
    torch.testing.assert_close(transformed(pixels, (29, 47, 39), rng()), pixels)
    # translate_x at the top level moves by 150/331 of the width, whole pixels, black comes in.
    moved = transformed(pixels, (3,), rng())
    width = int(150 / 331 * 8)
    for image, before in zip(moved, pixels, strict=True):
        left, right = image[..., :-width], image[..., width:]
        assert torch.allclose(left, before[..., width:]) or torch.allclose(right, before[..., :-width])


def test_every_operation_keeps_to_pixels() -> None:
    for channels in (1, 3):
        pixels = images(3, channels=channels, side=16).x
        for number in range(len(POOL)):
            found = transformed(pixels, (number,), rng())
            assert found.shape == pixels.shape
            assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_ats_draws_a_policy_for_each_image() -> None:
    data = images(40)
    batch = data.batch(slice(0, 40))
    # Inversion, or nothing (a colour change of level 0).
    found = Ats(policies=((29,), (39,))).encoded(batch, data, CLASSES, rng())["x"]
    kept = [bool(torch.allclose(a, b)) for a, b in zip(found, batch["x"], strict=True)]
    turned = [bool(torch.allclose(a, 1 - b)) for a, b in zip(found, batch["x"], strict=True)]
    assert all(a != b for a, b in zip(kept, turned, strict=True))
    assert 8 < sum(kept) < 32
    assert torch.equal(Ats().encoded(batch, data, CLASSES, rng())["y"], batch["y"])


def test_the_loss_sees_the_encoding_and_the_metrics_the_run() -> None:
    """Twice the same run: what is drawn is the step's own."""
    one, two = (worlds.run("fedprox", defence={"name": "mixup", "k": 2, "high": 0.9}) for _ in range(2))
    assert worlds.equal(one.result.model, two.result.model)


def test_smoothing_is_the_mean_of_the_losses_of_all_labels() -> None:
    """The gradient for (1 - s) y + s / C, against the weighted sum of gradients for hard labels, by one step."""
    sections: dict[str, Any] = {"federation": {"clients": 1, "rounds": 1}, "local": {"steps": 1}}
    start = worlds.run("fedavg", **{**sections, "local": {"steps": 1, "lr": 0.0}})
    found = worlds.run("fedavg", defence={"name": "labels", "smoothing": 0.3}, **sections).result.model
    parts = start.parts
    net = parts.spec.model.build(3)
    indices = parts.train.indices(0)
    rows = indices[worlds.order_of(0, len(indices), 0)[: worlds.BATCH].numpy()]
    x, y = parts.dataset.prepare(parts.dataset.train.inputs[rows]), parts.dataset.train.labels[rows]
    named = dict(net.named_parameters())

    def gradient(labels: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(F.cross_entropy(net(x), labels), list(named.values())))

    expected = [0.7 * g for g in gradient(y)]
    for label in range(10):
        for total, g in zip(expected, gradient(torch.full_like(y, label)), strict=True):
            total += 0.3 / 10 * g
    for (name, p), g in zip(named.items(), expected, strict=True):
        torch.testing.assert_close(found[name], p.detach() - worlds.LR * g, rtol=1e-4, atol=1e-6)


def test_a_head_without_bias_has_the_same_weights() -> None:
    sections: dict[str, Any] = {"federation": {"clients": 1, "rounds": 1}, "local": {"lr": 0.0}}
    plain = worlds.run("fedavg", **sections).result.model
    bare = worlds.run(
        "fedavg", defence={"name": "labels", "smoothing": 0.0, "bias": False}, **sections
    ).result.model
    assert plain.keys() - bare.keys() == {"head.bias"}
    assert all(torch.equal(bare[n], plain[n]) for n in bare)
