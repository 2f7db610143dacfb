"""R-GAP: exact where the equations determine the input, honest where they do not, and refused elsewhere by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_attacks import SCALE, SIDE, images, observed

from flowerbed.clients.params import LocalParams
from flowerbed.datasets.augment import Scale
from flowerbed.errors import ConfigError
from flowerbed.models.base import ModelSpec
from flowerbed.strategies.attacks.recursive import Recursive

ONE = replace(SIDE, local=LocalParams(lr=1.0, batch_size=0, steps=1))  # type: ignore[type-var]
BARE = "attack_nets:leaky_without_bias"


@pytest.mark.parametrize(
    ("spec", "within"),
    [
        (ModelSpec("dlg_lenet", (1, 8, 8), 4), 1e-3),
        (ModelSpec("dlg_lenet", (3, 8, 8), 4, {"activation": "leaky_relu", "uniform": 0.0}), 0.05),
        (ModelSpec("mlp", (1, 8, 8), 4, {"hidden": [100, 80]}), 1e-3),
        (ModelSpec(BARE, (1, 8, 8), 5), 0.05),
    ],
    ids=["sigmoid", "leaky", "mlp", "no bias"],
)
def test_the_input_is_solved_for(spec: ModelSpec, within: float) -> None:
    side = replace(ONE, scale=Scale(SCALE.mean * spec.input_shape[0], SCALE.std * spec.input_shape[0]))
    x = images(1, spec.input_shape, seed=3)
    (found,) = Recursive().run([(observed(x, torch.tensor([1]), spec, lr=1.0), side)])
    assert float((found.x - x).abs().max()) < within
    assert found.labels.tolist() == [1]
    assert found.found["determined"] == [1.0] * len(found.found["determined"])
    assert found.cost < 1e-4


def test_what_is_not_determined_is_said() -> None:
    """16 places of 4x4 pixels, one kernel: 16 values and 16 weights for 256 pixels."""
    x = images(1, (1, 16, 16), seed=3)
    spec = ModelSpec("attack_nets:wide_stride", (1, 16, 16), 4)
    (found,) = Recursive().run([(observed(x, torch.tensor([1]), spec, lr=1.0), ONE)])
    assert found.found["determined"][-1] == pytest.approx(32 / 256, abs=1.1 / 256)
    assert float((found.x - x).abs().max()) > 0.5


def test_a_relu_hides_what_it_makes_zero() -> None:
    """The rows of units at 0 are left out; what remains is solved for, and the gradient is explained."""
    x = images(1, (1, 8, 8), seed=3)
    spec = ModelSpec(BARE, (1, 8, 8), 5, {"activation": "relu", "stride": 1})
    (found,) = Recursive().run([(observed(x, torch.tensor([1]), spec, lr=1.0), ONE)])
    assert float((found.x - x).abs().max()) < 0.1


def test_noise_shows_in_the_cost() -> None:
    x, spec = images(1, (1, 8, 8), seed=3), ModelSpec("dlg_lenet", (1, 8, 8), 4)
    seen = observed(x, torch.tensor([1]), spec, lr=1.0)
    rng = torch.Generator().manual_seed(0)
    noisy = {n: v + 0.05 * torch.randn(v.shape, generator=rng) for n, v in seen.returned.items()}
    (found,) = Recursive().run([(replace(seen, returned=noisy), ONE)])
    assert found.cost > 0.01


@pytest.mark.parametrize(
    ("spec", "batch", "sentence"),
    [
        (ModelSpec("dlg_lenet", (1, 8, 8), 4), 2, "one sample, and the update is that of 2"),
        (ModelSpec("resnet8", (1, 8, 8), 4), 1, "of the model 'resnet8' is a"),
        (ModelSpec("leaf_cnn", (1, 8, 8), 4), 1, "'body.* of the model 'leaf_cnn' is a"),
    ],
)
def test_what_it_cannot_go_through_is_named(spec: ModelSpec, batch: int, sentence: str) -> None:
    x, y = images(batch, spec.input_shape), torch.zeros(batch, dtype=torch.int64)
    with pytest.raises(ConfigError, match=sentence):
        Recursive().run([(observed(x, y, spec, lr=1.0), ONE)])
