"""Masks by score: exact counts, slow twins, torch's own global pruning, and ERK by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from flowerbed.errors import ConfigError
from flowerbed.models.base import ModelSpec
from flowerbed.models.info import ModelInfo
from flowerbed.models.sparsity import (
    erdos_renyi_kernel,
    keep_by_layer,
    keep_largest,
    multiply_adds,
    prunable,
    sparsity_of,
)

ONE_TO_TEN = {"a": torch.tensor([1.0, 10, 3, 8]), "b": torch.tensor([[2.0, 9, 4], [7, 5, 6]])}


def kept(masks: dict[str, Tensor], scores: dict[str, Tensor]) -> list[float]:
    return sorted(v for n, m in masks.items() for v in scores[n][m].tolist())


def test_half_of_one_to_ten() -> None:
    assert kept(keep_largest(ONE_TO_TEN, 0.5), ONE_TO_TEN) == [6, 7, 8, 9, 10]
    assert kept(keep_largest(ONE_TO_TEN, 0.0), ONE_TO_TEN) == list(range(1, 11))


def test_the_order_of_layers_does_not_matter() -> None:
    turned = dict(reversed(ONE_TO_TEN.items()))
    one, other = keep_largest(ONE_TO_TEN, 0.7), keep_largest(turned, 0.7)
    assert all(torch.equal(one[n], other[n]) for n in ONE_TO_TEN)


def test_ties_go_by_position_and_the_number_is_exact() -> None:
    equal = {"a": torch.ones(4), "b": torch.ones(6)}
    masks = keep_largest(equal, 0.5)
    assert masks["a"].tolist() == [False] * 4
    assert masks["b"].tolist() == [False] + [True] * 5


def test_it_is_torchs_global_pruning() -> None:
    net = ModelSpec("resnet8", (3, 16, 16), 10).build(0)
    names = prunable(ModelInfo.of(net))
    weights = {name: net.state_dict()[name].abs() for name in names}
    masks = keep_largest(weights, 0.93)
    layers = [(net.get_submodule(name.removesuffix(".weight")), "weight") for name in names]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.93)
    for name, (module, _) in zip(names, layers, strict=True):
        assert torch.equal(module.weight_mask.bool(), masks[name]), name


def greedy(scores: dict[str, Tensor], count: int, least: int) -> dict[str, Tensor]:
    """Delete the globally smallest weight whose layer still holds more than its minimum, one after another."""
    pool = sorted(
        (v, k, n, i) for k, (n, s) in enumerate(scores.items()) for i, v in enumerate(s.flatten().tolist())
    )
    masks = {n: torch.ones(s.numel(), dtype=torch.bool) for n, s in scores.items()}
    left = {n: s.numel() for n, s in scores.items()}
    for _, _, name, i in pool:
        if count and left[name] > min(least, scores[name].numel()):
            masks[name][i] = False
            left[name] -= 1
            count -= 1
    assert count == 0
    return {n: m.view(scores[n].shape) for n, m in masks.items()}


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.floats(0, 0.95),
    st.integers(0, 5),
    st.integers(0, 1000),
    st.booleans(),
)
def test_the_minimum_per_layer_is_the_greedy_rule(
    sizes: list[int], sparsity: float, least: int, seed: int, ties: bool
) -> None:
    rng = torch.Generator().manual_seed(seed)
    scores = {
        str(k): torch.randint(3, (n,), generator=rng).double()
        if ties
        else torch.rand(n, generator=rng).double()
        for k, n in enumerate(sizes)
    }
    count = round(sparsity * sum(sizes))
    if count > sum(max(0, n - least) for n in sizes):
        with pytest.raises(ConfigError, match="may go while every layer keeps"):
            keep_largest(scores, sparsity, least)
        return
    masks = keep_largest(scores, sparsity, least)
    expected = greedy(scores, count, least)
    assert all(torch.equal(masks[n], expected[n]) for n in scores)
    assert sum(int((~m).sum()) for m in masks.values()) == count


def test_by_layer() -> None:
    masks = keep_by_layer(ONE_TO_TEN, {"a": 0.5, "b": 0.5})
    assert kept(masks, ONE_TO_TEN) == [6, 7, 8, 9, 10]
    assert kept(keep_by_layer(ONE_TO_TEN, {"a": 0.0, "b": 1.0}), ONE_TO_TEN) == [1, 3, 8, 10]


def test_erk_by_hand() -> None:
    """Raw densities (2+2)/4 = 1 and (10+10)/100 = 0.2; at 50 % of 104: 4 e + 20 e = 52, so the first is above 1."""
    found = erdos_renyi_kernel({"a": (2, 2), "b": (10, 10)}, 0.5)
    assert found == pytest.approx({"a": 0.0, "b": 1 - 48 / 100})
    rare = erdos_renyi_kernel({"a": (2, 2), "b": (10, 10)}, 0.9)
    scale = 10.4 / 24
    assert rare == pytest.approx({"a": 1 - scale, "b": 1 - 0.2 * scale})


def test_prunable_are_convolutions_and_linear_layers_alone() -> None:
    net = ModelSpec("resnet8", (3, 16, 16), 10, {"shortcut": "B"}).build(0)
    expected = {n + ".weight" for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert set(prunable(ModelInfo.of(net))) == expected


def test_multiply_adds_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(2 * 16, 3))
    with torch.no_grad():
        net[0].weight[0] = 0
    # 9 of 18 weights at 16 positions, and 96 at one.
    assert multiply_adds(net, torch.zeros(1, 1, 4, 4)) == (9 * 16 + 96, 18 * 16 + 96)
    assert multiply_adds(nn.Linear(3, 2), torch.zeros(1, 5, 3)) == (30, 30), "five tokens"


def test_sparsity_of_masks() -> None:
    assert sparsity_of({"a": torch.tensor([True, False]), "b": torch.tensor([False, False])}) == 0.75
