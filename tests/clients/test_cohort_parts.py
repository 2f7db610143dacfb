"""The pieces of the cohort engine, each against an oracle of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cohorts import Cohort, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flowerbed.clients.cohort import CohortOptions, Plan, Stacked
from flowerbed.clients.cohort import plan as planning
from flowerbed.clients.cohort.dropout import Site
from flowerbed.clients.cohort.extras import StackedExtras, UnstackableError
from flowerbed.clients.cohort.optimizer import StackedOptimizer, clip
from flowerbed.clients.cohort.plan import Candidate
from flowerbed.clients.cohort_params import KERNELS
from flowerbed.clients.data import BatchOrder
from flowerbed.clients.local_round import Reply
from flowerbed.clients.params import LocalParams
from flowerbed.errors import ConfigError

# The order of a round.


@given(st.integers(1, 30), st.integers(0, 12), st.booleans(), st.integers(0, 40), st.integers(1, 20))
def test_the_rows_of_a_span_are_those_of_its_steps(
    examples: int, size: int, drop_last: bool, first: int, count: int
) -> None:
    params = LocalParams(batch_size=size, drop_last=drop_last)
    order, twin = (BatchOrder(params, examples, 3, 1) for _ in range(2))
    rows, sizes = order.span(range(first, first + count))
    for step, own in zip(range(first, first + count), rows.split(sizes), strict=True):
        assert own.tolist() == twin.rows(step).tolist()


# Optimizers.


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["sgd", "adam", "adamw"]),
    st.sampled_from([0.0, 0.5]),
    st.booleans(),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([0.0, 0.3]),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.booleans(),
)
def test_stacked_optimizers_are_torchs(
    optimizer: str,
    momentum: float,
    nesterov: bool,
    decay: float,
    bound: float,
    lengths: list[int],
    vary: bool,
) -> None:
    """Clients with unequal numbers of steps and, where asked, unequal learning rates."""
    params = LocalParams(
        optimizer=optimizer, momentum=momentum, weight_decay=decay, clip_norm=bound,
        nesterov=nesterov and optimizer == "sgd" and momentum > 0, beta2=0.95 if vary else 0.999,
        eps=1e-3 if nesterov else 1e-8,
    )  # fmt: skip
    lengths = sorted(lengths, reverse=True)
    generator = torch.Generator().manual_seed(1)
    names, clients = {"a": (2, 3), "b": (3,)}, len(lengths)
    start = {n: torch.randn(clients, *s, generator=generator, dtype=torch.float64) for n, s in names.items()}
    gradients = [
        {n: torch.randn(clients, *s, generator=generator, dtype=torch.float64) for n, s in names.items()}
        for _ in range(max(lengths))
    ]

    def rate(k: int, j: int) -> float:
        return 0.1 / (1 + k * j) if vary else 0.1

    together = {n: v.clone() for n, v in start.items()}
    stacked = StackedOptimizer(params, together, list(names))
    for j, gradient in enumerate(gradients):
        active = sum(length > j for length in lengths)
        now = {n: v[:active] for n, v in together.items()}
        own = {n: g[:active].clone() for n, g in gradient.items()}
        stacked.step(now, own, [rate(k, j) for k in range(active)])
    for k, length in enumerate(lengths):
        alone = {n: nn.Parameter(v[k].clone()) for n, v in start.items()}
        twin = torch_optimizer(params, list(alone.values()))
        for j in range(length):
            for group in twin.param_groups:
                group["lr"] = rate(k, j)
            for n, parameter in alone.items():
                parameter.grad = gradients[j][n][k].clone()
            if bound:
                nn.utils.clip_grad_norm_(alone.values(), bound)
            twin.step()
        assert_close({n: v[k] for n, v in together.items()}, {n: p.detach() for n, p in alone.items()}, 1e-12)


def torch_optimizer(params: LocalParams, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if params.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, momentum=params.momentum, nesterov=params.nesterov, weight_decay=params.weight_decay
        )
    kind = torch.optim.Adam if params.optimizer == "adam" else torch.optim.AdamW
    return kind(
        parameters,
        betas=(params.momentum or 0.9, params.beta2),
        weight_decay=params.weight_decay,
        eps=params.eps,
    )


def test_clipping_by_hand() -> None:
    """Norms 5 and 0.5, bound 1: the first client's gradient is divided by five, the other is left alone."""
    gradients = {"a": torch.tensor([[3.0, 0.0], [0.3, 0.0]]), "b": torch.tensor([[4.0], [0.4]])}
    clip(gradients, 1.0)
    torch.testing.assert_close(gradients["a"], torch.tensor([[0.6, 0.0], [0.3, 0.0]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradients["b"], torch.tensor([[0.8], [0.4]]), atol=1e-6, rtol=0)


# Extras.


def test_extras_are_stacked_leaf_by_leaf() -> None:
    shared = torch.ones(2)
    each = [
        {"w": {"a": shared.clone(), "b": torch.tensor([float(k)])}, "n": 3, "t": (shared,)} for k in (1, 2)
    ]
    stacked = StackedExtras.of(each)
    assert stacked.dims == (None, 0, None)
    assert stacked.leaves[1].tolist() == [[1.0], [2.0]]
    second = stacked.take(torch.tensor([1]))
    filled = second.filled([second.leaves[0], second.leaves[1][0], second.leaves[2]])
    assert filled["n"] == 3
    assert filled["w"]["b"].tolist() == [2.0]
    assert filled["t"][0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("one", "other", "what"),
    [
        ({"a": torch.ones(1)}, {"a": torch.ones(2)}, r"extras\['a'\] has another shape"),
        ({"a": torch.ones(1)}, {"b": torch.ones(1)}, "extras has other names"),
        ({"a": torch.ones(1)}, {"a": 1.0}, "of another type"),
        ({"a": [1, 2]}, {"a": [1]}, "another length"),
        ({"a": [1, 2]}, {"a": [1, 3]}, r"extras\['a'\]\[1\] is a plain value that differs"),
    ],
)
def test_extras_that_do_not_fit_together(one: Any, other: Any, what: str) -> None:
    with pytest.raises(UnstackableError, match=what):
        StackedExtras.of([one, other])


# Masks.


@pytest.mark.parametrize("p", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(4, 8), (2, 3, 4, 5)])
def test_masks_are_those_of_torchs_dropout(p: float, shape: tuple[int, ...]) -> None:
    for channels_last in (False, True) if len(shape) == 4 else (False,):
        x = torch.randn(shape)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            wanted = nn.Dropout(p)(x)
        noise = Site(nn.Dropout(p), shape, channels_last).noise(torch.Generator().manual_seed(11), x.dtype)
        assert torch.equal(x * noise, wanted)


def test_fast_masks_keep_the_right_share() -> None:
    import numpy as np

    site = Site(nn.Dropout(0.25), (100, 8, 10, 10), True)
    noise = site.noise(np.random.default_rng(0), torch.float32)
    assert noise.is_contiguous(memory_format=torch.channels_last)
    assert noise.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    # Five standard deviations of 80,000 draws.
    assert abs(float((noise > 0).float().mean()) - 0.75) < 5 * math.sqrt(0.75 * 0.25 / noise.numel())


# Results.


def test_stacked_replies_come_apart_again() -> None:
    replies = [Reply({"arrays": {"w": torch.full((2,), float(k))}}, {"num-examples": k}) for k in (1, 3)]
    stacked = Stacked.of([5, 2], replies)
    assert len(stacked) == 2
    assert stacked.examples == [1, 3]
    assert [(p, r.streams["arrays"]["w"].tolist(), r.metrics) for p, r in stacked.replies()] == [
        (5, [1.0, 1.0], {"num-examples": 1}),
        (2, [3.0, 3.0], {"num-examples": 3}),
    ]
    (_, view), _ = stacked.replies()
    assert view.streams["arrays"]["w"].data_ptr() == stacked.streams["arrays"]["w"].data_ptr()
    with pytest.raises(ValueError, match="differ"):
        Stacked.of([0, 1], [replies[0], Reply({"arrays": {}}, {"num-examples": 1})])


def test_positions_tell_who_is_who() -> None:
    """Blocks come longest first; every client is in exactly one."""
    clients = Cohort(sizes=(4, 12, 8, 4))
    blocks = list(clients.engine(kernel="fused", block=2).run(clients.rounds()))
    assert [list(block.positions) for block in blocks] == [[1, 2], [0, 3]]
    assert [list(block.examples) for block in blocks] == [[12, 8], [4, 4]]
    assert [list(block.metrics["steps"]) for block in blocks] == [[3, 2], [1, 1]]


# The plan.


def trial(steps: int) -> Callable[[], int]:
    return lambda: steps


def test_the_fastest_candidate_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(planning, "_now", lambda device: float(next(clock)))

    def broken() -> int:
        raise RuntimeError("no rule\nfor this")

    found = planning.measured(
        [
            Candidate("generic", 1, trial(1)),
            Candidate("fused", 5, trial(20)),
            Candidate("fused", 10, trial(30)),
            Candidate("vmap", 5, broken),
            Candidate("vmap", 9, trial(1000)),
        ],
        torch.device("cpu"),
    )
    assert (found.kernel, found.block) == ("fused", 10)
    assert found.rates == {"one client at a time": 1.0, "fused x 5": 20.0, "fused x 10": 30.0}
    assert found.reason == (
        "fused x 10 makes 30 client steps a second (one client at a time 1, fused x 5 20); "
        "vmap cannot be used: RuntimeError: no rule"
    )


def test_a_plan_is_measured_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = Cohort(classes=3)
    plan = clients.engine().plan(clients.rounds())
    assert plan.kernel in KERNELS
    assert plan.rates[plan.reason.split(" makes")[0]] == max(plan.rates.values())
    monkeypatch.setattr(planning, "measured", lambda *args: pytest.fail("measured again"))
    assert clients.engine().plan(clients.rounds()) == plan
    assert clients.engine(kernel="fused", block=7).plan(clients.rounds()) == Plan(
        "fused", 7, "chosen by cohort.kernel and cohort.block"
    )


def test_a_trial_leaves_no_trace() -> None:
    clients = Cohort(local=LocalParams(batch_size=4, momentum=0.5))
    before = torch.get_rng_state()
    rounds = clients.rounds()
    clients.engine().plan(rounds)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(local.optimizer_steps == 0 and not local.state for local in rounds)


def test_blocks_hold_about_four_megabytes() -> None:
    assert planning.blocks(2**22) == [1, 2]
    assert planning.blocks(2**20) == [2, 4, 8]
    assert planning.blocks(31_400) == [66, 128]
    assert planning.blocks(2**30) == [1, 2]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"kernel": "cuda"}, "cohort.kernel is 'cuda'; choose from auto, fused"),
        ({"block": -1}, "cohort.block is -1"),
        ({"precision": "float16"}, "cohort.precision is 'float16'"),
        ({"dropout": "none"}, "cohort.dropout is 'none'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        CohortOptions(**options)


# Counted work.


class Calls(TorchDispatchMode):
    """Counts calls of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def calls(clients: int, steps: int) -> int:
    """Return the operator calls of one round of equal clients in one block."""
    cohort = Cohort(sizes=(4 * steps,) * clients, shape=(20,), dtype=torch.float32)
    engine = cohort.engine(kernel="fused", block=clients)
    list(engine.run(cohort.rounds()))
    with Calls() as counted:
        list(engine.run(cohort.rounds()))
    return counted.count


def test_clients_cost_no_operator_calls_of_their_own_but_their_data() -> None:
    """A step costs the same however many clients make it; a client costs the gathering of its samples."""
    few, many = calls(4, 3), calls(24, 3)
    assert many - few <= 20 * 20
    assert calls(24, 6) - many <= 3 * 40


def test_the_data_reach_the_kernel_without_a_copy_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trained models are sent as they lie in the block: one storage for all clients."""
    clients = Cohort(sizes=(4, 4, 4))
    (block,) = clients.engine(kernel="fused", block=3).run(clients.rounds())
    (first, second, _) = (reply.streams["arrays"]["head.weight"] for _, reply in block.replies())
    assert isinstance(first, Tensor)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
