"""Byzantine clients: who they are, what they send, what they train on, and whether rules withstand them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowerbed.clients.byzantine import Backdoor, LabelFlip, Trigger, byzantine_clients, make_trigger
from flowerbed.clients.data import ClientData
from flowerbed.clients.transform_params import ByzantineParams
from flowerbed.datasets.sources import load_dataset
from flowerbed.errors import ConfigError
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.parts import build_parts, server_evaluator
from flowerbed.experiments.simulation import simulate
from flowerbed.experiments.transforms import with_backdoor_success
from flowerbed.server.loop import RunResult
from flowerbed.strategies.base import ClientReply
from flowerbed.strategies.collusion import InnerProductManipulation


def run(byzantine: dict[str, Any] | None = None, **sections: Any) -> RunResult:
    base: dict[str, Any] = {
        "model": {"name": "mlp", "hidden": [16]},
        "federation": {"clients": 1, "rounds": 1},
        "local": {"batch_size": 64},
        "grid": {"device": "cpu"},
    }
    return simulate(**{**base, **sections}, byzantine=byzantine or {})


# Who.


@given(seed=st.integers(0, 10**6), clients=st.integers(1, 50), fraction=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_the_drawn_clients_are_a_function_of_the_seed(seed: int, clients: int, fraction: float) -> None:
    params = ByzantineParams("noise", fraction)
    members = byzantine_clients(params, clients, seed)
    assert members == byzantine_clients(params, clients, seed)
    assert len(members) == round(fraction * clients)
    assert members <= set(range(clients))
    # More byzantine clients are the same ones and others, so that a sweep over the share compares like with like.
    assert members <= byzantine_clients(ByzantineParams("noise", min(1.0, fraction + 0.2)), clients, seed)


def test_another_seed_draws_others_and_a_list_is_taken_as_it_is() -> None:
    drawn = {byzantine_clients(ByzantineParams("noise", 0.2), 100, seed) for seed in range(5)}
    assert len(drawn) == 5
    assert byzantine_clients(ByzantineParams("noise", clients=[3, 1]), 4, 0) == {1, 3}


# What they send. With lr = 0.1 and one client, the honest update is the whole round.


def test_forged_updates() -> None:
    start = run(local={"lr": 0.0}).model
    honest = run().model
    for attack, factor in (("sign-flip", -3.0), ("scaling", 3.0)):
        forged = run({"attack": attack, "scale": 3.0, "clients": [0]}).model
        for name, w in start.items():
            torch.testing.assert_close(forged[name], w + factor * (honest[name] - w), rtol=1e-4, atol=1e-6)


def test_noise_replaces_the_update() -> None:
    wide = {"name": "mlp", "hidden": [512]}
    start = run(local={"lr": 0.0}, model=wide).model
    noisy = run({"attack": "noise", "scale": 2.0, "clients": [0]}, model=wide).model
    change = torch.cat([(noisy[n] - w).flatten() for n, w in start.items()])
    assert float(change.std()) == pytest.approx(2.0, abs=12 / math.sqrt(2 * len(change)))
    assert float(change.mean()) == pytest.approx(0.0, abs=12 / math.sqrt(len(change)))


def test_honest_clients_are_left_alone_and_buffers_too() -> None:
    settings: dict[str, Any] = {
        "model": {"name": "resnet8", "norm": "bn"},
        "federation": {"clients": 3, "rounds": 1},
        "local": {"batch_size": 256},
        "evaluation": {"every": 0},
    }
    honest = run(**settings).model
    forged = run({"attack": "scaling", "scale": 1.0, "fraction": 1.0}, **settings).model
    assert all(torch.equal(forged[n], v) for n, v in honest.items())
    flipped = run({"attack": "sign-flip", "clients": [1]}, **settings).model
    buffers = [n for n in honest if "running" in n or "tracked" in n]
    assert all(torch.equal(flipped[n], honest[n]) for n in buffers)
    assert not torch.equal(flipped["head.weight"], honest["head.weight"])


def test_inner_product_manipulation_by_hand() -> None:
    models = [[3.0, 1.0], [1.0, 5.0], [9.0, 9.0]]
    answers = [
        ClientReply(
            10 + k, {"arrays": {"w": torch.tensor(m), "mean": torch.tensor([float(k)])}}, {"num-examples": 1}
        )
        for k, m in enumerate(models)
    ]
    current = {"w": torch.tensor([1.0, 1.0]), "mean": torch.zeros(1)}
    transform = InnerProductManipulation(frozenset({12}), scale=2.0)
    after = transform.replies(1, current, answers, frozenset({"w"}))
    # Honest updates (2, 0) and (0, 4) have the mean (1, 2); the third client sends -2 times that.
    assert after[2].model["w"].tolist() == [-1.0, -3.0]
    assert after[2].model["mean"] == 2.0
    assert after[:2] == answers[:2]
    everyone = InnerProductManipulation(frozenset({10, 11, 12}), scale=2.0)
    assert everyone.replies(1, current, answers, frozenset({"w"})) == answers


def test_inner_product_manipulation_reaches_the_right_clients() -> None:
    """Two of four send minus the mean of the others with s = 1, so that with equal weights nothing moves."""
    settings: dict[str, Any] = {
        "strategy": {"name": "fedavg", "weighting": "uniform"},
        "federation": {"clients": 4, "rounds": 1},
    }
    still = run(local={"lr": 0.0}, **settings).model
    moved = run({"attack": "inner-product", "fraction": 0.5}, **settings).model
    for name, value in still.items():
        torch.testing.assert_close(moved[name], value, rtol=1e-5, atol=1e-7)


# What they train on.


def images(n: int) -> ClientData:
    x = torch.zeros(n, 2, 4, 4)
    return ClientData(x, torch.arange(n) % 3, torch.arange(n), {})


def test_labels_are_mirrored() -> None:
    flip = LabelFlip(frozenset({1}), num_classes=3)
    assert flip.data(1, images(4)).y.tolist() == [2, 1, 0, 2]
    assert flip.data(0, images(4)).y.tolist() == [0, 1, 2, 0]


def test_the_trigger_lies_in_the_corner_of_the_drawn_images() -> None:
    trigger = Trigger(2, (0.5, 7.0), target=1)
    data = images(10)
    poisoned = Backdoor(frozenset({4}), trigger, poison=0.3, seed=0).data(4, data)
    stamped = poisoned.x.flatten(1).any(dim=1)
    assert int(stamped.sum()) == 3
    expected = torch.zeros(2, 4, 4)
    expected[0, 2:, 2:], expected[1, 2:, 2:] = 0.5, 7.0
    assert (poisoned.x[stamped] == expected).all()
    assert (poisoned.y[stamped] == 1).all()
    assert torch.equal(poisoned.y[~stamped], data.y[~stamped])
    assert not data.x.any(), "the data set itself must stay as it is"
    assert Backdoor(frozenset({4}), trigger, 0.3, 0).data(5, data) is data


def test_the_trigger_is_as_bright_as_the_data_gets() -> None:
    digits = load_dataset("digits")
    trigger = make_trigger(ByzantineParams("backdoor", 0.1), digits)
    assert trigger.brightness == (pytest.approx(float(digits.prepare(digits.train.inputs).max())),)


def test_backdoor_success_counts_images_of_other_classes() -> None:
    simulation = Simulation.of(
        {
            "model": "mlp",
            "byzantine": {"attack": "backdoor", "target": 3, "clients": [0]},
            "grid": {"device": "cpu"},
        }
    )
    parts = build_parts(simulation)
    evaluate = with_backdoor_success(server_evaluator(parts.spec), simulation, parts.spec)
    always = {n: torch.zeros_like(v) for n, v in parts.model.items()}
    for answer, success in ((3, 1.0), (4, 0.0)):
        always["head.bias"] = torch.nn.functional.one_hot(torch.tensor(answer), 10).float()
        assert evaluate(always)["backdoor-success"] == success


# Whether it matters.


def test_what_breaks_the_mean_does_not_break_the_robust_rules() -> None:
    settings: dict[str, Any] = {
        "federation": {"clients": 10, "rounds": 5},
        "local": {"batch_size": 32, "epochs": 2, "lr": 0.2},
        "byzantine": {"attack": "sign-flip", "fraction": 0.2, "scale": 10.0},
        "evaluation": {"every": 0},
    }
    assert run(strategy="fedavg", **settings).final()["accuracy"] < 0.4
    for name in ("median", "krum"):
        assert run(strategy={"name": name, "f": 2}, **settings).final()["accuracy"] > 0.7, name


def test_a_backdoor_is_measured_and_krum_keeps_it_out() -> None:
    settings: dict[str, Any] = {
        "model": {"name": "small_cnn"},
        "federation": {"clients": 8, "rounds": 3},
        "byzantine": {"attack": "backdoor", "clients": [2], "scale": 6.0},
    }
    opened, closed = (
        run(strategy=name, **settings).final()["backdoor-success"] for name in ("fedavg", "krum")
    )
    assert opened > 0.3 > closed


# Refusals.


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"attack": "flip"}, "byzantine.attack is 'flip'"),
        ({"attack": "noise", "fraction": 1.5}, "byzantine.fraction is 1.5"),
        ({"attack": "noise", "fraction": 0.1, "clients": [1]}, "give one of them"),
        ({"fraction": 0.1}, "choose an attack"),
        ({"attack": "noise", "clients": [1, 1]}, "repeats"),
        ({"attack": "noise", "scale": -1.0}, "byzantine.scale is -1.0"),
        ({"attack": "noise", "scale": math.inf}, "byzantine.scale is inf"),
        ({"attack": "backdoor", "poison": 0.0}, "byzantine.poison is 0.0"),
        ({"attack": "backdoor", "trigger": 0}, "byzantine.trigger is 0"),
        ({"attack": "noise", "clients": [7]}, r"names client \[7\]; clients are numbered 0 to 0"),
        ({"attack": "backdoor", "clients": [0], "target": 10}, "byzantine.target is 10"),
        ({"attack": "backdoor", "clients": [0], "trigger": 8}, "images are 8 x 8"),
    ],
)
def test_bad_settings_are_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(bad)
