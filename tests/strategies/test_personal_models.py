"""Methods whose clients keep a second model, head or prototypes: fixed points, gradients and identities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import toys
import worlds
from torch import Tensor
from torch.nn import functional as F

from flowerbed.clients.data import Batch, ClientData
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound
from flowerbed.clients.params import LocalParams
from flowerbed.clients.store import MemoryStore
from flowerbed.errors import ConfigError
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.strategies.apfl import APFL, APFLHalf, APFLParams, mixture
from flowerbed.strategies.base import ClientReply, FederatedStrategy
from flowerbed.strategies.ditto import Ditto, DittoHalf, DittoParams
from flowerbed.strategies.fedavg import FedAvg
from flowerbed.strategies.fedproto import FedProto, FedProtoHalf, FedProtoParams, class_means
from flowerbed.strategies.fedrod import FedRoDHalf
from flowerbed.strategies.per_fedavg import PerFedAvg, PerFedAvgHalf, PerFedAvgParams
from flowerbed.strategies.pfedme import PFedMe, PFedMeHalf, PFedMeParams

TEN = LocalParams(lr=0.1, batch_size=0, steps=10)
ONE = LocalParams(lr=0.1, batch_size=0, steps=1)
QUADRATICS = tuple(zip(toys.CURVATURES, toys.MINIMA, strict=True))


class QuadraticDitto(DittoHalf, toys.QuadraticHalf):
    """Ditto's client on the quadratics."""

    loss = toys.QuadraticHalf.loss


class QuadraticAPFL(APFLHalf, toys.QuadraticHalf):
    """APFL's client on the quadratics."""


class QuadraticPFedMe(PFedMeHalf, toys.QuadraticHalf):
    """pFedMe's client on the quadratics."""

    loss = toys.QuadraticHalf.loss


class QuadraticPerFedAvg(PerFedAvgHalf, toys.QuadraticHalf):
    """Per-FedAvg's client on the quadratics."""


def on_quadratics(
    strategy: FederatedStrategy, half: ClientHalf, rounds: int, local: LocalParams
) -> tuple[float, list[dict[str, dict[str, Tensor]]]]:
    """Return the shared number and what the two clients keep."""
    store = MemoryStore()
    federation = toys.quadratic_federation(toys.with_half(strategy, half), rounds, local, store=store)
    shared = float(federation.run().model["w"])
    return shared, [store.read(client, 10**6) for client in (0, 1)]


def weighted(weights: list[float]) -> float:
    """Return sum_i c_i b_i / sum_i c_i."""
    return sum(c * b for c, (_, b) in zip(weights, QUADRATICS, strict=True)) / sum(weights)


# Ditto.


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 2.0])
def test_ditto_reaches_the_known_personal_fixed_points(lambda_: float) -> None:
    params = DittoParams(lambda_=lambda_)
    shared, states = on_quadratics(Ditto(params), QuadraticDitto(params), 25, TEN)
    assert shared == pytest.approx(0.598711121, abs=1e-9)
    for (a, b), state in zip(QUADRATICS, states, strict=True):
        expected = (a * b + lambda_ * shared) / (a + lambda_)
        # The pull is towards the model as received, which is the fixed point itself.
        assert float(state["personal"]["w"]) == pytest.approx(expected, abs=1e-9)


def test_dittos_first_personal_step_by_hand() -> None:
    params = DittoParams(lambda_=0.5)
    _, states = on_quadratics(Ditto(params), QuadraticDitto(params), 2, ONE)
    # Round 1: v = w_1 = 0.3, gradients 0.3 and -2.1, no pull: v = 0.27 and 0.51, w_2 = 0.39.
    # Round 2: gradients 0.27 and 3 (0.51 - 1) = -1.47, pulls 0.5 (0.27 - 0.39) = -0.06 and 0.5 (0.51 - 0.39).
    assert float(states[0]["personal"]["w"]) == pytest.approx(0.27 - 0.1 * (0.27 - 0.06), abs=1e-12)
    assert float(states[1]["personal"]["w"]) == pytest.approx(0.51 - 0.1 * (-1.47 + 0.06), abs=1e-12)


