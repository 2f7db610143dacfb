"""MOON, FedNTD and FedSAM: finite differences, hand-worked numbers, and zero coefficients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from flowerbed.clients.half import ClientHalf
from flowerbed.clients.params import LocalParams
from flowerbed.clients.teacher import teacher
from flowerbed.clients.training import Hooks
from flowerbed.errors import ConfigError
from flowerbed.experiments.simulation import simulate
from flowerbed.models.base import ModelSpec
from flowerbed.models.info import ModelInfo
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Classification
from flowerbed.server.loop import RunResult
from flowerbed.server.sampling import UniformSampler
from flowerbed.strategies.base import Setting
from flowerbed.strategies.fedntd import FedNtdHalf, FedNtdParams, not_true_divergence
from flowerbed.strategies.fedsam import FedSam, FedSamHalf, FedSamParams
from flowerbed.strategies.moon import Moon, MoonHalf, MoonParams, contrastive_loss


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(name: str, rounds: int = 2, model: Mapping[str, Any] | None = None, **options: Any) -> RunResult:
    return simulate(
        strategy={"name": name, **options},
        model=model or {"name": "mlp", "hidden": [16]},
        partition={"name": "dirichlet", "alpha": 0.3},
        federation={"clients": 3, "rounds": rounds},
        evaluation={"every": 0},
    )


def equal(one: RunResult, other: RunResult) -> bool:
    return all(torch.equal(value, other.model[name]) for name, value in one.model.items())


def parts(options: Mapping[str, Any] | None = None, model: str = "mlp") -> ModelParts:
    """Return a float64 model of 4 inputs and 3 classes."""
    module = ModelSpec(model, (4,), 3, options or {"hidden": [5]}).build(0)
    return ModelParts.resident(module.double())


def loss_gradcheck(half: ClientHalf, extras: Mapping[str, Any], name: str) -> bool:
    """Compare the gradient of a half's loss with finite differences in one of the parameters."""
    model = parts()
    own = dict(model.parameters)
    batch = {"x": normal(6, 4, seed=1), "y": torch.tensor([0, 1, 2, 2, 1, 0])}

    def value(w: Tensor) -> Tensor:
        moved = ModelParts.functional(model.module, {**own, name: w}, {})
        return half.loss(moved, batch, extras, Classification(3))[0]

    return gradcheck(value, own[name].detach().clone().requires_grad_())


def reference(seed: int) -> dict[str, Tensor]:
    return {
        n: v.double() for n, v in ModelSpec("mlp", (4,), 3, {"hidden": [5]}).build(seed).state_dict().items()
    }


# Teachers.


def test_a_teacher_is_a_function_of_its_weights_alone() -> None:
    module = ModelSpec("resnet8", (1, 8, 8), 3, {"norm": "bn"}).build(0)
    model = ModelParts.resident(module)
    module.train()
    module.body[0].eval()
    modes = [m.training for m in module.modules()]
    before = {n: v.clone() for n, v in module.state_dict().items()}
    other = ModelSpec("resnet8", (1, 8, 8), 3, {"norm": "bn"}).build(1).eval()
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with teacher(model, dict(other.state_dict())) as taught:
        outputs, features = taught(x), taught.features(x)
    assert torch.equal(outputs, other(x))
    assert torch.equal(features, other.features(x))
    assert not outputs.requires_grad
    assert [m.training for m in module.modules()] == modes
    assert all(torch.equal(v, module.state_dict()[n]) for n, v in before.items())


# MOON.


def test_contrastive_loss_by_hand() -> None:
    """z along the x axis, z_g at 60 degrees, z_p at 120: cosines 0.5 and -0.5, T = 0.5."""
    half_root = math.sqrt(3) / 2
    z, z_g, z_p = (
        torch.tensor([v], dtype=torch.float64) for v in ((2.0, 0.0), (0.5, half_root), (-1.5, 3 * half_root))
    )
    expected = -math.log(math.e / (math.e + math.exp(-1)))
    assert float(contrastive_loss(z, z_g, z_p, 0.5)) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 5))
