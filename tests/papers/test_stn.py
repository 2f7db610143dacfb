"""Self-tuning networks: the identities and pitfalls of the paper."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import worlds
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.clients.data import ClientData
from flowerbed.clients.local_round import LocalRound
from flowerbed.clients.params import LocalParams
from flowerbed.datasets.augment import PIXELS
from flowerbed.errors import ClientError, ConfigError
from flowerbed.experiments.measures import Measured
from flowerbed.experiments.papers.stn import (
    HYPER,
    LAMBDAS,
    SCALE,
    SPREAD,
    StnHalf,
    StnParams,
    entropy,
    normal_equations,
    response,
    validation_loss,
)
from flowerbed.experiments.papers.stn.probes import (
    AT_BEST,
    BEST,
    FIXED,
    at_best,
    best_of_grid,
    diabetes,
    exact_response,
    hypergradients,
    hyperparameters,
    responses,
)
from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.models.base import ModelSpec
from flowerbed.models.gated import Conditioned, GatedLinear
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Classification
from flowerbed.server.callbacks import SERVER, Record

STN = "flowerbed.experiments.papers.stn:Stn"
MLP = "flowerbed.models.gated_nets:dropout_mlp"
SPEC = ModelSpec(MLP, (6,), 3, {"hidden": (5,), "rates": (0.1, 0.2)})
TASK = Classification(3)


def network(**options: Any) -> Conditioned:
    """Return a network whose gates respond."""
    net = ModelSpec(MLP, (6,), 3, {**SPEC.options, **options}).build(0)
    assert isinstance(net, Conditioned)
    torch.manual_seed(0)
    for layer in net.modules():
        if isinstance(layer, GatedLinear):
            nn.init.normal_(layer.gates.weight)
    return net


def batch(count: int = 8) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {"x": torch.randn(count, 6, generator=rng), "y": torch.randint(3, (count,), generator=rng)}


def lower(net: Conditioned, **params: Any) -> Tensor:
    return StnHalf(StnParams(**params)).loss(ModelParts.resident(net), batch(), {SCALE: PIXELS}, TASK)[0]


def upper(net: Conditioned, **params: Any) -> Tensor:
    return StnHalf(StnParams(**params)).validation(ModelParts.resident(net), batch(), {}, TASK)[0]


def opened(net: dict[str, Any] | None = None, **local: Any) -> LocalRound:
    spec = ModelSpec(MLP, (6,), 3, {**SPEC.options, **(net or {})})
    rng = torch.Generator().manual_seed(5)
    x, y = torch.randn(40, 6, generator=rng), torch.randint(3, (40,), generator=rng)
    params = LocalParams(**{"batch_size": 4, "lr": 0.1, "steps": 6, "persist": True, **local})
    return worlds.open_round(params, spec=spec, data=ClientData(x, y, torch.arange(40), {}))


def test_the_training_loss_has_no_gradient_in_the_hyperparameters() -> None:
    """Nothing comes through the dropout mask, nor through the gates of the first step."""
    net = network()
    found = torch.autograd.grad(lower(net.train()), [net.hyper, net.spread], allow_unused=True)
    assert found == (None, None)


def test_the_second_step_is_free_of_dropout_whatever_mode_the_network_was_in() -> None:
    net = network(rates=(0.9, 0.9))
    net.train()
    one, other = (float(upper(net, tune_scale=False).detach()) for _ in range(2))
    assert one == other
    assert not net.training
    # The first step does drop.
    net.train()
    assert float(lower(net, perturb=False).detach()) != float(lower(net, perturb=False).detach())


def test_the_hypergradient_is_that_of_finite_differences() -> None:
    """Through sigma as well: eps is drawn apart from it. The entropy is part of the objective."""
    net = network().double()
    data = {"x": batch()["x"].double(), "y": batch()["y"]}

    def value() -> Tensor:
        torch.manual_seed(3)
        half = StnHalf(StnParams(tau=0.7))
        return half.validation(ModelParts.resident(net), data, {}, TASK)[0]

    gradients = torch.autograd.grad(value(), [net.hyper, net.spread])
    for parameter, gradient in zip((net.hyper, net.spread), gradients, strict=True):
        for i in range(2):
            found = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter[i] += sign * 1e-5
                found.append(float(value().detach()))
                with torch.no_grad():
                    parameter[i] -= sign * 1e-5
            assert float(gradient[i]) == pytest.approx((found[0] - found[1]) / 2e-5, rel=1e-4, abs=1e-9)


def test_the_entropy_is_that_of_the_normal_distribution_and_grows_sigma() -> None:
    net = network(spread=0.3)
    normal = torch.distributions.Normal(torch.zeros(2), torch.full((2,), 0.3))
    torch.testing.assert_close(entropy(net), normal.entropy().sum())
    (slope,) = torch.autograd.grad(-entropy(net), net.spread)
    assert (slope < 0).all()


def test_the_second_step_asks_for_more_entropy() -> None:
    """tau > 0 keeps sigma from collapsing: the same draws, minus tau H."""
    net = network()
    values = []
    for tau in (0.0, 0.7):
        torch.manual_seed(3)
        values.append(upper(net, tau=tau))
    torch.testing.assert_close(values[1], values[0] - 0.7 * entropy(net))


def test_a_last_batch_that_is_smaller_works() -> None:
    """42 samples, 28 to train on: the fourth step of an epoch would have 4 of 8."""
    local = opened(batch_size=16, steps=8)
    reply = StnHalf(StnParams()).run(local)
    assert math.isfinite(float(reply.metrics["loss"]))


def test_lambda_waits_for_the_warm_up_and_moves_by_validation_samples_alone() -> None:
    local = opened()
    before = local.parameters()
    StnHalf(StnParams(warm_up=6)).run(local)
    after = local.parameters()
    assert torch.equal(after[HYPER], before[HYPER])
    assert torch.equal(after[SPREAD], before[SPREAD])
    assert not torch.equal(after["layers.0.plain.weight"], before["layers.0.plain.weight"])
    for name, lr in ((HYPER, 1e-3), (SPREAD, 1e-3)):
        local = opened()
        before = local.parameters()
        StnHalf(StnParams(hyper_lr=lr)).run(local)
        assert not torch.equal(local.parameters()[name], before[name])


def test_validation_samples_do_not_train_the_weights_and_training_samples_do_not_tune() -> None:
    """Without a step on lambda, other validation labels change nothing but the validation loss."""
    results = []
    for other in (False, True):
        local = opened()
        data = local.train_data
        order = worlds.seed_sequence(0, "validation samples", 0)
        held = np.random.Generator(np.random.PCG64(order)).permutation(40)[:16]
        y = data.y.clone()
        if other:
            y[torch.from_numpy(held)] = (y[torch.from_numpy(held)] + 1) % 3
        local = opened()
        local.train_data = ClientData(data.x, y, data.index, {})
        reply = StnHalf(StnParams(tune=False)).run(local)
        results.append((local.parameters(), reply.metrics))
    assert worlds.equal(results[0][0], results[1][0])
    assert results[0][1]["loss"] == results[1][1]["loss"]
    assert results[0][1]["validation-loss"] != results[1][1]["validation-loss"]


def test_gates_are_silent_at_first() -> None:
    """V = 0: the first step on lambda has no gradient but the entropy's, so that a warm-up is needed."""
    net = SPEC.build(0)
    assert isinstance(net, Conditioned)
    (slope,) = torch.autograd.grad(upper(net), net.hyper)
    assert torch.equal(slope, torch.zeros(2))


