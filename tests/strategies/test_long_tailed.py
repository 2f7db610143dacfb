"""Balanced softmax, tau-normalisation, FedETF and CReFF: formulas, identities and gradients."""

from __future__ import annotations

import math

import pytest
import torch
import worlds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from flowerbed.clients.data import ClientData
from flowerbed.clients.params import LocalParams
from flowerbed.errors import ConfigError
from flowerbed.models.base import ModelSpec
from flowerbed.models.etf import EtfHead, simplex
from flowerbed.models.parts import ModelParts
from flowerbed.strategies.base import ClientReply
from flowerbed.strategies.creff import (
    CReFFParams,
    class_gradient,
    local_gradients,
    matched,
    mean_gradients,
    mismatch,
    trained_head,
)
from flowerbed.strategies.fedetf import FedETF, FedETFHalf, FedETFParams
from flowerbed.strategies.logit_adjustment import (
    LogitAdjustment,
    LogitAdjustmentHalf,
    LogitAdjustmentParams,
    class_counts,
    log_prior,
)
from flowerbed.strategies.tau_norm import tau_normalised

# Balanced softmax.


def test_the_balanced_loss_is_its_formula() -> None:
    local = worlds.open_round(LocalParams(), dtype=torch.float64)
    half = LogitAdjustmentHalf(LogitAdjustmentParams())
    batch, extras = local.train_data.batch(slice(None)), half.begin(local)
    value, _ = half.loss(local.parts, batch, extras, local.task)
    z, y = local.model(batch["x"]), batch["y"]
    n = torch.bincount(y, minlength=3)
    weighted = n * z.exp()
    expected = -(weighted[torch.arange(20), y] / weighted.sum(1)).log().mean()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    assert len(set(n.tolist())) > 1


def test_its_gradient_by_finite_differences() -> None:
    local = worlds.open_round(LocalParams(), dtype=torch.float64)
    half = LogitAdjustmentHalf(LogitAdjustmentParams(tau=0.7))
    batch, extras = local.train_data.batch(slice(None)), half.begin(local)
    names = list(local.parts.parameters)

    def value(*tensors: Tensor) -> Tensor:
        parts = ModelParts.functional(local.model, dict(zip(names, tensors, strict=True)), {})
        return half.loss(parts, batch, extras, local.task)[0]

    assert torch.autograd.gradcheck(
        value, tuple(p.detach().clone().requires_grad_() for p in local.parts.parameters.values())
    )


@given(st.integers(1, 10**6), st.integers(2, 12))
def test_equal_counts_adjust_nothing(count: int, classes: int) -> None:
    z = torch.linspace(-2, 3, 4 * classes, dtype=torch.float64).reshape(4, classes)
    y = torch.arange(4) % classes
    prior = log_prior(torch.full((classes,), float(count), dtype=torch.float64))
    torch.testing.assert_close(F.cross_entropy(z + prior, y), F.cross_entropy(z, y))


def test_counts_and_absent_classes() -> None:
    counts = class_counts(torch.tensor([[2, 0], [2, 2]]), 4)
    assert counts.tolist() == [1, 0, 3, 0]
    assert log_prior(counts, 2.0).tolist() == pytest.approx([0, 0, 2 * math.log(3), 0])


def test_without_adjustment_it_is_fedavg_bit_for_bit() -> None:
    plain = worlds.run("fedavg").trained
    assert worlds.equal(worlds.run("logit_adjustment", {"tau": 0.0}).trained, plain)
    assert worlds.equal(worlds.run("logit_adjustment", {"tau": 0.0, "prior": "global"}).trained, plain)
    assert not worlds.equal(worlds.run("logit_adjustment").trained, plain)


def test_a_global_prior_adds_up_the_clients_that_have_answered() -> None:
    strategy = LogitAdjustment(LogitAdjustmentParams(prior="global"))
    assert strategy.broadcast(1) == {}

    def reply(node: int, counts: list[float]) -> ClientReply:
        streams = {"arrays": {"w": torch.zeros(1)}, "class counts": {"n": torch.tensor(counts)}}
        return ClientReply(node, streams, {"num-examples": 1})

    strategy.aggregate(1, {"w": torch.zeros(1)}, [reply(7, [3.0, 0.0]), reply(8, [1.0, 2.0])])
    strategy.aggregate(2, {"w": torch.zeros(1)}, [reply(8, [1.0, 2.0]), reply(9, [0.0, 5.0])])
    assert strategy.broadcast(3)["class counts"]["n"].tolist() == [4.0, 7.0]
    half = LogitAdjustmentHalf(LogitAdjustmentParams(prior="global"))
    first = worlds.open_round(LocalParams())
    assert not half.begin(first)["log prior"].any()
    counts = torch.tensor([4.0, 7.0, 1.0])
    later = worlds.open_round(LocalParams(), received={"class counts": {"n": counts}})
    torch.testing.assert_close(half.begin(later)["log prior"], counts.log())