def test_contrastive_loss_is_cross_entropy_of_two_similarities(seed: int, temperature: float) -> None:
    z, z_g, z_p = (normal(7, 3, seed=seed + i) for i in range(3))
    cosines = torch.stack([torch.cosine_similarity(z, other) for other in (z_g, z_p)], dim=1)
    expected = torch.nn.functional.cross_entropy(
        cosines / temperature, torch.zeros(7, dtype=torch.int64), reduction="none"
    )
    torch.testing.assert_close(contrastive_loss(z, z_g, z_p, temperature), expected)


def test_contrastive_gradient_by_finite_differences() -> None:
    z_g, z_p = normal(4, 3, seed=1), normal(4, 3, seed=2)
    assert gradcheck(lambda z: contrastive_loss(z, z_g, z_p, 0.5), normal(4, 3).requires_grad_())
    extras = {"global": reference(1), "previous": reference(2)}
    for name in parts().parameters:
        assert loss_gradcheck(MoonHalf(MoonParams(mu=2.0)), extras, name)


def test_equal_references_give_log_two_and_no_gradient() -> None:
    z, z_g = normal(5, 3).requires_grad_(), normal(5, 3, seed=1)
    value = contrastive_loss(z, z_g, z_g.clone(), 0.5)
    torch.testing.assert_close(value, torch.full_like(value, math.log(2)))
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_moon_without_its_term_is_fedavg_and_so_is_its_first_round() -> None:
    plain, first = run("fedavg"), run("fedavg", rounds=1)
    assert equal(run("moon", mu=0.0), plain)
    assert equal(run("moon", rounds=1, mu=5.0), first)
    some = run("moon", mu=5.0)
    assert not equal(some, plain)
    contrastive = [r.metrics["contrastive"] for r in some.history if r.phase == "train"]
    assert contrastive[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(contrastive[1] - math.log(2)) > 1e-3


def test_moon_needs_features() -> None:
    info = ModelInfo({"w": "backbone"}, frozenset({"w"}), frozenset(), {"w": (1,)})
    with pytest.raises(ConfigError, match="no head"):
        Moon().setup(Setting(0, 2, 1, info, UniformSampler(0, 0)))


# FedNTD.


def test_not_true_divergence_by_hand() -> None:
    """Class 1 is true; the teacher has 3 : 1 on the others, the student 1 : 1."""
    outputs = torch.tensor([[0.0, 9.0, 0.0]], dtype=torch.float64)
    taught = torch.tensor([[math.log(3), -4.0, 0.0]], dtype=torch.float64)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(not_true_divergence(outputs, taught, torch.tensor([1]), 1.0)) == pytest.approx(
        expected, abs=1e-12
    )


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(0.3, 4))
def test_not_true_divergence_against_a_loop(seed: int, temperature: float) -> None:
    outputs, taught = normal(4, 5, seed=seed), normal(4, 5, seed=seed + 1)
    labels = torch.tensor([0, 4, 2, 3])
    found = not_true_divergence(outputs, taught, labels, temperature)
    for row, label in enumerate(labels.tolist()):
        others = [c for c in range(5) if c != label]
        p = [math.exp(float(taught[row, c]) / temperature) for c in others]
        q = [math.exp(float(outputs[row, c]) / temperature) for c in others]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert float(found[row]) == pytest.approx(expected, abs=1e-10)


def test_not_true_gradient_is_zero_for_the_true_class_and_right_for_the_others() -> None:
    outputs, taught, labels = normal(4, 5).requires_grad_(), normal(4, 5, seed=1), torch.tensor([0, 4, 2, 3])
    assert gradcheck(lambda z: not_true_divergence(z, taught, labels, 2.0), outputs)
    (gradient,) = torch.autograd.grad(not_true_divergence(outputs, taught, labels, 2.0).sum(), outputs)
    assert torch.equal(gradient[range(4), labels], torch.zeros(4, dtype=torch.float64))
    assert (gradient != 0).sum() == 16


def test_not_true_divergence_ignores_the_true_class_and_shifts() -> None:
    """It is zero exactly where the softmaxes over the other classes agree."""
    taught, labels = normal(4, 5), torch.tensor([0, 4, 2, 3])
    outputs = taught + 3.0
    outputs[range(4), labels] = 50.0
    torch.testing.assert_close(not_true_divergence(outputs, taught, labels, 1.0), torch.zeros(4).double())
    outputs[0, 1] += 0.1
    assert float(not_true_divergence(outputs, taught, labels, 1.0)[0]) > 1e-4


