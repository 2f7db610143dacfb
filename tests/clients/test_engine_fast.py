"""The fast engine and bfloat16 against the strict one: how close, on what, and what falls back to strict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.clients import engine_routes
from flowerbed.clients.data import Batch, ClientData
from flowerbed.clients.engine_fast import FastLayers
from flowerbed.clients.engine_routes import Routes, describe, find_routes
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Clock, Extras, LocalRound
from flowerbed.clients.params import LocalParams
from flowerbed.clients.training import Hooks, backpropagate, of_one_call, train
from flowerbed.models.base import ModelSpec, Net
from flowerbed.models.fast import Route, dropout
from flowerbed.models.info import ModelInfo
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Classification, Task

SHAPE, CLASSES, SAMPLES = (1, 12, 12), 10, 24
ONEDNN = Route(output=engine_routes.has_onednn(), input_gradient=engine_routes.has_onednn())
TOLERANCE = 1e-4
"""Of the length of a round's update; what is stated for one step is a hundredth of it."""


def tied(input_shape: tuple[int, ...], num_classes: int) -> Net:
    """Return a network that calls one dense layer twice."""
    twice = nn.Linear(16, 16)
    body = nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.Tanh(), twice, nn.Tanh(), twice)
    return Net(body, nn.Linear(16, num_classes), 16)


MODELS = {
    "linear": ModelSpec("linear", SHAPE, CLASSES),
    "mlp": ModelSpec("mlp", SHAPE, CLASSES),
    "leaf_cnn": ModelSpec("leaf_cnn", SHAPE, CLASSES),
    "small_cnn": ModelSpec("small_cnn", SHAPE, CLASSES),
    "tied": ModelSpec(f"{__name__}:tied", SHAPE, CLASSES),
}


def build(model: str) -> nn.Module:
    if model == "tied":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return tied(SHAPE, CLASSES)
    return MODELS[model].build(0)


def every_route(model: nn.Module) -> Routes:
    """Send every dense layer, however small, through oneDNN."""
    return {(m.out_features, m.in_features): ONEDNN for m in model.modules() if isinstance(m, nn.Linear)}


def open_round(model: nn.Module, local: LocalParams, *, fast: bool) -> LocalRound:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SAMPLES, *SHAPE, generator=generator)
    y = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
    data = ClientData(x, y, torch.arange(SAMPLES), {})
    return LocalRound(
        client=0, seed=0, clock=Clock(1, 5, local.steps_per_round(SAMPLES)), phase="train", config={},
        received={"arrays": dict(model.state_dict())}, model=model, parts=ModelParts.resident(model),
        info=ModelInfo.of(model), task=Classification(CLASSES), local=local, open_train=lambda: data,
        open_test=lambda: data, state={}, device=torch.device("cpu"),
        fast=FastLayers(model, every_route(model)) if fast else None,
    )  # fmt: skip


def moved(
    model: str, local: LocalParams, *, fast: bool, half: ClientHalf | None = None, **how: Any
) -> dict[str, Tensor]:
    """Return the update of one round."""
    net, half = build(model), half or ClientHalf()
    before = {n: v.clone() for n, v in net.state_dict().items()}
    train(open_round(net, local, fast=fast), half.loss, extras={}, **{"hooks": half.hooks(), **how})
    assert all("forward" not in module.__dict__ for module in net.modules())
    return {n: v - before[n] for n, v in net.state_dict().items()}


