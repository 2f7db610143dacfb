"""DR-Tune: the identities and pitfalls of queue, calibration and learning rates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import worlds
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.clients.local_round import Clock, LocalRound
from flowerbed.clients.params import LocalParams
from flowerbed.clients.queues import Queue, group
from flowerbed.errors import ConfigError
from flowerbed.experiments.papers.dr_tune import (
    BANK,
    DECAY,
    FIRST,
    QUEUE,
    RATES,
    Bank,
    DrTuneHalf,
    DrTuneParams,
    calibrated,
)
from flowerbed.experiments.papers.dr_tune.probes import backbone
from flowerbed.models.alignment import centred, rotation
from flowerbed.models.base import Net
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Classification

DR = "flowerbed.experiments.papers.dr_tune:DrTune"
NET = {"name": "flowerbed.experiments.papers.dr_tune.probes:backbone"}
DATA = {"name": "excerpt", "of": "digits", "classes": [6, 7, 8, 9], "per_class": 15}
LOCAL = {
    "batch_size": 10,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 1e-2,
    "persist": True,
    "lr": 0.02,
}


def run(options: dict[str, Any], **sections: Any) -> worlds.World:
    base = {"model": NET, "dataset": DATA, "local": LOCAL, "federation": {"clients": 1, "rounds": 2}}
    return worlds.run(DR, options, **{**base, **sections})


def bank(count: int = 40, dim: int = 6, classes: int = 3) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(count) % classes
    centres = torch.randn(classes, dim, generator=rng)
    p = centres[y] + 0.3 * torch.randn(count, dim, generator=rng)
    turn, _ = torch.linalg.qr(torch.randn(dim, dim, generator=rng))
    d = p @ turn.T * 2 + 0.2 * torch.randn(count, dim, generator=rng) + 0.5
    return {"p": p, "d": d, "y": y}


def test_equal_clouds_and_equal_class_weights_change_nothing_but_the_length() -> None:
    """With all Q_j . u_c of a class alike, the confident mean is the plain one."""
    rows = bank()
    rows = {**rows, "d": rows["p"]}
    q = F.normalize(rows["p"], dim=1)
    turn = rotation(centred(q), centred(q))
    scale = torch.tensor(3.0)
    for how in ("none", "translation"):
        a, found = calibrated(rows, torch.zeros(3, 6), scale, how, None)
        torch.testing.assert_close(a, scale * q, rtol=0, atol=1e-5)
        assert float(found["centres-before"]) < 1e-6
    # The rotation does not put the mean back, and the translation of classes does.
    a, _ = calibrated(rows, torch.zeros(3, 6), scale, "full", turn)
    torch.testing.assert_close(a, scale * q, rtol=0, atol=1e-4)


def test_calibration_by_hand() -> None:
    """One class of two entries: weights by confidence, translation, length; a second class with one entry."""
    rows = {
        "p": torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, -5.0]]),
        "d": torch.tensor([[0.0, 3.0], [1.0, 0.0], [4.0, 0.0]]),
        "y": torch.tensor([0, 0, 1]),
    }
    weights = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    a, _ = calibrated(rows, weights, torch.tensor(2.0), "translation", None)
    sure = torch.tensor([1.0, 0.0]).softmax(0)
    target = sure[0] * torch.tensor([0.0, 1.0]) + sure[1] * torch.tensor([1.0, 0.0])
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0]]) + target - torch.tensor([0.5, 0.5])
    expected = torch.cat([first, torch.tensor([[1.0, 0.0]])])
    torch.testing.assert_close(a, 2 * F.normalize(expected, dim=1))


def test_translation_closes_the_distance_of_centres_and_rotation_that_of_the_clouds() -> None:
    rows = bank()
    a, q = (centred(F.normalize(rows[n], dim=1)) for n in ("p", "d"))
    _, found = calibrated(rows, torch.randn(3, 6), torch.tensor(1.0), "full", rotation(a, q))
    assert found["residual-after"] < 0.6 * found["residual-before"]
    assert found["centres-after"] < 0.2 * found["centres-before"]


def test_the_bank_is_not_changed_and_a_class_that_is_absent_is_left_out() -> None:
    rows = bank()
    rows["y"] = rows["y"] % 2
    copies = {n: v.clone() for n, v in rows.items()}
    a, _ = calibrated(rows, torch.randn(5, 6), torch.tensor(1.0), "translation", None)
    assert a.isfinite().all()
    assert worlds.equal(rows, copies)
    torch.testing.assert_close(a.norm(dim=1), torch.ones(40))


def opened(half: DrTuneHalf, net: Net) -> tuple[ModelParts, dict[str, Any], dict[str, Tensor]]:
    torch.manual_seed(1)
    rows = bank(30, 96, 4)
    queue = Queue.empty(30)
    queue.push({**rows, "p": rows["p"].abs(), "d": rows["d"].abs()})
    first = {n: v.clone() for n, v in net.state_dict().items()}
    extras = {FIRST: first, RATES: {"head.weight": 10.0}, DECAY: 0.0, BANK: Bank(queue)}
    return ModelParts.resident(net), extras, {"x": torch.randn(10, 1, 8, 8), "y": torch.arange(10) % 4}


def test_the_encoder_gets_no_gradient_from_the_regulariser() -> None:
    net = backbone((1, 8, 8), 4).train()
    with_it, without = DrTuneHalf(DrTuneParams(weight=5.0)), DrTuneHalf(DrTuneParams())
    model, extras, batch = opened(with_it, net)
    grads = []
    for half in (with_it, without):
        value, _ = half.loss(model, batch, extras, Classification(4))
        grads.append(
            dict(
                zip(
                    model.parameters, torch.autograd.grad(value, list(model.parameters.values())), strict=True
                )
            )
        )
    for name, one in grads[0].items():
        if name.startswith("head."):
            assert not torch.equal(one, grads[1][name])
        else:
            torch.testing.assert_close(one, grads[1][name])
    assert net.training
    assert all(module.training for module in net.modules())


def test_the_joined_loss_is_one_mean_over_batch_and_queue() -> None:
    net = backbone((1, 8, 8), 4).eval()
    half = DrTuneHalf(DrTuneParams(weight=1.0, joined=True, calibration="none"))
    model, extras, batch = opened(half, net)
    value, found = half.loss(model, batch, extras, Classification(4))
    rows = extras[BANK].queue.rows()
    d = net.features(batch["x"])
    a = d.norm(dim=1).mean() * F.normalize(rows["p"], dim=1)
    both = F.cross_entropy(net.head(torch.cat([d, a])), torch.cat([batch["y"], rows["y"]]))
    torch.testing.assert_close(value, both)
    split = DrTuneHalf(DrTuneParams(weight=0.5, calibration="none")).loss(
        model, batch, extras, Classification(4)
    )[0]
    torch.testing.assert_close(split, F.cross_entropy(net.head(d), batch["y"]) + 0.5 * found["r-dr"])


def test_without_a_weight_it_is_fedavg_with_a_faster_head() -> None:
    sections = {"federation": {"clients": 2, "rounds": 2}}
    mine = run({"head_lr": 1.0}, **sections).result.model
    plain = worlds.run("fedavg", model=NET, dataset=DATA, local=LOCAL, **sections).result.model
    assert worlds.equal(mine, plain)
    assert not worlds.equal(run({"head_lr": 5.0}, **sections).result.model, plain)


def test_the_queue_is_of_frozen_features_of_the_same_samples_and_outlives_the_round() -> None:
    world = run({"weight": 1.0, "queue": 25}, federation={"clients": 1, "rounds": 3})
    state = world.state(0)
    kept = Queue.kept(state, QUEUE, torch.device("cpu"))
    assert kept is not None
    assert len(kept) == 25
    rows, net = kept.rows(), world.parts.spec.model.build(3).eval()
    x = world.parts.dataset.prepare(world.parts.dataset.train.inputs)
    assert isinstance(net, Net)
    known = net.features(x)
    nearest = torch.cdist(rows["p"], known.detach(), compute_mode="donot_use_mm_for_euclid_dist").min(1)
    # Every row is what the untrained network says in evaluation mode of a sample with that label.
    assert float(nearest.values.max()) < 1e-4
    assert torch.equal(world.parts.dataset.train.labels[nearest.indices], rows["y"])
    assert not torch.equal(rows["d"], rows["p"])
    assert {group(QUEUE), "dr-tune rotation"} <= state.keys()


def local_round() -> LocalRound:
    return worlds.open_round(LocalParams(batch_size=8, persist=True))


def test_before_the_first_step_both_columns_are_pretrained_and_the_rotation_is_none_at_all() -> None:
    local = local_round()
    half = DrTuneHalf(DrTuneParams(weight=1.0, queue=45))
    extras = half.begin(local)
    rows = extras[BANK].queue.rows()
    assert len(rows["y"]) == 45
    assert torch.equal(rows["d"], rows["p"])
    a = centred(F.normalize(rows["p"], dim=1))
    torch.testing.assert_close(a @ extras[BANK].turn.T, a, rtol=0, atol=1e-5)


def test_the_rotation_is_kept_for_ten_steps_or_forgotten_as_released() -> None:
    turns: dict[bool, list[bool]] = {}
    for coded in (False, True):
        half = DrTuneHalf(DrTuneParams(weight=1.0, queue=20, every=4, as_coded=coded))
        held = half.begin(local_round())[BANK]
        seen = [held.turn is not None]
        for following in range(1, 9):
            half._turn(held, following)
            seen.append(held.turn is not None)
        turns[coded] = seen
    assert turns[False] == [True] * 9
    assert turns[True] == [n % 4 == 0 for n in range(9)]


def test_a_received_reference_follows_the_global_model() -> None:
    options = {"weight": 1.0, "queue": 20, "reference": "received"}
    world = run(options, federation={"clients": 2, "rounds": 2})
    assert group(QUEUE) not in world.state(0)
    assert worlds.equal(
        run(options, federation={"clients": 1, "rounds": 1}).result.model,
        run({**options, "reference": "initial"}, federation={"clients": 1, "rounds": 1}).result.model,
    )


def test_a_queue_that_is_filled_late_is_rotated_at_once() -> None:
    local = worlds.open_round(LocalParams(batch_size=8, persist=True))
    local.clock = Clock(round=4, rounds=5, steps=3)
    held = DrTuneHalf(DrTuneParams(weight=1.0, queue=20)).begin(local)[BANK]
    assert held.turn is not None


def test_a_probe_moves_the_head_alone() -> None:
    world = run({"probe": True})
    for name, value in world.result.model.items():
        assert torch.equal(value, world.parts.model[name]) != name.startswith("head."), name


def test_an_anchor_pulls_by_its_strength_times_the_distance() -> None:
    net = backbone((1, 8, 8), 4).eval()
    model, extras, batch = opened(DrTuneHalf(DrTuneParams()), net)
    with torch.no_grad():
        net.get_parameter("body.0.0.weight").add_(0.1)
    grads = [
        torch.autograd.grad(
            DrTuneHalf(DrTuneParams(anchor=anchor)).loss(model, batch, extras, Classification(4))[0],
            [model.parameters["body.0.0.weight"], model.parameters["head.weight"]],
        )
        for anchor in (0.0, 0.3)
    ]
    torch.testing.assert_close(
        grads[1][0] - grads[0][0], torch.full_like(grads[0][0], 0.03), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(grads[1][1], grads[0][1])


def test_the_new_head_is_small_and_the_backbone_is_not() -> None:
    torch.manual_seed(0)
    head = backbone((3, 32, 32), 10).head
    assert isinstance(head, nn.Linear)
    assert float(head.weight.std()) == pytest.approx(0.01, rel=0.1)
    assert not head.bias.any()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"weight": -1.0}, "strategy.weight is -1.0"),
        ({"queue": 0}, "strategy.queue is 0"),
        ({"calibration": "half"}, "strategy.calibration is 'half'"),
        ({"reference": "old"}, "strategy.reference is 'old'"),
        ({"joined": True, "weight": 0.5}, "set strategy.weight=1"),
        ({"head_lr": 0.0}, "strategy.head_lr is 0.0"),
    ],
)
def test_wrong_parameters_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        DrTuneParams(**options)
