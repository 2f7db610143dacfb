"""Frozen encoders and the embeddings they make: formulas, caching, what they may see, and what is refused."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flowerbed.clients.embeddings import embedded
from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.errors import ConfigError
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.parts import build_parts
from flowerbed.models.encoders import (
    CONTRAST_FLOOR,
    Normalised,
    PatchEncoder,
    encode,
    fit_patch_encoder,
    frozen,
    load_weights,
    timm_encoder,
)

CPU = torch.device("cpu")


def images(n: int = 40, side: int = 8, channels: int = 1) -> torch.Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(0))


def test_patch_similarities_are_their_formula() -> None:
    """Patch by patch, without convolutions."""
    rng = torch.Generator().manual_seed(1)
    filters = torch.randn(3, 2, 3, 3, generator=rng, dtype=torch.float64)
    filters -= filters.mean((1, 2, 3), keepdim=True)
    offset = torch.randn(3, generator=rng, dtype=torch.float64)
    x = images(2, 6, 2).double()
    found = PatchEncoder(filters, offset, 0.25).double()(x)
    maps = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    for n in range(2):
        for i in range(4):
            for j in range(4):
                patch = x[n, :, i : i + 3, j : j + 3].flatten()
                whole = (patch - patch.mean()) / (patch.var(unbiased=False) + CONTRAST_FLOOR).sqrt()
                maps[n, :, i, j] = (filters.flatten(1) @ whole - offset - 0.25).clamp(min=0)
    quadrants = [maps[:, :, i : i + 2, j : j + 2].mean((2, 3)) for i in (0, 2) for j in (0, 2)]
    torch.testing.assert_close(found, torch.stack(quadrants, 2).flatten(1))


def test_a_fitted_encoder_is_standardised_frozen_and_a_function_of_its_seed() -> None:
    x = images()
    one, same, other = (fit_patch_encoder(x, s, patch=3, atoms=6, patches=500, rounds=3) for s in (0, 0, 1))
    z = encode(frozen(one), x, CPU)
    assert z.shape == (40, 24)
    torch.testing.assert_close(z.mean(0), torch.zeros(24), atol=1e-4, rtol=0)
    used = z.std(0) > 0.5
    torch.testing.assert_close(z.std(0)[used], torch.ones(int(used.sum())), atol=1e-4, rtol=0)
    assert torch.equal(one.filters, same.filters)
    assert not torch.equal(one.filters, other.filters)
    assert not any(p.requires_grad for p in one.parameters())


def test_an_embedding_does_not_depend_on_its_neighbours() -> None:
    x = images(70)
    encoder = frozen(fit_patch_encoder(x, 0, patch=3, atoms=6, patches=500, rounds=2))
    together = encode(encoder, x, CPU)
    for i in (0, 33, 69):
        torch.testing.assert_close(encode(encoder, x[i : i + 1], CPU)[0], together[i], rtol=1e-5, atol=1e-5)


def test_what_is_no_vector_is_refused() -> None:
    with pytest.raises(ConfigError, match="one finite vector"):
        encode(nn.Identity(), images(2), CPU)
    with pytest.raises(ConfigError, match="not finite"):
        encode(nn.Sequential(nn.Flatten(), Nan()), images(2), CPU)


class Nan(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float("nan")


def test_normalised_expects_what_it_says() -> None:
    module = Normalised(nn.Flatten(), (0.5, 0.25, 0.0), (0.5, 0.5, 1.0), size=4)
    x = torch.full((2, 1, 8, 8), 0.75)
    found = module(x).reshape(2, 3, 16)
    torch.testing.assert_close(found, torch.tensor([0.5, 1.0, 0.75]).reshape(1, 3, 1).expand(2, 3, 16))


def tiny(n: int = 12) -> Dataset:
    rng = np.random.default_rng(0)
    split = Split(torch.from_numpy(rng.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8)), torch.arange(n) % 2)
    return Dataset("tiny", split, split, ("a", "b"), (0.5,), (0.5,))


class Once(nn.Module):
    """Counts how often it encodes."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Once.calls += 1
        return x.flatten(1)


def test_embeddings_are_made_once_and_keep_labels_and_extras(tmp_path: Path) -> None:
    data = tiny()
    first = embedded(data, Once, CPU, tmp_path / "key")
    calls = Once.calls
    again = embedded(data, Once, CPU, tmp_path / "key")
    assert Once.calls == calls == 2
    torch.testing.assert_close(first.train.inputs, data.train.inputs.flatten(1) / 255)
    assert torch.equal(first.train.inputs, again.train.inputs)
    assert torch.equal(again.prepare(again.train.inputs), again.train.inputs), "neither scaled nor shifted"
    marked = Split(data.train.inputs, data.train.labels, {"labelled": torch.arange(12) < 3})
    third = embedded(
        Dataset("tiny", marked, data.test, ("a", "b"), (0.5,), (0.5,)), Once, CPU, tmp_path / "key"
    )
    assert torch.equal(third.train.extras["labelled"], marked.extras["labelled"])


def test_damaged_embeddings_are_made_again_by_the_encoder(tmp_path: Path) -> None:
    data = tiny()
    whole = embedded(data, Once, CPU, tmp_path / "key")
    largest = max((tmp_path / "key").glob("*.npy"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-8])
    again = embedded(data, Once, CPU, tmp_path / "key")
    assert torch.equal(again.train.inputs, whole.train.inputs)
    assert again.train.inputs.shape == (12, data.train.inputs[0].numel())


