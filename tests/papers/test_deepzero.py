"""DeepZero: the estimate in the loop, active sets, scores, what N clients are."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import worlds
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.clients.params import LocalParams
from flowerbed.clients.training import Evaluation
from flowerbed.errors import ConfigError
from flowerbed.experiments.papers.deepzero import (
    CURVATURE,
    MASK,
    VALUES,
    DeepZeroHalf,
    DeepZeroParams,
    active_set,
)
from flowerbed.models.info import ModelInfo
from flowerbed.models.sparsity import keep_largest, prunable
from flowerbed.seeds import torch_rng

ZERO = "flowerbed.experiments.papers.deepzero:DeepZero"
TINY = {"name": "mlp", "hidden": [3]}
SAMPLES = {"client_samples": 60}


def run(options: dict[str, Any], **sections: Any) -> worlds.World:
    base: dict[str, Any] = {"model": TINY, "data": SAMPLES, "local": {"batch_size": 0, "steps": 1}}
    return worlds.run(
        ZERO, options, **{n: {**base.get(n, {}), **sections.get(n, {})} for n in {*base, *sections}}
    )


def queries_of(world: worlds.World) -> list[int]:
    return [r.metrics["queries"] for r in world.result.history if "queries" in r.metrics]


def test_dense_cge_follows_backpropagation() -> None:
    """Five full-batch steps end within a thousandth of the way that they went."""
    one = run({}, federation={"clients": 1, "rounds": 5})
    other = run({"estimator": "backprop"}, federation={"clients": 1, "rounds": 5})
    start = one.parts.spec.model.build(3).state_dict()
    way = torch.cat([(v - start[n]).flatten() for n, v in other.result.model.items()])
    apart = torch.cat([(v - one.result.model[n]).flatten() for n, v in other.result.model.items()])
    assert float(apart.norm()) < 0.02 * float(way.norm())


def test_backpropagation_is_fedavg_up_to_how_losses_are_added() -> None:
    one = run({"estimator": "backprop"}, federation={"clients": 2, "rounds": 3})
    other = worlds.run(
        "fedavg",
        model=TINY,
        data=SAMPLES,
        federation={"clients": 2, "rounds": 3},
        local={"batch_size": 0, "steps": 1},
    )
    worlds.close(one.result.model, other.result.model)


def test_a_step_moves_the_active_entries_alone_and_counts_its_losses() -> None:
    world = run({"s": 0.9, "layers": "uniform"}, federation={"clients": 1, "rounds": 1})
    net = world.parts.spec.model.build(3)
    start, info = net.state_dict(), ModelInfo.of(net)
    active = active_set(DeepZeroParams(s=0.9, layers="uniform"), info, {}, 3, 1)
    for name, value in world.result.model.items():
        moved = (value != start[name]).flatten().nonzero().flatten().tolist()
        assert set(moved) <= set(active[name].tolist())
    assert sum(map(len, active.values())) == round(0.1 * 192) + round(0.1 * 30) + 13
    assert queries_of(world) == [sum(map(len, active.values())) + 1]


def test_active_sets_are_drawn_anew_and_are_the_same_for_all_clients() -> None:
    info = ModelInfo.of(worlds.bn_net((1, 8, 8), 10))
    params = DeepZeroParams(s=0.9, layers="uniform")
    one, again, later = (active_set(params, info, {}, 3, r) for r in (1, 1, 2))
    assert all(torch.equal(at, again[n]) for n, at in one.items())
    assert any(not torch.equal(at, later[n]) for n, at in one.items())
    assert set(one) == info.parameters
    for name, at in one.items():
        whole = torch.Size(info.shapes[name]).numel()
        # Biases and batch norm are always active.
        assert len(at) == (round(0.1 * whole) if name in prunable(info) else whole)
        assert len(at.unique()) == len(at)


def test_the_scores_set_the_number_of_each_layer_and_pruning_keeps_their_mask() -> None:
    info = ModelInfo.of(worlds.bn_net((1, 8, 8), 10))
    masks = {n: torch.zeros(info.shapes[n], dtype=torch.bool) for n in prunable(info)}
    for k, mask in enumerate(masks.values()):
        mask.view(-1)[: 5 + 10 * k] = True
    drawn = active_set(DeepZeroParams(s=0.9), info, masks, 0, 1)
    kept = active_set(DeepZeroParams(s=0.9, pruned=True), info, masks, 0, 7)
    for k, name in enumerate(masks):
        assert len(drawn[name]) == 5 + 10 * k
        assert drawn[name].tolist() != list(range(5 + 10 * k))
        assert kept[name].tolist() == list(range(5 + 10 * k))


def test_scores_agree_with_the_true_product_of_hessian_and_gradient() -> None:
    """H g by double backpropagation. Two draws of directions leave nothing of it but noise."""
    params = DeepZeroParams(s=0.5, score_q=20_000, per_class=100, mu=1e-3)
    local = worlds.open_round(LocalParams(batch_size=0), dtype=torch.float64)
    reply = DeepZeroHalf(params).query(local)
    assert reply.metrics["queries"] == 2 * 20_001
    apart = DeepZeroHalf(replace(params, common=False)).query(local)
    net = copy.deepcopy(local.model)
    names, weights = zip(*net.named_parameters(), strict=True)
    loss = F.cross_entropy(net(local.train_data.x), local.train_data.y)
    first = torch.autograd.grad(loss, weights, create_graph=True)
    # What unit directions estimate: the gradient over the size of each tensor, twice.
    scaled = [g.detach() / g.numel() for g in first]
    second = torch.autograd.grad(first, weights, grad_outputs=scaled)
    for name, expected in zip(names, second, strict=True):
        if name in reply.streams[CURVATURE]:
            wanted = expected.flatten()
            assert float(F.cosine_similarity(reply.streams[CURVATURE][name].flatten(), wanted, 0)) > 0.7
            assert float(F.cosine_similarity(apart.streams[CURVATURE][name].flatten(), wanted, 0)) < 0.5


def test_the_mask_keeps_the_largest_absolute_scores_of_all_clients_together() -> None:
    world = run({"s": 0.8, "score_q": 5}, federation={"clients": 3, "rounds": 2})
    parts, rounds = world.parts, world.result.history
    mask = parts.strategy.state[MASK]
    assert sum(int(m.sum()) for m in mask.values()) == 222 - round(0.8 * 222)
    assert [r.phase for r in rounds if "queries" in r.metrics] == ["score", "train", "train"]
    products, sizes = [], [float(n) for n in parts.train.sizes]
    for client in range(3):
        net = parts.spec.model.build(3)
        products.append(plain_curvature(net, parts, client))
    product = {n: worlds.mean([p[n] for p in products], sizes) for n in mask}
    start = parts.spec.model.build(3).state_dict()
    expected = keep_largest({n: (start[n].double() * p).abs() for n, p in product.items()}, 0.8)
    agree = sum(int((m == expected[n]).sum()) for n, m in mask.items())
    assert agree >= 220
    signed = run({"s": 0.8, "score_q": 5, "signed": True}, federation={"clients": 3, "rounds": 1})
    assert any(not torch.equal(m, mask[n]) for n, m in signed.parts.strategy.state[MASK].items())


def plain_curvature(net: nn.Module, parts: Any, client: int) -> dict[str, Tensor]:
    """One direction after another, on a client's balanced batch (here all that it has of each class, at most 25)."""
    own = torch.from_numpy(parts.train.indices(client).copy())
    y = parts.dataset.train.labels[own]
    order = torch.randperm(len(y), generator=torch_rng(3, "batch of the scores", client))
    rows = torch.cat([order[y[order] == c][:25] for c in y.unique()])
    x, y = parts.dataset.prepare(parts.dataset.train.inputs[own][rows]), y[rows]
    here = {n: p.detach().clone() for n, p in net.named_parameters()}

    def value(tensors: dict[str, Tensor]) -> float:
        outputs = torch.func.functional_call(net, tensors, (x,))
        return float(F.cross_entropy(outputs, y, reduction="none").double().mean())

    def gradient(at: dict[str, Tensor]) -> dict[str, Tensor]:
        rng = torch_rng(3, "directions of the scores", client, 0)
        total = {n: torch.zeros_like(p) for n, p in at.items()}
        drawn = {n: torch.randn(5, *p.shape, generator=rng) for n, p in at.items()}
        for j in range(5):
            u = {n: d[j] / d[j].norm() for n, d in drawn.items()}
            slope = (value({n: p + 5e-3 * u[n] for n, p in at.items()}) - value(at)) / 5e-3
            total = {n: t + slope * u[n] / 5 for n, t in total.items()}
        return total

    with torch.no_grad():
        one = gradient(here)
        two = gradient({n: p + 5e-3 * one[n] for n, p in here.items()})
    return {n: (two[n] - one[n]) / 5e-3 for n in one}


