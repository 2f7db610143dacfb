"""FedProx, SCAFFOLD, FedDyn, FedDC and FedNova: fixed points, invariants and zero coefficients.

The two quadratics pull in opposite directions from wherever the model is between their minima 0 and 1; their
mean is least at 0.75, where their gradients are 0.75 and -0.75.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import toys
from torch import Tensor

from flowerbed.clients.data import Batch, ClientData
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Clock, Extras, LocalRound
from flowerbed.clients.params import LocalParams
from flowerbed.clients.store import MemoryStore
from flowerbed.errors import ConfigError
from flowerbed.experiments.simulation import simulate
from flowerbed.models.base import ModelSpec
from flowerbed.models.info import ModelInfo
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Classification, Task
from flowerbed.server.sampling import UniformSampler
from flowerbed.storage import Tensors
from flowerbed.strategies.base import ClientReply, FederatedStrategy, Setting
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams
from flowerbed.strategies.feddc import DRIFT, FedDC, FedDCParams
from flowerbed.strategies.feddyn import DUAL, FedDyn, FedDynParams
from flowerbed.strategies.fednova import FedNova, FedNovaParams, work_ratios
from flowerbed.strategies.fedprox import FedProx, FedProxParams
from flowerbed.strategies.scaffold import CONTROL, Scaffold, ScaffoldParams, full_gradient

TEN = LocalParams(lr=0.1, batch_size=0, steps=10)
ONE = LocalParams(lr=0.1, batch_size=0)
EXACT = LocalParams(lr=0.25, batch_size=0, steps=60)
"""Enough steps to minimise the quadratics with a penalty of 0.5 or 1 to the last bits."""
SLOPES = (0.75, -0.75)
"""Gradients of the two quadratics at 0.75."""


def play(
    strategy: FederatedStrategy, rounds: int, local: LocalParams, cohort: int = 0
) -> tuple[float, Callable[[int, str], float]]:
    """Return the last model, and what reads the state of a client after the last round."""
    store = MemoryStore()
    federation = toys.quadratic_federation(
        toys.on_quadratics(strategy), rounds, local, store=store, cohort=cohort
    )
    model = float(federation.run().model["w"])
    return model, lambda client, group: float(
        store.read(client, rounds + 1).get(group, {}).get("w", torch.zeros(1))
    )


def kept(strategy: FederatedStrategy, group: str) -> float:
    return float(strategy.state[group]["w"])


def digits(name: str, **options: Any) -> Tensors:
    return simulate(
        strategy={"name": name, **options},
        partition={"name": "dirichlet", "alpha": 0.3},
        federation={"clients": 4, "cohort": 2, "rounds": 2},
        evaluation={"every": 0},
    ).model


def equal(one: Tensors, other: Tensors) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


# FedProx.


def test_fedprox_with_exact_local_solutions_keeps_its_known_bias() -> None:
    mu = 1.0
    pulls = [a / (a + mu) for a in toys.CURVATURES]
    closed_form = sum(p * b for p, b in zip(pulls, toys.MINIMA, strict=True)) / sum(pulls)
    assert closed_form == pytest.approx(0.6)
    assert play(FedProx(FedProxParams(mu=mu)), 40, EXACT)[0] == pytest.approx(closed_form, abs=1e-12)


def test_fedprox_solves_the_proximal_problem_on_every_client() -> None:
    """The minimiser is (a b + mu w) / (a + mu): 0.15 and 0.825 from 0.3 with mu = 1, so down and up."""
    found, _ = play(FedProx(FedProxParams(mu=1.0)), 1, EXACT)
    assert found == pytest.approx((0.15 + 0.825) / 2, abs=1e-12)


def test_first_step_of_fedprox_is_fedavgs() -> None:
    strong = FedProx(FedProxParams(mu=7.0))
    assert play(strong, 1, ONE)[0] == play(FedAvg(), 1, ONE)[0]
    two = LocalParams(lr=0.1, batch_size=0, steps=2)
    assert play(FedProx(FedProxParams(mu=7.0)), 1, two)[0] != play(FedAvg(), 1, two)[0]


def test_fedprox_without_its_term_is_fedavg_bit_for_bit() -> None:
    plain = digits("fedavg")
    assert equal(digits("fedprox", mu=0.0), plain)
    assert not equal(digits("fedprox", mu=0.5), plain)


# SCAFFOLD.


@pytest.mark.parametrize("option", [1, 2])
def test_scaffold_removes_the_drift(option: int) -> None:
    strategy = Scaffold(ScaffoldParams(option=option))
    w, state = play(strategy, 120, TEN)
    assert w == pytest.approx(0.75, abs=1e-10)
    assert kept(strategy, CONTROL) == pytest.approx(0.0, abs=1e-9)
    assert [state(k, CONTROL) for k in (0, 1)] == pytest.approx(SLOPES, abs=1e-9)


def test_one_step_makes_the_control_variate_the_gradient_and_the_round_fedavgs() -> None:
    w = 0.3
    for rounds in (1, 2, 3):
        strategy = Scaffold()
        found, state = play(strategy, rounds, ONE)
        slopes = [a * (w - b) for a, b in zip(toys.CURVATURES, toys.MINIMA, strict=True)]
        assert [state(k, CONTROL) for k in (0, 1)] == pytest.approx(slopes, abs=1e-12)
        w -= 0.1 * sum(slopes) / 2
        assert found == pytest.approx(w, abs=1e-12)
        assert found == pytest.approx(play(FedAvg(), rounds, ONE)[0], abs=1e-12)


def test_option_one_takes_the_gradient_where_the_round_starts() -> None:
    _, state = play(Scaffold(ScaffoldParams(option=1)), 1, TEN)
    assert [state(k, CONTROL) for k in (0, 1)] == pytest.approx([0.3, -2.1], abs=1e-12)


@pytest.mark.parametrize("cohort", [0, 1])
@pytest.mark.parametrize("rounds", [1, 2, 3, 6])
@pytest.mark.parametrize("option", [1, 2])
def test_the_servers_control_variate_is_the_mean_of_all(cohort: int, rounds: int, option: int) -> None:
    strategy = Scaffold(ScaffoldParams(option=option))
    _, state = play(strategy, rounds, TEN, cohort)
    assert kept(strategy, CONTROL) == pytest.approx((state(0, CONTROL) + state(1, CONTROL)) / 2, abs=1e-12)
    assert kept(strategy, CONTROL) != 0.0


@pytest.mark.parametrize(
    "local",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"schedule": "cosine"},
        {"momentum": 0.5, "schedule": "exponential", "lr_decay": 0.5},
    ],
)
def test_control_variates_are_mean_gradients_whatever_the_optimizer(local: dict[str, Any]) -> None:
    """With the loss a w - b w the gradient is always a - b, that is 1 and 2, and so must c_i be."""

    def linear(
        self: ClientHalf, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        a, b = batch["x"].double().unbind(1)
        return ((a - b) * model(batch["x"])[:, 0]).mean(), {}

    strategy, store = Scaffold(), MemoryStore()
    half = type("Linear", (type(strategy.half),), {"loss": linear})
    strategy.half = half(strategy.params)
    params = LocalParams(lr=0.1, batch_size=0, steps=7, **local)
    toys.quadratic_federation(strategy, 3, params, store=store).run()
    found = [float(store.read(k, 4)[CONTROL]["w"]) for k in (0, 1)]
    assert found == pytest.approx([1.0, 2.0], abs=1e-12)
    assert kept(strategy, CONTROL) == pytest.approx(1.5, abs=1e-12)


def test_scaffolds_server_by_hand() -> None:
    """Four clients, two answer: models 0 and 4 from 1, changes 2 and -6; eta_g = 0.5."""
    strategy = Scaffold(ScaffoldParams(server_lr=0.5))
    current = {"w": torch.tensor([1.0]), "n": torch.tensor(3)}
    info = ModelInfo({"w": "backbone", "n": "backbone"}, frozenset({"w"}), frozenset(), {"w": (1,), "n": ()})
    strategy.setup(Setting(0, 4, 1, info, UniformSampler(0, 2), 2))
    strategy.current = current
    assert strategy.broadcast(1)[CONTROL].keys() == {"w"}
    replies = [
        ClientReply(
            1,
            {"arrays": {"w": torch.tensor([0.0]), "n": torch.tensor(4)}, CONTROL: {"w": torch.tensor([2.0])}},
            {"num-examples": 9},
        ),
        ClientReply(
            2,
            {
                "arrays": {"w": torch.tensor([4.0]), "n": torch.tensor(7)},
                CONTROL: {"w": torch.tensor([-6.0])},
            },
            {"num-examples": 1},
        ),
    ]
    following = strategy.aggregate(1, current, replies)
    assert following == {"w": torch.tensor([1.5]), "n": torch.tensor(7)}
    assert kept(strategy, CONTROL) == -1.0


def test_control_variates_do_something_on_a_real_model() -> None:
    plain = digits("fedavg", weighting="uniform")
    assert not equal(digits("scaffold"), plain)
    assert not equal(digits("scaffold", option=1), digits("scaffold"))


def open_round(model: str, options: Mapping[str, Any], local: LocalParams) -> LocalRound:
    """Return a local round on 10 random images."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(10, 1, 8, 8, generator=generator)
    y = torch.randint(0, 3, (10,), generator=generator)
    module = ModelSpec(model, (1, 8, 8), 3, options).build(0)
    data = ClientData(x, y, torch.arange(10), {})
    return LocalRound(
        client=0, seed=0, clock=Clock(1, 1, 1), phase="train", config={},
        received={"arrays": dict(module.state_dict())}, model=module, parts=ModelParts.resident(module),
        info=ModelInfo.of(module), task=Classification(3), local=local, open_train=lambda: data,
        open_test=lambda: data, state={}, device=torch.device("cpu"),
    )  # fmt: skip