def parts(encoder: Any, tmp_path: Path, **sections: Any) -> Any:
    base: dict[str, Any] = {"encoder": encoder, "grid": {"device": "cpu"}, "federation": {"clients": 2}}
    base["data"] = {"cache": str(tmp_path), **sections.pop("data", {})}
    return build_parts(Simulation.of({**base, **sections}))


def test_an_encoder_sees_the_server_s_samples_alone(tmp_path: Path) -> None:
    """Labels and images of clients change nothing about it; who holds what stays as it was."""
    found = parts({"name": "patches", "patch": 3, "atoms": 4}, tmp_path, data={"server_per_class": 5})
    assert found.dataset.input_shape == (16,)
    assert found.spec.model.name == "linear"
    held = np.concatenate([found.train.indices(k) for k in range(2)])
    assert len(held) == len(found.dataset.train) - 50
    mine = found.dataset.train.inputs[np.setdiff1d(np.arange(len(found.dataset.train)), held)]
    torch.testing.assert_close(mine.mean(0), torch.zeros(16), atol=1e-4, rtol=0)
    assert len(list((tmp_path / "embeddings").glob("digits-patches-*"))) == 1
    again = parts({"name": "patches", "patch": 3, "atoms": 4}, tmp_path, data={"server_per_class": 5})
    assert torch.equal(again.dataset.train.inputs, found.dataset.train.inputs)
    parts({"name": "patches", "patch": 3, "atoms": 4}, tmp_path, data={"server_per_class": 6})
    assert len(list((tmp_path / "embeddings").glob("digits-patches-*"))) == 2


@pytest.mark.parametrize("task", ["rotation", "labels"])
def test_a_trained_encoder_moves_and_freezes(task: str, tmp_path: Path) -> None:
    encoder = {"name": "trained", "model": "mlp", "options": {"hidden": [12]}, "task": task, "epochs": 2}
    found = parts(encoder, tmp_path, data={"server_per_class": 20}, model={"name": "mlp", "hidden": [5]})
    assert found.dataset.input_shape == (12,)
    assert found.spec.model.name == "mlp"
    other = parts({**encoder, "epochs": 1}, tmp_path, data={"server_per_class": 20})
    assert not torch.equal(found.dataset.train.inputs, other.dataset.train.inputs)


def test_a_zoo_model_with_weights_from_a_file(tmp_path: Path) -> None:
    from flowerbed.models.base import ModelSpec

    model = ModelSpec("mlp", (1, 8, 8), 10, {"hidden": (7,)}).build(3)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    encoder = {
        "name": "zoo",
        "model": "mlp",
        "options": {"hidden": [7]},
        "weights": str(tmp_path / "weights.pt"),
    }
    found = parts(encoder, tmp_path)
    raw = build_parts(Simulation.of({"grid": {"device": "cpu"}})).dataset
    with torch.no_grad():
        expected = model.body(raw.prepare(raw.train.inputs))
    torch.testing.assert_close(found.dataset.train.inputs, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="state dict of exactly this model"):
        load_weights(nn.Linear(2, 2), str(tmp_path / "weights.pt"))
    with pytest.raises(ConfigError, match="does not exist"):
        parts({**encoder, "weights": str(tmp_path / "none.pt")}, tmp_path)


@pytest.mark.parametrize(
    ("encoder", "told"),
    [
        ({"name": "patches"}, r"data.server_per_class"),
        ({"name": "patches", "patch": 9}, "larger than its patches"),
        ({"name": "trained"}, r"data.server_per_class"),
        ({"name": "trained", "task": "jigsaw"}, r"encoder.task is 'jigsaw'"),
        ({"name": "zoo"}, r"encoder.weights=FILE"),
        ({"name": "clip"}, "Unknown encoder 'clip'"),
        ({"name": "patches", "atom": 3}, "atom"),
    ],
)
def test_impossible_encoders_are_refused(encoder: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        parts(encoder, tmp_path)


def test_foreign_encoders_say_what_they_need(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ConfigError, match="pip install timm"):
        parts({"name": "timm", "weights": "x"}, tmp_path)
    with pytest.raises(ConfigError, match="pip install open-clip-torch"):
        parts({"name": "open_clip", "weights": "x"}, tmp_path)


def test_a_foreign_encoder_by_a_stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is asked of timm, with a stand-in for the library, and refusal of random weights."""
    stand_in = types.SimpleNamespace(
        is_model=lambda name: name == "small",
        create_model=lambda name, pretrained, num_classes: nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 5)),
        data=types.SimpleNamespace(
            resolve_data_config=lambda facts, model: {
                "mean": (0.5,) * 3,
                "std": (0.5,) * 3,
                "input_size": (3, 4, 4),
            }
        ),
    )
    monkeypatch.setitem(sys.modules, "timm", stand_in)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="encode at random"):
        timm_encoder("small", "", False, 0)
    with pytest.raises(ConfigError, match="no model 'large'"):
        timm_encoder("large", "", True, 0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 5))
    torch.save(body.state_dict(), tmp_path / "body.pt")
    found = timm_encoder("small", str(tmp_path / "body.pt"), False, 0)
    x = images(2, 4)
    torch.testing.assert_close(found(x), body((x.expand(-1, 3, -1, -1) - 0.5) / 0.5))