def test_a_round_of_one_step_of_n_clients_is_cge_on_the_union_of_their_data() -> None:
    """And a client sends the active numbers, no more."""
    sparse = {"s": 0.5, "layers": "uniform", "inactive": "stay"}
    many = run(sparse, federation={"clients": 4, "rounds": 3})
    one = run(sparse, federation={"clients": 1, "rounds": 3})
    for name, value in many.result.model.items():
        torch.testing.assert_close(value, one.result.model[name], rtol=1e-3, atol=2e-5)
    whole = run({**sparse, "inactive": "move"}, federation={"clients": 4, "rounds": 3})
    assert worlds.equal(whole.result.model, many.result.model)
    up = {
        n: next(r.bytes_up for r in w.result.history if r.phase == "train")
        for n, w in (("s", many), ("w", whole))
    }
    assert up["w"] - up["s"] == pytest.approx(4 * 4 * (222 - 96 - 15), abs=4 * 8)


def test_inactive_weights_move_by_decay_as_released_or_stay() -> None:
    decay = {"weight_decay": 0.1, "momentum": 0.9, "persist": True, "steps": 3}
    for inactive, moves in (("move", True), ("stay", False)):
        world = run(
            {"s": 0.9, "layers": "uniform", "inactive": inactive},
            federation={"clients": 1, "rounds": 1},
            local=decay,
        )
        net = world.parts.spec.model.build(3)
        active = active_set(DeepZeroParams(s=0.9, layers="uniform"), ModelInfo.of(net), {}, 3, 1)
        name = "body.1.weight"
        rest = torch.ones(net.state_dict()[name].numel(), dtype=torch.bool)
        rest[active[name]] = False
        changed = (world.result.model[name] != net.state_dict()[name]).flatten()[rest]
        assert bool(changed.any()) == moves


