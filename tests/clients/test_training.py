"""The training loop's parts: order of data, learning rates, hooks, limits."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st

from flowerbed.clients.data import BatchOrder, ClientData
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Clock, LocalRound
from flowerbed.clients.params import LocalParams
from flowerbed.clients.training import Evaluation, Hooks, TimeLimitError, backpropagate, train
from flowerbed.errors import ClientError, ConfigError
from flowerbed.models.base import ModelSpec
from flowerbed.models.info import ModelInfo
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Classification

CPU = torch.device("cpu")


def open_round(local: LocalParams, *, round_: int = 1, examples: int = 20, seed: int = 0) -> LocalRound:
    """Return a local round of a linear model on random data."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(examples, 6, generator=generator)
    y = torch.randint(0, 3, (examples,), generator=generator)
    model = ModelSpec("linear", (6,), 3).build(seed)
    clock = Clock(round_, 5, local.steps_per_round(examples))
    data = ClientData(x, y, torch.arange(examples), {})
    return LocalRound(
        client=0, seed=seed, clock=clock, phase="train", config={}, received={"arrays": dict(model.state_dict())},
        model=model, parts=ModelParts.resident(model), info=ModelInfo.of(model), task=Classification(3), local=local,
        open_train=lambda: data, open_test=lambda: data, state={}, device=CPU,
    )  # fmt: skip


@given(st.integers(1, 40), st.integers(0, 12), st.integers(0, 5), st.booleans())
def test_an_epoch_visits_every_sample_once(examples: int, batch: int, epoch: int, drop_last: bool) -> None:
    local = LocalParams(batch_size=batch, drop_last=drop_last)
    per_epoch = local.batches_per_epoch(examples)
    order = BatchOrder(local, examples, seed=3, client=1)
    rows = torch.cat([order.rows(epoch * per_epoch + i) for i in range(per_epoch)]).tolist()
    assert len(set(rows)) == len(rows)
    if not drop_last or batch == 0 or examples < batch:
        assert sorted(rows) == list(range(examples))
    else:
        assert len(rows) == examples // batch * batch


def test_with_replacement_every_row_is_an_independent_draw() -> None:
    """All batches are whole, repeats occur as often as they should, and a step is a function of its clock."""
    local = LocalParams(batch_size=4, replacement=True)
    order = BatchOrder(local, 10, seed=0, client=0)
    rows = torch.stack([order.rows(step) for step in range(3000)])
    assert rows.shape == (3000, 4)
    shares = torch.bincount(rows.flatten(), minlength=10) / rows.numel()
    assert (shares - 0.1).abs().max() < 0.01
    # Neighbours within a batch agree with probability 1/10: in a permutation never.
    assert float((rows[:, 1:] == rows[:, :-1]).float().mean()) == pytest.approx(0.1, abs=0.01)
    assert torch.equal(BatchOrder(local, 10, seed=0, client=0).rows(1234), rows[1234])
    flat, sizes = order.span(range(1000, 1100))
    assert sizes == [4] * 100
    assert torch.equal(flat.view(100, 4), rows[1000:1100])


def test_a_budget_of_steps_goes_on_through_the_epochs() -> None:
    """Steps of successive rounds continue the same stream; nothing starts anew at a round's border."""
    local = LocalParams(batch_size=4, steps=3)
    order = BatchOrder(local, 10, seed=0, client=0)
    straight = [order.rows(step).tolist() for step in range(9)]
    again = [BatchOrder(local, 10, seed=0, client=0).rows(step).tolist() for step in range(9)]
    assert straight == again
    assert sorted(row for rows in straight[:3] for row in rows) == list(range(10))


def test_clients_and_seeds_have_their_own_order() -> None:
    local = LocalParams(batch_size=0)
    orders = {
        tuple(BatchOrder(local, 30, seed, client).rows(0).tolist()) for seed in (0, 1) for client in (0, 1)
    }
    assert len(orders) == 4