def test_not_true_loss_of_tokens_and_by_finite_differences() -> None:
    outputs, taught, labels = normal(2, 3, 5), normal(2, 3, 5, seed=1), torch.tensor([[0, 4, 2], [3, 1, 0]])
    flat = not_true_divergence(outputs.flatten(0, 1), taught.flatten(0, 1), labels.flatten(), 1.0)
    assert torch.equal(not_true_divergence(outputs, taught, labels, 1.0).flatten(), flat)
    for name in parts().parameters:
        assert loss_gradcheck(
            FedNtdHalf(FedNtdParams(beta=3.0, temperature=2.0)), {"global": reference(1)}, name
        )


def test_fedntd_without_its_term_is_fedavg_and_its_first_step_too() -> None:
    plain = run("fedavg")
    assert equal(run("fedntd", beta=0.0), plain)
    some = run("fedntd", beta=2.0)
    assert not equal(some, plain)
    assert all(r.metrics["not-true-divergence"] > 0 for r in some.history if r.phase == "train")


# FedSAM.


def test_sam_step_by_hand() -> None:
    """In one dimension the ascent is rho to the side of the gradient: down for client 0, up for client 1."""
    strategy = toys.on_quadratics(FedSam(FedSamParams(rho=0.05)))
    moved = float(toys.quadratic_federation(strategy, 1, LocalParams(lr=0.1, batch_size=0)).run().model["w"])
    # Gradients at 0.3 are 0.3 and -2.1; at 0.35 and 0.25 they are 0.35 and -2.25.
    assert moved == pytest.approx(0.3 - 0.1 * (0.35 - 2.25) / 2, abs=1e-12)


def test_sam_gradient_is_that_at_the_worst_point_nearby() -> None:
    """Against a copy of the model that is really moved there."""
    model, x, y = parts(), normal(6, 4, seed=1), torch.tensor([0, 1, 2, 2, 1, 0])
    before = {n: p.detach().clone() for n, p in model.parameters.items()}

    def compute() -> tuple[Tensor, Mapping[str, Tensor]]:
        return Classification(3).loss(model(x), y).mean(), {}

    half = FedSamHalf(FedSamParams(rho=0.7))
    value, _, found = half.estimate(compute, model.parameters)
    assert all(torch.equal(p, before[n]) for n, p in model.parameters.items())
    plain = torch.autograd.grad(compute()[0], list(model.parameters.values()))
    assert torch.equal(value, compute()[0])
    norm = math.sqrt(sum(float((g**2).sum()) for g in plain))
    there = {
        n: (w + 0.7 * g / norm).requires_grad_() for (n, w), g in zip(before.items(), plain, strict=True)
    }
    outputs = ModelParts.functional(model.module, there, {})(x)
    expected = torch.autograd.grad(Classification(3).loss(outputs, y).mean(), list(there.values()))
    for name, gradient in zip(there, expected, strict=True):
        torch.testing.assert_close(found[name], gradient)


def test_sam_survives_a_zero_gradient() -> None:
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    unused = torch.ones(1, requires_grad=True)
    _, _, found = FedSamHalf(FedSamParams()).estimate(lambda: ((w**2).sum(), {}), {"w": w, "unused": unused})
    assert found["unused"] is None
    assert torch.equal(found["w"], torch.zeros(2, dtype=torch.float64))  # type: ignore[arg-type]
    assert isinstance(FedSamHalf(FedSamParams()).hooks(), Hooks)


def test_sam_without_a_radius_is_fedavg_bit_for_bit() -> None:
    plain = run("fedavg")
    assert equal(run("fedsam", rho=0.0), plain)
    assert not equal(run("fedsam", rho=0.1), plain)


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        (MoonParams, {"mu": -1.0}), (MoonParams, {"temperature": 0.0}), (FedNtdParams, {"beta": -1.0}),
        (FedNtdParams, {"temperature": 0.0}), (FedSamParams, {"rho": -0.1}), (FedSamParams, {"server_lr": 0.0}),
    ],
)  # fmt: skip
def test_bad_parameters_are_named(kind: type, bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"strategy\.{next(iter(bad))} is .*; give"):
        kind(**bad)