def test_weights_that_stay_do_so_in_every_step_of_the_client() -> None:
    """Not only in what the server makes of the reply: later steps of the round would see them moved."""
    params = DeepZeroParams(s=0.5, layers="uniform", inactive="stay")
    local = worlds.open_round(LocalParams(batch_size=0, steps=3, weight_decay=0.1))
    before = local.parameters()
    reply = DeepZeroHalf(params).run(local)
    for name, at in active_set(params, local.info, {}, 0, 1).items():
        rest = torch.ones(before[name].numel(), dtype=torch.bool)
        rest[at] = False
        assert torch.equal(local.parts.parameters[name].flatten()[rest], before[name].flatten()[rest])
        assert torch.equal(reply.streams[VALUES][name], local.parts.parameters[name].flatten()[at])
        assert not torch.equal(reply.streams[VALUES][name], before[name].flatten()[at])


def test_pruned_weights_are_zero_and_stay_so() -> None:
    world = run(
        {"s": 0.8, "pruned": True, "score_q": 5},
        federation={"clients": 2, "rounds": 3},
        local={"weight_decay": 0.1, "momentum": 0.9, "persist": True},
    )
    for name, mask in world.parts.strategy.state[MASK].items():
        assert (world.result.model[name][~mask] == 0).all()
        assert (world.result.model[name][mask] != 0).any()


