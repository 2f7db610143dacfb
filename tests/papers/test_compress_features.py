"""Compressing features: the identities and pitfalls of masks, cut-offs and networks that teach each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import worlds
from torch import Tensor
from torch.nn import functional as F

from flowerbed.clients.params import LocalParams
from flowerbed.errors import ClientError, ConfigError
from flowerbed.experiments.papers.compress_features import (
    CHANNELS,
    COUNTS,
    MASK,
    CompressHalf,
    CompressParams,
    CoTeachHalf,
    cut_off,
)
from flowerbed.experiments.papers.compress_features.probes import ordered, ramp
from flowerbed.models.batchnorm import fixed_statistics
from flowerbed.models.feature_masks import (
    LeadingLinear,
    leading,
)
from flowerbed.models.pair import pair
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Classification

MODULE = "flowerbed.experiments.papers.compress_features"
NET = {"name": f"{MODULE}.probes:ordered", "width": 16}
TWO = {"name": "flowerbed.models.pair:pair", "of": f"{MODULE}.probes:ordered", "options": {"width": 16}}
DATA = {"name": "noisy_labels", "of": "digits", "per_class": 30, "validation_per_class": 6}


def run(strategy: str, options: dict[str, Any] | None = None, **sections: Any) -> worlds.World:
    base = {"model": NET, "dataset": DATA, "local": {"batch_size": 30, "persist": True, "lr": 0.05}}
    return worlds.run(f"{MODULE}:{strategy}", options, **{**base, **sections})


def test_cut_off_at_d_is_the_whole_network_and_training_ignores_it() -> None:
    torch.manual_seed(0)
    head = LeadingLinear(6, 3)
    z = torch.randn(5, 6)
    whole = F.linear(z, head.weight)
    assert torch.equal(head.eval()(z), whole)
    head.kept.fill_(2)
    torch.testing.assert_close(head(z), z[:, :2] @ head.weight[:, :2].T)
    assert torch.equal(head.train()(z), whole)
    assert head.bias is None
    net = ordered((1, 8, 8), 10, width=16)
    model = dict(net.state_dict())
    assert int(cut_off(model, 5)["head.kept"]) == 5
    assert int(cut_off(cut_off(model, 5), 0)["head.kept"]) == 16
    assert int(model["head.kept"]) == 16


def test_without_a_mask_it_is_fedavg_bit_for_bit() -> None:
    mine = run("Compress").result.model
    plain = {"model": NET, "dataset": DATA, "local": {"batch_size": 30, "persist": True, "lr": 0.05}}
    assert worlds.equal(mine, worlds.run("fedavg", **plain).result.model)
    assert not worlds.equal(mine, run("Compress", {"mask": "nested"}).result.model)
    # Another number is another network: weights, order and masks.
    other = run("Compress", {"network": 1}).parts
    assert not torch.equal(other.model["head.weight"], run("Compress").parts.model["head.weight"])
    one, two = (CompressParams(mask="dropout", network=n).draw(0, 0, 0, 4, 9) for n in (0, 1))
    assert one is not None
    assert two is not None
    assert not torch.equal(one, two)


def test_one_k_a_batch_and_other_ones_at_other_steps() -> None:
    params = CompressParams(mask="nested", sigma=20)
    masks = [params.draw(1, 0, step, 8, 64) for step in range(30)]
    assert all(m is not None and m.shape == (64,) for m in masks)
    assert len({int(m.sum()) for m in masks if m is not None}) > 10
    again = params.draw(1, 0, 3, 8, 64)
    assert again is not None
    assert masks[3] is not None
    assert torch.equal(again, masks[3])


def test_the_server_adds_up_what_clients_count_and_delivers_that_cut() -> None:
    world = run("Compress", {"mask": "nested", "sigma": 4}, federation={"clients": 3, "rounds": 3})
    strategy, parts = world.parts.strategy, world.parts
    kept = int(strategy.state[CHANNELS]["kept"])
    assert int(world.result.model["head.kept"]) == kept
    # Training goes on with the whole network.
    assert int(world.trained["head.kept"]) == 16
    assert worlds.equal(strategy.deliver(world.trained), world.result.model)
    assert parts.dataset.validation is not None
    assert parts.spec.validation is not None
    assert sum(parts.spec.validation.size(k) for k in range(3)) == len(parts.dataset.validation)


def test_with_one_client_the_cut_is_that_of_the_model_on_all_validation_samples() -> None:
    world = run("Compress", {"mask": "nested", "sigma": 4}, federation={"clients": 1, "rounds": 3})
    net = world.parts.spec.model.build(3)
    net.load_state_dict(world.trained)
    net.eval()
    held, prepare = world.parts.dataset.validation, world.parts.dataset.prepare
    assert held is not None
    scores = []
    for k in range(1, 17):
        net.load_state_dict(cut_off(world.trained, k))
        right = (net(prepare(held.inputs)).argmax(1) == held.labels).double().mean()
        scores.append(float(right) - 1e-5 * (k - 1))
    assert int(world.result.model["head.kept"]) == scores.index(max(scores)) + 1


def test_nothing_but_training_labels_is_noisy_and_the_choice_needs_clean_samples() -> None:
    plain = {
        "dataset": {"name": "excerpt", "of": "digits", "per_class": 5},
        "federation": {"clients": 1, "rounds": 1},
    }
    assert COUNTS not in run("Compress", {"mask": "dropout"}, **plain).parts.strategy.state
    local = worlds.open_round(LocalParams())
    half = CompressHalf(CompressParams(mask="nested"))
    with pytest.raises(ClientError, match="validation samples"):
        half.right(local)


def batch_of(size: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(size, 1, 8, 8), "y": torch.randint(10, (size,))}


def test_each_network_learns_from_what_the_other_one_chose() -> None:
    """By hand: the gradient of A's weights is that of A's loss on the samples of H2 that B finds easy, and so on."""
    torch.manual_seed(0)
    two = pair((1, 8, 8), 10, of=f"{MODULE}.probes:ordered", options={"width": 16}).train()
    batch, keep = batch_of(12), leading(16, 9)
    statistics = two.first.state_dict()["body.3.running_mean"].clone()
    half = CoTeachHalf(CompressParams(forget=0.5))
    model = ModelParts.resident(two)
    value, _ = half.loss(model, batch, {CHANNELS: keep}, Classification(10))
    found = torch.autograd.grad(value, list(two.parameters()))
    assert torch.equal(two.first.state_dict()["body.3.running_mean"], statistics)
    assert two.training
    two.eval()
    chosen = []
    for net, rows in ((two.first, range(6)), (two.second, range(6, 12))):
        logits = (net.features(batch["x"]) * keep) @ net.head.weight.T
        losses = F.cross_entropy(logits, batch["y"], reduction="none")
        chosen.append(sorted(rows, key=lambda i: float(losses[i].detach()))[:3])
    for place, net in enumerate((two.first, two.second)):
        rows = torch.tensor(chosen[1 - place])
        loss = F.cross_entropy(net(batch["x"][rows]), batch["y"][rows])
        own = torch.autograd.grad(loss, list(net.parameters()))
        count = len(own)
        for mine, expected in zip(found[place * count : (place + 1) * count], own, strict=True):
            torch.testing.assert_close(mine, expected)


def test_forgetting_nothing_is_plain_tuning_of_each_network_on_the_others_half() -> None:
    torch.manual_seed(0)
    two = pair((1, 8, 8), 10, of=f"{MODULE}.probes:ordered", options={"width": 16}).train()
    batch = {**batch_of(8), MASK: leading(16, 4)}
    half = CoTeachHalf(CompressParams(forget=0.0, mask="nested"))
    value, _ = half.loss(ModelParts.resident(two), batch, {CHANNELS: leading(16, 16)}, Classification(10))
    with fixed_statistics(two):
        expected = sum(
            F.cross_entropy(net.features(batch["x"][at])[:, :4] @ net.head.weight[:, :4].T, batch["y"][at])
            for net, at in ((two.first, slice(4, 8)), (two.second, slice(4)))
        )
    # The same samples in another order: those of small loss come first.
    torch.testing.assert_close(value, expected)


def test_networks_are_averaged_apart_and_answer_by_their_mean() -> None:
    options = {"mask": "nested", "sigma": 4, "forget": 0.3}
    world = run("CoTeach", options, model=TWO, federation={"clients": 3, "rounds": 2})
    net = world.parts.spec.model.build(3)
    net.load_state_dict(world.result.model)
    net.eval()
    x = batch_of(5)["x"]
    torch.testing.assert_close(net(x), (net.first(x) + net.second(x)) / 2)
    assert int(net.first.head.kept) == int(net.second.head.kept) < 17
    right = [r.metrics["taken-right"] for r in world.result.history if "taken-right" in r.metrics]
    assert len(right) == 2
    assert all(0 < share <= 1 for share in right)
    with pytest.raises(Exception, match="two are needed"):
        run("CoTeach", options, federation={"clients": 1, "rounds": 1})


def test_the_toy_is_a_line_with_noise_that_grows() -> None:
    data = ramp(samples=4000)
    x, y = data.train.inputs[:, 0], data.train.extras["target"]
    near, far = ((y - x)[(x > a) & (x < b)].std() for a, b in ((1, 2), (8, 9)))
    assert float(near) == pytest.approx(0.6, rel=0.2)
    assert float(far) == pytest.approx(3.4, rel=0.2)
    assert torch.equal(data.test.inputs[:, 0], data.test.extras["target"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mask": "some"}, "strategy.mask is 'some'"),
        ({"p": 1.0}, "strategy.p is 1.0"),
        ({"sigma": 0.0}, "strategy.sigma is 0.0"),
        ({"forget": 1.0}, "strategy.forget is 1.0"),
        ({"kept": -1}, "strategy.kept is -1"),
    ],
)
def test_wrong_parameters_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        CompressParams(**options)
