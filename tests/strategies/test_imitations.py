"""What attackers repeat of defences, by hand and against the clients' own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from flowerbed.errors import ConfigError
from flowerbed.experiments.leakage import attacking
from flowerbed.models.base import ModelSpec
from flowerbed.strategies.attacks import labels as label_rules
from flowerbed.strategies.attacks.candidates import gradient
from flowerbed.strategies.attacks.imitations import IMITATIONS, imitation_of
from flowerbed.strategies.attacks.objectives import cosine, l2

U = {"a": torch.tensor([3.0, 0.5, -1.0]), "head.weight": torch.tensor([4.0])}
V = {"a": torch.tensor([2.0, 0.0, 0.0]), "head.weight": torch.tensor([-4.0])}


def test_compared_by_hand() -> None:
    expected: dict[Any, dict[str, list[float]]] = {
        "none": {"a": [3.0, 0.5, -1.0], "head.weight": [4.0]},
        "mask": {"a": [3.0, 0.0, 0.0], "head.weight": [4.0]},
        "top": {"a": [3.0, 0.0, 0.0], "head.weight": [4.0]},
    }
    for name, wanted in expected.items():
        found, observed = imitation_of(name).compared(U, V)
        assert {n: v.tolist() for n, v in found.items()} == wanted
        assert observed == V
    _, kept = imitation_of({"name": "drop", "layers": ["head"]}).compared(U, V)
    assert kept.keys() == {"a"}
    # |u|^2 = 9 + 0.25 + 1 + 16 = 26.25 and |v|^2 = 20.
    found, _ = imitation_of("clip").compared(U, V)
    torch.testing.assert_close(found["a"], U["a"] * (20 / 26.25) ** 0.5)
    small = {n: 0.1 * v for n, v in U.items()}
    assert torch.equal(imitation_of("clip").compared(small, V)[0]["a"], small["a"])


def test_the_largest_entries_are_chosen_by_row() -> None:
    """Rows of one batch may have different shares of zeros."""
    u = torch.tensor([[1.0, -3.0, 2.0], [1.0, -3.0, 2.0]])
    v = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    found = vmap(lambda a, b: imitation_of("top").compared({"w": a}, {"w": b})[0]["w"])(u, v)
    assert found.tolist() == [[0.0, -3.0, 0.0], [0.0, -3.0, 2.0]]


def test_constants_are_read_off() -> None:
    assert imitation_of("mask").read(V) == {"keep": 2 / 4}
    assert imitation_of("clip").read(V)["bound"] == pytest.approx(20**0.5)
    assert imitation_of("none").read(V) == {}


def test_a_clip_matters_to_those_who_see_lengths_alone() -> None:
    longer = {n: 3 * v for n, v in V.items()}
    assert float(l2(*imitation_of("clip").compared(longer, V))) == pytest.approx(0, abs=1e-6)
    assert float(l2(longer, V)) == pytest.approx(4 * 20)
    assert float(cosine(longer, V)) == pytest.approx(0, abs=1e-6)
    assert "imitation" not in attacking.useful("ig", {"imitation": "clip"})
    assert attacking.useful("wang", {"imitation": "clip"}) == {"imitation": "clip"}


def test_clipped_examples_against_a_loop() -> None:
    module = ModelSpec("mlp", (6,), 3, {"hidden": (5,)}).build(0)
    x, y = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0])
    named = dict(module.named_parameters())
    clip, total = 0.5, {n: torch.zeros_like(p) for n, p in named.items()}
    scaled = 0
    for i in range(4):
        found = torch.autograd.grad(F.cross_entropy(module(x[i : i + 1]), y[i : i + 1]), list(named.values()))
        length = float(torch.cat([g.flatten() for g in found]).norm())
        scaled += length > clip
        for name, g in zip(named, found, strict=True):
            total[name] += g * min(1.0, clip / length) / 4
    assert scaled > 0, "the bound binds"
    made, _ = gradient(module, named, {}, x, y, clip=clip)
    for name, value in total.items():
        torch.testing.assert_close(made[name], value)


def test_softened_labels_are_counted_exactly() -> None:
    """With the true p the counts are exact once the smoothing is taken off; without that they are not."""
    net = ModelSpec("mlp", (6,), 4, {"hidden": (16,)}).build(0)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
    y = torch.tensor([0, 0, 0, 0, 0, 0, 0, 2])
    imitation = imitation_of({"name": "smooth", "share": 0.6})
    soft = imitation.targets(y, 4)
    torch.testing.assert_close(soft.sum(1), torch.ones(8))
    found, _ = gradient(net, dict(net.named_parameters()), {}, x, soft)
    with torch.no_grad():
        last = label_rules.last_layer(net, found, 8, x)
    known = replace(last, smoothing=imitation.smoothing)
    assert label_rules.restore("count", known).tolist() == y.tolist()
    assert label_rules.restore("count", last).tolist() != y.tolist()


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("guess", "Unknown imitation 'guess'"),
        ({"layers": ["head"]}, "write {name: NAME"),
        ({"name": "drop", "layer": "head"}, "Unknown constant of imitation Drop 'layer'"),
        ({"name": "smooth", "share": 1.0}, "share is 1.0"),
        ({"name": "dpsgd", "clip": 0.0}, "clip is 0.0"),
    ],
)
def test_wrong_imitations_are_refused(said: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        imitation_of(said)


def test_nothing_is_left_to_compare() -> None:
    with pytest.raises(ConfigError, match="nothing is left"):
        imitation_of({"name": "drop", "layers": ["a", "head"]}).compared(U, V)


def test_every_imitation_works_in_a_batch_of_rows() -> None:
    stacked = {n: torch.stack([v, 2 * v]) for n, v in U.items()}
    observed = {n: torch.stack([v, v]) for n, v in V.items()}
    for name in IMITATIONS:
        imitation = imitation_of(name)

        def cost(u: dict[str, Tensor], v: dict[str, Tensor], imitation: Any = imitation) -> Tensor:
            return cosine(*imitation.compared(u, v))

        assert vmap(cost)(stacked, observed).shape == (2,)


def test_the_bottleneck_adds_its_divergence_once() -> None:
    """The attacker's loss has the term that the clients' has; by hand from the layer's own outputs."""
    from flowerbed.models.bottleneck import BOTTLENECKED

    options = {"base": "mlp", "options": {"hidden": (5,)}, "size": 3, "beta": 0.5}
    net = ModelSpec(BOTTLENECKED, (6,), 3, options).build(0).eval()
    x, y = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0])
    named = dict(net.named_parameters())
    made, _ = gradient(net, named, {}, x, y)

    layer = net.get_submodule("body.bottleneck")
    r = net.get_submodule("body.body")(x)
    mean, log_variance = layer.encode(r)[:, :3], layer.encode(r)[:, 3:]  # type: ignore[operator]
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    standard = torch.distributions.Normal(torch.zeros(3), torch.ones(3))
    divergence = torch.distributions.kl_divergence(normal, standard).sum(1).mean()
    head = net.get_submodule("head")
    assert isinstance(head, nn.Linear)
    loss = F.cross_entropy(head(layer.decode(mean)), y) + 0.5 * divergence  # type: ignore[operator]
    expected = torch.autograd.grad(loss, list(named.values()))
    for name, value in zip(named, expected, strict=True):
        torch.testing.assert_close(made[name], value)