def test_full_gradient_is_that_of_all_samples_whatever_the_batches() -> None:
    local = open_round("mlp", {"hidden": [5]}, LocalParams(batch_size=4))
    found = full_gradient(local, ClientHalf().loss, {})
    data, names = local.train_data, list(local.parts.parameters)
    loss = torch.nn.functional.cross_entropy(local.model(data.x), data.y)
    expected = torch.autograd.grad(loss, [local.parts.parameters[n] for n in names])
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


def test_full_gradient_leaves_the_model_and_the_generators_alone() -> None:
    local = open_round("resnet8", {"norm": "bn"}, LocalParams(batch_size=5))
    before = {n: v.clone() for n, v in local.model.state_dict().items()}
    generator = torch.get_rng_state()
    full_gradient(local, ClientHalf().loss, {})
    assert equal(before, dict(local.model.state_dict()))
    assert torch.equal(generator, torch.get_rng_state())
    assert all(p.grad is None for p in local.model.parameters())


# FedDyn.


def test_feddyn_removes_the_drift() -> None:
    strategy = FedDyn(FedDynParams(alpha=0.5))
    # Every step leaves 0.4 of the distance to either client's solution.
    w, state = play(strategy, 85, LocalParams(lr=0.4, batch_size=0, steps=24))
    assert w == pytest.approx(0.75, abs=1e-10)
    assert kept(strategy, DUAL) == pytest.approx(0.0, abs=1e-10)
    assert [state(k, DUAL) for k in (0, 1)] == pytest.approx(SLOPES, abs=1e-9)


