"""Parts of data sets, their validation samples, and labels that are wrong in exact numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import worlds
from torch import Tensor

from flowerbed.clients.data import CLEAN, ClientData
from flowerbed.clients.params import LocalParams
from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.datasets.excerpt import TRUE, noisy
from flowerbed.datasets.sources import load_dataset
from flowerbed.errors import ClientError, ConfigError, DataError
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.parts import build_parts


def rows_of(part: Split, whole: Split) -> list[int]:
    """Return where the samples of a part are in the whole, by their pixels."""
    places = {bytes(image.numpy()): row for row, image in enumerate(whole.inputs)}
    return [places[bytes(image.numpy())] for image in part.inputs]


def test_an_excerpt_has_so_many_of_each_class_and_no_sample_twice() -> None:
    whole = load_dataset("digits")
    part = load_dataset(
        "excerpt", of="digits", classes=[7, 3, 1], per_class=20, validation_per_class=5, test_per_class=8
    )
    assert part.classes == ("7", "3", "1")
    assert part.validation is not None
    for split, count in ((part.train, 20), (part.validation, 5), (part.test, 8)):
        assert torch.bincount(split.labels).tolist() == [count] * 3
    train, held = rows_of(part.train, whole.train), rows_of(part.validation, whole.train)
    assert len({*train, *held}) == 75
    assert torch.equal(torch.tensor([7, 3, 1])[part.train.labels], whole.train.labels[train])
    again = load_dataset(
        "excerpt", of="digits", classes=[7, 3, 1], per_class=20, validation_per_class=5, draw=1
    )
    assert rows_of(again.train, whole.train) != train
    # By default everything, and no third split.
    plain = load_dataset("excerpt", of="digits")
    assert torch.equal(plain.train.inputs, whole.train.inputs)
    assert plain.validation is None


def test_what_validates_is_not_trained_on_also_without_a_number_of_training_samples() -> None:
    part, whole = load_dataset("excerpt", of="digits", validation_per_class=3), load_dataset("digits")
    assert part.validation is not None
    assert len(part.train) + len(part.validation) == len(whole.train)
    assert not set(rows_of(part.train, whole.train)) & set(rows_of(part.validation, whole.train))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"of": "noisy_labels"}, "nothing to take an excerpt of"),
        ({"of": "digits", "classes": [0, 0]}, "repeats one"),
        ({"of": "digits", "classes": [12]}, "has the classes 0 to 9"),
        ({"of": "digits", "per_class": 10**6}, "ask for fewer"),
        ({"of": "digits", "per_class": -1}, "dataset.per_class is -1"),
        ({"of": "toys:quadratics"}, "nothing to take an excerpt of"),
    ],
)
def test_what_cannot_be_had_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_dataset("excerpt", **options)


def labels() -> Tensor:
    return torch.arange(4).repeat_interleave(torch.tensor([10, 20, 30, 15]))


def test_symmetric_noise_hits_an_exact_share_of_every_class_and_spreads_evenly() -> None:
    true = torch.arange(4).repeat_interleave(6000)
    wrong = noisy(true, 4, "symmetric", 0.4, 0)
    table = torch.zeros(4, 4, dtype=torch.int64).index_put_((true, wrong), torch.tensor(1), accumulate=True)
    assert table.diag().tolist() == [3600] * 4
    off = table[~torch.eye(4, dtype=torch.bool)].double()
    assert off.sum() == 4 * 2400
    # 800 on average, with a standard deviation of 23.
    assert (off - 800).abs().max() < 110
    small = noisy(labels(), 4, "symmetric", 0.5, 3)
    assert [int((small[labels() == c] != c).sum()) for c in range(4)] == [5, 10, 15, 8]
    assert torch.equal(small, noisy(labels(), 4, "symmetric", 0.5, 3))
    assert not torch.equal(small, noisy(labels(), 4, "symmetric", 0.5, 4))


def test_pair_and_asymmetric_noise_know_one_wrong_class() -> None:
    wrong = noisy(labels(), 4, "pair", 0.2, 0)
    hit = wrong != labels()
    assert torch.equal(wrong[hit], (labels()[hit] + 1) % 4)
    assert torch.bincount(labels()[hit]).tolist() == [2, 4, 6, 3]
    true = torch.arange(10).repeat_interleave(10)
    wrong = noisy(true, 10, "asymmetric", 0.3, 0)
    pairs = sorted(set(zip(true.tolist(), wrong.tolist(), strict=True)))
    assert [p for p in pairs if p[0] != p[1]] == [(2, 0), (3, 5), (4, 7), (5, 3), (9, 1)]
    assert int((wrong != true).sum()) == 15
    assert torch.equal(noisy(true, 10, "symmetric", 0.0, 0), true)
    with pytest.raises(DataError, match="single class"):
        noisy(torch.zeros(3, dtype=torch.int64), 1, "pair", 0.5, 0)


def test_only_training_labels_are_wrong_and_the_client_has_the_true_ones_to_measure_with() -> None:
    clean = load_dataset("excerpt", of="digits", per_class=20, validation_per_class=5)
    part = load_dataset("noisy_labels", of="digits", per_class=20, validation_per_class=5, rate=0.5)
    assert part.validation is not None
    assert clean.validation is not None
    assert torch.equal(part.train.inputs, clean.train.inputs)
    assert torch.equal(part.train.extras[TRUE], clean.train.labels)
    assert int((part.train.labels != clean.train.labels).sum()) == 100
    assert torch.equal(part.validation.labels, clean.validation.labels)
    assert torch.equal(part.test.labels, clean.test.labels)
    assert TRUE == CLEAN
    # Also where some labels are hidden as well.
    hidden = Split(
        part.train.inputs,
        part.train.labels,
        {**part.train.extras, "labelled": torch.zeros(200, dtype=torch.bool)},
    )
    view = ClientData.view(part, hidden, torch.arange(200).numpy(), torch.device("cpu"))
    assert torch.equal(view.extras[CLEAN], clean.train.labels)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"noise": "loud"}, "dataset.noise is 'loud'"),
        ({"rate": 1.5}, "dataset.rate is 1.5"),
        ({"noise": "asymmetric"}, "use dataset.of=cifar10"),
    ],
)
def test_wrong_noise_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_dataset("noisy_labels", of="digits", **options)


def test_clients_share_the_validation_samples_as_they_share_the_test_set() -> None:
    parts = build_parts(
        Simulation.of(
            {
                "dataset": {"name": "excerpt", "of": "digits", "validation_per_class": 9},
                "partition": {"name": "shards"},
                "federation": {"clients": 5, "rounds": 1},
            }
        )
    )
    held, data = parts.spec.validation, parts.dataset
    assert held is not None
    assert data.validation is not None
    assert sorted(i for k in range(5) for i in held.indices(k).tolist()) == list(range(90))
    for client in range(5):
        own = set(data.train.labels[torch.from_numpy(parts.train.indices(client).copy())].tolist())
        assert set(data.validation.labels[torch.from_numpy(held.indices(client).copy())].tolist()) <= own


def test_a_set_without_validation_samples_says_so() -> None:
    local = worlds.open_round(LocalParams())
    with pytest.raises(ClientError, match="validation_per_class"):
        _ = local.validation_data


def test_a_validation_split_must_fit_the_others() -> None:
    one, other = (
        Split(torch.zeros(3, 4), torch.zeros(3).long()),
        Split(torch.zeros(3, 5), torch.zeros(3).long()),
    )
    with pytest.raises(DataError, match="train and validation inputs of 'x' differ"):
        Dataset("x", one, one, ("a",), (0.0,), (1.0,), validation=other)
    odd = Split(torch.zeros(3, 4), torch.ones(3).long())
    with pytest.raises(DataError, match="validation labels"):
        Dataset("x", one, one, ("a",), (0.0,), (1.0,), validation=odd)
