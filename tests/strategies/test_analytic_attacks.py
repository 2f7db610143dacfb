"""Read-outs: exact where one sample reaches a row, and as many hits as the law of bins says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_attacks import SCALE, SIDE, images, observed
from torch import nn

from flowerbed.errors import ConfigError
from flowerbed.experiments.leakage import scoring
from flowerbed.models.base import ModelSpec
from flowerbed.models.imprint import Imprint
from flowerbed.strategies.attacks.analytic import BINS, READOUT

SHAPE = (1, 6, 6)


def test_one_sample_is_read_exactly() -> None:
    x, y = images(1, SHAPE), torch.tensor([1])
    spec = ModelSpec("mlp", SHAPE, 4, {"hidden": [16]})
    (found,) = READOUT.run([(observed(x, y, spec, lr=1.0), SIDE_OF_ONE)])
    torch.testing.assert_close(found.x, x, rtol=1e-3, atol=1e-3)
    assert found.labels.tolist() == [1]
    assert found.evaluations == 0


SIDE_OF_ONE = replace(SIDE, local=replace(SIDE.local, lr=1.0))  # type: ignore[type-var]


def test_the_imprint_layer_is_nearly_the_identity_and_has_equal_bins() -> None:
    layer = Imprint(SHAPE, 8, mean=0.3, std=0.2, leak=0.0)
    x = images(5, SHAPE)
    assert torch.equal(layer(x), x)
    h = 0.3 + 0.2 * torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    edges = -layer.rows.bias.detach()
    counts = torch.histc(torch.bucketize(h, edges).float(), bins=9, min=0, max=8)
    # Bin 0 is below all rows: its share is that of the first quantile, nearly nothing.
    assert float(counts[0]) / len(h) < 0.001
    torch.testing.assert_close(counts[1:] / len(h), torch.full((8,), 1 / 8), rtol=0, atol=0.004)


@pytest.mark.parametrize(("batch", "bins"), [(4, 16), (8, 16)])
def test_hits_follow_the_law_of_bins(batch: int, bins: int) -> None:
    """B (1 - 1/k)^(B - 1) samples are alone in their bin; those are copied, the others are not."""
    mean, std = 0.0, 1.0 / 6  # of 36 independent normal inputs
    spec = ModelSpec("imprinted", SHAPE, 4, {"bins": bins, "mean": mean, "std": std, "leak": 0.05})
    hits, alone, runs = 0, 0, 60
    for seed in range(runs):
        rng = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, *SHAPE, generator=rng)
        y = torch.randint(4, (batch,), generator=rng)
        case = (observed(x, y, spec, lr=1.0), replace(SIDE_OF_ONE, labels=y))
        (found,) = BINS.run([case])
        edges = -spec.build(0).state_dict()["body.imprint.rows.bias"]
        place = torch.bucketize(x.flatten(1).mean(1), edges)
        single = torch.bincount(place, minlength=bins + 1)[place] == 1
        gaps = (x[:, None] - found.x[None]).flatten(2).abs().amax(2).amin(1)
        near = gaps < 0.05
        assert bool((near == (single & (place > 0))).float().mean() > 0.9), seed
        hits, alone = hits + int(near.sum()), alone + int(single.sum())
    expected = batch * (1 - 1 / bins) ** (batch - 1)
    assert alone / runs == pytest.approx(expected, rel=0.12)
    assert hits / runs == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(("batch", "bins"), [(8, 16), (32, 64), (64, 64)])
def test_the_law_of_bins_is_the_expectation(batch: int, bins: int) -> None:
    """Against 4000 draws of equal bins, within four standard errors; and the edges of the layer make such bins."""
    rng = torch.Generator().manual_seed(batch + bins)
    h = torch.randn(4000, batch, generator=rng, dtype=torch.float64)
    layer = Imprint(SHAPE, bins, mean=0.0, std=1.0, leak=0.0)
    place = torch.bucketize(h, -layer.rows.bias.detach().double())
    counts = torch.zeros(4000, bins + 1).scatter_add(1, place, torch.ones_like(h).float())
    alone = (counts == 1).sum(1).double()
    expected = batch * (1 - 1 / bins) ** (batch - 1)
    error = float(alone.std()) / 4000**0.5
    assert abs(float(alone.mean()) - expected) < 4 * error < 0.1 * expected


def test_a_model_without_such_a_layer_is_refused() -> None:
    x, y = images(1), torch.tensor([1])
    with pytest.raises(ConfigError, match="has none in front"):
        READOUT.run([(observed(x, y), SIDE)])
    with pytest.raises(ConfigError, match=r"none called body\.imprint\.rows"):
        BINS.run([(observed(x, y), SIDE)])


def test_a_copy_is_a_hit() -> None:
    from flowerbed.experiments.leakage.truth import Truth
    from flowerbed.strategies.attacks.observation import Reconstruction

    x = images(2)
    truth = Truth(x, torch.tensor([0, 1]), torch.tensor([0, 1]))
    found = Reconstruction(torch.stack([x[0], x[1] + 0.5]), truth.y, 0.0)
    assert [i["hit"] for i in scoring.score(found, truth, SCALE).images] == [1.0, 0.0]


def test_models_with_an_imprint_train_like_others() -> None:
    net = ModelSpec("imprinted", SHAPE, 4).build(0)
    loss = nn.functional.cross_entropy(net(images(3, SHAPE)), torch.tensor([0, 1, 2]))
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())
