"""The strict engine's pieces are torch's own to the bit, and do no more work than the step needs."""

from __future__ import annotations

import mmap
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
import worlds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowerbed.clients.data import (
    SLAB_BYTES,
    BatchOrder,
    BatchReader,
    ClientData,
    Slabs,
    ViewCache,
)
from flowerbed.clients.engine_rules import clip, update_rule
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Clock, LocalRound
from flowerbed.clients.params import LocalParams
from flowerbed.clients.training import train
from flowerbed.errors import ConfigError
from flowerbed.models.base import ModelSpec
from flowerbed.models.info import ModelInfo
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Classification

SHAPES = {"a": (3, 4), "b": (4,), "never": (2,), "late": (2, 2)}


def parameters(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for n, s in SHAPES.items()}


def gradients(step: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """One parameter never has a gradient, another only from the third step on."""
    generator = torch.Generator().manual_seed(100 + step)
    drawn = {n: torch.randn(s, generator=generator, dtype=dtype) for n, s in SHAPES.items()}
    return {n: None if n == "never" or (n == "late" and step < 2) else g for n, g in drawn.items()}


OPTIMIZERS = {
    "plain": {},
    "decay": {"weight_decay": 0.01},
    "momentum": {"momentum": 0.9},
    "momentum, decay": {"momentum": 0.7, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "nesterov, decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "adam": {"optimizer": "adam", "weight_decay": 0.01},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.01},
    "adam, betas": {"optimizer": "adam", "momentum": 0.5, "beta2": 0.9},
    "adamw, eps": {"optimizer": "adamw", "weight_decay": 0.01, "eps": 1e-3},
    "adamw, beta2, eps": {"optimizer": "adamw", "weight_decay": 0.01, "beta2": 0.9, "eps": 1e-3},
    "rmsprop": {"optimizer": "rmsprop", "weight_decay": 0.01},
    "rmsprop, momentum": {"optimizer": "rmsprop", "momentum": 0.5},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_rule_is_torchs_optimizer_to_the_bit(name: str, dtype: torch.dtype) -> None:
    """Also across a break: after three steps a new rule goes on from the state of the old one."""
    given_ = OPTIMIZERS[name]
    params = LocalParams(lr=0.5, **given_)
    mine, theirs = parameters(dtype), parameters(dtype)
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}
    kind = kinds.get(params.optimizer, torch.optim.SGD)
    options = {k: v for k, v in given_.items() if k not in ("optimizer", "beta2")}
    if "beta2" in given_:
        options["betas"] = (options.pop("momentum", 0.9), given_["beta2"])
    optimizer = kind(theirs.values(), lr=0.5, **options)
    rule = update_rule(params, mine)
    for step in range(6):
        if step == 3:
            kept = rule.state(" scope")
            rule = update_rule(params, mine)
            rule.restore(kept, " scope")
        lr = 0.5 / (step + 1)
        rule.step(gradients(step, dtype), lr)
        optimizer.param_groups[0]["lr"] = lr
        for n, g in gradients(step, dtype).items():
            theirs[n].grad = g
        optimizer.step()
        for n, p in mine.items():
            assert torch.equal(p, theirs[n]), (step, n)


@given(st.floats(1e-3, 100), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=25, deadline=None)
def test_clipping_is_torchs_to_the_bit(bound: float, dtype: torch.dtype) -> None:
    found, theirs = gradients(5, dtype), parameters(dtype)
    for n, g in gradients(5, dtype).items():
        theirs[n].grad = g
    clip(found, SHAPES, bound)
    torch.nn.utils.clip_grad_norm_(theirs.values(), bound)
    for n, g in found.items():
        assert (g is None and theirs[n].grad is None) or torch.equal(g, theirs[n].grad)  # type: ignore[arg-type]


def view(samples: int, width: int = 6) -> ClientData:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(samples, width, generator=generator)
    y = torch.randint(0, 3, (samples,), generator=generator)
    return ClientData(x, y, torch.arange(samples) + 1000, {"domain": y * 2})


@given(
    samples=st.integers(1, 60),
    batch=st.integers(0, 12),
    drop_last=st.booleans(),
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    ahead=st.sampled_from([1, 200, 2**21]),
)
@settings(max_examples=60, deadline=None)
def test_batches_gathered_together_are_those_gathered_one_by_one(
    samples: int, batch: int, drop_last: bool, steps: list[int], ahead: int
) -> None:
    """In any order of asking, whatever number is gathered at a time; and a batch's mapping is the caller's."""
    local = LocalParams(batch_size=batch, drop_last=drop_last)
    data = view(samples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flowerbed.clients.data.GATHER_BYTES", ahead)
        read = BatchReader(data, BatchOrder(local, samples, 3, 1))
        for step in steps:
            wanted = data.batch(BatchOrder(local, samples, 3, 1).rows(step))
            found = read(step)
            assert found.keys() == wanted.keys()
            for name, values in wanted.items():
                assert torch.equal(found[name], values)
            found.clear()


TYPES = (torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.bfloat16)


@given(
    kinds=st.lists(st.tuples(st.sampled_from(TYPES), st.integers(0, 300), st.integers(1, 700)), max_size=30)
)
@settings(max_examples=30, deadline=None)
def test_what_lies_in_slabs_is_what_was_given(kinds: list[tuple[torch.dtype, int, int]]) -> None:
    slabs = Slabs()
    given = [torch.arange(n * m).view(n, m).mul(7).to(kind) for kind, n, m in kinds]
    found = [slabs.keep(values) for values in given]
    for values, kept in zip(given, found, strict=True):
        assert kept.dtype == values.dtype
        assert kept.is_contiguous()
        assert torch.equal(kept, values)
        assert kept.data_ptr() % 64 == 0 or not 0 < kept.nbytes <= SLAB_BYTES


def test_a_slab_goes_with_the_last_tensor_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[mmap.mmap]] = []
    make = mmap.mmap

    def noted(*args: int) -> mmap.mmap:
        memory = make(*args)
        made.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr("flowerbed.clients.data.mmap.mmap", noted)
    slabs = Slabs()
    half = torch.ones(SLAB_BYTES // 8)  # float32: half a slab
    first, second = slabs.keep(half), slabs.keep(half)
    third = slabs.keep(half)
    large = torch.ones(SLAB_BYTES)
    assert slabs.keep(large) is large
    assert len(made) == 2
    assert second.data_ptr() - first.data_ptr() == half.nbytes
    del first
    assert made[0]() is not None
    del second
    assert made[0]() is None
    assert made[1]() is not None
    assert float(third.sum()) == half.numel()


def test_views_are_kept_within_their_limit_and_the_last_one_always() -> None:
    made: list[int] = []

    def get(cache: ViewCache, client: int, samples: int = 10) -> ClientData:
        def make() -> ClientData:
            made.append(client)
            return view(samples)

        return cache.get(client, make)

    one = view(10).nbytes
    assert one == 10 * (6 * 4 + 8 + 8 + 8)
    cache = ViewCache(2 * one)
    first = get(cache, 0)
    get(cache, 1)
    assert get(cache, 0) is first
    get(cache, 2)  # 1 was used longest ago
    get(cache, 0)
    get(cache, 1)
    assert made == [0, 1, 2, 1]
    get(cache, 3, samples=100)  # larger than the limit: kept until another is made
    get(cache, 3)
    get(cache, 0)
    get(cache, 3, samples=100)
    assert made == [0, 1, 2, 1, 3, 0, 3]


def test_views_are_kept_up_to_a_number_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowerbed.clients.data.MOST_VIEWS", 2)
    made: list[int] = []
    cache = ViewCache(10**9)
    for client in (0, 1, 0, 1, 2, 1, 2, 0):

        def make(client: int = client) -> ClientData:
            made.append(client)
            return view(1)

        cache.get(client, make)
    assert made == [0, 1, 2, 0]


def open_round(model: str, local: LocalParams, samples: int = 20) -> LocalRound:
    data = view(samples)
    net = ModelSpec(model, (6,), 3).build(0)
    return LocalRound(
        client=0, seed=0, clock=Clock(1, 5, local.steps_per_round(samples)), phase="train", config={},
        received={"arrays": dict(net.state_dict())}, model=net, parts=ModelParts.resident(net),
        info=ModelInfo.of(net), task=Classification(3), local=local, open_train=lambda: data,
        open_test=lambda: data, state={}, device=torch.device("cpu"),
    )  # fmt: skip


class Counting(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_is_forward_backward_and_one_update_and_nothing_else() -> None:
    """Counted work, so that it cannot creep up: the operators of a step of logistic regression."""

    def operators(steps: int) -> Counter[str]:
        local = open_round("linear", LocalParams(batch_size=2, steps=steps))
        with Counting() as counting:
            train(local, ClientHalf().loss, extras={})
        return counting.calls

    more = operators(8)
    more.subtract(operators(4))
    per_step = {name.removeprefix("aten."): calls / 4 for name, calls in more.items() if calls}
    views = {n: per_step.pop(n, 0) for n in ("t", "view", "detach", "flatten", "_unsafe_view")}
    assert sum(views.values()) <= 8
    assert per_step == {
        # forward
        "addmm": 1,
        "_log_softmax": 1,
        "nll_loss_forward": 1,
        # backward
        "ones_like": 1,
        "nll_loss_backward": 1,
        "_log_softmax_backward_data": 1,
        "mm": 1,
        "sum": 1,
        # update, and the loss reported
        "_foreach_add_": 1,
        "add_": 1,
    }


def test_the_engine_is_part_of_what_a_run_is() -> None:
    from flowerbed.experiments.config import Simulation

    strict, fast = (Simulation.of({"local": {"engine": engine}}).identity for engine in ("strict", "fast"))
    assert strict == Simulation().identity != fast


@pytest.mark.parametrize("bad", [{"engine": "quick"}, {"precision": "half"}])
def test_bad_engines_are_named(bad: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"local.{next(iter(bad))} is"):
        LocalParams(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["decay", "momentum, decay", "nesterov, decay", "adam", "adamw"])
def test_weight_decay_may_spare_parameters(name: str) -> None:
    """As torch's parameter groups do it, also across a break."""
    given_ = OPTIMIZERS[name]
    params = LocalParams(lr=0.5, **given_)
    mine, theirs = parameters(torch.float64), parameters(torch.float64)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}.get(params.optimizer, torch.optim.SGD)
    further = {k: v for k, v in given_.items() if k not in ("optimizer", "weight_decay")}
    groups = [
        {"params": [theirs["a"], theirs["never"]], "weight_decay": params.weight_decay},
        {"params": [theirs["b"], theirs["late"]], "weight_decay": 0.0},
    ]
    optimizer = kind(groups, lr=0.5, **further)
    rule = update_rule(params, mine, {"a", "never"})
    for step in range(6):
        if step == 3:
            kept = rule.state()
            rule = update_rule(params, mine, {"a", "never"})
            rule.restore(kept)
        rule.step(gradients(step, torch.float64), 0.5)
        for n, g in gradients(step, torch.float64).items():
            theirs[n].grad = g
        optimizer.step()
        for n, p in mine.items():
            assert torch.equal(p, theirs[n]), (step, n)


def test_a_half_says_what_decays() -> None:
    """With no gradient, decay is all that moves a weight."""

    class Spared(ClientHalf):
        def decayed(self, info: ModelInfo) -> frozenset[str]:
            return frozenset(n for n in info.parameters if not n.endswith("bias"))

        def loss(
            self, model: ModelParts, batch: Any, extras: Any, task: Any
        ) -> tuple[Tensor, dict[str, Tensor]]:
            return 0.0 * sum(p.sum() for p in model.parameters.values()), {}  # type: ignore[return-value]

    local = worlds.open_round(LocalParams(lr=0.1, weight_decay=0.5, batch_size=0))
    before = local.parameters()
    Spared().run(local)
    for name, value in local.parameters().items():
        assert torch.allclose(value, before[name] * (1.0 if name.endswith("bias") else 0.95)), name
