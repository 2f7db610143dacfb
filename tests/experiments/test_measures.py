"""Measures of one's own, models that start from a file, data without labels, schedules by milestones, divergence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowerbed.clients.data import Batch
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, Step
from flowerbed.clients.params import LocalParams
from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.datasets.sources import load_dataset
from flowerbed.errors import ConfigError, DivergedError
from flowerbed.experiments.measures import Measured
from flowerbed.experiments.simulation import resume, simulate
from flowerbed.models.base import ModelSpec
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Task
from flowerbed.strategies.fedavg import FedAvg

SMALL: dict[str, Any] = {
    "federation": {"clients": 2, "rounds": 2},
    "model": {"name": "mlp", "hidden": [4]},
    "grid": {"device": "cpu"},
}
HERE = __name__


def norm(measured: Measured) -> dict[str, float]:
    outputs, labels = measured.outputs()
    assert not measured.model.training
    assert outputs.shape == (len(labels), 10)
    return {"norm": float(outputs.norm())}


def loss(measured: Measured) -> dict[str, float]:
    return {"loss": 0.0}


def test_a_measure_stands_beside_accuracy_in_every_evaluation() -> None:
    result = simulate(**SMALL, evaluation={"measures": [f"{HERE}:norm"]})
    found = [r.metrics["norm"] for r in result.history if r.phase == "evaluate-server"]
    assert len(found) == 3
    net = ModelSpec("mlp", (1, 8, 8), 10, {"hidden": (4,)}).build(0)
    net.load_state_dict(result.model)
    data = load_dataset("digits")
    outputs = net(data.prepare(data.test.inputs)).detach()
    assert found[-1] == pytest.approx(float(outputs.norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("measures", "sentence"),
    [
        ([f"{HERE}:loss"], "metric 'loss' is measured twice"),
        ([f"{HERE}:nrom"], "Unknown attribute of module .* 'nrom'. Did you mean 'norm'"),
        (["norm"], r"evaluation.measures is \['norm'\]; give import paths"),
    ],
)
def test_wrong_measures_are_refused(measures: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        simulate(**SMALL, evaluation={"measures": measures})


# Weights from a file.


def test_a_run_goes_on_from_the_model_of_another(tmp_path: Path) -> None:
    """Two runs of a round, the second from the first's model, are one of two rounds where nothing else is kept."""
    settings = {**SMALL, "federation": {"clients": 2, "rounds": 1}, "local": {"batch_size": 0}}
    whole = simulate(**{**settings, "federation": {"clients": 2, "rounds": 2}})
    simulate(**settings, run={"dir": str(tmp_path / "one")})
    file = tmp_path / "one" / "model.safetensors"
    second = simulate(**settings, initial={"weights": str(file)})
    for name, value in whole.model.items():
        torch.testing.assert_close(second.model[name], value)


def test_another_file_under_the_same_name_is_refused(tmp_path: Path) -> None:
    net = ModelSpec("mlp", (1, 8, 8), 10, {"hidden": (4,)})
    file = tmp_path / "start.safetensors"
    save_file(net.build(5).state_dict(), file)
    simulate(**SMALL, initial={"weights": str(file)}, run={"dir": str(tmp_path / "run")})
    save_file(net.build(6).state_dict(), file)
    with pytest.raises(ConfigError, match="not the file that this run began with"):
        resume(tmp_path / "run", federation={"rounds": 3})


def test_some_tensors_may_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "body.safetensors"
    save_file({"head.bias": torch.arange(10.0)}, file)
    spec = ModelSpec("mlp", (1, 8, 8), 10, {"hidden": (4,)}, str(file))
    drawn = ModelSpec("mlp", (1, 8, 8), 10, {"hidden": (4,)}).build(2).state_dict()
    for name, value in spec.build(2).state_dict().items():
        assert torch.equal(value, load_file(file)[name] if name == "head.bias" else drawn[name])


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"tail.bias": torch.zeros(10)}, "has no tensor 'tail.bias'"),
        ({"head.bias": torch.zeros(9)}, r"'head.bias' has shape \(9,\), needed is \(10,\)"),
        (None, "cannot be read"),
    ],
)
def test_weights_of_another_model_are_refused(
    tensors: dict[str, Tensor] | None, sentence: str, tmp_path: Path
) -> None:
    file = tmp_path / "w.safetensors"
    if tensors is not None:
        save_file(tensors, file)
    with pytest.raises(ConfigError, match=sentence):
        simulate(**SMALL, initial={"weights": str(file)})


