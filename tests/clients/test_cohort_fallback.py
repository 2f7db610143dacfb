"""What cannot be computed together is computed one client at a time: the same result, and a sentence why."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from cohorts import CPU, Cohort, assert_close, assert_same
from torch import Tensor, nn

from flowerbed.clients.cohort import CohortEngine, Plan
from flowerbed.clients.cohort.block import BlockTrainer
from flowerbed.clients.cohort.refusal import TIME_LIMIT
from flowerbed.clients.data import LABELLED, Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound, Trained
from flowerbed.clients.params import LocalParams
from flowerbed.errors import ClientError
from flowerbed.experiments.simulation import simulate
from flowerbed.models.base import Net
from flowerbed.models.info import ModelInfo
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.storage import Tensors


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records]


class Branches(ClientHalf):
    """Decides by the value of a tensor."""

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        value, metrics = super().loss(model, batch, extras, task)
        return (value if float(value) > 0.1 else 2 * value), metrics


def test_data_dependent_control_flow(caplog: pytest.LogCaptureFixture) -> None:
    clients = Cohort(half=Branches())
    engine = clients.engine(kernel="vmap", block=2)
    assert_same(engine.replies(clients.rounds()), clients.alone(), 1e-12)
    assert len(said(caplog)) == 1
    assert "cannot be computed together" in said(caplog)[0]
    engine.replies(clients.rounds())
    assert len(said(caplog)) == 1


class Noisy(nn.Module):
    """Draws random numbers in a way that nobody can imitate."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


def test_a_model_that_draws_random_numbers_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    net = Net(nn.Sequential(Noisy(), nn.Linear(6, 5)), nn.Linear(5, 4), 5)
    clients = Cohort(module=net)
    assert_same(clients.together(kernel="vmap", block=2), clients.alone(), 1e-12)
    assert "random" in said(caplog)[0]
    plan = clients.engine().plan(clients.rounds())
    assert plan.kernel == "generic"
    assert "fused cannot be used: its layer 'body.0' (Noisy) is none that is known" in plan.reason
    assert "vmap cannot be used" in plan.reason


def test_mixed_types_go_to_torch_func() -> None:
    """Parameters of two types, and samples of another one than the parameters."""
    torch.manual_seed(0)

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.first(x).double())
            return y

    class Wide(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.double())

    for module in (Mixed(), Wide(6, 4).double()):
        clients = Cohort(dtype=torch.float32)
        clients.net = module
        clients.start = {name: value.detach().clone() for name, value in module.state_dict().items()}
        plan = clients.engine().plan(clients.rounds())
        assert "fused cannot be used" in plan.reason
        assert_same(clients.together(kernel="vmap", block=2), clients.alone(), 1e-6)


def test_samples_of_another_type_than_the_model(caplog: pytest.LogCaptureFixture) -> None:
    """The hand-written kernels would mix them up; the error of the model itself is what is reported."""
    clients = Cohort(sizes=(4,))
    clients.data = [replace(data, x=data.x.float()) for data in clients.data]
    with pytest.raises(RuntimeError, match="dtype"):
        clients.together(kernel="fused", block=1)
    assert "cannot be computed together" in said(caplog)[0]


