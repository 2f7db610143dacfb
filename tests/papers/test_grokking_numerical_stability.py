"""perpGrad and StableMax: the projection, the precision that is asked for, the order of hooks and decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import worlds
from torch import Tensor
from torch.nn import functional as F

from flowerbed.clients.params import LocalParams
from flowerbed.errors import ConfigError
from flowerbed.experiments.papers.grokking_numerical_stability import (
    COLLAPSED,
    StabilityHalf,
    StabilityParams,
    perpendicular,
)
from flowerbed.experiments.papers.grokking_numerical_stability.probes import mlp, transformer
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Classification

STRATEGY = "flowerbed.experiments.papers.grokking_numerical_stability:Stability"


def pair(shape: tuple[int, ...] = (5, 7)) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(4)
    return (torch.randn(shape, generator=rng), torch.randn(shape, generator=rng))


def test_the_projection_is_perpendicular_and_keeps_the_norm() -> None:
    g, w = pair()
    plain, scaled = perpendicular(g, w, False), perpendicular(g, w, True)
    for found in (plain, scaled):
        assert abs(float((found * w).sum())) < 1e-6 * float(found.norm() * w.norm())
        # Still a descent direction.
        assert float((found * g).sum()) > 0
    assert float(scaled.norm()) == pytest.approx(float(g.norm()), rel=1e-6)
    # Pythagoras: what was taken away is the part along w.
    along = float((g * w).sum() / w.norm())
    assert float(plain.square().sum()) == pytest.approx(float(g.square().sum()) - along**2, rel=1e-5)


def test_by_hand() -> None:
    g, w = torch.tensor([3.0, 4.0]), torch.tensor([2.0, 0.0])
    assert perpendicular(g, w, False).tolist() == [0.0, 4.0]
    assert perpendicular(g, w, True).tolist() == [0.0, 5.0]


def test_rounding_is_no_direction() -> None:
    """A tensor of one element, or a gradient along the weights, would come back as noise at full length."""
    _, w = pair()
    assert not perpendicular(1e3 * w, w, True).any()
    for g in torch.linspace(0.1, 9, 50):
        assert not perpendicular(g[None], torch.tensor([0.3]), True).any()
    zero = torch.zeros_like(w)
    assert torch.equal(perpendicular(w, zero, True), w)
    assert not perpendicular(zero, w, True).any()


def test_the_projection_is_per_tensor_not_global() -> None:
    half = StabilityHalf(StabilityParams(gradient="perp"))
    (g1, w1), (g2, w2) = pair((3,)), pair((4, 2))
    found = half.correct({"a": g1, "b": g2}, {"a": w1, "b": w2}, {})
    assert abs(float((found["a"] * w1).sum())) < 1e-5
    assert abs(float((found["b"] * w2).sum())) < 1e-5


def test_a_step_of_perp_sgd_only_grows_norms() -> None:
    """||w - lr g_perp||^2 = ||w||^2 + lr^2 ||g_perp||^2."""
    local = worlds.open_round(LocalParams(batch_size=0, lr=0.1), dtype=torch.float64)
    before = local.parameters()
    StabilityHalf(StabilityParams(gradient="perp", precision="float64")).run(local)
    for name, w in before.items():
        step = local.parts.parameters[name].detach() - w
        assert step.norm() > 0
        torch.testing.assert_close(
            local.parts.parameters[name].detach().square().sum(), w.square().sum() + step.square().sum()
        )


def test_plain_in_float32_is_fedavg_to_rounding_with_no_hook() -> None:
    assert StabilityHalf(StabilityParams()).hooks().correct is None
    assert StabilityHalf(StabilityParams(gradient="perp")).hooks().correct is not None
    sections = {"federation": {"clients": 2, "rounds": 2}}
    worlds.close(
        worlds.run(STRATEGY, {}, **sections).result.model, worlds.run("fedavg", **sections).result.model
    )


def test_decoupled_decay_is_not_projected_away() -> None:
    """Along w only the decay acts: after a step w . w_new is (1 - lr decay) w . w."""
    local = worlds.open_round(
        LocalParams(optimizer="adamw", batch_size=0, lr=1e-2, weight_decay=5.0), dtype=torch.float64
    )
    half = StabilityHalf(StabilityParams(gradient="perp", precision="float64"))
    seen: dict[str, Tensor] = {}

    def correct(gradients: Any, parameters: Any, extras: Any) -> Any:
        seen.update(StabilityHalf.correct(half, gradients, parameters, extras))
        return {n: torch.zeros_like(g) for n, g in seen.items()}

    half.correct = correct  # type: ignore[method-assign]
    before = local.parameters()
    half.run(local)
    for name, w in before.items():
        assert abs(float((seen[name] * w).sum())) < 1e-10
        torch.testing.assert_close(local.parts.parameters[name].detach(), w * (1 - 1e-2 * 5.0))


@pytest.mark.parametrize("precision", ["float16", "float32", "float64"])
def test_the_share_of_collapsed_samples_is_in_the_precision_of_the_loss(precision: str) -> None:
    """Gaps of 5, 10, 20 and 40 collapse beyond 7.6, 16.6 and 36.7."""
    gaps = torch.tensor([5.0, 10.0, 20.0, 40.0])
    logits = torch.stack([gaps, torch.zeros(4)], 1).requires_grad_()
    half = StabilityHalf(StabilityParams(precision=precision))
    batch = {"x": logits, "y": torch.zeros(4, dtype=torch.int64)}
    value, found = half.loss(ModelParts.resident(torch.nn.Identity()), batch, {}, Classification(2))
    share = {"float16": 0.75, "float32": 0.5, "float64": 0.25}[precision]
    assert float(found[COLLAPSED]) == share
    (gradient,) = torch.autograd.grad(value, logits)
    assert float((gradient[:, 0] == 0).float().mean()) == share


def test_the_network_is_homogeneous_without_biases() -> None:
    """Logits scale by c^3 for weights scaled by c: the direction in which descent is free."""
    torch.manual_seed(0)
    net, x = mlp((6,), 4, width=8).double(), torch.randn(5, 6, dtype=torch.float64)
    before = net(x)
    assert all(p.ndim == 2 for p in net.parameters())
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    torch.testing.assert_close(net(x), before * 1.5**3)
    y = F.one_hot(before.argmax(1), 4).argmax(1)
    assert F.cross_entropy(net(x), y) < F.cross_entropy(before, y)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"loss": "mse"}, "strategy.loss is 'mse'"),
        ({"precision": "float8"}, "float8"),
        ({"gradient": "sharp"}, "strategy.gradient is 'sharp'"),
        ({"variant": "coded"}, "strategy.variant is 'coded'"),
    ],
)
def test_wrong_parameters_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        StabilityParams(**options)


def test_the_transformer_does_not_know_which_operand_comes_first() -> None:
    """It has no positions: a + b and b + a are one question, and its answer depends on both."""
    p = 7
    net = transformer((2 * p,), p, width=8, heads=2, feedforward=16).eval()
    a, b = F.one_hot(torch.arange(p), p).float(), F.one_hot((torch.arange(p) * 3 + 1) % p, p).float()
    outputs = net(torch.cat([a, b], 1))
    torch.testing.assert_close(outputs, net(torch.cat([b, a], 1)))
    assert not torch.allclose(outputs, net(torch.cat([a, a], 1)))
    with pytest.raises(ConfigError, match="two one-hot operands below 7 and the inputs have 13 numbers"):
        transformer((13,), p)
