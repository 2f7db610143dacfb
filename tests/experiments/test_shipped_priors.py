"""Priors that come with the package: readable, of the recipe that is here, and with more than one image a class."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from flowerbed.datasets.augment import Scale
from flowerbed.experiments.composition import compose_simulations
from flowerbed.experiments.leakage import fitness
from flowerbed.experiments.leakage.ship import MOST_BYTES
from flowerbed.experiments.parts import completed
from flowerbed.strategies.attacks.generative import Prior, shipped

SHAPES = {"fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32)}


def test_there_are_two() -> None:
    assert {"fashion_mnist", "cifar10"} <= set(shipped())


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_prior_says_how_it_was_made(name: str) -> None:
    path = shipped()[name]
    assert path.stat().st_size <= MOST_BYTES
    with safe_open(path, framework="pt") as file:
        told = file.metadata()
    (recipe,) = compose_simulations([f"experiment=prior_{name}"])
    assert told["config_hash"] == completed(recipe).identity
    assert (int(told["rounds"]), int(told["seed"])) == (recipe.federation.rounds, recipe.seed)


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_prior_has_classes_and_variety_within_them(name: str) -> None:
    shape = SHAPES[name]
    scale = Scale((0.5,) * shape[0], (0.5,) * shape[0])
    prior = Prior.load(name, shape, 10, scale, torch.device("cpu"))
    classes = torch.stack([fitness.samples(prior, label, 64, seed=0) for label in range(10)])
    assert classes.shape == (10, 64, *shape)
    # A collapsed one has 0.01 here, the data about 0.2.
    assert min(fitness.variety(one) for one in classes) > 0.04
    means = classes.mean(1).flatten(1)
    assert float(torch.pdist(means).min()) > 1