def test_out_of_memory_halves_the_block(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = Cohort(sizes=(9, 4, 12, 7, 8, 5))
    train, tried = BlockTrainer._train, []

    def limited(self: BlockTrainer, members: Any) -> Any:
        tried.append(len(members))
        if len(members) > 2:
            raise torch.OutOfMemoryError("no room")
        return train(self, members)

    monkeypatch.setattr(BlockTrainer, "_train", limited)
    engine = clients.engine(kernel="fused", block=5)
    assert_same(engine.replies(clients.rounds()), clients.alone(), 1e-10)
    assert tried == [5, 3, 2, 1, 2, 1]
    assert [m for m in said(caplog) if "memory" in m] == [
        "cohort engine: 5 clients do not fit into memory together, 3 may.",
        "cohort engine: 3 clients do not fit into memory together, 2 may.",
    ]


class Fussy(ClientHalf):
    """Client 2 refuses; client 1 has extras of another shape; all are pulled back to where they started."""

    def begin(self, local: LocalRound) -> Extras:
        if local.client == 2 and self.params == "refuses":
            raise ClientError("client 2 does not want to")
        size = 2 if local.client == 1 and self.params == "differs" else 3
        return {"bias": torch.zeros(size, dtype=torch.float64), "start": local.parameters()}

    def correct(self, gradients: Tensors, parameters: Mapping[str, Tensor], extras: Extras) -> Tensors:
        pull = 0.5 if self.params == "looks" else 0.0
        return {n: g + pull * (parameters[n] - extras["start"][n]) for n, g in gradients.items()}


def test_the_error_of_one_client_is_its_own() -> None:
    clients = Cohort(half=Fussy("refuses"))
    with pytest.raises(ClientError, match="client 2"):
        clients.together(kernel="vmap", block=4)
    failed: dict[int, BaseException] = {}
    blocks = list(clients.engine(kernel="vmap", block=4).run(clients.rounds(), failed))
    assert list(failed) == [2]
    found = {position: reply for block in blocks for position, reply in block.replies()}
    others = Cohort().alone()
    assert sorted(found) == [0, 1, 3]
    assert_same([found[k] for k in (0, 1, 3)], [others[k] for k in (0, 1, 3)], 1e-10)


def test_extras_that_differ_in_shape_are_not_stacked(caplog: pytest.LogCaptureFixture) -> None:
    clients = Cohort(half=Fussy("differs"))
    assert_same(clients.together(kernel="vmap", block=4), clients.alone(), 1e-12)
    assert "extras['bias'] has another shape" in said(caplog)[0]


class SendsMore(ClientHalf):
    """Sends as many numbers as it has samples."""

    def end(self, local: LocalRound, trained: Trained, extras: Extras) -> Mapping[str, Mapping[str, Tensor]]:
        more = torch.full((trained.examples,), float(trained.steps))
        return {**super().end(local, trained, extras), "more": {"rows": more}}


def test_streams_of_different_shapes_come_as_blocks_of_one() -> None:
    clients = Cohort(half=SendsMore())
    blocks = list(clients.engine(kernel="fused", block=4).run(clients.rounds()))
    assert [len(block) for block in blocks] == [1, 1, 1, 1]
    assert_same(clients.together(kernel="fused", block=4), clients.alone(), 1e-10)


def test_a_client_without_steps_answers_alone() -> None:
    clients = Cohort(sizes=(5, 0, 8))
    assert_same(clients.together(kernel="fused", block=3), clients.alone(), 1e-10)


def test_a_time_limit_holds_for_each_client_alone(caplog: pytest.LogCaptureFixture) -> None:
    clients = Cohort()
    rounds = [replace(local, deadline=time.monotonic() - 1) for local in clients.rounds()]
    failed: dict[int, BaseException] = {}
    assert not list(clients.engine(kernel="fused", block=4).run(rounds, failed))
    assert sorted(failed) == [0, 1, 2, 3]
    assert "time limit" in said(caplog)[0]


def test_missing_labels_are_refused_as_ever() -> None:
    clients = Cohort()
    hidden = {LABELLED: torch.zeros(9, dtype=torch.bool)}
    clients.data[0] = replace(clients.data[0], extras=hidden)
    with pytest.raises(ClientError, match="no label"):
        clients.together(kernel="fused", block=4)


def test_a_model_that_does_not_fit_is_named() -> None:
    clients = Cohort()
    clients.start["head.bias"] = torch.zeros(9)
    with pytest.raises(ClientError, match=r"'head.bias' arrived with shape \(9,\)"):
        clients.together(kernel="fused", block=4)
    del clients.start["head.bias"]
    with pytest.raises(ClientError, match="lacks 'head.bias'"):
        clients.together(kernel="fused", block=4)


class FrozenAll(ClientHalf):
    def frozen(self, info: ModelInfo) -> frozenset[str]:
        return info.parameters


class Projects(ClientHalf):
    def after_step(self, step: Any) -> None:
        """Does nothing, but might."""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"half": Projects()}, r"Projects acts on the model after every step \(it overrides 'after_step'\)"),
        ({"local": LocalParams(persist=True)}, "local.persist keeps"),
        ({"local": LocalParams(optimizer="rmsprop")}, "local.optimizer=rmsprop"),
        ({"half": FrozenAll()}, "every parameter is frozen"),
    ],
)
def test_refusals_are_sentences(changes: dict[str, Any], reason: str) -> None:
    clients = Cohort(**changes)
    engine = clients.engine()
    assert engine.refusal() is not None
    plan = engine.plan(clients.rounds())
    assert (plan.kernel, plan.block) == ("generic", 1)
    assert re.search(reason, plan.reason)


