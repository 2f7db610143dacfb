"""QLAE: identities and pitfalls of the method and of its baselines."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import worlds
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed import seeds
from flowerbed.clients.data import ClientData
from flowerbed.clients.local_round import MODEL
from flowerbed.clients.params import LocalParams
from flowerbed.datasets.sources import load_dataset
from flowerbed.errors import ConfigError
from flowerbed.experiments.measures import Measured
from flowerbed.experiments.papers.qlae import (
    VALUES,
    AeHalf,
    AeParams,
    BioHalf,
    BioParams,
    Qlae,
    QlaeHalf,
    QlaeParams,
    TcvaeHalf,
    TcvaeParams,
    VqHalf,
    VqParams,
    decays,
    in_order,
    probes,
    total_correlation,
)
from flowerbed.experiments.papers.qlae.adversarial import InfoGanParams, network
from flowerbed.experiments.papers.qlae.probes import disentangled
from flowerbed.models.autoencoders import Autoencoder, Decoding, autoencoder
from flowerbed.models.base import ModelSpec
from flowerbed.models.disentanglement import InfoMec
from flowerbed.models.info import ModelInfo
from flowerbed.models.parts import ModelParts
from flowerbed.models.quantisers import ScalarCodebooks
from flowerbed.models.tasks import MeasuredTask
from flowerbed.strategies.base import ClientReply

NAME = "flowerbed.models.autoencoders:autoencoder"
SHAPE, TASK = (3, 8, 8), MeasuredTask(1)


def net_of(latent: str, seed: int = 0, **options: Any) -> Autoencoder:
    torch.manual_seed(seed)
    return autoencoder(SHAPE, 1, latent=latent, n_z=4, levels=5, hidden=(8,), **options)


def batch() -> dict[str, Tensor]:
    x = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(1))
    return {"x": x, "y": torch.zeros(6, dtype=torch.int64), "index": torch.arange(6)}


def value(half: AeHalf, net: nn.Module) -> Tensor:
    found, _ = half.loss(ModelParts.resident(net), batch(), {}, TASK)
    return found


def test_the_loss_is_that_of_the_paper() -> None:
    net, x = net_of("quantised"), batch()["x"]
    z, values = net.body(x), net.head.latent.values
    z_q = torch.stack([torch.stack([v[(v - s).abs().argmin()] for v, s in zip(values, row)]) for row in z])
    pixels = net.head(z_q).sigmoid()
    expected = -(x * pixels.log() + (1 - x) * (1 - pixels).log()).mean()
    expected = expected + (0.3 + 0.2) * (z - z_q).square().mean()
    torch.testing.assert_close(value(QlaeHalf(QlaeParams(l_q=0.3, l_c=0.2)), net), expected)


def test_the_values_are_moved_by_the_quantisation_loss_alone_and_the_encoder_by_the_rest() -> None:
    net = net_of("quantised")

    def gradients(**weights: float) -> dict[str, Tensor | None]:
        loss = value(QlaeHalf(QlaeParams(**weights)), net)
        names = dict(net.named_parameters())
        return dict(zip(names, torch.autograd.grad(loss, list(names.values()), allow_unused=True)))

    plain, pulled, held = (gradients(l_q=q, l_c=c) for q, c in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)))
    assert plain[VALUES] is not None
    assert not plain[VALUES].any()
    assert pulled[VALUES].any()
    assert not held[VALUES].any()
    for name, gradient in plain.items():
        if name.startswith("body"):
            torch.testing.assert_close(pulled[name], gradient)
            assert not torch.equal(held[name], gradient)
        if name.startswith("head.decoder"):
            torch.testing.assert_close(held[name], gradient)


def test_on_the_values_it_is_the_plain_autoencoder() -> None:
    """An encoder that says values already: nothing is lost, and all gradients of the weights agree."""

    class Rounded(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z + ((z * 4).round() / 4 - z).detach()

    plain = net_of("plain")
    plain.body.append(Rounded())
    books = ScalarCodebooks(4, 41)
    with torch.no_grad():
        books.values.copy_(torch.arange(-20, 21) / 4)
    quantised = Autoencoder(plain.body, Decoding(books, plain.head.decoder), 4)
    one, other = value(AeHalf(AeParams()), plain), value(QlaeHalf(QlaeParams()), quantised)
    torch.testing.assert_close(one, other)
    weights = [*plain.body.parameters(), *plain.head.decoder.parameters()]
    for a, b in zip(torch.autograd.grad(one, weights), torch.autograd.grad(other, weights)):
        torch.testing.assert_close(a, b)


def test_weights_decay_and_are_clipped_and_neither_biases_nor_codebooks() -> None:
    info = ModelInfo.of(net_of("quantised"))
    half = QlaeHalf(QlaeParams())
    expected = {n for n in info.parameters if n.endswith("weight")}
    assert half.decayed(info) == expected
    assert VALUES in info.parameters - expected
    large = {n: torch.full(info.shapes[n], 7.0) for n in info.parameters}
    for name, gradient in half.correct(large, {}, {}).items():
        assert (gradient == (1.0 if decays(name) else 7.0)).all()
    # Element by element: no entry's clipping shrinks another.
    mixed = {"body.1.weight": torch.tensor([[9.0, 0.5], [-9.0, -0.5]])}
    assert half.correct(mixed, {}, {})["body.1.weight"].tolist() == [[1.0, 0.5], [-1.0, -0.5]]


def test_a_step_without_gradients_shrinks_the_weights_by_lr_times_decay() -> None:
    class Still(QlaeHalf):
        def loss(self, model: ModelParts, *rest: Any) -> tuple[Tensor, dict[str, Tensor]]:  # type: ignore[override]
            return 0.0 * sum(p.sum() for p in model.parameters.values()), {}  # type: ignore[return-value]

    x = batch()["x"]
    spec = ModelSpec(NAME, SHAPE, 1, {"latent": "quantised", "n_z": 4, "hidden": (8,)})
    data = ClientData(x, torch.zeros(6, dtype=torch.int64), torch.arange(6), {})
    params = LocalParams(optimizer="adamw", lr=0.01, weight_decay=0.5, batch_size=0)
    local = worlds.open_round(params, spec=spec, data=data)
    before = local.parameters()
    Still(QlaeParams()).run(local)
    for name, now in local.parameters().items():
        torch.testing.assert_close(now, before[name] * ((1 - 0.01 * 0.5) if decays(name) else 1.0))


def test_total_correlation_is_that_of_its_mixture() -> None:
    """Against the densities themselves; factorised posteriors that are all alike have none."""
    rng = torch.Generator().manual_seed(0)
    mean, log_var, z = (torch.randn(7, 3, generator=rng, dtype=torch.float64) for _ in range(3))
    density = torch.distributions.Normal(mean, (0.5 * log_var).exp()).log_prob(z[:, None]).exp()
    joint, marginals = density.prod(2).mean(1), density.mean(1)
    expected = (joint / marginals.prod(1)).log().mean()
    torch.testing.assert_close(total_correlation(z, mean, log_var), expected)
    assert float(total_correlation(z, torch.zeros_like(z), torch.zeros_like(z))) == pytest.approx(
        0, abs=1e-12
    )


def test_beta_one_is_the_variational_autoencoder_per_pixel() -> None:
    net, x = net_of("gaussian"), batch()["x"]
    torch.manual_seed(3)
    found = value(TcvaeHalf(TcvaeParams(beta=1.0)), net)
    torch.manual_seed(3)
    mean, log_var = net.body(x).chunk(2, -1)
    posterior = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    z = mean + torch.randn_like(mean) * posterior.stddev
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
    summed = F.binary_cross_entropy_with_logits(net.head(z), x, reduction="none").flatten(1).sum(1)
    torch.testing.assert_close(found, (summed + kl).mean() / math.prod(SHAPE))


def test_the_losses_of_bioae_and_vqvae() -> None:
    net, x = net_of("plain"), batch()["x"]
    z = net.body(x)
    expected = F.binary_cross_entropy_with_logits(net.head(z), x)
    expected = expected + 2.0 * z.clamp_max(0).abs().mean() + 0.3 * (z**2).mean()
    torch.testing.assert_close(value(BioHalf(BioParams(nonnegative=2.0, activity=0.3)), net), expected)

    net = net_of("vectors", size=3)
    z, values = net.body(x), net.head.latent.values
    near = [torch.cat([values[(values - v).norm(dim=1).argmin()] for v in row.split(3)]) for row in z]
    z_q = torch.stack(near)
    expected = F.binary_cross_entropy_with_logits(net.head(z_q), x) + (1.0 + 0.25) * (z - z_q).square().mean()
    torch.testing.assert_close(value(VqHalf(VqParams(n_z=4, levels=5, size=3)), net), expected)


def test_codebooks_are_sorted_before_they_are_averaged() -> None:
    """Two clients with the same function and their values in another order keep that function."""
    net = net_of("quantised")
    model = {n: v.detach().clone() for n, v in net.state_dict().items()}
    turned = {**model, VALUES: model[VALUES].flip(1)}
    strategy = Qlae(QlaeParams(n_z=4, levels=5))
    replies = [ClientReply(i, {MODEL: m}, {"num-examples": 5}) for i, m in enumerate((model, turned))]
    worlds.close(strategy.aggregate(1, model, replies), model)
    assert torch.equal(in_order(turned)[VALUES], model[VALUES])
    # One client is the identity, whatever its order.
    assert worlds.equal(strategy.aggregate(1, model, replies[1:]), turned)


def test_many_clients_train_and_keep_their_codebooks_in_order() -> None:
    world = worlds.run(
        "flowerbed.experiments.papers.qlae:Qlae",
        {"n_z": 4, "levels": 5},
        dataset={
            "name": "flowerbed.datasets.mini_shapes:MiniShapes",
            "side": 8,
            "test": 100,
            "label": "shape",
        },
        data={"client_samples": 400},
        model={"name": NAME, "hidden": [8]},
        local={"optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.1},
        evaluation={"every": 0, "clients_every": 0, "measures": [f"{probes.__name__}:disentangled"]},
    )
    values = world.trained[VALUES]
    assert values.shape == (4, 5)
    assert torch.equal(values, values.sort(1).values)
    assert not torch.equal(values, ScalarCodebooks(4, 5).values.detach())


def test_the_measures_know_codes_from_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes are counted, numbers are not; an untrained network's pixels are a half, which says what the PSNR is."""
    data = load_dataset("flowerbed.datasets.mini_shapes:MiniShapes", side=8, test=60)
    seen: list[str] = []

    def noted(latents: Any, factors: Any) -> InfoMec:
        seen.append(latents.dtype.kind)
        return found(latents, factors)

    found = probes.infomec
    monkeypatch.setattr(probes, "infomec", noted)
    for latent, kinds in (("quantised", ["i"]), ("plain", ["f", "i"])):
        seen.clear()
        net = net_of(latent).eval()
        with torch.no_grad():
            last = net.head.decoder[-2]
            last.weight.zero_()
            last.bias.zero_()
        figures = disentangled(Measured(net, data, 0, torch.device("cpu")))
        assert seen == kinds
        error = (data.prepare(data.test.inputs) - 0.5).square().flatten(1).mean(1)
        assert figures["psnr"] == pytest.approx(float(-10 * error.log10().mean()), abs=1e-4)
        assert (figures["infom"] == figures["infom-binned"]) == (latent == "quantised")


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        (QlaeParams, {"levels": 1}, "strategy.levels is 1"),
        (QlaeParams, {"l_q": -1.0}, "strategy.l_q is -1.0"),
        (QlaeParams, {"n_z": 0}, "strategy.n_z is 0"),
        (AeParams, {"clip": -1.0}, "strategy.clip is -1.0"),
        (TcvaeParams, {"beta": -1.0}, "strategy.beta is -1.0"),
        (BioParams, {"activity": -1.0}, "strategy.activity is -1.0"),
        (VqParams, {"size": 0}, "strategy.size is 0"),
        (VqParams, {"learned": False}, "codebook of a VQ-VAE learns"),
        (InfoGanParams, {"gamma": -1.0}, "strategy.gamma is -1.0"),
        (InfoGanParams, {"period": 0}, "strategy.period is 0"),
        (InfoGanParams, {"learned": False}, "learns its codebooks"),
    ],
)
def test_wrong_parameters_are_refused(kind: type, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        kind(**options)


def test_a_model_without_codes_is_refused() -> None:
    data = load_dataset("flowerbed.datasets.mini_shapes:MiniShapes", side=8, test=60)
    with pytest.raises(ConfigError, match="the model is Linear"):
        disentangled(Measured(nn.Linear(2, 2), data, 0, torch.device("cpu")))
    with pytest.raises(ConfigError, match="not Linear"):
        network(ModelParts.resident(nn.Linear(2, 2)))


GAN_LOCAL = {
    "optimizer": "adamw",
    "lr": 0.01,
    "weight_decay": 0.1,
    "momentum": 1e-8,
    "beta2": 0.9,
    "steps": 4,
    "batch_size": 16,
    "drop_last": True,
    "persist": True,
}


def gan(quantised: bool, **settings: Any) -> worlds.World:
    return worlds.run(
        "flowerbed.experiments.papers.qlae.adversarial:InfoGan",
        {"n_z": 4, "levels": 5, "quantised": quantised, "mu": 20.0, "l_q": 0.3, "l_c": 0.2, "period": 3},
        dataset={"name": "flowerbed.datasets.mini_shapes:MiniShapes", "side": 8, "test": 100},
        data={"client_samples": 40},
        model={"name": NAME, "hidden": [8]},
        local=GAN_LOCAL,
        evaluation={"every": 0, "clients_every": 0},
        **settings,
    )


def gan_twin(net: Autoencoder, x: Tensor, quantised: bool, steps: int) -> None:
    """Train by the book: two AdamW, penalties image by image, the documented batches and streams."""
    reads = {n for n, _ in net.named_parameters() if n.startswith(("body.", "head.critic."))}
    named = dict(net.named_parameters())
    for name, parameter in named.items():
        if decays(name):
            parameter.register_hook(lambda g: g.clamp(-1.0, 1.0))
    optimizers, states = {}, {}
    for scope, moving in (("encoder", reads), ("generator", set(named) - reads)):
        groups = [
            {"params": [named[n] for n in named if n in moving and decays(n) == d], "weight_decay": 0.1 * d}
            for d in (True, False)
        ]
        optimizers[scope] = torch.optim.AdamW(groups, lr=0.01, betas=(1e-8, 0.9))
        with seeds.torch_stream(3, f"modules{scope}", 0):
            states[scope] = torch.get_rng_state()

    def drawn() -> Tensor:
        if not quantised:
            return torch.rand(16, 4)
        index = torch.randint(5, (16, 4))
        return torch.stack([net.head.latent.values[j][index[:, j]] for j in range(4)], 1)

    def read_back(fake: Tensor, z: Tensor) -> Tensor:
        said = net.body(fake)
        if not quantised:
            return 20.0 * F.mse_loss(said, z)
        z_q = net.head.latent.quantised(said)
        wrong = F.mse_loss(said + (z_q - said).detach(), z)
        return 20.0 * wrong + 0.3 * F.mse_loss(z_q, said.detach()) + 0.2 * F.mse_loss(said, z_q.detach())

    for step in range(steps):
        epoch, place = divmod(step, len(x) // 16)
        rows = torch.from_numpy(seeds.numpy_rng(3, "data order", 0, epoch).permutation(len(x)))
        real = x[rows[place * 16 : (place + 1) * 16]]
        for scope in ("encoder", "generator") if (step + 1) % 3 == 0 else ("encoder",):
            torch.set_rng_state(states[scope])
            z = drawn()
            fake = net.head(z).sigmoid()
            if scope == "encoder":
                z, fake = z.detach(), fake.detach()
                share = torch.rand(16, 1, 1, 1)
                loss = net.value(fake).mean() - net.value(real).mean() + read_back(fake, z)
                for one in share * real + (1 - share) * fake:
                    one.requires_grad_()
                    (slope,) = torch.autograd.grad(net.value(one[None])[0], one, create_graph=True)
                    loss = loss + 10.0 / 16 * (slope.norm() - 1) ** 2
            else:
                loss = read_back(fake, z) - net.value(fake).mean()
            states[scope] = torch.get_rng_state()
            net.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            for parameters in optimizers[scope].param_groups:
                for parameter in parameters["params"]:
                    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            optimizers[scope].step()


@pytest.mark.parametrize("quantised", [True, False])
def test_one_client_is_the_plain_training_of_an_infogan(quantised: bool) -> None:
    world = gan(quantised, federation={"clients": 1, "rounds": 2})
    parts = world.parts
    chosen = torch.from_numpy(parts.train.indices(0).copy())
    net = parts.spec.model.build(3)
    assert isinstance(net, Autoencoder)
    gan_twin(net, parts.dataset.prepare(parts.dataset.train.inputs[chosen]), quantised, 8)
    assert (VALUES in world.trained) == quantised
    worlds.close(world.trained, net.state_dict())


def test_many_clients_train_an_infogan_and_keep_their_codebooks_in_order() -> None:
    values = gan(True).trained[VALUES]
    assert torch.equal(values, values.sort(1).values)
    assert not torch.equal(values, ScalarCodebooks(4, 5).values.detach())
