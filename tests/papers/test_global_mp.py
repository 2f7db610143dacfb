"""Global magnitude pruning: its identities and pitfalls."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import worlds
from torch import Tensor
from torch.nn import functional as F

from flowerbed.clients.params import LocalParams
from flowerbed.errors import ConfigError
from flowerbed.experiments.papers.global_mp import (
    GRADIENT,
    MASK,
    SQUARES,
    GlobalMp,
    GlobalMpHalf,
    GlobalMpParams,
    refined,
)
from flowerbed.experiments.papers.global_mp.probes import bottleneck
from flowerbed.models.info import ModelInfo
from flowerbed.models.sparsity import keep_largest, prunable, sparsity_of
from flowerbed.server.sampling import UniformSampler
from flowerbed.strategies.base import Phase, Setting

GLOBAL = "flowerbed.experiments.papers.global_mp:GlobalMp"
MOMENTUM = {"momentum": 0.9, "weight_decay": 1e-2, "persist": True}


def run(options: Mapping[str, Any], **sections: Any) -> worlds.World:
    return worlds.run(GLOBAL, options, **{"model": {"name": "worlds:bn_net"}, **sections})


def masks_of(model: torch.nn.Module, sparsity: float, **params: Any) -> dict[str, Tensor]:
    strategy = GlobalMp(GlobalMpParams(**params))
    strategy.setup(Setting(0, 1, 1, ModelInfo.of(model), UniformSampler(0, 0)))
    return strategy.masks(dict(model.state_dict()), sparsity)


def test_pruned_weights_stay_zero_under_momentum_and_decay_at_every_client() -> None:
    world = run({"s": 0.8}, federation={"clients": 4, "rounds": 3}, local=MOMENTUM)
    masks = world.parts.strategy.state[MASK]
    assert sparsity_of(masks) == pytest.approx(0.8, abs=1e-3)
    for name, mask in masks.items():
        assert (world.trained[name][~mask] == 0).all()
        assert (world.trained[name][mask] != 0).all()
    for client in range(4):
        # Nor has momentum gathered where nothing can move, beyond what the decay of a zero weight leaves: nothing.
        momentum = world.state(client)["optimizer.momentum_buffer"]
        assert all((momentum[name][~mask] == 0).all() for name, mask in masks.items())


def test_sparsity_zero_is_fedavg_bit_for_bit() -> None:
    sections = {"model": {"name": "worlds:bn_net"}, "local": MOMENTUM}
    mine = run({"s": 0.0}, **sections).result.model
    assert worlds.equal(mine, worlds.run("fedavg", **sections).result.model)


def test_the_upload_falls_by_the_sparsity() -> None:
    """Kept entries, the other tensors, and nothing else."""
    up = {}
    for s in (0.0, 0.9):
        world = run({"s": s}, federation={"clients": 1, "rounds": 1})
        up[s] = next(r.bytes_up for r in world.result.history if r.phase == "train")
        weights = sum(m.numel() for m in world.parts.strategy.state[MASK].values())
    assert up[0.0] - up[0.9] == pytest.approx(4 * 0.9 * weights, abs=8)


def test_the_gradual_sparsity_is_cubic_and_what_is_pruned_stays_pruned() -> None:
    params = GlobalMpParams(s=0.9, ramp_rounds=4)
    assert [params.sparsity(t) for t in (1, 2, 4, 9)] == pytest.approx(
        [0.9 * (1 - 27 / 64), 0.9 * 7 / 8, 0.9, 0.9]
    )
    before: dict[str, Tensor] = {}
    for rounds in (1, 2, 3, 4, 5):
        world = run({"s": 0.9, "ramp_rounds": 4}, federation={"clients": 2, "rounds": rounds})
        masks = world.parts.strategy.state[MASK]
        # After the last round the mask of the next one is on the model.
        assert sparsity_of(masks) == pytest.approx(params.sparsity(rounds + 1), abs=2e-3)
        assert all(not (mask & ~before[name]).any() for name, mask in masks.items() if before)
        before = masks


def test_what_was_pruned_stays_so_even_if_it_has_grown() -> None:
    torch.manual_seed(0)
    net = bottleneck((1, 8, 8), 3)
    strategy = GlobalMp(GlobalMpParams(s=0.5, ramp_rounds=2))
    strategy.setup(Setting(0, 1, 2, ModelInfo.of(net), UniformSampler(0, 0)))
    strategy.start_phase(Phase("train", 2), dict(net.state_dict()))
    before = strategy.state[MASK]
    grown = {n: torch.where(before[n], v, 9.0) if n in before else v for n, v in net.state_dict().items()}
    strategy.start_phase(Phase("train", 2), grown)
    assert strategy.state[MASK] is not before
    assert all(not (mask & ~before[name]).any() for name, mask in strategy.state[MASK].items())


def test_momentum_from_before_moves_no_pruned_weight() -> None:
    """A client that kept its optimizer across a change of the mask."""
    local = worlds.open_round(LocalParams(batch_size=4, momentum=0.9, persist=True))
    names = prunable(local.info)
    half = GlobalMpHalf(GlobalMpParams())
    local.received[MASK] = {n: torch.ones(local.info.shapes[n], dtype=torch.bool) for n in names}
    half.run(local)
    masks = {n: torch.arange(w.numel()).view(w.shape) % 2 == 0 for n, w in local.received[MASK].items()}
    assert any(m[~masks[n]].any() for n, m in local.state["optimizer.momentum_buffer"].items() if n in masks)
    local.received[MASK] = masks
    local.load({n: local.parts.parameters[n].detach() * mask for n, mask in masks.items()})
    half.run(local)
    assert all((local.parts.parameters[n][~mask] == 0).all() for n, mask in masks.items())


def test_scores_are_the_gradient_over_all_clients_data() -> None:
    world = run({"score": "snip", "s": 0.5}, federation={"clients": 3, "rounds": 1}, local={"batch_size": 0})
    parts, state = world.parts, world.parts.strategy.state
    net = parts.spec.model.build(3).eval()
    x, y = parts.dataset.prepare(parts.dataset.train.inputs), parts.dataset.train.labels
    names = list(state[GRADIENT])
    weights = [dict(net.named_parameters())[name] for name in names]
    whole = torch.autograd.grad(F.cross_entropy(net(x), y, reduction="sum"), weights)
    for name, w, g in zip(names, weights, whole, strict=True):
        torch.testing.assert_close(state[GRADIENT][name], g, rtol=1e-3, atol=1e-3)
        squares = torch.zeros_like(w)
        for client in range(3):
            rows = torch.from_numpy(parts.train.indices(client).copy())
            (own,) = torch.autograd.grad(F.cross_entropy(net(x[rows]), y[rows]), [w])
            squares += len(rows) * (w.detach() * own) ** 2
        torch.testing.assert_close(state[SQUARES][name], squares, rtol=1e-3, atol=1e-5)
    expected = keep_largest(
        {n: (w.detach() * state[GRADIENT][n]).abs() for n, w in zip(names, weights, strict=True)}, 0.5
    )
    assert all(torch.equal(state[MASK][n], expected[n]) for n in names)


def test_the_round_of_scores_moves_no_clock() -> None:
    """With nothing pruned, a score that asks first trains the very same model."""
    sections = {"local": {"schedule": "cosine", "persist": True, "momentum": 0.9}}
    one, other = run({"s": 0.0, "score": "snip"}, **sections), run({"s": 0.0}, **sections)
    assert worlds.equal(one.result.model, other.result.model)


def test_a_scale_that_batch_norm_hides_changes_the_mask() -> None:
    """The pitfall: the function stays, the ranking does not."""
    torch.manual_seed(0)
    net = bottleneck((1, 8, 8), 3).train()
    scaled = copy.deepcopy(net)
    with torch.no_grad():
        scaled.body[3].weight.mul_(10)
    x = torch.randn(16, 1, 8, 8)
    torch.testing.assert_close(net(x), scaled(x), rtol=1e-3, atol=1e-3)
    one, other = masks_of(net, 0.9), masks_of(scaled, 0.9)
    assert int(other["body.3.weight"].sum()) > int(one["body.3.weight"].sum())


def test_layer_collapse_and_its_cure() -> None:
    torch.manual_seed(0)
    net = bottleneck((3, 32, 32), 10)
    plain = {name: int(mask.sum()) for name, mask in masks_of(net, 0.995).items()}
    assert min(plain.values()) == 0
    total = sum(net.state_dict()[name].numel() for name in plain)
    floor = total // 1000
    for variant in ("greedy", "as_coded"):
        masks = masks_of(net, 0.995, least=0.1, variant=variant)
        assert min(int(mask.sum()) for mask in masks.values()) >= floor - 1
        assert sparsity_of(masks) == pytest.approx(0.995, abs=1e-4)


def test_the_two_variants_agree_where_no_minimum_binds() -> None:
    torch.manual_seed(0)
    net = bottleneck((3, 32, 32), 10, scale=1.0)
    plain = masks_of(net, 0.5)
    for variant in ("greedy", "as_coded"):
        masks = masks_of(net, 0.5, least=0.01, variant=variant)
        assert all(torch.equal(masks[name], plain[name]) for name in plain)


def test_refinement_by_hand() -> None:
    """Layers of 100, 100 and 2 weights, 10 to be kept by each: the third is never pruned, the first is clamped."""
    masks = {"a": torch.zeros(100), "b": torch.ones(100), "c": torch.zeros(2)}
    masks["a"][:1] = 1
    masks["b"][:50] = 0
    sparsity = 140 / 202
    found = refined({n: m.bool() for n, m in masks.items()}, {"a": 100, "b": 100, "c": 2}, sparsity, 10)
    # p = .99, .5, 1, in all 151/202; scaled by 140/151: .918, .464, so a keeps 10 at .9 and b is scaled up to .5.
    assert found == pytest.approx({"a": 0.9, "b": 0.5, "c": 0.0}, abs=0.01)


def test_a_minimum_that_leaves_nothing_to_prune_is_refused() -> None:
    net = bottleneck((1, 8, 8), 3)
    for variant in ("greedy", "as_coded"):
        with pytest.raises(ConfigError, match="lower one of the two|cannot be reached"):
            masks_of(net, 0.5, least=100.0, variant=variant)


def test_uniform_prunes_every_layer_alike_the_first_and_the_last_included() -> None:
    torch.manual_seed(0)
    net = bottleneck((3, 32, 32), 10)
    masks = masks_of(net, 0.9, scope="uniform")
    assert set(masks) == set(prunable(ModelInfo.of(net)))
    assert all(1 - float(m.float().mean()) == pytest.approx(0.9, abs=0.5 / m.numel()) for m in masks.values())
    assert sparsity_of(masks_of(net, 0.9, scope="erk")) == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"s": 1.0}, "strategy.s is 1.0"),
        ({"least": -1.0}, "strategy.least is -1.0"),
        ({"score": "size"}, "strategy.score is 'size'"),
        ({"scope": "local"}, "strategy.scope is 'local'"),
        ({"variant": "x"}, "strategy.variant is 'x'"),
        ({"score": "snip", "ramp_rounds": 2}, "measured once, before the first round"),
    ],
)
def test_wrong_parameters_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        GlobalMpParams(**options)