def test_after_an_exact_solution_the_dual_is_the_gradient_there() -> None:
    """From 0.3 with alpha = 0.5 the clients stop at 0.1 (down) and 3.15 / 3.5 = 0.9 (up)."""
    strategy = FedDyn(FedDynParams(alpha=0.5))
    w, state = play(strategy, 1, EXACT)
    assert [state(k, DUAL) for k in (0, 1)] == pytest.approx([1 * (0.1 - 0), 3 * (0.9 - 1)], abs=1e-12)
    # h = (0.1 - 0.3) / 2 = -0.1, so the mean 0.5 of the clients is moved on by 0.1 / 0.5.
    assert kept(strategy, DUAL) == pytest.approx(-0.1, abs=1e-12)
    assert w == pytest.approx(0.7, abs=1e-12)


@pytest.mark.parametrize("cohort", [0, 1])
@pytest.mark.parametrize("rounds", [1, 2, 3, 6])
def test_the_servers_dual_is_the_mean_of_all(cohort: int, rounds: int) -> None:
    strategy = FedDyn(FedDynParams(alpha=0.5))
    _, state = play(strategy, rounds, TEN, cohort)
    assert kept(strategy, DUAL) == pytest.approx((state(0, DUAL) + state(1, DUAL)) / 2, abs=1e-12)
    assert kept(strategy, DUAL) != 0.0


