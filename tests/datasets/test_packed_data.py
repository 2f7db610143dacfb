"""The real packed sets, where FLOWERBED_DATA has them: decoded bytes and class counts as stated with them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from flowerbed.datasets.dataset import Split
from flowerbed.datasets.pacs import DOMAINS
from flowerbed.datasets.partitions import partition
from flowerbed.datasets.sources import load_dataset

DATA = os.environ.get("FLOWERBED_DATA")


@pytest.fixture(scope="module")
def decoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests of this file: a set is decoded once."""
    return tmp_path_factory.mktemp("decoded")


@pytest.fixture(autouse=True)
def shared_cache(decoded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWERBED_CACHE", str(decoded))


def packed(name: str) -> Path:
    if DATA is None or not (Path(DATA) / name).is_dir():
        pytest.skip(f"FLOWERBED_DATA has no packed folder '{name}'")
    return Path(DATA)


def digest(split: Split) -> str:
    """The digests were taken of (N, h, w) for grey and (N, h, w, 3) for colour images."""
    pixels = split.inputs.permute(0, 2, 3, 1).squeeze(-1).contiguous().numpy()
    return hashlib.sha256(pixels.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        ("mnist", "31a90daf74994fc9", "4c7ac34c96593a53"),
        ("usps", "b3aea71639e9f07b", "418e84c15696e0dc"),
    ],
)
def test_lossless_sets_decode_to_the_stated_bytes(name: str, train: str, test: str) -> None:
    data = load_dataset(name, data_dir=packed(name), download=False)
    assert (digest(data.train), digest(data.test)) == (train, test)
    if name == "usps":
        counts = torch.bincount(data.train.labels).tolist()
        # The class counts of the ESL book's zip.train.
        assert counts == [1194, 1005, 731, 658, 652, 556, 664, 645, 542, 644]
    else:
        counts = torch.bincount(data.test.labels).tolist()
        assert counts == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.mark.parametrize(
    ("name", "labels", "classes", "deviation"),
    [("cifar10", {}, 10, 0.01), ("cifar100", {}, 100, 0.02), ("cifar100", {"labels": "coarse"}, 20, 0.02)],
)
def test_cifar_counts_and_statistics(
    name: str, labels: dict[str, str], classes: int, deviation: float
) -> None:
    data = load_dataset(name, data_dir=packed(name), download=False, **labels)
    assert data.num_classes == classes
    assert torch.bincount(data.train.labels).tolist() == [50_000 // classes] * classes
    assert torch.bincount(data.test.labels).tolist() == [10_000 // classes] * classes
    sample = data.prepare(data.train.inputs[:5000])
    assert sample.mean(dim=(0, 2, 3)).abs().max() < 0.02
    assert (sample.std(dim=(0, 2, 3)) - 1).abs().max() < deviation + 0.02


def test_cifar10_test_sheet_agrees_with_its_lossless_part() -> None:
    from flowerbed.datasets.formats import read_image

    folder = packed("cifar10") / "cifar10"
    sheet = read_image(folder / "test-lossless-00.png")
    exact = sheet.reshape(sheet.shape[0] // 32, 32, 40, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
    lossy = load_dataset("cifar10", data_dir=folder.parent).test.inputs[:1000].permute(0, 2, 3, 1).numpy()
    error = lossy.astype(float) - exact[:1000]
    # The JPEG sheets are stated to be off by 2.59 of 255 (rms).
    assert np.sqrt((error**2).mean()) < 3


def test_pacs_counts_and_leaving_a_domain_out() -> None:
    data = load_dataset("pacs", data_dir=packed("pacs"), download=False)
    domains = torch.cat([data.train.extras["domain"], data.test.extras["domain"]])
    assert torch.bincount(domains).tolist() == [2048, 2344, 1670, 3929]
    left = load_dataset("pacs", data_dir=packed("pacs"), download=False, leave_out="sketch")
    assert (len(left.train), len(left.test)) == (6062, 3929)
    made = partition("domain", data.train.labels, 8, 0, data.train.extras["domain"])
    assert [len(set(data.train.extras["domain"][made.indices(k)].tolist())) for k in range(8)] == [1] * 8
    assert len(DOMAINS) == 4


def test_shakespeare_speakers() -> None:
    data = load_dataset("shakespeare", data_dir=packed("shakespeare"), download=False)
    assert (data.num_classes, data.input_shape) == (65, (80,))
    assert 100 < len(data.domains) < 310
    assert data.domains[0] == "First Citizen"
    first = "".join(data.classes[index] for index in data.train.inputs[0].tolist())
    assert first.startswith("Before we proceed any further, hear me speak.\nYou are all resolved")
    # Every speaker trains; labels are the inputs one step later.
    assert set(data.train.extras["domain"].tolist()) == set(range(len(data.domains)))
    assert torch.equal(data.train.inputs[:, 1:], data.train.labels[:, :-1])