def test_dropout_is_frozen_within_a_step_and_goes_on_after_it() -> None:
    half = DeepZeroHalf(DeepZeroParams(mu=1e-5))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)).double().train()
    local = worlds.open_round(LocalParams(batch_size=0), dtype=torch.float64)
    parts = type(local.parts).resident(net)
    batch = local.train_data.batch(slice(None))
    extras = {"active": active_set(DeepZeroParams(), ModelInfo.of(net), {}, 0, 1)}
    compute = Evaluation(half.loss, parts, batch, extras, local.task)
    torch.manual_seed(5)
    value, _ = half.loss(parts, batch, {}, local.task)
    expected = torch.autograd.grad(value, list(parts.parameters.values()))
    following = torch.rand(1)
    torch.manual_seed(5)
    base, metrics, found = half.estimate(compute, parts.parameters)
    assert torch.equal(torch.rand(1), following)
    assert float(base) == float(value.detach())
    assert int(metrics["queries"]) == 6 * 8 + 8 + 8 * 3 + 3 + 1
    for name, g in zip(parts.parameters, expected, strict=True):
        torch.testing.assert_close(found[name], g, rtol=1e-3, atol=1e-4)


def test_batch_norm_counts_one_step_not_every_query() -> None:
    world = worlds.run(
        ZERO,
        model={"name": "worlds:bn_net"},
        data=SAMPLES,
        federation={"clients": 1, "rounds": 2},
        local={"batch_size": 0, "steps": 1},
    )
    assert int(world.result.model["body.2.num_batches_tracked"]) == 2


def test_random_directions_are_new_in_every_step() -> None:
    one = run(
        {"estimator": "rge", "q": 2}, federation={"clients": 1, "rounds": 1}, local={"steps": 2, "lr": 0.0}
    )
    assert queries_of(one) == [6]
    moved = run({"estimator": "rge", "q": 1}, federation={"clients": 1, "rounds": 1}, local={"steps": 2})
    start = moved.parts.spec.model.build(3).state_dict()
    single = run({"estimator": "rge", "q": 1}, federation={"clients": 1, "rounds": 1})
    first = torch.cat([(v - start[n]).flatten() for n, v in single.result.model.items()])
    both = torch.cat([(v - start[n]).flatten() for n, v in moved.result.model.items()])
    assert abs(float(F.cosine_similarity(first, both - first, 0))) < 0.3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"estimator": "spsa"}, "strategy.estimator is 'spsa'"),
        ({"layers": "erk"}, "strategy.layers is 'erk'"),
        ({"inactive": "x"}, "strategy.inactive is 'x'"),
        ({"mu": 0.0}, "strategy.mu is 0.0"),
        ({"q": -1}, "strategy.q is -1"),
        ({"s": 1.0}, "strategy.s is 1.0"),
        ({"score_q": 0}, "strategy.score_q is 0"),
        ({"per_class": 0}, "strategy.per_class is 0"),
        ({"s": 0.5, "estimator": "rge"}, "strategy.s needs"),
        ({"pruned": True}, "strategy.pruned keeps"),
    ],
)
def test_wrong_parameters_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        DeepZeroParams(**options)


def test_coarse_arithmetic_is_refused() -> None:
    local = worlds.open_round(LocalParams(precision="bfloat16"))
    with pytest.raises(ConfigError, match="too coarse for finite differences"):
        DeepZeroHalf(DeepZeroParams()).begin(local)