# tau-normalisation.


def test_rows_are_divided_by_a_power_of_their_norm() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    assert torch.equal(tau_normalised(weight, 0.0), weight)
    torch.testing.assert_close(tau_normalised(weight, 1.0).norm(dim=1), torch.tensor([1.0, 1.0, 0.0]))
    half = tau_normalised(weight, 0.5)
    torch.testing.assert_close(half[:2], weight[:2] / torch.tensor([[5.0], [2.0]]).sqrt())


def test_training_is_fedavgs_and_only_the_delivered_head_differs() -> None:
    evaluation = {"every": 1, "clients_every": 2}
    ours, plain = worlds.run("tau_norm", evaluation=evaluation), worlds.run("fedavg", evaluation=evaluation)
    assert worlds.equal(ours.trained, plain.trained)
    delivered = ours.result.model
    rows = delivered["head.weight"].norm(dim=1)
    torch.testing.assert_close(rows, torch.ones_like(rows))
    assert not delivered["head.bias"].any()
    assert torch.equal(delivered["body.1.weight"], plain.trained["body.1.weight"])
    data = ours.parts.dataset
    model = ours.parts.spec.model.build(0)
    model.load_state_dict(delivered)
    hits = model(data.prepare(data.test.inputs)).argmax(1) == data.test.labels
    assert ours.result.final()["accuracy"] == pytest.approx(float(hits.double().mean()))
    assert ours.result.final() != plain.result.final()
    clients = "evaluate-clients"
    assert ours.result.final(clients) != plain.result.final(clients)


def test_with_tau_zero_and_the_bias_it_delivers_fedavg() -> None:
    ours = worlds.run("tau_norm", {"tau": 0.0, "keep_bias": True})
    assert worlds.equal(ours.result.model, worlds.run("fedavg").result.model)


# FedETF.