def test_schedules() -> None:
    cosine = LocalParams(lr=2.0, schedule="cosine")
    assert cosine.lr_at(0, 10, 4) == 2.0
    assert cosine.lr_at(20, 10, 4) == pytest.approx(1.0)
    assert cosine.lr_at(40, 10, 4) == pytest.approx(0.0, abs=1e-15)
    exponential = LocalParams(lr=1.0, schedule="exponential", lr_decay=0.5)
    assert [exponential.lr_at(s, 3, 4) for s in (0, 2, 3, 8, 9)] == [1.0, 1.0, 0.5, 0.25, 0.125]
    assert LocalParams(lr=0.3).lr_at(7, 3, 4) == 0.3


def test_correct_edits_the_gradient_that_the_optimizer_sees() -> None:
    local = open_round(LocalParams(lr=0.5, batch_size=0))
    before = {n: v.clone() for n, v in local.model.state_dict().items()}

    def ones(gradients: Any, parameters: Any, extras: Mapping[str, float]) -> Any:
        return {n: torch.full_like(g, extras["value"]) for n, g in gradients.items()}

    train(local, ClientHalf().loss, extras={"value": 2.0}, hooks=Hooks(correct=ones))
    for name, value in local.model.state_dict().items():
        torch.testing.assert_close(value, before[name] - 0.5 * 2.0)


def test_an_evaluation_elsewhere_is_that_of_moved_parameters_and_moves_nothing() -> None:
    """Also where only one tensor is given, and for many at once under vmap."""
    local = open_round(LocalParams(batch_size=0))
    half, batch = ClientHalf(), local.train_data.batch(slice(None))
    compute = Evaluation(half.loss, local.parts, batch, {}, local.task)
    before = {n: v.clone() for n, v in local.model.state_dict().items()}
    weights = torch.randn(4, *before["head.weight"].shape)
    found = torch.func.vmap(lambda w: compute.at({"head.weight": w}))(weights)
    assert all(torch.equal(v, before[n]) for n, v in local.model.state_dict().items())
    for w, value in zip(weights, found, strict=True):
        local.load({"head.weight": w})
        torch.testing.assert_close(compute()[0], value)


def test_estimate_replaces_the_gradient_and_after_step_sees_the_step() -> None:
    local = open_round(LocalParams(lr=0.5, batch_size=10))
    seen: list[tuple[int, float, int]] = []

    def doubled(compute: Any, parameters: Any) -> Any:
        value, metrics, gradients = backpropagate(compute, parameters)
        return value, metrics, {n: 2 * g for n, g in gradients.items()}

    hooks = Hooks(estimate=doubled, after_step=lambda s: seen.append((s.index, s.lr, len(s.batch["y"]))))
    train(local, ClientHalf().loss, extras={}, hooks=hooks)
    twin = open_round(LocalParams(lr=1.0, batch_size=10))
    train(twin, ClientHalf().loss, extras={})
    assert seen == [(0, 0.5, 10), (1, 0.5, 10)]
    for name, value in local.model.state_dict().items():
        torch.testing.assert_close(value, twin.model.state_dict()[name])


def test_two_trainings_of_one_round_keep_their_own_memory() -> None:
    params = LocalParams(momentum=0.9, persist=True, batch_size=10)
    local = open_round(params)
    train(local, ClientHalf().loss, extras={}, steps=range(1), scope=" first")
    train(local, ClientHalf().loss, extras={}, steps=range(1, 2), scope=" second")
    assert {"optimizer first.momentum_buffer", "optimizer second.momentum_buffer"} <= local.state.keys()


def test_frozen_parameters_do_not_move_and_others_do() -> None:
    local = open_round(LocalParams(momentum=0.9, weight_decay=0.1))
    before = {n: v.clone() for n, v in local.model.state_dict().items()}
    frozen = frozenset({"head.bias"})
    train(local, ClientHalf().loss, extras={}, frozen=frozen)
    assert torch.equal(local.model.state_dict()["head.bias"], before["head.bias"])
    assert not torch.equal(local.model.state_dict()["head.weight"], before["head.weight"])
    with pytest.raises(ClientError, match="every parameter is frozen"):
        train(local, ClientHalf().loss, extras={}, frozen=frozenset(before))


