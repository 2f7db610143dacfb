"""The compiled kernel of the cohort engine: the same results, and what it does where nothing can be compiled."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from cohorts import CPU, Cohort, assert_same
from torch import Tensor

from flowerbed.clients.cohort.compiled import SHAPES, Compiled
from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, Reply
from flowerbed.clients.params import LocalParams
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.strategies.fedprox import FedProxHalf, FedProxParams


@torch._dynamo.disable  # type: ignore[untyped-decorator]
def opaque(value: Tensor) -> Tensor:
    """What torch.compile may not look into, and torch.func may."""
    return 2 * value


class Opaque(ClientHalf):
    """A loss that cannot be compiled."""

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        value, metrics = super().loss(model, batch, extras, task)
        return opaque(value), metrics


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    clients = Cohort(half=Opaque())
    engine = clients.engine(kernel="compiled", block=2)
    with caplog.at_level(logging.WARNING):
        assert_same(engine.replies(clients.rounds()), clients.alone(), 1e-10)
        engine.replies(clients.rounds())
    (said,) = (r.message for r in caplog.records if "cohort engine" in r.message)
    assert "torch.compile cannot compile this loss" in said


def test_only_a_few_shapes_are_compiled_and_errors_are_the_functions_own() -> None:
    seen: list[tuple[int, ...]] = []

    def function(x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            seen.append(tuple(x.shape))
        if x.shape[0] == 7:
            raise ValueError("seven")
        return x + 1

    compiled = Compiled(function, CPU)
    with pytest.raises(ValueError, match="seven"):
        compiled(torch.zeros(7))
    assert compiled.refused is None
    seen.clear()
    for size in (1, 2, 3, 1, 4, 5, 6, 2):
        assert torch.equal(compiled(torch.zeros(size)), torch.ones(size))
    assert seen == [(size,) for size in (5, 6)]
    assert SHAPES == 4


def test_a_block_is_chosen_without_a_measurement() -> None:
    clients = Cohort()
    plan = clients.engine(kernel="compiled").plan(clients.rounds())
    assert plan.kernel == "compiled"
    assert plan.block > 1
    assert "cohort.block" in plan.reason


@pytest.mark.parametrize(
    "clients",
    [
        # Sizes of several blocks and widths, of which only the first few are compiled.
        pytest.param(Cohort(local=LocalParams(batch_size=4, momentum=0.9, epochs=2)), id="momentum"),
        pytest.param(
            Cohort(
                half=FedProxHalf(FedProxParams(mu=0.5)),
                local=LocalParams(batch_size=0, steps=3),
                sizes=(8, 8),
            ),
            id="fedprox",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Cohort("resnet8", (3, 16, 16), 4, {"norm": "bn"}, local=LocalParams(batch_size=4), sizes=(8, 8)),
            id="batch norm",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Cohort(
                "pfl_cnn", (3, 32, 32), 4, local=LocalParams(batch_size=4, optimizer="adam"), sizes=(8, 8)
            ),
            id="dropout and adam",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_compiled_clients_are_those_of_one_at_a_time(
    clients: Cohort, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert_same(clients.together(kernel="compiled", block=2), clients.alone(), 1e-8)
    assert not caplog.records, caplog.text


@pytest.mark.parametrize("kernel", ["vmap", pytest.param("compiled", marks=pytest.mark.slow)])
def test_autocast_is_that_of_one_client_at_a_time(kernel: str) -> None:
    """Weights stay in float32; compiled code may round less often than autocast does."""
    clients = Cohort("small_cnn", (3, 16, 16), sizes=(8, 4), dtype=torch.float32)
    low = Cohort(
        "small_cnn", (3, 16, 16), sizes=(8, 4), dtype=torch.float32,
        local=replace(clients.local, precision="bfloat16"),
    )  # fmt: skip
    wanted, full = low.alone(), clients.alone()
    found = clients.together(kernel=kernel, block=2, precision="bfloat16")

    def distance(one: Sequence[Reply], other: Sequence[Reply] | Mapping[str, Tensor]) -> float:
        return max(
            float(torch.cat([(tensors[n] - start[n]).flatten() for n in start]).norm())
            for tensors, start in (
                (a.streams["arrays"], other if isinstance(other, Mapping) else other[k].streams["arrays"])
                for k, a in enumerate(one)
            )
        )

    moved = distance(full, clients.start)
    assert distance(found, wanted) < 0.02 * moved
    assert 1e-4 * moved < distance(found, full) < 0.1 * moved
    assert all(v.dtype == torch.float32 for v in found[0].streams["arrays"].values())
