"""Two networks as one model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flowerbed.errors import ConfigError
from flowerbed.models.base import ModelSpec
from flowerbed.models.pair import Pair, members, pair
from flowerbed.models.parts import ModelParts


def test_it_answers_by_the_mean_and_its_networks_begin_differently() -> None:
    torch.manual_seed(0)
    two = pair((6,), 3, of="mlp", options={"hidden": (5,)})
    x = torch.randn(4, 6)
    torch.testing.assert_close(two(x), (two.first(x) + two.second(x)) / 2)
    assert not torch.equal(two.first.head.weight, two.second.head.weight)
    assert {name.partition(".")[0] for name in two.state_dict()} == {"first", "second"}


def test_each_network_may_come_from_a_file(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{n}.safetensors") for n in (1, 2)]
    nets = [ModelSpec("mlp", (6,), 3, {"hidden": (5,)}).build(n) for n in (1, 2)]
    for net, path in zip(nets, paths, strict=True):
        save_file(dict(net.state_dict()), path)
    two = pair((6,), 3, of="mlp", options={"hidden": (5,)}, first=paths[0], second=paths[1])
    for net, member in zip(nets, (two.first, two.second), strict=True):
        assert all(torch.equal(v, member.state_dict()[n]) for n, v in net.state_dict().items())


def test_views_of_the_members_compute_the_same_in_place_and_with_given_weights() -> None:
    torch.manual_seed(0)
    two = pair((6,), 3, of="mlp", options={"hidden": (5,)})
    x = torch.randn(4, 6)
    resident = ModelParts.resident(two)
    doubled = {name: 2 * value for name, value in resident.parameters.items()}
    given = ModelParts.functional(two, doubled, dict(resident.buffers))
    for one, other, net in zip(members(resident), members(given), (two.first, two.second), strict=True):
        assert torch.equal(one(x), net(x))
        expected = [2 * value for value in net.state_dict().values()]
        torch.testing.assert_close(other.head(other.features(x)), other(x))
        net.load_state_dict(dict(zip(net.state_dict(), expected, strict=True)))
        torch.testing.assert_close(other(x), net(x))


def test_one_network_is_no_pair() -> None:
    with pytest.raises(ConfigError, match="two are needed"):
        members(ModelParts.resident(ModelSpec("mlp", (6,), 3).build(0)))
    assert isinstance(pair((6,), 3, of="mlp"), Pair)
