"""FedAvg against hand-worked numbers."""

from __future__ import annotations

import pytest
import torch
import toys

from flowerbed.clients.params import LocalParams
from flowerbed.errors import ConfigError
from flowerbed.strategies.base import ClientReply
from flowerbed.strategies.fedavg import FedAvg, FedAvgParams

GD = LocalParams(lr=0.1, batch_size=0)


def fixed_point(steps: int, params: FedAvgParams | None = None) -> float:
    strategy = toys.with_half(FedAvg(params), toys.QuadraticHalf())
    local = LocalParams(lr=0.1, batch_size=0, steps=steps)
    return float(toys.quadratic_federation(strategy, 200, local).run().model["w"])


def test_one_local_step_reaches_the_optimum_of_the_mean_loss() -> None:
    assert fixed_point(1) == pytest.approx(0.75, abs=1e-12)


def test_ten_local_steps_drift_to_the_known_fixed_point() -> None:
    rho = [1 - (1 - 0.1 * a) ** 10 for a in toys.CURVATURES]
    closed_form = sum(r * b for r, b in zip(rho, toys.MINIMA, strict=True)) / sum(rho)
    assert closed_form == pytest.approx(0.598711121, abs=1e-9)
    assert fixed_point(10) == pytest.approx(closed_form, abs=1e-12)


def test_one_round_is_one_step_of_gradient_descent_on_the_mean_loss() -> None:
    strategy = toys.with_half(FedAvg(), toys.QuadraticHalf())
    moved = float(toys.quadratic_federation(strategy, 1, GD).run().model["w"])
    # Gradients at 0.3: 1*(0.3-0) = 0.3 moves down, 3*(0.3-1) = -2.1 moves up; mean -0.9.
    assert moved == pytest.approx(0.3 - 0.1 * -0.9, abs=1e-12)


def test_examples_weigh_and_uniform_does_not() -> None:
    replies = [
        ClientReply(1, {"arrays": {"w": torch.tensor([0.0])}}, {"num-examples": 3}),
        ClientReply(2, {"arrays": {"w": torch.tensor([4.0])}}, {"num-examples": 1}),
    ]
    current = {"w": torch.tensor([2.0])}
    assert FedAvg().aggregate(1, current, replies)["w"] == 1.0
    assert FedAvg(FedAvgParams(weighting="uniform")).aggregate(1, current, replies)["w"] == 2.0


def test_server_lr_scales_the_step_of_parameters_only() -> None:
    replies = [
        ClientReply(1, {"arrays": {"w": torch.tensor([1.0]), "n": torch.tensor(5)}}, {"num-examples": 1})
    ]
    current = {"w": torch.tensor([3.0]), "n": torch.tensor(4)}
    moved = FedAvg(FedAvgParams(server_lr=0.25)).aggregate(1, current, replies)
    assert moved["w"] == 3.0 + 0.25 * (1.0 - 3.0)
    assert moved["n"] == 5
    assert moved["n"].dtype == torch.int64


@pytest.mark.parametrize("bad", [{"weighting": "size"}, {"server_lr": 0.0}, {"server_lr": -1.0}])
def test_bad_parameters_are_named(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        FedAvgParams(**bad)  # type: ignore[arg-type]