def test_ditto_leaves_fedavg_alone_and_without_pull_is_local_training() -> None:
    local = {"momentum": 0.9, "persist": True}
    federation = {"clients": 4, "cohort": 2, "rounds": 3}
    ditto = worlds.run("ditto", {"lambda_": 0.0}, local=local, federation=federation)
    assert worlds.equal(ditto.trained, worlds.run("fedavg", local=local, federation=federation).trained)
    alone = worlds.run("local", local=local, federation=federation)
    for client in range(4):
        mine = alone.state(client).get("private")
        assert (mine is None) == ("personal" not in ditto.state(client))
        assert mine is None or worlds.equal(ditto.state(client)["personal"], mine)


def test_dittos_pull_moves_the_personal_model() -> None:
    one, other = (worlds.run("ditto", {"lambda_": value}).state(0)["personal"] for value in (0.0, 1.0))
    assert not worlds.equal(one, other)


def test_ditto_may_train_the_personal_model_longer() -> None:
    world = worlds.run("ditto", {"lambda_": 0.0, "personal_epochs": 3})
    twin = world.parts.spec.model.build(3)
    for t in range(2):
        worlds.plain_epochs(world.parts, twin, 1, range(3 * t, 3 * t + 3), lambda name: True)
    worlds.close(world.state(1)["personal"], dict(twin.state_dict()))


# APFL.


def test_apfl_by_hand() -> None:
    params = APFLParams(alpha=0.5, adaptive=False)
    shared, states = on_quadratics(APFL(params), QuadraticAPFL(params), 1, ONE)
    assert shared == pytest.approx(0.3 + 0.09, abs=1e-12)
    # The mixture is 0.3 for both; v moves by eta alpha grad F(0.3).
    assert float(states[0]["personal"]["w"]) == pytest.approx(0.3 - 0.1 * 0.5 * 0.3, abs=1e-12)
    assert float(states[1]["personal"]["w"]) == pytest.approx(0.3 + 0.1 * 0.5 * 2.1, abs=1e-12)


def test_apfl_adapts_alpha_by_hand() -> None:
    params = APFLParams(alpha=0.5)
    _, states = on_quadratics(APFL(params), QuadraticAPFL(params), 2, ONE)
    # In round 1 v = w, so alpha stays. Round 2 starts with w = 0.39, v = 0.285 and 0.405.
    for (a, b), v, state in zip(QUADRATICS, (0.285, 0.405), states, strict=True):
        m = 0.5 * v + 0.5 * 0.39
        alpha = 0.5 - 0.1 * (v - 0.39) * a * (m - b)
        assert float(state["mixing"]["alpha"]) == pytest.approx(alpha, abs=1e-12)
        m = alpha * v + (1 - alpha) * 0.39
        assert float(state["personal"]["w"]) == pytest.approx(v - 0.1 * alpha * a * (m - b), abs=1e-12)
    assert float(states[0]["mixing"]["alpha"]) > 0.5


def test_alpha_zero_is_fedavg_and_alpha_one_local_training() -> None:
    local = {"momentum": 0.9, "persist": True}
    none = worlds.run("apfl", {"alpha": 0.0, "adaptive": False}, local=local)
    full = worlds.run("apfl", {"alpha": 1.0, "adaptive": False}, local=local)
    plain, alone = worlds.run("fedavg", local=local), worlds.run("local", local=local)
    assert worlds.equal(none.trained, plain.trained)
    assert worlds.equal(full.trained, plain.trained)
    for client in range(4):
        assert worlds.equal(none.state(client)["personal"], none.parts.model)
        worlds.close(full.state(client)["personal"], alone.state(client)["private"])