def test_clipping_bounds_the_step() -> None:
    local = open_round(LocalParams(lr=1.0, batch_size=0, clip_norm=1e-3))
    before = torch.cat([p.detach().flatten().clone() for p in local.model.parameters()])
    train(local, ClientHalf().loss, extras={})
    after = torch.cat([p.detach().flatten() for p in local.model.parameters()])
    assert float((after - before).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_metrics_are_means_over_samples() -> None:
    local = open_round(LocalParams(lr=0.0, batch_size=7), examples=20)
    trained = train(local, ClientHalf().loss, extras={})
    model, data = local.model, local.train_data
    expected = torch.nn.functional.cross_entropy(model(data.x), data.y).detach()
    assert trained.metrics["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert trained.steps == 3
    assert trained.examples == 20


def test_a_client_out_of_time_says_so() -> None:
    local = replace(open_round(LocalParams()), deadline=time.monotonic() - 1)
    with pytest.raises(TimeLimitError, match="time limit"):
        train(local, ClientHalf().loss, extras={})


def test_the_global_generators_are_left_alone() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    train(open_round(LocalParams()), ClientHalf().loss, extras={})
    assert torch.equal(torch.get_rng_state(), before)


def test_proximal_term_of_flowers_fedprox_by_hand() -> None:
    """Two steps on the quadratics, mu = 2: the first is FedAvg's, the second is pulled back to w_t."""
    from flowerbed.strategies.flower import FlowerHalf, FlowerParams, FlowerStrategy

    class Half(FlowerHalf):
        loss = staticmethod(toys.quadratic_loss)  # type: ignore[assignment]

    strategy = toys.with_half(
        FlowerStrategy(FlowerParams(flower="FedProx", options={"proximal_mu": 2.0})), Half()
    )
    moved = float(
        toys.quadratic_federation(strategy, 1, LocalParams(lr=0.1, batch_size=0, steps=2)).run().model["w"]
    )
    ends = []
    for a, b in zip(toys.CURVATURES, toys.MINIMA, strict=True):
        w = 0.3
        for _ in range(2):
            w -= 0.1 * (a * (w - b) + 2.0 * (w - 0.3))
        ends.append(w)
    assert moved == pytest.approx(sum(ends) / 2, abs=1e-12)


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0}, {"steps": -1}, {"batch_size": -1}, {"lr": -0.1}, {"lr": math.nan}, {"momentum": 1.0},
        {"nesterov": True}, {"weight_decay": -1.0}, {"clip_norm": -1.0}, {"lr_decay": 0.0},
        {"optimizer": "lbfgs"}, {"schedule": "step"},
    ],
)  # fmt: skip
def test_bad_local_parameters_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"local.{next(iter(bad))}"):
        LocalParams(**bad)


def test_hidden_labels_are_hidden_and_refused_by_supervised_strategies() -> None:
    from flowerbed.errors import RunError
    from flowerbed.experiments.config import Simulation
    from flowerbed.experiments.parts import build_parts
    from flowerbed.experiments.simulation import simulate

    settings: dict[str, Any] = {"data": {"labelled": 0.25}, "federation": {"clients": 3, "rounds": 1}}
    parts = build_parts(Simulation.of(settings))
    for client in range(3):
        view = ClientData.view(parts.dataset, parts.dataset.train, parts.train.indices(client), CPU)
        labelled = view.extras["labelled"]
        assert abs(int(labelled.sum()) - len(view) / 4) <= 1
        assert bool((view.y[~labelled] == -1).all())
        assert torch.equal(view.y[labelled], view.extras["clean"][labelled])
        assert set(view.y[labelled].tolist()) == set(range(10))
    with pytest.raises(RunError, match="semi-supervised strategy"):
        simulate(**settings)