def apart(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Return the distance of two updates, by the length of the second."""

    def length(update: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([v.flatten() for v in update.values()]).norm()

    return float(length({n: found[n] - v for n, v in wanted.items()}) / length(wanted))


def half_that(hook: str, function: Any) -> ClientHalf:
    half: ClientHalf = type("Half", (ClientHalf,), {hook: function})()
    return half


def shifted(self: Any, gradients: Any, parameters: Any, extras: Any) -> Any:
    return {n: g + 0.01 * parameters[n] for n, g in gradients.items()}


RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "clip": {"clip_norm": 0.3},
    "cosine": {"schedule": "cosine"},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("model", MODELS)
def test_a_round_is_that_of_the_strict_engine_but_for_rounding(model: str, rule: str) -> None:
    local = LocalParams(batch_size=10, lr=0.05, epochs=2, **RULES[rule])
    assert apart(moved(model, local, fast=True), moved(model, local, fast=False)) < TOLERANCE


@pytest.mark.parametrize("model", ["linear", "mlp", "leaf_cnn"])
def test_one_step_is_within_a_millionth(model: str) -> None:
    local = LocalParams(batch_size=10, steps=1)
    assert apart(moved(model, local, fast=True), moved(model, local, fast=False)) < TOLERANCE / 100


def test_corrections_frozen_parts_and_steps_seen_are_as_in_the_strict_engine() -> None:
    local = LocalParams(batch_size=10, lr=0.05)
    corrects = half_that("correct", shifted)
    frozen = frozenset({"body.1.weight"})
    for how in ({"half": corrects}, {"frozen": frozen}):
        found, wanted = (moved("mlp", local, fast=fast, **how) for fast in (True, False))
        assert apart(found, wanted) < TOLERANCE
    assert not found["body.1.weight"].any()


def test_plain_descent_moves_dense_weights_within_the_backward_pass() -> None:
    """The gradient of a weight that has moved is None, and a weight that is used twice has a true gradient."""
    for model, inside in (
        ("mlp", {"body.1.weight", "head.weight"}),
        ("tied", {"body.1.weight", "head.weight"}),
    ):
        net = build(model)
        layers = FastLayers(net, every_route(net))
        layers.lr = 0.1
        x, y = torch.randn(4, *SHAPE), torch.tensor([0, 1, 2, 3])
        with layers.applied():
            _, _, gradients = layers.descend(
                lambda net=net, x=x, y=y: (F.cross_entropy(net(x), y), {}), dict(net.named_parameters())
            )
        assert {n for n, g in gradients.items() if g is None} == inside


@of_one_call
def doubled(
    model: ModelParts, batch: Batch, extras: Extras, task: Task
) -> tuple[Tensor, Mapping[str, Tensor]]:
    return 2 * task.loss(model(batch["x"]), batch["y"]).mean(), {}


def twice(model: ModelParts, batch: Batch, extras: Extras, task: Task) -> tuple[Tensor, Mapping[str, Tensor]]:
    """A gradient penalty: calls the model, differentiates, and differentiates that again."""
    x = batch["x"].clone().requires_grad_()
    value = task.loss(model(x), batch["y"]).mean()
    (slope,) = torch.autograd.grad(value, x, create_graph=True)
    return value + slope.square().sum(), {}


def test_losses_of_another_kind_are_trained_strictly_to_the_bit() -> None:
    local = LocalParams(batch_size=10, lr=0.05)

    def again(compute: Any, parameters: Any) -> Any:
        return backpropagate(compute, parameters)

    for loss, hooks in ((twice, Hooks()), (doubled, Hooks(estimate=again))):
        half = ClientHalf()
        half.loss = loss  # type: ignore[method-assign]
        found, wanted = (moved("mlp", local, fast=fast, half=half, hooks=hooks) for fast in (True, False))
        assert all(torch.equal(found[n], v) for n, v in wanted.items())
    half.loss = doubled  # type: ignore[method-assign]
    found, wanted = (moved("mlp", local, fast=fast, half=half) for fast in (True, False))
    assert 0 < apart(found, wanted) < TOLERANCE


def test_an_override_of_the_loss_loses_the_mark() -> None:
    class Half(ClientHalf):
        def loss(self, *arguments: Any) -> Any:
            return super().loss(*arguments)

    from flowerbed.clients.training import ONE_CALL

    assert hasattr(ClientHalf().loss, ONE_CALL)
    assert not hasattr(Half().loss, ONE_CALL)


@pytest.mark.parametrize("p", [0.25, 0.5, 1 / 256])
def test_fast_dropout_has_the_distribution_of_dropout(p: float) -> None:
    layer = nn.Dropout(p)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        x = torch.ones(64, 3, 40, 40).to(memory_format=torch.channels_last).requires_grad_()
        y = dropout(layer)(x)
        assert torch.equal(y, dropout(layer.eval())(x)) is False
        torch.manual_seed(3)
        assert torch.equal(y, dropout(layer.train())(x))
    kept = 1 / (1 - p)
    assert y.unique().tolist() == [0.0, pytest.approx(kept)]
    # Five standard deviations of a mean of n coins.
    n = x.numel()
    assert abs(float((y == 0).float().mean()) - p) < 5 * (p * (1 - p) / n) ** 0.5
    # Neighbours in memory are independent.
    dropped = (y == 0).permute(0, 2, 3, 1).flatten().float() - p
    assert abs(float((dropped[1:] * dropped[:-1]).mean())) < 5 * p * (1 - p) / n**0.5
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y)
    assert torch.equal(dropout(layer.eval())(x), x)


def test_dropout_of_other_probabilities_and_linear_subclasses_stay_as_they_are() -> None:
    class Scaled(nn.Linear):
        pass

    net = nn.Sequential(Scaled(4, 4), nn.Dropout(0.3), nn.Linear(4, 4), nn.Dropout(0.0))
    with FastLayers(net, {(4, 4): ONEDNN}).applied():
        assert [i for i, module in enumerate(net) if "forward" in module.__dict__] == [2]


def test_routes_are_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, local = MODELS["leaf_cnn"].build(0), LocalParams(batch_size=10)
    measured: list[tuple[int, ...]] = []

    def measure(*sizes: int) -> Route:
        measured.append(sizes)
        return Route(output=True)

    monkeypatch.setattr(engine_routes, "measure", measure)
    # Only the large layer, (512, 64 * 3 * 3), is looked at.
    assert find_routes(net, local, tmp_path) == find_routes(net, local, tmp_path) == {(512, 576): Route(True)}
    assert measured == [(512, 576, 10)]
    find_routes(net, LocalParams(batch_size=20), tmp_path)
    assert measured[1:] == [(512, 576, 20)]
    (file,) = (tmp_path / "engine").iterdir()
    assert set(json.loads(file.read_text())) == {"512x576x10", "512x576x20"}
    file.write_text("no json")
    find_routes(net, local, tmp_path)
    assert measured[2:] == [(512, 576, 10)]
    (tmp_path / "file").touch()
    find_routes(net, local, tmp_path / "file")  # A folder that cannot be made: measured, not kept.
    assert len(measured) == 4
    assert "576x512 through oneDNN (output)" in describe(find_routes(net, local, tmp_path))
    assert find_routes(MODELS["linear"].build(0), local, tmp_path) == {}


def test_a_measurement_ends_in_a_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_routes, "REPEATS", 1)
    assert isinstance(engine_routes.measure(300, 300, 10), Route)
    monkeypatch.setattr(engine_routes, "has_onednn", lambda: False)
    assert engine_routes.measure(300, 300, 10) == Route()


def test_a_simulation_with_the_fast_engine_is_the_strict_one_but_for_rounding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from flowerbed.experiments.simulation import simulate

    monkeypatch.setenv("FLOWERBED_CACHE", str(tmp_path))
    monkeypatch.setattr(engine_routes, "LARGE", 64)
    monkeypatch.setattr(engine_routes, "REPEATS", 1)

    def model(engine: str) -> dict[str, Tensor]:
        return simulate(
            federation={"clients": 4, "rounds": 2},
            local={"engine": engine},
            evaluation={"every": 0},
            grid={"device": "cpu"},
        ).model

    strict, fast = model("strict"), model("fast")
    assert 0 < apart(fast, strict) < TOLERANCE


@pytest.mark.parametrize("engine", ["strict", "fast"])
@pytest.mark.parametrize("model", ["mlp", "leaf_cnn"])
def test_bfloat16_is_close_and_keeps_weights_and_losses_in_float32(model: str, engine: str) -> None:
    seen: list[torch.dtype] = []

    @of_one_call
    def loss(model: ModelParts, batch: Batch, extras: Extras, task: Task) -> Any:
        outputs = model(batch["x"])
        seen.append(outputs.dtype)
        return task.loss(outputs, batch["y"]).mean(), {}

    half = ClientHalf()
    half.loss = loss  # type: ignore[method-assign]
    low, full = (
        moved(
            model, LocalParams(batch_size=10, lr=0.02, precision=precision), fast=engine == "fast", half=half
        )
        for precision in ("bfloat16", "float32")
    )
    assert set(seen) == {torch.float32}
    assert all(v.dtype == torch.float32 for v in low.values())
    assert apart(low, full) < 0.1
    # The dense layers of the fast engine stay float32, and an MLP has no others.
    assert (apart(low, full) < TOLERANCE) == (engine == "fast" and model == "mlp")


def test_bfloat16_learns_digits_as_float32_does() -> None:
    from flowerbed.experiments.simulation import simulate

    def accuracy(precision: str) -> float:
        found = simulate(
            model="leaf_cnn",
            federation={"clients": 2, "rounds": 3},
            local={"precision": precision, "batch_size": 32, "lr": 0.1, "epochs": 1},
            evaluation={"every": 3},
            grid={"device": "cpu"},
        ).final()["accuracy"]
        return float(found)

    full, low = accuracy("float32"), accuracy("bfloat16")
    assert full > 0.8
    assert abs(full - low) < 0.03