def test_without_perturbation_and_gates_it_is_an_ordinary_network_with_dropout() -> None:
    net = network(gated=False)
    torch.manual_seed(4)
    mine = lower(net.train(), perturb=False)
    torch.manual_seed(4)
    x, layers = batch()["x"], [m for m in net.modules() if isinstance(m, nn.Linear)]
    for place, (layer, p) in enumerate(zip(layers, (0.1, 0.2), strict=True)):
        x = x.relu() if place else x
        x = layer(x * (torch.rand_like(x) >= p) / (1 - p))
    torch.testing.assert_close(mine, F.cross_entropy(x, batch()["y"]))


def test_validation_is_judged_at_lambda_itself() -> None:
    net, found = network(), batch(700)
    data = ClientData(found["x"], found["y"], torch.arange(700), {})
    expected = F.cross_entropy(net.eval()(data.x), data.y)
    assert validation_loss(net.train(), data, TASK) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_hyperparameters_are_measured_with_sigma_and_the_least_move() -> None:
    net = network(spread=0.5)
    with torch.no_grad():
        net.hyper[0] = 0.0
    found = hyperparameters(Measured(net, diabetes(), 0, torch.device("cpu")))
    assert found == pytest.approx(
        {
            "dropout-input": 0.475,
            "dropout-hidden-1": 0.2,
            "sigma-dropout-input": 0.5,
            "sigma-dropout-hidden-1": 0.5,
            "moved": 0.0,
        },
        abs=1e-6,
    )


