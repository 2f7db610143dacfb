"""Neural-collapse metrics against slow twins, and the models that they are measured on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowerbed.errors import ConfigError
from flowerbed.models.base import ModelSpec
from flowerbed.models.collapse import class_means, distance, equiangular, variability
from flowerbed.models.deep_linear import TABLE, linear_stack
from flowerbed.models.info import ModelInfo


def test_variability_is_the_trace_with_the_pseudo_inverse() -> None:
    rng = np.random.default_rng(0)
    y = np.array([0] * 9 + [1] * 4 + [2] * 5)
    h = rng.standard_normal((18, 6)) + 3 * rng.standard_normal((3, 6))[y]
    means = np.stack([h[y == k].mean(0) for k in range(3)])
    within = sum(np.outer(row - means[k], row - means[k]) for row, k in zip(h, y, strict=True)) / 18
    between = sum(np.outer(m - means.mean(0), m - means.mean(0)) for m in means) / 3
    expected = np.trace(within @ np.linalg.pinv(between, rcond=1e-9)) / 3
    features, labels = torch.from_numpy(h), torch.from_numpy(y)
    assert variability(features, labels, 3) == pytest.approx(expected)
    torch.testing.assert_close(class_means(features, labels, 3), torch.from_numpy(means))
    # Collapsed features have none, and units do not matter.
    assert variability(torch.from_numpy(means)[labels], labels, 3) == pytest.approx(0, abs=1e-25)
    assert variability(7 * features, labels, 3) == pytest.approx(expected)


def test_distance_ignores_scale_only() -> None:
    one, other = torch.diag(torch.tensor([1.0, 2.0])), torch.eye(2)
    assert distance(3 * one, one) == pytest.approx(0, abs=1e-7)
    assert distance(one, other) == pytest.approx(float(2 - 2 * 3 / (5**0.5 * 2**0.5)) ** 0.5)
    assert distance(one, -one) == pytest.approx(2)
    assert distance(torch.zeros(2, 2), other) == pytest.approx(1)


def test_the_simplex_gram_has_its_cosines() -> None:
    gram = equiangular(5)
    assert float(gram[0, 1] / gram[0, 0]) == pytest.approx(-1 / 4)
    assert gram.sum(1).abs().max() < 1e-12


def test_a_stack_has_one_bias_at_most_and_orthogonal_weights() -> None:
    torch.manual_seed(0)
    stack = linear_stack([6, 6, 3], bias=True)
    assert [layer.bias is not None for layer in stack] == [False, True]
    for layer in stack:
        torch.testing.assert_close(layer.weight @ layer.weight.T, torch.eye(len(layer.weight)))
    drawn = linear_stack([300, 300], bias=False, std=0.1)[0].weight
    assert float(drawn.std()) == pytest.approx(0.1, rel=0.02)


def test_free_features_are_looked_up_by_sample() -> None:
    spec = ModelSpec(
        "flowerbed.models.deep_linear:free_features", (1,), 3, {"samples": 7, "dim": 4, "depth": 2}
    )
    net = spec.build(0)
    table = net.state_dict()[TABLE]
    ids = torch.tensor([[5], [0], [5]])
    torch.testing.assert_close(net.body(ids), table[[5, 0, 5]])  # type: ignore[operator]
    assert net(ids).dtype == torch.float64
    info = ModelInfo.of(net)
    assert info.head == {"head.0.weight", "head.1.weight"}
    assert info.shapes[TABLE] == (7, 4)


def test_a_network_under_linear_layers() -> None:
    spec = ModelSpec(
        "flowerbed.models.deep_linear:deep_linear_mlp", (1, 4, 4), 3, {"hidden": [8, 6], "depth": 3}
    )
    net = spec.build(0)
    x = torch.randn(5, 1, 4, 4)
    out = x.flatten(1)
    for name, weight in net.state_dict().items():
        out = out @ weight.T
        out = out.relu() if name.startswith("body") else out
    torch.testing.assert_close(net(x), out)
    with pytest.raises(ConfigError, match="depth=0"):
        ModelSpec("flowerbed.models.deep_linear:deep_linear_mlp", (4,), 3, {"depth": 0}).build(0)


def test_pooling_comes_first() -> None:
    net = ModelSpec("flowerbed.models.deep_linear:deep_linear_mlp", (1, 4, 4), 3, {"pool": 2}).build(0)
    x = torch.randn(2, 1, 4, 4)
    means = x.reshape(2, 1, 2, 2, 2, 2).mean((3, 5))
    torch.testing.assert_close(net(x), net(means.repeat_interleave(2, 2).repeat_interleave(2, 3)))
    assert net.state_dict()["body.2.weight"].shape == (256, 4)
