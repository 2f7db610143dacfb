"""Counted work has a budget, since time depends on the machine: operator calls and function calls of a client.

A budget that is passed says which operators have come in: compare with ``of_a_plain_step``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowerbed.experiments.benchmarks import counted
from flowerbed.models.base import ModelSpec

# Digits, whose default model is the MLP; 10 samples a step.
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"model": {"name": "mlp"}},
    "small_cnn": {"model": {"name": "small_cnn"}},
}
# Forward, backward, one update of all parameters, and the sum of the losses.
# Of the CNN, two are the clones that bring the gradient of a max pooling into the layout of its backward pass.
OPERATORS_OF_A_STEP = {"mlp": 34, "small_cnn": 66}
# Beside its steps, a client is loaded, gets its data and its order, and is added to the sum.
OPERATORS_OF_A_CLIENT = 38
FUNCTIONS_OF_A_CLIENT = 800
FUNCTIONS_OF_A_STEP = 160


@pytest.mark.parametrize("model", MODELS)
def test_a_step_has_a_budget_below_the_bare_loop(model: str) -> None:
    net = ModelSpec(model, (1, 8, 8), 10).build(0)
    plain = counted.of_a_plain_step(net, torch.zeros(50, 1, 8, 8))
    ours = counted.of_a_step(MODELS[model])
    # The arithmetic is the same whoever calls it; what else there is may not be more.
    for name in ("mm", "addmm", "convolution_backward", "nll_loss_forward"):
        assert ours[name] == plain[name], name
    assert ours.total() <= plain.total(), ours - plain
    assert ours.total() <= OPERATORS_OF_A_STEP[model], ours


@pytest.mark.parametrize("model", MODELS)
def test_a_client_beside_its_steps_has_a_budget(model: str) -> None:
    found = counted.of_a_client(MODELS[model])
    assert found.total() <= OPERATORS_OF_A_CLIENT, found


def test_function_calls_have_a_budget() -> None:
    def calls(clients: int, steps: int) -> int:
        return counted.python_calls(counted.federation(clients, steps, {}))

    calls(1, 1)  # What is imported and built once is no client's.
    client = (calls(6, 1) - calls(2, 1)) / 4
    step = (calls(1, 6) - calls(1, 1)) / 5
    assert client - step <= FUNCTIONS_OF_A_CLIENT
    assert step <= FUNCTIONS_OF_A_STEP


def test_the_counters_count() -> None:
    x = torch.ones(3)
    found = counted.operator_calls(lambda: [x + 1, x + 2, x.sum()])
    assert dict(found) == {"add": 2, "sum": 1}
    assert counted.python_calls(lambda: [len("a"), len("b")]) - counted.python_calls(lambda: None) == 2
