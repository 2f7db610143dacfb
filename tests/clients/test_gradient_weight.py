"""The weight of a round's gradients, against torch's own optimizer and the closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowerbed.clients.gradient_weight import gradient_weight, require_gradient_weight
from flowerbed.clients.local_round import Clock
from flowerbed.clients.params import LocalParams
from flowerbed.errors import ConfigError


def unit(steps: int, mu: float = 0.0, **local: Any) -> float:
    return gradient_weight(LocalParams(lr=1.0, **local), Clock(1, 1, steps), mu)


def test_numbers_of_the_fednova_paper() -> None:
    assert unit(7) == 7
    assert unit(7, momentum=0.9) == pytest.approx(23.046721, abs=1e-12)
    assert unit(7, mu=0.05) == pytest.approx(6.033254078125, abs=1e-12)


@given(st.integers(1, 12), st.floats(0.01, 0.99), st.floats(0.01, 1.0))
def test_closed_form_of_momentum(steps: int, rho: float, lr: float) -> None:
    expected = lr * (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)
    found = gradient_weight(LocalParams(lr=lr, momentum=rho), Clock(3, 5, steps))
    assert found == pytest.approx(expected, rel=1e-9)


@settings(deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.sampled_from(["constant", "cosine", "exponential"]),
    st.floats(0.0, 0.95),
    st.booleans(),
    st.sampled_from([0.0, 0.3]),
)
def test_it_is_what_torchs_sgd_moves_for_a_constant_gradient(
    steps: int, round_: int, schedule: str, momentum: float, nesterov: bool, mu: float
) -> None:
    params = LocalParams(
        lr=0.2, schedule=schedule, lr_decay=0.7, momentum=momentum, nesterov=nesterov and momentum > 0
    )
    clock = Clock(round_, 4, steps)
    w = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    sgd = torch.optim.SGD([w], lr=0.2, momentum=momentum, nesterov=params.nesterov)
    for step in clock.all_steps:
        sgd.param_groups[0]["lr"] = params.lr_at(step, steps, 4)
        w.grad = 1 + mu * w.detach()
        sgd.step()
    assert gradient_weight(params, clock, mu) == pytest.approx(-w.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("local", "remedy"),
    [
        ({"optimizer": "adam"}, "local.optimizer=sgd"),
        ({"lr": 0.0}, "local.lr above 0"),
        ({"momentum": 0.5, "persist": True}, "local.persist=false"),
    ],
)
def test_training_without_such_a_weight_is_refused(local: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        require_gradient_weight("Thing", LocalParams(**local))
    require_gradient_weight("Thing", LocalParams(persist=True))