# Data without labels, and by-products of a loss.


def points() -> Dataset:
    """Points on a line, of which nothing is to be predicted."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1, generator=rng) @ torch.tensor([[1.0, 2.0, -1.0]])
    split = Split(x, torch.zeros(64, dtype=torch.int64))
    return Dataset("points", split, split, ("nothing",), (0.0,), (1.0,), task="measured")


def rebuild(input_shape: tuple[int, ...], num_classes: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Linear(1, 3))


class Rebuild(ClientHalf):
    """Reconstructs its input; remembers the outputs of the last step."""

    last: Step | None = None

    def loss(
        self, model: ModelParts, batch: Batch, extras: Extras, task: Task
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        outputs = model(batch["x"])
        return (outputs - batch["x"]).square().mean(), {
            "outputs": outputs,
            "rows": torch.tensor(len(outputs)),
        }

    def after_step(self, step: Step) -> None:
        Rebuild.last = step


class Autoencoder(FedAvg):
    Half = Rebuild


def distance(measured: Measured) -> dict[str, float]:
    outputs, _ = measured.outputs()
    return {"distance": float((outputs - measured.dataset.test.inputs).square().mean())}


UNLABELLED: dict[str, Any] = {
    "dataset": f"{HERE}:points",
    "model": f"{HERE}:rebuild",
    "federation": {"clients": 1, "rounds": 30},
    "local": {"lr": 0.1, "batch_size": 16},
    "grid": {"device": "cpu"},
}


def test_data_without_labels_is_judged_by_measures_alone() -> None:
    result = simulate(
        **UNLABELLED, strategy=f"{HERE}:Autoencoder", evaluation={"measures": [f"{HERE}:distance"]}
    )
    found = [r.metrics for r in result.history if r.phase == "evaluate-server"]
    assert all(metrics.keys() == {"distance"} for metrics in found)
    assert found[-1]["distance"] < 0.01 * found[0]["distance"]


def test_by_products_of_the_loss_reach_the_step_and_no_metric() -> None:
    result = simulate(**UNLABELLED, strategy=f"{HERE}:Autoencoder", evaluation={"every": 0})
    step = Rebuild.last
    assert step is not None
    assert step.products.keys() == {"outputs"}
    assert step.products["outputs"].shape == (16, 3)
    assert not step.products["outputs"].requires_grad
    training = next(r for r in result.history if r.phase == "train")
    assert "outputs" not in training.metrics
    assert training.metrics["rows"] == 64


def test_data_without_labels_has_no_loss_of_its_own() -> None:
    with pytest.raises(Exception, match="has no labels to predict, hence no loss"):
        simulate(**UNLABELLED)


# Schedules and divergence.


def test_milestones_lower_the_rate_exactly_there() -> None:
    params = LocalParams(lr=0.1, schedule="multistep", lr_decay=0.1, milestones=(0.5, 0.7))
    rates = [params.lr_at(step, 5, 2) for step in range(10)]
    assert rates == pytest.approx([0.1] * 5 + [0.01] * 2 + [0.001] * 3)
    with pytest.raises(ConfigError, match="local.milestones"):
        LocalParams(milestones=(1.5,))


def test_a_longer_run_under_milestones_is_another_run(tmp_path: Path) -> None:
    simulate(**SMALL, local={"schedule": "multistep"}, run={"dir": str(tmp_path)})
    with pytest.raises(ConfigError, match="made with other settings of federation"):
        resume(tmp_path, federation={"rounds": 9})


def test_numbers_that_are_not_finite_are_a_divergence() -> None:
    with pytest.raises(DivergedError, match="is nan|NaN or infinity"):
        simulate(**SMALL, local={"lr": 1e30})
