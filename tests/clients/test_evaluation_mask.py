"""The mask of a client's evaluation: which classes it leaves out, and that it does so for every method alike."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import worlds
from torch import Tensor

from flowerbed.models import evaluation
from flowerbed.models.tasks import Classification

MODEL = {"name": "mlp", "hidden": [16]}


def test_a_masked_class_is_never_predicted() -> None:
    outputs = torch.tensor([[3.0, 2.0, 1.0], [0.0, 1.0, 2.0]])
    predictor = evaluation.masked(lambda x: outputs[x], torch.tensor([True, False, False]))
    assert predictor(torch.tensor([0, 1])).argmax(1).tolist() == [1, 2]
    found = evaluation.counts(predictor, Classification(3), torch.tensor([0, 1]), torch.tensor([1, 1]))
    # The probability of the first sample's label is that among the two classes that are left.
    losses = -torch.log_softmax(outputs[:, 1:], dim=1)[:, 0]
    assert float(found["loss_sum"]) == pytest.approx(float(losses.sum()))


def expected(world: worlds.World, mask: str) -> tuple[list[int], list[int]]:
    """Return the right answers of all clients per class, with and without the mask, by plain loops."""
    net, data = copy.deepcopy(world.parts.spec.model.build(3)), world.parts.dataset
    net.load_state_dict(world.result.model)
    net.eval()
    right: dict[bool, list[int]] = {True: [0] * 10, False: [0] * 10}
    for client in range(4):
        own: Tensor = data.train.labels[world.parts.train.indices(client)]
        test = world.parts.test.indices(client)
        labels = data.test.labels[test]
        allowed = set((own if mask == "train" else labels).tolist())
        outputs = net(data.prepare(data.test.inputs[test])).tolist()
        for row, label in zip(outputs, labels.tolist()):
            for masked, found in right.items():
                classes = allowed if masked else set(range(10))
                found[label] += max(classes, key=lambda c: row[c]) == label
    return right[True], right[False]


@pytest.mark.parametrize("mask", ["train", "test"])
def test_every_client_may_predict_its_own_classes_only(mask: str) -> None:
    settings: dict[str, Any] = {
        "model": MODEL,
        "partition": {"name": "dirichlet", "alpha": 0.1},
        "federation": {"clients": 4, "rounds": 1},
    }
    world = worlds.run("fedavg", **settings, evaluation={"clients_every": 1, "mask": mask})
    free = worlds.run("fedavg", **settings, evaluation={"clients_every": 1})
    with_mask, without = expected(world, mask)
    assert world.result.final("evaluate-clients")["correct-per-class"] == with_mask
    assert free.result.final("evaluate-clients")["correct-per-class"] == without
    assert sum(with_mask) > sum(without)
    # The server's own evaluation has no mask, and training does not know of it.
    assert world.result.final("evaluate-server") == free.result.final("evaluate-server")
    assert worlds.equal(world.trained, free.trained)


@pytest.mark.parametrize("strategy", ["finetune", "fedrod", "fedloge"])
def test_the_mask_is_the_same_for_every_method_and_predictor(strategy: str) -> None:
    """Under an oracle that leaves one class, everybody is right."""
    options: dict[str, Any] = {"tune_epochs": 1} if strategy == "finetune" else {}
    if strategy == "fedloge":
        options = {"gamma": 1.0, "beta": 0.3, "ssec_steps": 200, "ssec_lr": 0.01}
    world = worlds.run(
        strategy,
        options,
        model=MODEL,
        partition={"name": "shards", "per_client": 1},
        federation={"clients": 30, "rounds": 1},
        evaluation={"clients_every": 1, "mask": "test"},
    )
    single = [world.parts.test.indices(client) for client in range(30)]
    labels = [set(world.parts.dataset.test.labels[rows].tolist()) for rows in single]
    assert any(len(found) == 1 for found in labels)
    clients = world.result.final("evaluate-clients")
    names = [name for name in clients if name.endswith("accuracy") and "balanced" not in name]
    assert "personal-accuracy" in names
    for name in names:
        # Some shards span two classes.
        assert clients[name] > 0.85, name


def test_own_groups_by_hand() -> None:
    """Client 0: class 1 is many (16 of 20), class 0 medium (up to 19), class 2 few; client 1 has many alone."""
    clients = [([1, 8, 0], [3, 16, 1]), ([0, 0, 3], [0, 0, 4])]
    found = evaluation.own_group_scores(clients)
    assert found == {
        "accuracy-many-own-share-75-95": pytest.approx((8 / 16 + 3 / 4) / 2),
        "accuracy-medium-own-share-75-95": pytest.approx(1 / 3),
        "accuracy-few-own-share-75-95": 0.0,
    }