def test_batched_and_alone_in_turn_on_one_resident_model(caplog: pytest.LogCaptureFixture) -> None:
    """A block that falls back leaves nothing behind for the next cohort."""
    caplog.set_level(logging.CRITICAL)
    clients = Cohort()
    fused, generic = clients.engine(kernel="fused", block=3), clients.engine(kernel="generic")
    alone = clients.alone()
    for engine in (fused, generic, fused, generic):
        assert_same(engine.replies(clients.rounds()), alone, 1e-10)
    assert_close(dict(generic.replies(clients.rounds())[0].streams["arrays"]), alone[0].streams["arrays"], 0)


def test_a_given_plan_is_not_measured() -> None:
    clients = Cohort()
    plan = Plan("fused", 2, "as on another machine")
    engine = CohortEngine(
        clients.half,
        clients.net,
        ModelInfo.of(clients.net),
        clients.rounds()[0].task,
        clients.local,
        CPU,
        plan=plan,
    )
    assert engine.plan([]) is plan
    assert [len(block) for block in engine.run(clients.rounds())] == [2, 2]


def test_a_bad_first_client_does_not_spoil_the_cohort(caplog: pytest.LogCaptureFixture) -> None:
    """The measurement is made on it, so it fails; the others train, and the next cohort measures again."""
    clients = Cohort(classes=5)
    good = clients.data[0]
    clients.data[0] = replace(good, y=good.y + 100)
    engine = clients.engine()
    failed: dict[int, BaseException] = {}
    found = [p for block in engine.run(clients.rounds(), failed) for p, _ in block.replies()]
    assert list(failed) == [0]
    assert sorted(found) == [1, 2, 3]
    assert "the client that it was tried on failed" in engine.plan(clients.rounds()).reason
    clients.data[0] = good
    assert "client steps a second" in engine.plan(clients.rounds()).reason


def test_someone_else_used_the_resident_model_in_between() -> None:
    """An evaluation may load another model between two cohorts that start from the same one."""
    clients = Cohort(half=Fussy("looks"))
    engine = clients.engine(kernel="vmap", block=4)
    first = engine.replies(clients.rounds())
    clients.rounds()[0].load({name: value + 1 for name, value in clients.start.items()})
    assert_same(engine.replies(clients.rounds()), first, 0)


class Exits(ClientHalf):
    """Ends the process where one may not."""

    def begin(self, local: LocalRound) -> Extras:
        if local.client == 1:
            raise SystemExit(3)
        return {}


def test_a_client_that_exits_is_one_failure() -> None:
    clients = Cohort(half=Exits())
    failed: dict[int, BaseException] = {}
    found = [
        pair
        for s in clients.engine(kernel="fused", block=4).run(clients.rounds(), failed)
        for pair in s.replies()
    ]
    assert list(failed) == [1]
    assert isinstance(failed[1], SystemExit)
    assert sorted(position for position, _ in found) == [0, 2, 3]


def test_a_kernel_that_fails_its_trial_says_why() -> None:
    clients = Cohort(half=Branches())
    plan = clients.engine(kernel="vmap").plan(clients.rounds())
    assert plan.kernel == "generic"
    assert "no kernel could be tried; vmap cannot be used: " in plan.reason
    assert "max()" not in plan.reason


def test_the_precision_of_single_clients_is_not_ignored() -> None:
    clients = Cohort(local=LocalParams(precision="bfloat16"))
    assert "cohort.precision" in str(clients.engine().refusal())


def test_a_time_limit_is_each_clients_own_also_where_they_could_be_together(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def together(*_: Any) -> None:
        raise AssertionError("the clock of all clients would start at once")

    monkeypatch.setattr(CohortEngine, "run", together)
    federation = {"clients": 3, "rounds": 2, "time_limit": 600.0}
    result = simulate(
        grid={"engine": "cohort", "device": "cpu"}, federation=federation, evaluation={"every": 0}
    )
    assert not result.failures
    assert [text for text in said(caplog) if "time limit" in text] == [
        f"Clients are computed one after another: {TIME_LIMIT}."
    ]