def test_alphas_slope_by_finite_differences_and_its_bounds() -> None:
    local = worlds.open_round(LocalParams(batch_size=0, lr=1e6), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    noise = {
        n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in local.parts.parameters.items()
    }
    local.state["personal"] = {n: p.detach() + noise[n] for n, p in local.parts.parameters.items()}
    half, batch = APFLHalf(APFLParams(adaptive=False)), local.train_data.batch(slice(None))
    extras = half.begin(local)

    def value(alpha: float) -> float:
        mixed = mixture(torch.tensor(alpha, dtype=torch.float64), extras["personal"], local.parts.parameters)
        parts = ModelParts.functional(local.model, mixed, {})
        return float(F.cross_entropy(parts(batch["x"]), batch["y"]))

    slope = float(half.slope(local.parts, batch, extras, local.task))
    assert slope == pytest.approx((value(0.5 + 1e-6) - value(0.5 - 1e-6)) / 2e-6, rel=1e-6)
    assert abs(slope) > 1e-3
    bound = float(APFLHalf(APFLParams()).begin(local)["alpha"])
    assert bound == (0.0 if slope > 0 else 1.0)


def test_the_personal_loss_sends_no_gradient_to_the_shared_model() -> None:
    local = worlds.open_round(LocalParams())
    half = APFLHalf(APFLParams(adaptive=False))
    extras, batch = half.begin(local), local.train_data.batch(slice(None))
    for value in extras["personal"].values():
        value.requires_grad_()
    total, parts = half.loss(local.parts, batch, extras, local.task)
    shared = list(local.parts.parameters.values())
    both = torch.autograd.grad(total, shared, retain_graph=True)
    alone = torch.autograd.grad(parts["shared-loss"], shared)
    assert all(torch.equal(x, y) for x, y in zip(both, alone, strict=True))


def test_apfl_keeps_batch_statistics_apart() -> None:
    bn = {"name": "worlds:bn_net"}
    apfl, plain = worlds.run("apfl", model=bn), worlds.run("fedavg", model=bn)
    assert worlds.equal(apfl.trained, plain.trained)
    kept = apfl.state(0)["personal"]
    assert kept["body.2.num_batches_tracked"] == 2 * -(-int(apfl.parts.train.sizes[0]) // worlds.BATCH)
    assert not torch.equal(kept["body.2.running_mean"], plain.trained["body.2.running_mean"])


# pFedMe.


@pytest.mark.parametrize(("steps", "rounds"), [(1, 25), (4, 10)])
def test_pfedme_descends_the_moreau_envelopes(steps: int, rounds: int) -> None:
    params = PFedMeParams(lambda_=1.0, eta=1.0, K=30)
    local = LocalParams(lr=0.2, batch_size=0, steps=steps)
    shared, states = on_quadratics(PFedMe(params), QuadraticPFedMe(params), rounds, local)
    rates = [1 - (1 - a / (a + 1)) ** steps for a, _ in QUADRATICS]
    assert shared == pytest.approx(weighted(rates), abs=1e-6)
    if steps == 1:
        # With one step, the point where the envelopes' mean is least, that of FedProx.
        assert shared == pytest.approx(0.6, abs=1e-6)
        for (a, b), state in zip(QUADRATICS, states, strict=True):
            assert float(state["personal"]["w"]) == pytest.approx((a * b + shared) / (a + 1), abs=1e-6)


def test_pfedme_by_hand_with_beta() -> None:
    params = PFedMeParams(lambda_=2.0, eta=0.1, K=1, server_lr=0.5)
    shared, states = on_quadratics(PFedMe(params), QuadraticPFedMe(params), 1, replace(ONE, steps=2))
    ends = []
    for (a, b), state in zip(QUADRATICS, states, strict=True):
        theta = w = 0.3
        for _ in range(2):
            theta -= 0.1 * (a * (theta - b) + 2 * (theta - w))
            w -= 0.1 * 2 * (w - theta)
        assert float(state["personal"]["w"]) == pytest.approx(theta, abs=1e-12)
        ends.append(w)
    assert shared == pytest.approx(0.3 + 0.5 * (sum(ends) / 2 - 0.3), abs=1e-12)


def test_pfedmes_inner_steps_share_a_batch() -> None:
    """K steps on one batch: the inner clock runs K times as fast as the data's."""
    world = worlds.run("pfedme", {"K": 3, "eta": 0.01}, local={"lr": 0.05})
    record = next(r for r in world.result.history if r.phase == "train")
    plain = worlds.run("fedavg")
    assert (
        record.metrics["steps"]
        == 3 * next(r for r in plain.result.history if r.phase == "train").metrics["steps"]
    )
    net = world.parts.spec.model.build(3)
    data, indices = world.parts.dataset, world.parts.train.indices(0)
    batches = -(-len(indices) // worlds.BATCH)
    theta = {n: p.detach().clone() for n, p in net.named_parameters()}
    w = {n: p.clone() for n, p in theta.items()}
    order = worlds.order_of(0, len(indices), 0)
    for rows in torch.split(order, worlds.BATCH):
        x = data.prepare(data.train.inputs[indices[rows]])
        y = data.train.labels[indices[rows]]
        for _ in range(3):
            net.zero_grad()
            F.cross_entropy(net(x), y).backward()
            with torch.no_grad():
                for n, p in net.named_parameters():
                    assert p.grad is not None
                    p -= 0.05 * (p.grad + 15 * (p - w[n]))
        with torch.no_grad():
            for n, p in net.named_parameters():
                w[n] -= 0.01 * 15 * (w[n] - p)
    assert batches > 1
    first = worlds.run(
        "pfedme", {"K": 3, "eta": 0.01}, local={"lr": 0.05}, federation={"clients": 4, "rounds": 1}
    )
    worlds.close(first.state(0)["personal"], dict(net.state_dict()))


# Per-FedAvg.


@pytest.mark.parametrize("first_order", [False, True])
def test_per_fedavg_reaches_the_known_fixed_points(first_order: bool) -> None:
    params = PerFedAvgParams(alpha=0.2, first_order=first_order)
    slopes = [a * (1 - 0.2 * a) ** (1 if first_order else 2) for a, _ in QUADRATICS]
    shared, _ = on_quadratics(PerFedAvg(params), QuadraticPerFedAvg(params), 70, replace(ONE, lr=0.5))
    assert shared == pytest.approx(weighted(slopes), abs=1e-9)
    rates = [1 - (1 - 0.1 * c) ** 10 for c in slopes]
    shared, _ = on_quadratics(PerFedAvg(params), QuadraticPerFedAvg(params), 40, TEN)
    assert shared == pytest.approx(weighted(rates), abs=1e-7)


def test_without_adaptation_per_fedavg_is_fedavg() -> None:
    """With the whole data as the batch, D and D' are the same samples."""
    local = {"batch_size": 0, "momentum": 0.5}
    ours = worlds.run("per_fedavg", {"alpha": 0.0}, local=local).trained
    plain = worlds.run("fedavg", local=local).trained
    worlds.close(ours, plain)
    assert not worlds.equal(worlds.run("per_fedavg", {"alpha": 0.1}, local=local).trained, ours)


def meta_batch(local: LocalRound) -> dict[str, Tensor]:
    data = local.train_data
    inner = {f"inner {name}": value for name, value in data.batch(slice(0, 9)).items()}
    return {**data.batch(slice(9, 20)), **inner}


def test_the_meta_gradient_by_finite_differences() -> None:
    local = worlds.open_round(LocalParams(), dtype=torch.float64)
    half, batch = PerFedAvgHalf(PerFedAvgParams(alpha=0.3)), meta_batch(local)
    names = list(local.parts.parameters)

    def value(*tensors: Tensor) -> Tensor:
        parts = ModelParts.functional(local.model, dict(zip(names, tensors, strict=True)), {})
        return half.loss(parts, batch, {}, local.task)[0]

    point = tuple(p.detach().clone().requires_grad_() for p in local.parts.parameters.values())
    assert torch.autograd.gradcheck(value, point)


def test_first_order_is_the_gradient_at_the_adapted_model() -> None:
    local = worlds.open_round(LocalParams(), dtype=torch.float64)
    half, batch = PerFedAvgHalf(PerFedAvgParams(alpha=0.3, first_order=True)), meta_batch(local)
    parameters = dict(local.parts.parameters)
    value, _ = half.loss(local.parts, batch, {}, local.task)
    found = torch.autograd.grad(value, list(parameters.values()))
    inner = F.cross_entropy(local.model(batch["inner x"]), batch["inner y"])
    slopes = torch.autograd.grad(inner, list(parameters.values()))
    with torch.no_grad():
        for parameter, slope in zip(parameters.values(), slopes, strict=True):
            parameter -= 0.3 * slope
    outer = F.cross_entropy(local.model(batch["x"]), batch["y"])
    expected = torch.autograd.grad(outer, list(parameters.values()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_per_fedavg_evaluates_after_plain_steps() -> None:
    local = worlds.open_round(LocalParams(batch_size=0, lr=0.5, momentum=0.9, weight_decay=0.1))
    half = PerFedAvgHalf(PerFedAvgParams(alpha=0.3, adapt_steps=2))
    personal = half.predictors(local)["personal"]
    x, y = local.train_data.x, local.train_data.y
    for _ in range(2):
        slopes = torch.autograd.grad(F.cross_entropy(local.model(x), y), list(local.model.parameters()))
        with torch.no_grad():
            for parameter, slope in zip(local.model.parameters(), slopes, strict=True):
                parameter -= 0.3 * slope
    torch.testing.assert_close(personal(x), local.model(x))


def test_per_fedavg_takes_two_batches_a_step() -> None:
    seen: list[list[int]] = []

    class Spy(PerFedAvgHalf):
        def loss(
            self, model: ModelParts, batch: Batch, extras: Extras, task: Task
        ) -> tuple[Tensor, Mapping[str, Tensor]]:
            seen.extend([batch["inner index"].tolist(), batch["index"].tolist()])
            return super().loss(model, batch, extras, task)

    local = worlds.open_round(LocalParams(batch_size=5))
    Spy(PerFedAvgParams()).run(local)
    # Four steps on 20 samples in batches of five: two whole epochs, each sample twice.
    assert len(seen) == 8
    for epoch in (seen[:4], seen[4:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(20))


# FedRoD.


def fedrod_terms() -> tuple[LocalRound, dict[str, Any], dict[str, Tensor], Tensor, Tensor]:
    """Return a round, extras with a non-zero personal head, a batch, and the two losses by their formulas."""
    local = worlds.open_round(LocalParams(), dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    local.state["personal"] = {
        n: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for n, p in local.parts.parameters.items()
        if n in local.info.head
    }
    extras: dict[str, Any] = dict(FedRoDHalf().begin(local))
    for value in extras["personal"].values():
        value.requires_grad_()
    batch = local.train_data.batch(slice(None))
    z = local.parts.features(batch["x"])
    g = local.parts.head(z)
    own = z.detach() @ extras["personal"]["head.weight"].T + extras["personal"]["head.bias"]
    counts = torch.bincount(local.train_data.y, minlength=3)
    balanced = F.cross_entropy(g + counts.log(), batch["y"])
    return local, extras, batch, balanced, F.cross_entropy(g.detach() + own, batch["y"])


def test_fedrods_losses_and_what_they_move() -> None:
    local, extras, batch, balanced, personal = fedrod_terms()
    total, parts = FedRoDHalf().loss(local.parts, batch, extras, local.task)
    torch.testing.assert_close(parts["balanced-loss"], balanced, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(parts["personal-loss"], personal)
    model, head = list(local.parts.parameters.values()), list(extras["personal"].values())
    found = torch.autograd.grad(total, [*model, *head])
    expected = [*torch.autograd.grad(balanced, model), *torch.autograd.grad(personal, head)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
        assert one.abs().max() > 0


def test_fedrods_shared_model_is_that_of_balanced_softmax() -> None:
    local = {"momentum": 0.9, "weight_decay": 1e-3, "clip_norm": 0.5}
    ours = worlds.run("fedrod", local=local)
    assert worlds.equal(ours.trained, worlds.run("logit_adjustment", local=local).trained)
    heads = [ours.state(client)["personal"]["head.weight"] for client in (0, 1)]
    assert heads[0].abs().max() > 0
    assert not torch.equal(*heads)


def test_fedrods_personal_prediction_adds_the_heads() -> None:
    local, extras, batch, _, _ = fedrod_terms()
    found = FedRoDHalf().predictors(local)
    z = local.parts.features(batch["x"])
    own = z @ extras["personal"]["head.weight"].T + extras["personal"]["head.bias"]
    torch.testing.assert_close(found["personal"](batch["x"]), local.parts.head(z) + own)
    torch.testing.assert_close(found[""](batch["x"]), local.parts.head(z))
    local.state.clear()
    torch.testing.assert_close(FedRoDHalf().predictors(local)["personal"](batch["x"]), local.parts.head(z))


# FedProto.


def prototypes(local: LocalRound) -> dict[str, dict[str, Tensor]]:
    mean = torch.arange(15, dtype=local.train_data.x.dtype).reshape(3, 5) / 10
    return {"prototypes": {"mean": mean, "count": torch.tensor([4, 0, 2])}}


def proto_round(**kwargs: Any) -> LocalRound:
    local = worlds.open_round(LocalParams(batch_size=5), dtype=torch.float64, **kwargs)
    local.received = {**local.received, **prototypes(local)}
    return local


def test_fedprotos_pull_is_the_known_gradient() -> None:
    local = proto_round()
    half, batch = FedProtoHalf(FedProtoParams(lambda_=0.7)), local.train_data.batch(slice(None))
    extras = half.begin(local)
    seen: list[Tensor] = []

    class Spy:
        def features(self, x: Tensor) -> Tensor:
            seen.append(local.parts.features(x).detach().requires_grad_())
            return seen[-1]

        def head(self, z: Tensor) -> Tensor:
            return local.parts.head(z.detach())

    value, _ = half.loss(Spy(), batch, extras, local.task)  # type: ignore[arg-type]
    (found,) = torch.autograd.grad(value, seen)
    target = prototypes(local)["prototypes"]["mean"][batch["y"]]
    owned = (batch["y"] != 1).unsqueeze(1)
    expected = 2 * 0.7 * (seen[0] - target) * owned / (20 * 5)
    torch.testing.assert_close(found, expected)
    assert owned.any()
    assert not owned.all()


def test_fedproto_trains_the_body_and_without_pull_is_local_training() -> None:
    alone = worlds.run("local")
    none, some = worlds.run("fedproto", {"lambda_": 0.0}), worlds.run("fedproto", {"lambda_": 5.0})
    for client in range(4):
        assert worlds.equal(none.state(client)["private"], alone.state(client)["private"])
        moved = some.state(client)["private"]["body.1.weight"]
        assert not torch.equal(moved, alone.state(client)["private"]["body.1.weight"])


def test_class_means_against_a_plain_loop() -> None:
    local = worlds.open_round(LocalParams())
    data = ClientData(local.train_data.x, local.train_data.y.clamp(max=1), local.train_data.index, {})
    local = worlds.open_round(LocalParams(), data=data)
    found = class_means(local)
    features = local.parts.features(data.x).detach()
    assert found["count"].tolist() == [int((data.y == c).sum()) for c in range(3)]
    assert found["count"][2] == 0
    assert not found["mean"][2].any()
    for c in (0, 1):
        torch.testing.assert_close(found["mean"][c], features[data.y == c].mean(0))


@pytest.mark.parametrize(("weighting", "first"), [("examples", 1.75), ("uniform", 2.5)])
def test_prototypes_average_over_their_owners_and_stay_otherwise(weighting: str, first: float) -> None:
    strategy = FedProto(FedProtoParams(weighting=weighting))

    def reply(means: list[float], counts: list[int]) -> ClientReply:
        stream = {"mean": torch.tensor(means).unsqueeze(1), "count": torch.tensor(counts)}
        return ClientReply(1, {"prototypes": stream}, {"num-examples": 9})

    strategy.aggregate(1, {}, [reply([1.0, 5.0, 0.0], [3, 1, 0]), reply([4.0, 0.0, 0.0], [1, 0, 0])])
    assert strategy.state["prototypes"]["mean"].flatten().tolist() == [first, 5.0, 0.0]
    assert strategy.state["prototypes"]["count"].tolist() == [4, 1, 0]
    strategy.aggregate(2, {}, [reply([0.0, 0.0, 7.0], [0, 0, 2])])
    assert strategy.state["prototypes"]["mean"].flatten().tolist() == [first, 5.0, 7.0]
    assert strategy.broadcast(3) == strategy.broadcast_evaluate(3) == strategy.state


def test_fedproto_predicts_the_nearest_of_its_own_known_classes() -> None:
    local = proto_round()
    x, y = local.train_data.x, local.train_data.y
    mean = prototypes(local)["prototypes"]["mean"]

    def predict() -> Tensor:
        return FedProtoHalf(FedProtoParams()).predictors(local)["personal"](x).argmax(1)

    distance = (local.parts.features(x).unsqueeze(1) - mean).square().sum(2)
    nearest = distance[:, [0, 2]].argmin(1) * 2
    assert torch.equal(predict(), nearest)
    only_two = proto_round(data=ClientData(x, torch.full_like(y, 2), local.train_data.index, {}))
    local = only_two
    assert (predict() == 2).all()
    local = proto_round(data=ClientData(x, torch.ones_like(y), only_two.train_data.index, {}))
    # Nobody has sent class 1, the only one of this client: any known class may be predicted, never class 1.
    assert torch.equal(predict(), nearest)


def test_fedprotos_traffic_is_its_prototypes() -> None:
    world = worlds.run("fedproto")
    last = [r for r in world.result.history if r.phase == "train"][-1]
    # 10 prototypes of 8 float32 and 10 int64 counts from each of four clients, beside names and metrics.
    assert 4 * (10 * 8 * 4 + 10 * 8) < last.bytes_up < 4 * (10 * 8 * 4 + 10 * 8 + 500)
    assert last.bytes_down < 4 * (10 * 8 * 4 + 10 * 8 + 500)


# All of them.


@pytest.mark.parametrize("strategy", ["ditto", "apfl", "pfedme", "fedrod", "fedproto", "per_fedavg"])
def test_clients_that_never_trained_can_be_evaluated(strategy: str) -> None:
    world = worlds.run(
        strategy,
        local={"lr": 0.05},
        federation={"clients": 4, "cohort": 1, "rounds": 1},
        evaluation={"clients_every": 1},
    )
    assert not world.result.failures
    assert 0 <= world.result.final("evaluate-clients")["personal-accuracy"] <= 1


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        ("ditto", {"lambda_": -0.1}, "strategy.lambda_ is -0.1"),
        ("ditto", {"personal_epochs": -1}, "strategy.personal_epochs is -1"),
        ("apfl", {"alpha": 1.1}, "strategy.alpha is 1.1"),
        ("pfedme", {"lambda_": 0.0}, "strategy.lambda_ is 0"),
        ("pfedme", {"eta": 0.0}, "strategy.eta is 0"),
        ("pfedme", {"K": 0}, "strategy.K is 0"),
        ("pfedme", {"lambda_": 20.0}, "product must stay below 2"),
        ("per_fedavg", {"alpha": -1.0}, "strategy.alpha is -1"),
        ("per_fedavg", {"adapt_steps": 0}, "strategy.adapt_steps is 0"),
        ("fedproto", {"lambda_": -1.0}, "strategy.lambda_ is -1"),
        ("fedproto", {"weighting": "size"}, "strategy.weighting is 'size'"),
        ("fedrod", {"weighting": "size"}, "strategy.weighting is 'size'"),
    ],
)
def test_bad_parameters_are_named(strategy: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        worlds.run(strategy, options)


def test_fedavg_is_what_these_are_measured_against() -> None:
    shared, _ = on_quadratics(FedAvg(), toys.QuadraticHalf(), 25, TEN)
    assert shared == pytest.approx(0.598711121, abs=1e-9)
