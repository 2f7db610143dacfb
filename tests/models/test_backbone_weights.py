"""A run that starts from another task's backbone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flowerbed.errors import ConfigError
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.parts import build_parts
from flowerbed.models.base import ModelSpec


def test_the_backbone_is_the_files_and_the_head_is_drawn_as_always(tmp_path: Path) -> None:
    path = str(tmp_path / "model.safetensors")
    six = ModelSpec("mlp", (6,), 6, {"hidden": (5,)}).build(1)
    save_file(dict(six.state_dict()), path)
    four = ModelSpec("mlp", (6,), 4, {"hidden": (5,)}, weights=path, part="backbone").build(2)
    drawn = ModelSpec("mlp", (6,), 4, {"hidden": (5,)}).build(2)
    for name, value in four.state_dict().items():
        source = drawn if name.startswith("head.") else six
        assert torch.equal(value, source.state_dict()[name]), name
    with pytest.raises(ConfigError, match="has shape"):
        ModelSpec("mlp", (6,), 4, {"hidden": (5,)}, weights=path).build(2)
    with pytest.raises(ConfigError, match="those of another model"):
        ModelSpec("mlp", (6,), 4, {"hidden": (7,)}, weights=path, part="backbone").build(2)


def test_a_run_says_so_and_one_that_takes_everything_is_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    settings = {"dataset": "digits", "model": {"name": "mlp", "hidden": [5]}}
    source = build_parts(Simulation.of({**settings, "seed": 5}))
    save_file(source.model, str(path))
    asked = {"weights": str(path), "part": "backbone"}
    found = build_parts(Simulation.of({**settings, "initial": asked}))
    assert found.simulation.initial.part == "backbone"
    for name, value in found.model.items():
        assert torch.equal(value, source.model[name]) != name.startswith("head.")
    whole = build_parts(Simulation.of({**settings, "initial": {"weights": str(path)}})).simulation
    assert whole.identity != found.simulation.identity
    with pytest.raises(ConfigError, match="initial.part is 'head'"):
        Simulation.of({**settings, "initial": {"part": "head"}})