def world(**options: Any) -> worlds.World:
    return worlds.run(
        STN,
        options,
        model={"name": MLP, "hidden": [8], "rates": [0.1, 0.2]},
        local={"batch_size": 64, "steps": 4},
        partition={"name": "iid"},
    )


def test_clients_average_lambda_or_keep_their_own() -> None:
    shared = world()
    start = shared.parts.model[HYPER]
    assert not torch.equal(shared.result.model[HYPER], start)
    assert not any("private" in shared.state(client) for client in range(4))
    own = world(personal=True)
    kept = [own.state(client)["private"][HYPER] for client in range(4)]
    assert all(state.shape == start.shape for state in kept)
    assert len({tuple(state.tolist()) for state in kept}) == 4
    sent = own.result.model
    assert HYPER not in sent or torch.equal(sent[HYPER], start)


# Ridge regression.


def slow_response(gram: Tensor, right: Tensor, lambda_: float, sigma: float) -> tuple[Tensor, Tensor]:
    """Minimise the mean over Gauss-Hermite nodes as one least-squares problem in (w_0, u)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()
    d = len(right)
    quadratic, linear = (
        torch.zeros(2 * d, 2 * d, dtype=torch.float64),
        torch.zeros(2 * d, dtype=torch.float64),
    )
    for node, weight in zip(nodes, weights, strict=True):
        eps = sigma * float(node)
        at = torch.cat([torch.eye(d), eps * torch.eye(d)], 1).double()
        hessian = gram + math.exp(lambda_ + eps) * torch.eye(d, dtype=torch.float64)
        quadratic += float(weight) * at.T @ hessian @ at
        linear += float(weight) * at.T @ right
    w, u = torch.linalg.solve(quadratic, linear).chunk(2)
    return w, u


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0])
def test_the_response_is_the_minimiser_over_all_perturbations(sigma: float) -> None:
    data = diabetes().train
    gram, right = normal_equations(data.inputs, data.extras["target"])
    for mine, slow in zip(
        response(gram, right, -2.0, sigma), slow_response(gram, right, -2.0, sigma), strict=True
    ):
        torch.testing.assert_close(mine, slow, rtol=1e-6, atol=1e-8)


def test_the_exact_response_and_its_slope() -> None:
    data = diabetes().train
    gram, right = normal_equations(data.inputs, data.extras["target"])
    w, slope = exact_response(gram, right, -1.0)
    x, y = data.inputs.double(), data.extras["target"]
    weights = w.clone().requires_grad_()
    f = (x @ weights - y).square().mean() + math.exp(-1.0) * weights.square().sum()
    (zero,) = torch.autograd.grad(f, weights)
    torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=1e-10)
    ahead, behind = (exact_response(gram, right, -1.0 + step)[0] for step in (1e-5, -1e-5))
    torch.testing.assert_close(slope, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-8)
    # A narrow fit is the tangent.
    near, tangent = response(gram, right, -1.0, 1e-3)
    torch.testing.assert_close(near, w, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tangent, slope, rtol=1e-4, atol=1e-5)


def test_a_gated_layer_with_one_output_is_that_response() -> None:
    """w(eps) = w_0 + eps u: with V = 1 and no biases the layer has nothing else to say."""
    net = Line().double()
    with torch.no_grad():
        net.layer.gates.weight.copy_(torch.tensor([[1.0], [0.0]]))
        net.layer.plain.bias.zero_()
    x, eps = torch.randn(4, 3).double(), torch.randn(4, 1).double()
    with net.at(eps):
        said = net(x)
    w = net.layer.plain.weight + eps * net.layer.response.weight
    torch.testing.assert_close(said[:, 0], (w * x).sum(1))


class Line(Conditioned):
    def __init__(self) -> None:
        super().__init__([])
        self.layer = GatedLinear(3, 1, 1, self.condition)

    def compute(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


def test_in_principal_axes_the_exact_response_is_a_sigmoid_gate() -> None:
    """s_j(lambda) = s_j(-inf) sigmoid(log(d_j^2 / N) - lambda), which is why gates are linear in lambda."""
    data = diabetes().train
    gram, right = normal_equations(data.inputs, data.extras["target"])
    size, axes = torch.linalg.eigh(gram)
    free = axes.T @ torch.linalg.solve(gram, right)
    for lambda_ in (-3.0, 0.0, 2.0):
        w, _ = exact_response(gram, right, lambda_)
        torch.testing.assert_close(axes.T @ w, free * torch.sigmoid(size.log() - lambda_))


def test_hypergradients_of_the_exact_response_are_exact() -> None:
    data = diabetes()
    gram, right = normal_equations(data.train.inputs, data.train.extras["target"])
    net = responses((10,), 1)
    pairs = [exact_response(gram, right, at) for at in LAMBDAS]
    net.load_state_dict({"w": torch.stack([w for w, _ in pairs]), "u": torch.stack([u for _, u in pairs])})
    found = hypergradients(Measured(net, data, 0, torch.device("cpu")))
    assert found["hypergradient-error"] == pytest.approx(0, abs=1e-9)
    assert found["wrong-signs"] == 0
    net.load_state_dict({"w": net.w.detach(), "u": -1.5 * net.u.detach()})
    found = hypergradients(Measured(net, data, 0, torch.device("cpu")))
    assert found["hypergradient-error"] == pytest.approx(2.5)
    assert found["wrong-signs"] == len(LAMBDAS)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"train_steps": 0}, "strategy.train_steps is 0"),
        ({"warm_up": -1}, "strategy.warm_up is -1"),
        ({"tau": -0.1}, "strategy.tau is -0.1"),
        ({"hyper_lr": 0.0}, "strategy.hyper_lr is 0.0"),
        ({"hyper_optimizer": "lion"}, "strategy.hyper_optimizer is 'lion'"),
        ({"valid": 1.0}, "strategy.valid is 1.0"),
    ],
)
def test_wrong_parameters_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        StnParams(**options)


def test_models_without_gates_or_hyperparameters_are_refused() -> None:
    with pytest.raises(ClientError, match="no gates"):
        StnHalf(StnParams()).run(opened({"gated": False}))
    with pytest.raises(ClientError, match="no hyperparameters"):
        StnHalf(StnParams()).run(worlds.open_round(LocalParams(batch_size=4)))


def finished(arm: str, **values: float) -> Finished:
    return Finished(arm, 0, Path("nowhere"), values)


def test_the_best_of_the_grid_is_that_by_validation_and_the_grid_must_be_whole() -> None:
    """Its test loss is that of the same run, not the best one."""
    runs = {
        arm: finished(arm, **{BEST: 0.5 + abs(i - 2) / 10, AT_BEST: 0.9 - i / 100})
        for i, arm in enumerate(FIXED)
    }
    assert best_of_grid(runs) == {}
    runs["stn"] = finished("stn", **{BEST: 0.1, AT_BEST: 0.1})
    assert best_of_grid(runs) == {"stn": {"grid-validation-loss": 0.5, "grid-test-loss": pytest.approx(0.88)}}
    del runs["fixed-4"]
    assert best_of_grid(runs) == {}


def test_figures_are_those_of_the_best_validation_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    records = []
    for round_, (valid, tested) in enumerate([(0.9, 0.8), (0.5, 0.6), (0.7, 0.4)], start=1):
        records += [
            Record(round_, "train", {"validation-loss": valid}),
            Record(round_, SERVER, {"loss": tested, "accuracy": 0.7}),
        ]
    monkeypatch.setattr(Finished, "records", property(lambda self: records))
    found = at_best(finished("stn"))
    assert found == pytest.approx({BEST: 0.5, AT_BEST: 0.6, "test-error-at-best": 0.3, "best-epoch": 2.0})
    monkeypatch.setattr(Finished, "records", property(lambda self: records[1::2]))
    assert at_best(finished("ridge-0.1")) == {}
