"""Quantisers: nearest values, and where their gradients go."""

from __future__ import annotations

import pytest
import torch

from flowerbed.errors import ConfigError
from flowerbed.models.autoencoders import Autoencoder, autoencoder
from flowerbed.models.quantisers import (
    ScalarCodebooks,
    VectorCodebook,
    looked_up,
    nearest,
    nearest_vector,
    pulls,
    straight_through,
)


def test_every_dimension_has_values_of_its_own() -> None:
    values = torch.tensor([[0.0, 1.0, 2.0], [10.0, 0.0, -10.0]])
    z = torch.tensor([[0.4, 4.0], [1.6, 9.0], [0.5, -5.0]])
    index = nearest(z, values)
    # Halfway the first wins, here the one that stands first.
    assert index.tolist() == [[0, 1], [2, 0], [0, 1]]
    assert looked_up(index, values).tolist() == [[0.0, 0.0], [2.0, 10.0], [0.0, 0.0]]


def test_the_order_of_the_values_is_a_symmetry() -> None:
    rng = torch.Generator().manual_seed(0)
    values, z = torch.randn(3, 10, generator=rng), torch.randn(50, 3, generator=rng)
    other = values[:, torch.randperm(10, generator=rng)]
    assert torch.equal(looked_up(nearest(z, values), values), looked_up(nearest(z, other), other))


def test_the_gradient_passes_unchanged_to_z_and_never_reaches_the_values() -> None:
    books = ScalarCodebooks(3, 10)
    z = torch.randn(4, 3, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(lambda z: books(z).flatten(), z)
    assert torch.equal(jacobian.reshape(12, 12), torch.eye(12))
    books(z).sum().backward()
    assert books.values.grad is None
    assert torch.equal(z.grad, torch.ones(4, 3))
    assert torch.allclose(books(z), looked_up(books.codes(z), books.values))


def test_each_pull_moves_one_side() -> None:
    z, z_q = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    for loss, moved, still in zip(pulls(z, z_q), (z_q, z), (z, z_q), strict=True):
        first, other = torch.autograd.grad(loss, (moved, still), allow_unused=True)
        assert other is None
        torch.testing.assert_close(first, 2 * (moved - still).detach() / 12)
    assert torch.equal(straight_through(z, z_q), z + (z_q - z))


def test_vectors_go_to_the_nearest_one() -> None:
    codebook = torch.randn(7, 4)
    z = torch.randn(5, 6, 4)
    distances = (z[..., None, :] - codebook).square().sum(-1)
    assert torch.equal(nearest_vector(z, codebook), distances.argmin(-1))


def test_one_codebook_of_vectors_serves_all_latents() -> None:
    torch.manual_seed(0)
    book = VectorCodebook(4, 7)
    assert book.values.shape == (7, 4)
    assert float(book.values.detach().abs().max()) <= (3 / 4) ** 0.5
    z = torch.randn(5, 12, requires_grad=True)
    codes = [[int((part - book.values).norm(dim=1).argmin()) for part in row.split(4)] for row in z]
    assert book.codes(z).tolist() == codes
    expected = torch.stack([torch.cat([book.values[c] for c in row]) for row in codes])
    assert torch.equal(book.quantised(z), expected)
    torch.testing.assert_close(book(z), expected)
    book(z).sum().backward()
    assert book.values.grad is None
    assert torch.equal(z.grad, torch.ones(5, 12))
    with pytest.raises(ConfigError, match="quantises nothing"):
        VectorCodebook(4, 1)


def test_an_even_number_of_values_begins_at_both_ends() -> None:
    values = ScalarCodebooks(2, 10).values
    assert float(values.detach()[0, 0]) == -0.5
    assert float(values.detach()[1, -1]) == 0.5
    assert "values" not in dict(ScalarCodebooks(2, 10, learned=False).named_parameters())
    with pytest.raises(ConfigError, match="quantise nothing"):
        ScalarCodebooks(2, 1)


@pytest.mark.parametrize("nets", ["mlp", "style"])
@pytest.mark.parametrize("latent", ["plain", "gaussian", "quantised", "fixed", "vectors"])
def test_autoencoders_have_exchangeable_latents(latent: str, nets: str) -> None:
    torch.manual_seed(0)
    net = autoencoder((3, 32, 32), 1, latent=latent, n_z=4, levels=3, size=6, nets=nets, hidden=(8,))
    assert isinstance(net, Autoencoder)
    x = torch.rand(2, 3, 32, 32)
    assert net(x).shape == x.shape
    assert net.features(x).shape == (2, net.feature_dim)
    assert net.code(x).shape == (2, 24 if latent == "vectors" else 4)
    torch.testing.assert_close(net(x), net.head(net.code(x)))
    if latent in ("quantised", "fixed"):
        assert torch.isin(net.code(x).round(decimals=5), torch.tensor([-0.5, 0.0, 0.5])).all()


@pytest.mark.parametrize("nets", ["mlp", "style"])
def test_an_autoencoder_may_judge_images_one_by_one(nets: str) -> None:
    net = autoencoder((3, 32, 32), 1, n_z=4, nets=nets, hidden=(8,), critic=True)
    assert isinstance(net, Autoencoder)
    x = torch.rand(3, 3, 32, 32)
    assert net.value(x).shape == (3,)
    torch.testing.assert_close(net.value(x), torch.cat([net.value(one[None]) for one in x]))
    blind = autoencoder((3, 32, 32), 1, n_z=4, nets=nets, hidden=(8,))
    assert isinstance(blind, Autoencoder)
    with pytest.raises(ConfigError, match=r"model\.critic=true"):
        blind.value(x)


@pytest.mark.parametrize(
    ("shape", "options", "sentence"),
    [
        ((3, 16, 16), {"nets": "style"}, "multiples of 16 from 32 on, not 16x16"),
        ((3, 16, 16), {"nets": "cnn"}, "nets='cnn'"),
        ((3, 16, 16), {"latent": "odd"}, "latent='odd'"),
        ((3, 16, 16), {"n_z": 0}, "n_z=0"),
        ((3, 16, 16), {"hidden": ()}, "at least one layer"),
        ((16,), {}, "takes images"),
    ],
)
def test_wrong_options_are_refused(shape: tuple[int, ...], options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        autoencoder(shape, 1, **options)  # type: ignore[arg-type]