# FedDC.


def test_feddc_removes_the_drift() -> None:
    alpha = 0.5
    strategy = FedDC(FedDCParams(alpha=alpha))
    w, state = play(strategy, 150, TEN)
    assert w == pytest.approx(0.75, abs=1e-9)
    assert kept(strategy, DRIFT) == pytest.approx(0.0, abs=1e-9)
    slopes = [state(k, CONTROL) - alpha * state(k, DRIFT) for k in (0, 1)]
    assert slopes == pytest.approx(SLOPES, abs=1e-8)


def test_a_round_of_feddc_by_hand() -> None:
    """One step of 0.1 a round, alpha = 2; the second round sees c and h of the first."""
    w, c, h = 0.3, 0.0, 0.0
    own, drift = [0.0, 0.0], [0.0, 0.0]
    for rounds in (1, 2, 3):
        ends, change = [], []
        for k, (a, b) in enumerate(zip(toys.CURVATURES, toys.MINIMA, strict=True)):
            y = w - 0.1 * (a * (w - b) + c - own[k] + 2.0 * drift[k])
            change.append((w - y) / 0.1 - c)
            own[k] += change[k]
            drift[k] += y - w
            ends.append(y)
        c += sum(change) / 2
        h += sum(y - w for y in ends) / 2
        w = sum(ends) / 2 + h
        strategy = FedDC(FedDCParams(alpha=2.0))
        found, state = play(strategy, rounds, ONE)
        assert found == pytest.approx(w, abs=1e-12)
        assert [state(k, DRIFT) for k in (0, 1)] == pytest.approx(drift, abs=1e-12)
        # With everybody there, it is the mean of y_i + h_i, the form of the paper.
        assert w == pytest.approx(sum(y + d for y, d in zip(ends, drift, strict=True)) / 2, abs=1e-12)


@pytest.mark.parametrize("rounds", [1, 2, 3, 6])
def test_the_servers_drift_is_the_mean_of_all(rounds: int) -> None:
    strategy = FedDC(FedDCParams(alpha=0.5))
    _, state = play(strategy, rounds, TEN, cohort=1)
    for group in (DRIFT, CONTROL):
        assert kept(strategy, group) == pytest.approx((state(0, group) + state(1, group)) / 2, abs=1e-12)


# FedNova.


def nova(work: list[float], ends: list[float], examples: list[int], **params: Any) -> float:
    replies = [
        ClientReply(
            k, {"arrays": {"w": torch.tensor([end], dtype=torch.float64)}},
            {"num-examples": n, "gradient-weight": a},
        )
        for k, (a, end, n) in enumerate(zip(work, ends, examples, strict=True))
    ]  # fmt: skip
    current = {"w": torch.tensor([2.0], dtype=torch.float64)}
    return float(FedNova(FedNovaParams(**params)).aggregate(1, current, replies)["w"])


