"""Sets of Hugging Face from local folders, against the arrays that they were made of; no network is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flowerbed.datasets.sources import load_dataset
from flowerbed.errors import ConfigError, DataError
from flowerbed.experiments import cli

datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(12) % 3


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWERBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FLOWERBED_DATA", raising=False)
    datasets.disable_progress_bars()


def pictures(images: np.ndarray[Any, Any]) -> list[Image.Image]:
    return [Image.fromarray(image) for image in images]


def saved(folder: Path, columns: dict[str, Any], features: dict[str, Any], test: int = 4) -> str:
    """Write the columns with ``save_to_disk``, the last ``test`` rows as the test split; return hf:FOLDER."""
    parts = {
        split: datasets.Dataset.from_dict(
            {name: list(values[rows]) for name, values in columns.items()}, datasets.Features(features)
        )
        for split, rows in (("train", slice(0, -test or None)), ("test", slice(len(LABELS) - test, None)))
        if split == "train" or test
    }
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    return f"hf:{folder}"


def two_columns(names: tuple[str, str] = ("image", "label")) -> dict[str, Any]:
    return {names[0]: datasets.Image(), names[1]: datasets.ClassLabel(names=["ant", "bee", "cow"])}


def test_images_and_classes_come_out_as_they_went_in(tmp_path: Path) -> None:
    name = saved(tmp_path / "set", {"img": pictures(COLOURS), "kind": LABELS}, two_columns(("img", "kind")))
    data = load_dataset(name)
    assert np.array_equal(data.train.inputs.numpy(), COLOURS[:8].transpose(0, 3, 1, 2))
    assert np.array_equal(data.test.inputs.numpy(), COLOURS[8:].transpose(0, 3, 1, 2))
    assert data.train.labels.tolist() == LABELS[:8].tolist()
    assert data.classes == ("ant", "bee", "cow")
    assert data.mean == pytest.approx((COLOURS[:8] / 255).mean((0, 1, 2)))
    # The decoded copy is found again, and says the same.
    assert len(list((tmp_path / "cache" / "decoded").iterdir())) == 1
    again = load_dataset(name)
    assert torch.equal(again.train.inputs, data.train.inputs)
    assert len(list((tmp_path / "cache" / "decoded").iterdir())) == 1


def test_grey_images_have_one_channel_and_sizes_can_be_made_alike(tmp_path: Path) -> None:
    grey = COLOURS[..., 0]
    name = saved(tmp_path / "grey", {"image": pictures(grey), "label": LABELS}, two_columns())
    assert np.array_equal(load_dataset(name).train.inputs.numpy(), grey[:8, None])
    # One picture in colour makes all of them colour.
    mixed = saved(
        tmp_path / "mixed",
        {"image": [*pictures(grey[:11]), *pictures(COLOURS[11:])], "label": LABELS},
        two_columns(),
    )
    data = load_dataset(mixed)
    assert np.array_equal(data.train.inputs.numpy(), np.repeat(grey[:8, None], 3, axis=1))
    assert np.array_equal(data.test.inputs[3].numpy(), COLOURS[11].transpose(2, 0, 1))
    odd = [*pictures(COLOURS[:11]), Image.new("RGB", (9, 9))]
    odd_name = saved(tmp_path / "odd", {"image": odd, "label": LABELS}, two_columns())
    with pytest.raises(DataError, match=r"2 sizes \(6x5, 9x9, ...\); set dataset.side"):
        load_dataset(odd_name)
    assert load_dataset(odd_name, side=8).input_shape == (3, 8, 8)


def test_a_folder_of_parquet_with_numbers_texts_and_domains(tmp_path: Path) -> None:
    (tmp_path / "data" / "sensors").mkdir(parents=True)
    features = RNG.normal(size=(12, 4))
    places = np.array(["b", "a", "c"])[LABELS]
    rows = {"x": features.tolist(), "name": [f"n{k}" for k in LABELS], "place": places.tolist()}
    table = datasets.Dataset.from_dict(rows)
    table.to_parquet(str(tmp_path / "data" / "sensors" / "train.parquet"))
    # By its name below the data folder; without a test split, a share is kept from training.
    data = load_dataset(
        "hf:sensors", data_dir=tmp_path / "data", label="name", domain="place", test_share=0.25
    )
    assert (len(data.train), len(data.test)) == (9, 3)
    assert data.classes == ("n0", "n1", "n2")
    assert data.domains == ("a", "b", "c")
    together = torch.cat([data.train.inputs, data.test.inputs])
    order = [int(np.abs(features - row).sum(1).argmin()) for row in together.numpy()]
    assert sorted(order) == list(range(12))
    assert torch.cat([data.train.labels, data.test.labels]).tolist() == LABELS[order].tolist()
    domains = torch.cat([data.train.extras["domain"], data.test.extras["domain"]])
    assert [data.domains[k] for k in domains] == places[order].tolist()
    assert torch.allclose(data.prepare(data.train.inputs).mean(0), torch.zeros(4), atol=1e-6)


def test_images_in_folders_by_class(tmp_path: Path) -> None:
    for split, rows in (("train", range(8)), ("test", range(8, 12))):
        for row in rows:
            folder = tmp_path / "pictures" / split / ("ant", "bee", "cow")[LABELS[row]]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(COLOURS[row]).save(folder / f"{row:02}.png")
    data = load_dataset(f"hf:{tmp_path / 'pictures'}")
    assert data.classes == ("ant", "bee", "cow")
    found = {(x.numpy().tobytes(), int(y)) for x, y in zip(data.test.inputs, data.test.labels)}
    expected = {(COLOURS[row].transpose(2, 0, 1).tobytes(), int(LABELS[row])) for row in range(8, 12)}
    assert found == expected


def test_what_is_wrong_is_said_with_the_remedy(tmp_path: Path) -> None:
    columns = {"image": pictures(COLOURS), "label": LABELS, "coarse": LABELS}
    features = two_columns() | {"coarse": datasets.ClassLabel(names=["x", "y", "z"])}
    name = saved(tmp_path / "set", columns, features)
    with pytest.raises(
        DataError, match="2 columns that could be the label; set dataset.label to one of image, "
    ):
        load_dataset(name)
    assert load_dataset(name, label="coarse").classes == ("x", "y", "z")
    with pytest.raises(DataError, match="no column 'lable'; set dataset.label to one of"):
        load_dataset(name, label="lable")
    with pytest.raises(DataError, match="no split 'validation' but train, test; set dataset.test"):
        load_dataset(name, label="coarse", test="validation")
    with pytest.raises(DataError, match="holds neither images nor lists of numbers"):
        load_dataset(name, label="coarse", image="label")
    with pytest.raises(ConfigError, match="Known: image, label"):
        load_dataset(name, lable="coarse")
    hidden = saved(
        tmp_path / "hidden",
        {"image": pictures(COLOURS), "label": np.where(np.arange(12) < 8, LABELS, -1)},
        {"image": datasets.Image(), "label": datasets.Value("int64")},
    )
    with pytest.raises(DataError, match="holds -1, which is no class"):
        load_dataset(hidden)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be read as a data set"):
        load_dataset(f"hf:{tmp_path / 'empty'}")


def test_without_a_network_the_error_says_how_to_bring_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError) as refused:
        load_dataset("hf:nobody/nothing", download=False)
    for part in ("data.download=false", "hf download --repo-type dataset nobody/nothing", "HF_HUB_OFFLINE=1"):
        assert part in str(refused.value)
    assert not datasets.config.HF_HUB_OFFLINE

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub\n(and more)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"\(ConnectionError: Couldn't reach 'nobody/nothing' on the Hub\)"):
        load_dataset("hf:nobody/nothing")


def test_it_runs_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = saved(tmp_path / "set", {"img": pictures(COLOURS), "kind": LABELS}, two_columns(("img", "kind")))
    quick = ["federation.clients=2", "federation.rounds=1", "model=mlp", "partition=iid", "run.dir=run"]
    assert cli.main(["simulate", f"dataset={name}", "dataset.image=img", *quick, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "completed"
    assert cli.main(["simulate", f"dataset={name}", "dataset.imge=img", *quick]) == 2
    assert "Did you mean 'image'?" in capsys.readouterr().err
