"""DP-SGD: clipping by example against a loop, noise against its closed form, accounting against other figures."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import worlds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from flowerbed.clients.defence import ExamplePrivacy
from flowerbed.clients.dpsgd import per_example, private
from flowerbed.clients.params import LocalParams
from flowerbed.clients.training import Evaluation
from flowerbed.errors import ConfigError
from flowerbed.models.base import ModelSpec
from flowerbed.strategies.base import ClientReply
from flowerbed.strategies.privacy import ExampleLedger

pytest.importorskip("opacus")
pytest.importorskip("dp_accounting")

SPECS = {
    "dense": ModelSpec("mlp", (6,), 3, {"hidden": (5, 4)}),
    "convolutions": ModelSpec("small_cnn", (1, 8, 8), 3, {"groups": 4}),
    "a layer of its own": ModelSpec("imprinted", (1, 8, 8), 3, {"bins": 4}),
}


def evaluation(local: Any, count: int) -> Evaluation:
    def loss(parts: Any, batch: Any, extras: Any, task: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return task.mean_loss(parts(batch["x"]), batch["y"]), {}

    batch = local.train_data.batch(slice(0, count))
    return Evaluation(loss, local.parts, batch, {}, local.task)


def opened(spec: ModelSpec) -> Any:
    from flowerbed.clients.data import ClientData

    rng = torch.Generator().manual_seed(5)
    x, y = torch.rand(20, *spec.input_shape, generator=rng), torch.randint(0, 3, (20,), generator=rng)
    return worlds.open_round(
        LocalParams(batch_size=4), spec=spec, data=ClientData(x, y, torch.arange(20), {})
    )


@pytest.mark.parametrize("kind", SPECS)
def test_gradients_of_single_examples_against_a_loop(kind: str) -> None:
    local = opened(SPECS[kind])
    local.model.train()
    compute = evaluation(local, 4)
    moving = dict(local.parts.parameters)
    _, _, samples = per_example(local.model, compute, moving)
    for i in range(4):
        batch = compute.batch
        one = F.cross_entropy(local.model(batch["x"][i : i + 1]), batch["y"][i : i + 1])
        for name, g in zip(moving, torch.autograd.grad(one, list(moving.values())), strict=True):
            torch.testing.assert_close(samples[name][i], g, rtol=1e-4, atol=1e-6)
    assert not any(hasattr(p, "grad_sample") for p in local.model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in local.model.modules())


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 6),
    clip=st.floats(0.01, 100.0),
    size=st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
)
@settings(max_examples=40, deadline=None)
def test_clipping_is_by_example_and_over_all_parameters(
    seed: int, count: int, clip: float, size: float
) -> None:
    rng = torch.Generator().manual_seed(seed)
    samples = {
        "a": size * torch.randn(count, 3, 2, generator=rng),
        "b": size * torch.randn(count, 4, generator=rng),
    }
    found = private(samples, clip, 0.0, rng)
    total = {n: torch.zeros(v.shape[1:], dtype=torch.float64) for n, v in samples.items()}
    for i in range(count):
        length = math.sqrt(sum(float(v[i].double().square().sum()) for v in samples.values()))
        for name, value in samples.items():
            total[name] += value[i].double() * (min(1.0, clip / length) if length else 1.0) / count
    for name, value in total.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6 * max(size, 1e-3))
    assert math.sqrt(sum(float(v.double().square().sum()) for v in found.values())) <= clip * (1 + 1e-5)


def test_the_noise_has_its_variance() -> None:
    """The mean of B clipped gradients has noise of deviation z C / B, whatever the gradients are."""
    rng = torch.Generator().manual_seed(0)
    samples = {"w": torch.ones(5, 200_000)}
    quiet, noisy = (private(samples, 0.3, z, rng)["w"] for z in (0.0, 2.0))
    expected = 2.0 * 0.3 / 5
    noise = noisy - quiet
    assert float(noise.std()) == pytest.approx(expected, abs=6 * expected / math.sqrt(400_000))
    assert float(noise.mean()) == pytest.approx(0.0, abs=6 * expected / math.sqrt(200_000))


def test_a_wide_clip_without_noise_is_plain_training() -> None:
    plain = worlds.run("fedavg").result.model
    free = worlds.run("fedavg", defence={"name": "dpsgd", "clip": 1e6, "noise": 0.0}).result.model
    worlds.close(plain, free)
    tight = worlds.run("fedavg", defence={"name": "dpsgd", "clip": 0.1, "noise": 0.0}).result.model
    assert not worlds.equal(plain, tight)


def test_a_clipped_run_moves_no_further_than_its_steps_allow() -> None:
    sections: dict[str, Any] = {"federation": {"clients": 1, "rounds": 1}, "local": {"lr": 0.5, "steps": 3}}
    start = worlds.run("fedavg", **{**sections, "local": {"lr": 0.0, "steps": 3}}).result.model
    end = worlds.run("fedavg", defence={"name": "dpsgd", "clip": 0.01, "noise": 0.0}, **sections).result.model
    moved = math.sqrt(sum(float((end[n] - v).square().sum()) for n, v in start.items()))
    assert 0 < moved <= 3 * 0.5 * 0.01 * (1 + 1e-5)


def test_noise_differs_by_round_and_repeats_with_the_seed() -> None:
    defence = {"name": "dpsgd", "clip": 0.1, "noise": 1.0}
    one, two = (worlds.run("fedprox", defence=defence).result for _ in range(2))
    assert worlds.equal(one.model, two.model)
    told = [r.metrics for r in one.history if r.phase == "train"]
    assert all("privacy-example-epsilon" in metrics for metrics in told)


# Accounting.


def ledger(local: LocalParams, noise: float = 4.0, sampling: str = "none") -> ExampleLedger:
    return ExampleLedger(ExamplePrivacy(noise, 1e-5, sampling), local)


def reply(node: int, examples: int) -> ClientReply:
    return ClientReply(node, {"arrays": {}}, {"num-examples": examples})


def gaussian_epsilon(noise: float, count: int, delta: float = 1e-5) -> float:
    """Return the exact epsilon of ``count`` Gaussian releases (Balle and Wang 2018), by bisection."""
    mu = math.sqrt(count) / noise
    low, high = 0.0, 200.0
    normal = lambda t: 0.5 * math.erfc(-t / math.sqrt(2))
    for _ in range(200):
        e = (low + high) / 2
        tail = normal(mu / 2 - e / mu) - math.exp(e) * normal(-mu / 2 - e / mu)
        low, high = (e, high) if tail > delta else (low, e)
    return high


def test_an_example_is_spent_once_an_epoch() -> None:
    """40 samples in batches of 10, two steps a round: rounds 1 and 2 are one epoch, 3 another; sensitivity is 2 C."""
    book = ledger(LocalParams(batch_size=10, steps=2))
    expected = {1: 1, 2: 1, 3: 2}
    for round_, epochs in expected.items():
        book.replies(round_, {}, [reply(5, 40)], frozenset())
        found = book.metrics()["privacy-example-epsilon"]
        exact = gaussian_epsilon(4.0 / 2, epochs)
        assert exact <= found <= 1.25 * exact, "Renyi accounting is an upper bound, and not a loose one"
    # Who was not asked spends nothing, also in the middle of an epoch.
    book.replies(9, {}, [reply(6, 40)], frozenset())
    assert book.epsilons()[6] == pytest.approx(gaussian_epsilon(2.0, 1), rel=0.25)
    assert book.epsilons()[6] < book.epsilons()[5]


def test_poisson_is_amplified_and_a_ledger_survives() -> None:
    local = LocalParams(batch_size=10, steps=2)
    book, tighter = ledger(local), ledger(local, sampling="poisson")
    for round_ in (1, 2, 3):
        for one in (book, tighter):
            one.replies(round_, {}, [reply(1, 4000), reply(2, 40)], frozenset())
    assert tighter.epsilons()[1] < 0.2 * book.epsilons()[1]
    again = ledger(local)
    again.load_state_dict(book.state_dict())
    assert again.epsilons() == book.epsilons()
    empty = ledger(local)
    empty.load_state_dict(ledger(local).state_dict())
    assert empty.epsilons() == {}


# What it does not combine with.


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"strategy": "fedsam"}, "FedSamHalf makes its gradients by itself"),
        ({"strategy": "moon"}, "has a loss of its own"),
        ({"model": {"name": "worlds:bn_net"}}, "batch norm"),
        ({"local": {"replacement": True}}, "local.replacement"),
        ({"local": {"precision": "bfloat16"}}, "float32"),
        ({"defence": {"clip": 0.0}}, "defence.clip is 0"),
        ({"defence": {"noise": -1.0}}, "defence.noise is -1"),
        ({"defence": {"delta": 0.0}}, "defence.delta is 0"),
        ({"defence": {"sampling": "lucky"}}, "defence.sampling is 'lucky'"),
    ],
)
def test_what_cannot_be_protected_is_refused(sections: dict[str, Any], sentence: str) -> None:
    sections = dict(sections)
    strategy = sections.pop("strategy", "fedavg")
    defence = {"name": "dpsgd", **sections.pop("defence", {})}
    with pytest.raises(ConfigError, match=sentence):
        worlds.run(strategy, defence=defence, **sections)
