"""A prior that comes with the package: only the generator, with what made it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flowerbed.datasets.augment import Scale
from flowerbed.errors import ConfigError
from flowerbed.experiments.leakage.ship import ship
from flowerbed.models.generators import Gan
from flowerbed.strategies.attacks import generative
from flowerbed.strategies.attacks.generative import Prior


def finished_run(folder: Path, width: int) -> Gan:
    torch.manual_seed(0)
    gan = Gan(1, 4, 5, 3, width)
    folder.mkdir()
    save_file({n: v.clone() for n, v in gan.state_dict().items()}, folder / "model.safetensors")
    told = {"config_hash": "abc", "seed": 3, "rounds": 2, "versions": {"torch": "2"}}
    (folder / "summary.json").write_text(json.dumps(told))
    return gan


def test_a_shipped_prior_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gan = finished_run(tmp_path / "run", 4)
    path = ship(tmp_path / "run", "mine", tmp_path / "weights")
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["config_hash"] == "abc"
        assert set(file.keys()) == set(gan.average.state_dict())
    monkeypatch.setattr(generative, "WEIGHTS", tmp_path / "weights")
    prior = Prior.load("mine", (1, 20, 20), 4, Scale(), torch.device("cpu"))
    z, y = torch.randn(2, 5), torch.tensor([1, 3])
    found = prior.generator.part(z, prior.generator.condition(y), 0, prior.generator.layers)
    torch.testing.assert_close(found, gan.average.eval()(z, y))


def test_a_large_prior_is_not_shipped(tmp_path: Path) -> None:
    finished_run(tmp_path / "run", 64)
    with pytest.raises(ConfigError, match="too many for the package"):
        ship(tmp_path / "run", "mine", tmp_path / "weights")
