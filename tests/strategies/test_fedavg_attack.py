"""Epochs with orders of their own: the imitated update, the prior that is blind to order, labels, and merging."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attacks import SCALE, images
from torch import Tensor
from torch.nn import functional as F

from flowerbed.clients.params import LocalParams
from flowerbed.errors import ConfigError
from flowerbed.models.base import ModelSpec
from flowerbed.strategies.attacks.candidates import Steps, update
from flowerbed.strategies.attacks.descents import Descent
from flowerbed.strategies.attacks.inversion import Inversion, mean_gradient, merged, moved_back, steps_of
from flowerbed.strategies.attacks.observation import Observation, SideInfo
from flowerbed.strategies.attacks.presets import ATTACKS
from flowerbed.strategies.attacks.priors import SameSamples

LEAKY = ModelSpec("dlg_lenet", (1, 8, 8), 4, {"activation": "leaky_relu", "uniform": 0.0})


def shuffled_epochs(
    x: Tensor, y: Tensor, local: LocalParams, seed: int = 0
) -> tuple[Observation, list[Tensor]]:
    """Return what comes back from epochs of torch's SGD, each in an order of its own, and the orders."""
    module = LEAKY.build(0).train()
    sent = {n: v.detach().clone() for n, v in module.state_dict().items()}
    optimizer = torch.optim.SGD(
        module.parameters(),
        local.lr,
        local.momentum,
        weight_decay=local.weight_decay,
        nesterov=local.nesterov,
    )
    rng = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(y), generator=rng) for _ in range(local.epochs)]
    for order in orders:
        for rows in order.split(local.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(module(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    returned = {n: v.detach().clone() for n, v in module.state_dict().items()}
    return Observation(0, 1, LEAKY, sent, returned, len(y)), orders


def test_epochs_in_their_true_orders_explain_the_update() -> None:
    x, y = images(5), torch.tensor([0, 1, 2, 3, 1])
    local = LocalParams(lr=0.1, batch_size=2, epochs=3, momentum=0.9)
    seen, orders = shuffled_epochs(x, y, local)
    steps = replace(steps_of(seen, SideInfo(local=local), 5), apart=True)
    assert steps.epochs == 3
    assert [s.stop - s.start for s in steps.batches()] == [2, 2, 1] * 3
    module, order = seen.module(), torch.cat(orders)
    found, _ = update(module, dict(module.named_parameters()), {}, x[order], y[order], steps)
    first = torch.cat([orders[0]] * 3)
    wrong, _ = update(module, dict(module.named_parameters()), {}, x[first], y[first], steps)
    moved = moved_back(seen)
    for name, value in moved.items():
        torch.testing.assert_close(found[name].detach(), value, rtol=1e-4, atol=1e-6)
    assert any(float((wrong[n].detach() - v).abs().max()) > 1e-4 for n, v in moved.items())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), epochs=st.integers(1, 4), samples=st.integers(1, 5))
@pytest.mark.parametrize("aggregate", ["mean", "max"])
def test_the_prior_is_blind_to_order(aggregate: str, seed: int, epochs: int, samples: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 2, 3, generator=rng)
    same = torch.cat([x[torch.randperm(samples, generator=rng)] for _ in range(epochs)])
    term = SameSamples(2.0, aggregate)
    assert float(term(same, epochs)) == pytest.approx(0, abs=1e-6)
    other = torch.randn(epochs * samples, 2, 3, generator=rng)
    # The definition, pair by pair.
    g = [part.mean(0) if aggregate == "mean" else part.amax(0) for part in other.chunk(epochs)]
    pairs = [float((a - b).square().mean()) for a in g for b in g]
    assert float(term(other, epochs)) == pytest.approx(2 * sum(pairs) / epochs**2, rel=1e-4, abs=1e-6)


def test_samples_are_matched_over_epochs_and_averaged() -> None:
    x = images(4)
    noisy = [
        x[order] + shift for order, shift in (([0, 1, 2, 3], 0.0), ([2, 0, 3, 1], 0.3), ([3, 2, 1, 0], 0.6))
    ]
    torch.testing.assert_close(merged(torch.cat(noisy), 3), x + 0.3)
    assert torch.equal(merged(x, 1), x)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_weights_of_steps_are_those_of_momentum(momentum: float, nesterov: bool) -> None:
    local = LocalParams(
        lr=0.3, momentum=momentum, nesterov=nesterov, batch_size=1, schedule="exponential", lr_decay=0.5
    )
    steps = Steps(local, (1, 1, 1), 6)
    drawn = [random.Random(0).gauss(0, 1) for _ in range(6)]
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], 0.3, momentum, nesterov=nesterov)
    for value in drawn:
        parameter.grad = torch.tensor([value])
        optimizer.step()
    expected = -sum(w * g for w, g in zip(steps.weights(), drawn, strict=True))
    assert float(parameter.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_labels_of_several_epochs_are_counted(momentum: float) -> None:
    """Repeats and all, though the model moves on the way."""
    local = LocalParams(lr=0.05, batch_size=4, epochs=3, momentum=momentum, weight_decay=0.01)
    attack = Inversion("mine", descents=(Descent(steps=1),))
    right = 0
    for seed in range(5):
        y = torch.randint(4, (12,), generator=torch.Generator().manual_seed(seed))
        seen, _ = shuffled_epochs(images(12, seed=seed), y, local, seed)
        (found,) = attack.run([(seen, SideInfo(local=local, scale=SCALE))])
        right += found.labels.sort().values.tolist() == y.sort().values.tolist()
    assert right == 5


def test_the_mean_gradient_takes_back_weight_decay() -> None:
    """A loss that does not depend on the weights leaves decay alone, which the mean gradient must not show."""
    local = LocalParams(lr=0.01, batch_size=1, weight_decay=0.1)
    w = torch.tensor([2.0, -1.0])
    sent = {**LEAKY.build(0).state_dict()}
    name = "head.bias"
    sent[name] = torch.cat([w, w])
    now = sent[name].clone()
    for _ in range(3):
        now = now - 0.01 * 0.1 * now
    seen = Observation(0, 1, LEAKY, sent, {**sent, name: now}, 3)
    steps = Steps(local, (1, 1, 1), 3)
    found = mean_gradient(seen, {name: sent[name] - now}, steps)[name]
    assert float(found.abs().max()) < 1e-3 * 0.2


def test_the_preset_returns_as_many_samples_as_there_are() -> None:
    x, y = images(4), torch.tensor([0, 1, 2, 3])
    local = LocalParams(lr=0.1, batch_size=2, epochs=2)
    seen, _ = shuffled_epochs(x, y, local)
    preset = ATTACKS.get("fedavg")(None)
    assert isinstance(preset, Inversion)
    short = replace(preset, descents=(Descent(steps=3),))
    (found,) = short.run([(seen, SideInfo(local=local, scale=SCALE))])
    assert found.x.shape == x.shape
    assert sorted(found.labels.tolist()) == [0, 1, 2, 3]
    assert found.evaluations == 4 * 4, "four local steps for each candidate"
    with pytest.raises(ConfigError, match="choose from mean, max"):
        SameSamples(1.0, "median")
