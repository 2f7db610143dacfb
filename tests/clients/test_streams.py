"""Batches that are drawn anew at every step."""

from __future__ import annotations

from dataclasses import replace

import torch
import worlds

from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Clock, LocalRound
from flowerbed.clients.params import LocalParams
from flowerbed.clients.streams import fresh_batches
from flowerbed.clients.training import Batches
from flowerbed.seeds import torch_rng
from flowerbed.strategies.fedavg import FedAvg


def draw(count: int, rng: torch.Generator) -> Batch:
    return {"x": torch.randn(count, 6, generator=rng), "y": torch.randint(3, (count,), generator=rng)}


def opened(**changes: object) -> LocalRound:
    return replace(worlds.open_round(LocalParams(batch_size=4)), **changes)  # type: ignore[arg-type]


def test_a_batch_is_a_function_of_seed_purpose_client_and_step() -> None:
    batches = fresh_batches(opened(), draw, "demo")
    expected = draw(4, torch_rng(0, "demo", 0, 7))
    assert worlds.equal(batches(7), expected)
    assert worlds.equal(fresh_batches(opened(clock=Clock(4, 5, 5)), draw, "demo")(7), expected)
    for other in (
        batches(8),
        fresh_batches(opened(client=1), draw, "demo")(7),
        fresh_batches(opened(seed=1), draw, "demo")(7),
        fresh_batches(opened(), draw)(7),
    ):
        assert not torch.equal(other["x"], expected["x"])


def test_without_a_batch_size_it_is_that_of_the_client_data() -> None:
    local = worlds.open_round(LocalParams(batch_size=0))
    assert len(fresh_batches(local, draw)(0)["y"]) == len(local.train_data) == 20


class Endless(ClientHalf):
    """Trains on images that nobody has."""

    def batches(self, local: LocalRound) -> Batches:
        return fresh_batches(
            local,
            lambda count, rng: {
                "x": torch.randn(count, 1, 8, 8, generator=rng),
                "y": torch.randint(10, (count,), generator=rng),
            },
        )


class EndlessAvg(FedAvg):
    Half = Endless


def test_rounds_go_on_in_the_stream_as_one_long_round() -> None:
    once = {"clients": 1}
    one = worlds.run(
        f"{__name__}:EndlessAvg", federation={**once, "rounds": 1}, local={"steps": 6, "persist": True}
    )
    several = worlds.run(
        f"{__name__}:EndlessAvg", federation={**once, "rounds": 3}, local={"steps": 2, "persist": True}
    )
    assert worlds.equal(one.result.model, several.result.model)