@pytest.mark.parametrize("gradient", [1.5, -0.5])
def test_one_gradient_and_unequal_work(gradient: float) -> None:
    """tau = (1, 10), p = (0.3, 0.7): the step is -eta (p_1 + 10 p_2) g."""
    ends = [2.0 - 0.1 * tau * gradient for tau in (1, 10)]
    expected = 2.0 - 0.1 * (0.3 + 7.0) * gradient
    assert nova([0.1, 1.0], ends, [3, 7]) == pytest.approx(expected, abs=1e-12)


def test_normalised_directions_by_hand() -> None:
    """d = (2 - 1) / 1 = 1 and (2 - 6) / 2 = -2, work (1 + 2) / 2; step -0.5 * 1.5 * (1 - 2) / 2."""
    assert nova([1.0, 2.0], [1.0, 6.0], [5, 5], server_lr=0.5) == pytest.approx(2.375, abs=1e-12)


def test_ratios_of_equal_work_are_exactly_one() -> None:
    assert work_ratios([0.1, 0.1, 0.1], [3.0, 7.0, 11.0]) == [1.0, 1.0, 1.0]


def test_equal_work_is_fedavg_bit_for_bit_and_unequal_work_is_not() -> None:
    def run(name: str, **local: Any) -> Tensors:
        return simulate(
            strategy=name,
            partition={"name": "dirichlet", "alpha": 0.3},
            federation={"clients": 4, "rounds": 2},
            local={"momentum": 0.5, **local},
            evaluation={"every": 0},
        ).model

    assert equal(run("fednova", steps=3), run("fedavg", steps=3))
    assert not equal(run("fednova"), run("fedavg"))


def test_fednovas_clients_report_their_work() -> None:
    """Momentum 0.9 and mu 0.5: recursion by hand over 3 steps of 0.1."""
    strategy = toys.on_quadratics(FedNova(FedNovaParams(mu=0.5)))
    local = LocalParams(lr=0.1, batch_size=0, steps=3, momentum=0.9)
    history = toys.quadratic_federation(strategy, 1, local).run().history
    # buffers 1, 1.9 - 0.05, 0.9 * 1.85 + 1 - 0.5 * 0.285
    expected = 0.1 * (1 + 1.85 + (0.9 * 1.85 + 1 - 0.5 * 0.285))
    assert history[0].metrics["gradient-weight"] == pytest.approx(expected, abs=1e-12)


# Refusals.


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        (FedProxParams, {"mu": -1.0}), (FedNovaParams, {"mu": -1.0}), (ScaffoldParams, {"option": 3}),
        (FedDynParams, {"alpha": 0.0}), (FedDCParams, {"alpha": 0.0}), (FedDCParams, {"option": 0}),
        (FedAvgParams, {"server_lr": -1.0}),
    ],
)  # fmt: skip
def test_bad_parameters_are_named(kind: type, bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"strategy\.{next(iter(bad))} is .*; (give|choose)"):
        kind(**bad)


@pytest.mark.parametrize("name", ["scaffold", "fednova", "feddc"])
@pytest.mark.parametrize(
    ("local", "remedy"),
    [({"optimizer": "adamw"}, "sgd"), ({"momentum": 0.9, "persist": True}, "persist=false")],
)
def test_training_that_cannot_be_normalised_is_refused_before_it_starts(
    name: str, local: dict[str, Any], remedy: str
) -> None:
    with pytest.raises(ConfigError, match=remedy):
        simulate(strategy=name, local=local)


@pytest.mark.parametrize("strategy", [Scaffold(), FedDyn(), FedDC()], ids=lambda s: type(s).__name__)
def test_a_server_that_does_not_know_its_clients_says_so(strategy: FederatedStrategy) -> None:
    strategy.current = {"w": torch.zeros(1)}
    strategy.broadcast(1)
    reply = ClientReply(1, {"arrays": strategy.current, CONTROL: strategy.current}, {"num-examples": 1})
    with pytest.raises(ConfigError, match="how many clients"):
        strategy.aggregate(1, strategy.current, [reply])