@given(st.integers(2, 20), st.integers(0, 15), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_the_prototypes_are_a_simplex(classes: int, extra: int, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        frame = simplex(classes + extra, classes).double()
    expected = classes / (classes - 1) * (torch.eye(classes) - torch.full((classes, classes), 1 / classes))
    torch.testing.assert_close(frame.T @ frame, expected.double(), rtol=0, atol=1e-6)


def test_a_simplex_needs_room() -> None:
    with pytest.raises(ConfigError, match="4 classes need as many dimensions, got 3; raise strategy.d"):
        simplex(3, 4)
    with pytest.raises(ConfigError, match="give at least two classes"):
        simplex(3, 1)


def test_the_head_is_a_scaled_cosine() -> None:
    head = EtfHead(5, 4, 3)
    with torch.no_grad():
        head.scale.fill_(2.5)
    z = torch.linspace(-1, 2, 10).reshape(2, 5)
    projected = z @ head.projection.weight.T + head.projection.bias
    for n in range(2):
        for c in range(3):
            cosine = F.cosine_similarity(projected[n], head.prototypes[:, c], dim=0)
            torch.testing.assert_close(head(z)[n, c], 2.5 * cosine)


def test_prototypes_stay_and_do_not_travel_back() -> None:
    world = worlds.run("fedetf", local={"momentum": 0.9, "weight_decay": 0.1})
    assert torch.equal(world.trained["head.prototypes"], world.parts.model["head.prototypes"])
    for name in ("head.projection.weight", "head.scale", "body.1.weight"):
        assert not torch.equal(world.trained[name], world.parts.model[name])
    spec = FedETF().model_spec(ModelSpec("mlp", (6,), 3, {"hidden": (5,)}))
    local = worlds.open_round(LocalParams(), spec=spec)
    reply = FedETFHalf(FedETFParams()).run(local)
    assert local.model.state_dict().keys() - reply.streams["arrays"].keys() == {"head.prototypes"}
    start = local.received["arrays"]["head.prototypes"]
    assert torch.equal(local.model.state_dict()["head.prototypes"], start)


def test_the_model_is_drawn_from_the_seed_and_checked() -> None:
    spec = FedETF(FedETFParams(d=7)).model_spec(ModelSpec("mlp", (6,), 3, {"hidden": (5,)}))
    one, again, other = (spec.build(seed).state_dict() for seed in (1, 1, 2))
    assert worlds.equal(dict(one), dict(again))
    assert all(not torch.equal(one[n], other[n]) for n in one if n != "head.scale")
    assert one["head.prototypes"].shape == (7, 3)
    with pytest.raises(ConfigError, match="Unknown option of model 'mlp' 'hiden'"):
        FedETF().model_spec(ModelSpec("mlp", (6,), 3, {"hiden": (5,)})).build(0)
    with pytest.raises(ConfigError, match="its head cannot be replaced"):
        FedETF().model_spec(ModelSpec("toys:Scalar", (6,), 3)).build(0)


def test_fedetf_trains_on_balanced_softmax() -> None:
    spec = FedETF().model_spec(ModelSpec("mlp", (6,), 3, {"hidden": (5,)}))
    local = worlds.open_round(LocalParams(), spec=spec)
    batch = local.train_data.batch(slice(None))
    ours, twin = FedETFHalf(FedETFParams()), LogitAdjustmentHalf(LogitAdjustmentParams())
    losses = [half.loss(local.parts, batch, half.begin(local), local.task)[0] for half in (ours, twin)]
    assert torch.equal(*losses)


def test_fedetfs_personal_model_tunes_everything_then_prototypes_and_projection_in_turn() -> None:
    spec = FedETF().model_spec(ModelSpec("mlp", (6,), 3, {"hidden": (5,)}))
    local = worlds.open_round(LocalParams(batch_size=0, lr=0.3), spec=spec)
    params = FedETFParams(
        tune_epochs=2, alternations=2, alternate_epochs=1, prototype_lr=0.2, projection_lr=0.4
    )
    personal = FedETFHalf(params).predictors(local)["personal"]
    twin, (x, y) = spec.build(1), (local.train_data.x, local.train_data.y)
    prototypes, projection = {"head.prototypes"}, {"head.projection.weight", "head.projection.bias"}
    rest = set(dict(twin.named_parameters())) - prototypes
    for moving, lr in [(rest, 0.3)] * 2 + [(prototypes, 0.2), (projection, 0.4)] * 2:
        twin.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        torch.optim.SGD([p for n, p in twin.named_parameters() if n in moving], lr=lr).step()
    torch.testing.assert_close(personal(x), twin(x), rtol=1e-5, atol=1e-6)


# CReFF.


def linear_head(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(3, 4, generator=generator, dtype=dtype),
        torch.randn(3, generator=generator, dtype=dtype),
    )


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def test_class_gradients_are_those_of_autograd() -> None:
    weight, bias = linear_head()
    z = features(6, 4)
    for c in range(3):
        leaf = weight.clone().requires_grad_()
        value = F.cross_entropy(z @ leaf.T + bias, torch.full((6,), c))
        (expected,) = torch.autograd.grad(value, leaf)
        torch.testing.assert_close(class_gradient(z, torch.tensor(c), weight, bias), expected)


def test_a_client_reports_its_own_classes_at_the_received_model() -> None:
    local = worlds.open_round(LocalParams(batch_size=0, lr=1.0), dtype=torch.float64)
    x, y = local.train_data.x, local.train_data.y.clamp(max=1)
    data = ClientData(x, y, local.train_data.index, {})
    local = worlds.open_round(LocalParams(batch_size=0, lr=1.0), data=data, dtype=torch.float64)
    weight, bias = torch.ones(3, 5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    found = local_gradients(local, weight, bias)
    assert found["owned"].tolist() == [1, 1, 0]
    assert not found["gradient"][2].any()
    z = local.parts.features(x).detach()
    for c in (0, 1):
        expected = class_gradient(z[y == c], torch.tensor(c), weight, bias)
        torch.testing.assert_close(found["gradient"][c], expected)


def test_gradients_average_over_their_owners() -> None:
    def stream(scale: float, owned: list[int]) -> dict[str, Tensor]:
        gradient = torch.stack([torch.full((3, 2), scale * (c + 1) * o) for c, o in enumerate(owned)])
        return {"gradient": gradient, "owned": torch.tensor(owned)}

    classes, mean = mean_gradients([stream(1.0, [1, 1, 0]), stream(3.0, [1, 0, 0])])
    assert classes.tolist() == [0, 1]
    assert mean[:, 0, 0].tolist() == [2.0, 2.0]


def test_mismatch_is_zero_at_the_truth_and_its_gradient_is_right() -> None:
    weight, bias = linear_head()
    classes, v = torch.tensor([0, 2]), features(3, 2, 4)
    real = torch.stack([class_gradient(v[c], c, weight, bias) for c in classes])
    assert float(mismatch(v, classes, 5 * real, weight, bias)) == pytest.approx(0, abs=1e-12)
    # Two classes of three rows each: the largest value is that of opposite directions.
    assert float(mismatch(v, classes, -real, weight, bias)) == pytest.approx(12)
    other = features(2, 3, 4)
    assert torch.autograd.gradcheck(lambda t: mismatch(t, classes, other, weight, bias), v.requires_grad_())


def test_matching_moves_only_features_of_the_classes_that_came() -> None:
    weight, bias = linear_head()
    v, classes, real = features(3, 2, 4), torch.tensor([0, 2]), features(2, 3, 4)
    found = matched(v, classes, real, weight, bias, CReFFParams(m=2, match_steps=200))
    before, after = (float(mismatch(t, classes, real, weight, bias)) for t in (v, found))
    assert after < 0.8 * before
    assert torch.equal(found[1], v[1])


def test_the_heads_training_is_plain_sgd() -> None:
    v = features(3, 2, 4)
    params = CReFFParams(m=2, head_epochs=3, head_batch=4, head_lr=0.3)
    found = trained_head(v, params, torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(9)
    twin = torch.nn.Linear(4, 3, dtype=torch.float64)
    with torch.no_grad():
        twin.weight.uniform_(-0.5, 0.5, generator=generator)
        twin.bias.uniform_(-0.5, 0.5, generator=generator)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.3)
    x, y = v.reshape(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])
    for _ in range(3):
        order = torch.randperm(6, generator=generator)
        for rows in (order[:4], order[4:]):
            optimizer.zero_grad()
            F.cross_entropy(twin(x[rows]), y[rows]).backward()
            optimizer.step()
    torch.testing.assert_close(found, {"weight": twin.weight.detach(), "bias": twin.bias.detach()})


def test_creff_leaves_fedavg_alone_and_delivers_its_own_head() -> None:
    options = {"m": 20, "match_steps": 20, "head_epochs": 30}
    local = {"momentum": 0.9, "persist": True}
    federation = {"clients": 4, "cohort": 2, "rounds": 3}
    ours = worlds.run("creff", options, local=local, federation=federation)
    plain = worlds.run("fedavg", local=local, federation=federation)
    assert worlds.equal(ours.trained, plain.trained)
    state = ours.parts.strategy.state
    assert torch.equal(ours.result.model["head.weight"], state["retrained head"]["weight"])
    assert torch.equal(ours.result.model["head.bias"], state["retrained head"]["bias"])
    assert not torch.equal(ours.result.model["head.weight"], ours.trained["head.weight"])
    body = [n for n in ours.trained if n.startswith("body.")]
    assert all(torch.equal(ours.result.model[n], ours.trained[n]) for n in body)


def test_creffs_head_learns() -> None:
    ours = worlds.run(
        "creff",
        {"m": 20, "head_epochs": 100, "head_lr": 0.05},
        partition={"name": "iid"},
        federation={"clients": 4, "rounds": 6},
        local={"batch_size": 32},
    )
    assert ours.result.final()["accuracy"] > 0.5


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        ("logit_adjustment", {"tau": -1.0}, "strategy.tau is -1"),
        ("logit_adjustment", {"prior": "none"}, "strategy.prior is 'none'"),
        ("tau_norm", {"tau": -0.5}, "strategy.tau is -0.5"),
        ("fedetf", {"d": -1}, "strategy.d is -1"),
        ("fedetf", {"d": 9}, "10 classes need as many dimensions, got 9"),
        ("fedetf", {"tune_epochs": 0}, "strategy.tune_epochs is 0"),
        ("fedetf", {"alternations": -1}, "strategy.alternations is -1"),
        ("fedetf", {"alternate_epochs": 0}, "strategy.alternate_epochs is 0"),
        ("fedetf", {"prototype_lr": 0.0}, "strategy.prototype_lr is 0"),
        ("fedetf", {"projection_lr": 0.0}, "strategy.projection_lr is 0"),
        *(
            ("creff", {name: 0}, f"strategy.{name} is 0")
            for name in ("m", "match_steps", "head_epochs", "head_batch")
        ),
        *(("creff", {name: 0.0}, f"strategy.{name} is 0") for name in ("match_lr", "head_lr")),
    ],
)
def test_bad_parameters_are_named(strategy: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        worlds.run(strategy, options)


def test_a_head_of_several_layers_is_refused() -> None:
    for strategy in ("tau_norm", "creff", "fedrod"):
        with pytest.raises(ConfigError, match="needs a head that is one linear layer"):
            worlds.run(strategy, model={"name": "worlds:deep_head"})
