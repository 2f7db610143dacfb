"""MSBReg: identities of its three terms, and what the target does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import worlds
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.clients.data import ClientData
from flowerbed.clients.local_round import LocalRound
from flowerbed.clients.momentum import MomentumModel, cosine_tau
from flowerbed.clients.params import LocalParams
from flowerbed.datasets.sources import load_dataset
from flowerbed.errors import ConfigError
from flowerbed.experiments.measures import Measured
from flowerbed.experiments.papers.msbreg import (
    TARGET,
    VIEWS,
    MsbHalf,
    MsbParams,
    flatness,
    kick,
    pulled,
    unit,
)
from flowerbed.experiments.papers.msbreg.probes import embedder, probed
from flowerbed.models.base import ModelSpec
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import MeasuredTask
from flowerbed.seeds import torch_rng

MSB = "flowerbed.experiments.papers.msbreg:Msb"
MODEL = "flowerbed.experiments.papers.msbreg.probes:embedder"
DIGITS = {"name": "flowerbed.datasets.unlabelled:Unlabelled", "of": "digits"}
SECTIONS: dict[str, Any] = {
    "dataset": DIGITS,
    "data": {"client_samples": 160},
    "model": {"name": MODEL, "d": 4, "hidden": 8},
    "partition": {"name": "iid"},
    "local": {"batch_size": 16, "optimizer": "adam", "lr": 1e-3, "drop_last": True, "persist": True},
    "evaluation": {
        "every": 0,
        "clients_every": 0,
        "measures": ["flowerbed.experiments.papers.msbreg.probes:probed"],
    },
}


def sphere(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=rng, dtype=torch.float64), dim=-1)


def opened(**options: Any) -> tuple[MsbHalf, LocalRound]:
    x = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    spec = ModelSpec(MODEL, (1, 8, 8), 10, {"d": 4, "hidden": 8})
    params = LocalParams(batch_size=10, lr=0.05, persist=True)
    data = ClientData(x, torch.zeros(20, dtype=torch.int64), torch.arange(20), {})
    return MsbHalf(MsbParams(**options)), worlds.open_round(params, spec=spec, data=data)


def test_the_pull_vanishes_where_all_views_are_the_targets_centroid_and_there_alone() -> None:
    aim = sphere(3, 5, 4)
    c = F.normalize(aim.mean(0), dim=1)
    assert float(pulled(c.expand(3, 5, 4), aim, "view_to_centroid")) == pytest.approx(0, abs=1e-12)
    assert float(pulled(c.expand(3, 5, 4), aim, "centroid_to_centroid")) == pytest.approx(0, abs=1e-12)
    assert float(pulled(sphere(3, 5, 4, seed=1), aim, "view_to_centroid")) > 0.1
    q = sphere(3, 5, 4, seed=2)
    torch.testing.assert_close(pulled(q, aim, "view_to_centroid"), (q - c).square().sum(-1).mean())


def test_the_two_pulls_differ_by_the_variance_of_the_views() -> None:
    q, aim = sphere(4, 6, 5), sphere(4, 6, 5, seed=1)
    variance = (q - q.mean(0)).square().sum(-1).mean()
    difference = pulled(q, aim, "view_to_centroid") - pulled(q, aim, "centroid_to_centroid")
    torch.testing.assert_close(difference, variance)


def test_pairs_are_byols_loss_of_every_two_views() -> None:
    q, aim = sphere(3, 6, 5), sphere(3, 6, 5, seed=1)
    pairs = [(q[v] - aim[u]).square().sum(1).mean() for v in range(3) for u in range(3) if u != v]
    torch.testing.assert_close(pulled(q, aim, "pairs"), torch.stack(pairs).mean())


@pytest.mark.parametrize("form", ["spectrum", "frobenius"])
def test_an_orthonormal_cloud_is_flat(form: str) -> None:
    """Unit vectors along both directions of every axis have no mean, and equal singular values."""
    axes = torch.eye(6, dtype=torch.float64)
    assert float(flatness(torch.cat([axes, -axes]), form)) == pytest.approx(0, abs=1e-12)


def test_the_mean_takes_one_singular_value_and_that_does_not_count() -> None:
    """N = d orthonormal vectors: less their mean, N - 1 singular values of 1 are left."""
    assert float(flatness(torch.eye(6, dtype=torch.float64))) == pytest.approx(0, abs=1e-12)
    assert float(flatness(torch.eye(6, dtype=torch.float64), "barrier")) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("form", ["spectrum", "frobenius", "barrier"])
def test_all_forms_are_least_at_the_flat_spectrum(form: str) -> None:
    """From any cloud of unit vectors, descent ends where all singular values are 1."""
    raw = torch.randn(24, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    raw = (raw * torch.tensor([1, 0.5, 0.3, 0.2]) + torch.tensor([1.0, 0, 0, 0])).requires_grad_()
    for _ in range(400):
        (g,) = torch.autograd.grad(flatness(F.normalize(raw, dim=1), form), raw)
        with torch.no_grad():
            raw -= 2.0 * g
    z = F.normalize(raw.detach(), dim=1)
    sigma = torch.linalg.svdvals(z - z.mean(0)) * (4 / 24) ** 0.5
    torch.testing.assert_close(sigma, torch.ones_like(sigma), atol=0.02, rtol=0)


def test_the_gradient_of_the_spectrum_is_finite_where_singular_values_coincide() -> None:
    axes = torch.cat([torch.eye(4), -torch.eye(4)]).double().requires_grad_()
    (g,) = torch.autograd.grad(flatness(0.9 * axes), axes)
    assert g.isfinite().all()
    rough = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(flatness, (rough,))


def test_kicks_have_no_mean_and_variance_one_over_d() -> None:
    z, d = sphere(1, 4, 8), 8
    torch.manual_seed(0)
    found = torch.stack([kick(z) for _ in range(8000)])
    assert float(found.mean()) == pytest.approx(0, abs=4 * (1 / (4 * d) / 8000) ** 0.5)
    # A mean over four images with vectors of their own.
    assert float(found.var()) == pytest.approx(1 / (4 * d), rel=0.06)


def test_views_of_an_image_are_kicked_alike_and_images_apart() -> None:
    z = sphere(2, 5, 3).requires_grad_()
    torch.manual_seed(0)
    (g,) = torch.autograd.grad(kick(z), z)
    torch.testing.assert_close(g[0], g[1])
    torch.testing.assert_close((10 * g[0]).norm(dim=1), torch.ones(5, dtype=torch.float64))
    assert not torch.allclose(g[0, 0], g[0, 1])


def test_the_loss_is_the_sum_of_its_terms() -> None:
    half, local = opened(lambda_s=0.7, lambda_b=0.3, views=3)
    extras = half.begin(local)
    batch = half.batches(local)(0)
    torch.manual_seed(5)
    found, said = half.loss(local.parts, batch, extras, MeasuredTask(10))
    raw = local.parts.features(batch[VIEWS].flatten(0, 1))
    z = unit(raw, 3)
    torch.manual_seed(5)
    expected = pulled(z, z.detach(), "view_to_centroid")
    expected = expected + 0.7 * flatness(F.normalize(z.mean(0), dim=1)) + 0.3 * kick(z)
    torch.testing.assert_close(found, expected)
    assert set(said) == {"pull", "singular"}


def test_nothing_reaches_the_target_but_by_following() -> None:
    half, local = opened(views=2, tau=0.9, lambda_b=0.0)
    start = {n: v.clone() for n, v in local.parts.parameters.items()}
    weights: list[dict[str, Tensor]] = []

    class Watched(MsbHalf):
        def after_step(self, step: Any) -> None:
            super().after_step(step)
            weights.append({n: v.detach().clone() for n, v in step.parts.parameters.items()})

    Watched(half.params).run(local)
    expected = {n: v.detach() for n, v in start.items()}
    for seen in weights:
        expected = {n: 0.9 * v + 0.1 * seen[n] for n, v in expected.items()}
    worlds.close(dict(local.state[f"momentum {TARGET}"]), expected)


def test_the_ramp_of_tau_goes_by_the_clock_of_the_run() -> None:
    half, local = opened(views=2, tau=0.5, ramp="cosine")
    seen: list[float] = []

    class Noted(MomentumModel):
        def follow(self, model: ModelParts, tau: float) -> None:
            seen.append(tau)

    class Watched(MsbHalf):
        def begin(self, local: LocalRound) -> Any:
            extras = super().begin(local)
            return {**extras, TARGET: Noted(extras[TARGET].tensors)}

    Watched(half.params).run(local)
    # Five rounds of two steps, of which this is the first.
    assert seen == pytest.approx([cosine_tau(0.5, 0, 10), cosine_tau(0.5, 1, 10)])


def test_views_differ_and_come_from_the_clients_own_streams() -> None:
    half, local = opened(views=3)
    batch = half.batches(local)(1)
    assert batch[VIEWS].shape == (3, 10, 1, 8, 8)
    assert not torch.equal(batch[VIEWS][0], batch[VIEWS][1])
    from flowerbed.datasets.views import ssl_view

    expected = ssl_view(batch["x"], torch_rng(0, "view 2", 0, 1), scale=local.train_data.scale)
    assert torch.equal(batch[VIEWS][2], expected)


def test_with_a_frozen_target_and_no_regularisers_it_is_regression_on_the_centroids() -> None:
    half, local = opened(lambda_s=0.0, lambda_b=0.0, views=2, tau=1.0)
    aim = MomentumModel.open(local, TARGET)
    # The twin starts from the same weights and is told its targets.
    net = local.parts.module
    twin = ModelSpec(MODEL, (1, 8, 8), 10, {"d": 4, "hidden": 8}).build(1)
    twin.load_state_dict(net.state_dict())
    batches = [half.batches(local)(step)[VIEWS] for step in range(2)]
    still = ModelSpec(MODEL, (1, 8, 8), 10, {"d": 4, "hidden": 8}).build(1)
    still.load_state_dict(aim.tensors)
    half.run(local)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    for views in batches:
        with torch.no_grad():
            c = F.normalize(unit(still.body(views.flatten(0, 1)), 2).mean(0), dim=1)
        optimizer.zero_grad()
        (unit(twin.body(views.flatten(0, 1)), 2) - c).square().sum(-1).mean().backward()
        optimizer.step()
    worlds.close({n: v.detach() for n, v in local.model.state_dict().items()}, dict(twin.state_dict()))


def test_clients_keep_targets_of_their_own_and_the_server_can_keep_one() -> None:
    own = worlds.run(MSB, {"views": 2, "tau": 0.5}, **SECTIONS)
    targets = [own.state(k)[f"momentum {TARGET}"] for k in range(4)]
    assert not worlds.equal(targets[0], targets[1])
    served = worlds.run(MSB, {"views": 2, "tau": 0.5, "target": "server"}, **SECTIONS)
    assert f"momentum {TARGET}" not in served.state(0)
    kept = served.parts.strategy.state[TARGET]
    one = worlds.run(
        MSB,
        {"views": 2, "tau": 0.5, "target": "server"},
        **{**SECTIONS, "federation": {"clients": 4, "rounds": 1}},
    )
    start = one.parts.model
    first = {n: 0.5 * start[n] + 0.5 * one.trained[n] for n in start}
    worlds.close(one.parts.strategy.state[TARGET], first)
    worlds.close(kept, {n: 0.5 * v + 0.5 * served.trained[n] for n, v in first.items()})


def test_probes_look_at_the_encoder_and_at_the_embeddings() -> None:
    """An encoder of constants tells nothing, wherever the projector puts it."""
    data = load_dataset(DIGITS["name"], of="digits")
    torch.manual_seed(0)
    net = embedder((1, 8, 8), 10, d=4, hidden=8).eval()
    figures = probed(Measured(net, data, 0, torch.device("cpu")))
    assert figures["probe"] > 0.6
    assert figures["rank-share"] == pytest.approx(figures["effective-rank"] / 4)
    for parameter in net.body[0].parameters():
        nn.init.zeros_(parameter)
    dead = probed(Measured(net, data, 0, torch.device("cpu")))
    assert dead["probe"] < 0.2
    assert dead["spread"] == pytest.approx(0, abs=1e-6)


def test_the_models_that_arms_ask_for() -> None:
    batch = embedder((1, 8, 8), 10, projector="batch", predictor=True)
    assert sum(isinstance(m, nn.BatchNorm1d) for m in batch.modules()) == 2
    plain = embedder((1, 8, 8), 10)
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in plain.modules())
    named = embedder((3, 16, 16), 10, encoder="resnet8", norm="gn", d=5)
    assert named(torch.rand(2, 3, 16, 16)).shape == (2, 5)
    assert math.isclose(
        float(unit(named(torch.rand(2, 3, 16, 16)), 1)[0, 0].norm().detach()), 1, rel_tol=1e-5
    )
    with pytest.raises(ConfigError, match="projector='none'"):
        embedder((1, 8, 8), 10, projector="none")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lambda_s": -1.0}, "strategy.lambda_s is -1.0"),
        ({"lambda_b": -1.0}, "strategy.lambda_b is -1.0"),
        ({"views": 0}, "strategy.views is 0"),
        ({"tau": 1.5}, "strategy.tau is 1.5"),
        ({"pull": "x"}, "strategy.pull is 'x'"),
        ({"form": "x"}, "strategy.form is 'x'"),
        ({"ramp": "x"}, "strategy.ramp is 'x'"),
        ({"target": "x"}, "strategy.target is 'x'"),
        ({"pull": "pairs", "views": 1}, "at least 2"),
    ],
)
def test_wrong_parameters_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        MsbParams(**options)
