"""The cohort engine against its slow twin: every client trained by itself, by the ordinary loop."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from cohorts import Cohort, assert_close, assert_same
from torch import Tensor, nn

from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import Extras, LocalRound, Trained
from flowerbed.clients.params import LocalParams
from flowerbed.models.base import Net
from flowerbed.models.zoo import MODELS

IMAGE = ((3, 8, 8), 4, "classification")
SHAPES = {
    "linear": ((6,), 4, "classification"),
    "mlp": ((6,), 4, "classification"),
    "gpt_tiny": ((5,), 7, "next-token"),
    "char_lstm": ((5,), 7, "next-token"),
    "char_gru": ((5,), 7, "next-token"),
}
OPTIONS = {
    "gpt_tiny": {"width": 8, "depth": 1, "heads": 2},
    "char_lstm": {"hidden": 8},
    "char_gru": {"hidden": 8},
    "vit_tiny": {"width": 8, "depth": 1, "heads": 2},
}
NORMALISED = (
    "resnet8",
    "resnet20",
    "resnet32",
    "resnet18",
    "wrn16_2",
    "wrn28_2",
    "wrn28_10",
    "mobilenet_tiny",
)
LARGE = ("resnet32", "wrn28_2", "wrn28_10", "resnet18")
"""The builders of resnet20 and wrn16_2 with other numbers, and one of 11 million parameters: not again here."""
FUSED = ("linear", "mlp", "lenet5", "leaf_cnn", "pfl_cnn", "small_cnn")
"""Models of which the hand-written kernels know every layer."""


def cohort(model: str, **changes: object) -> Cohort:
    shape, classes, task = SHAPES.get(model, IMAGE)
    options = OPTIONS.get(model, {"groups": 4, "norm": "gn"} if model in NORMALISED else {})
    settings = {"sizes": (5, 3), "options": options, **changes}
    return Cohort(model, shape, classes, task=task, **settings)


@pytest.mark.parametrize("model", [name for name in MODELS.names() if name not in LARGE])
def test_every_model_of_the_zoo_gives_what_its_clients_give_alone(
    model: str, caplog: pytest.LogCaptureFixture
) -> None:
    clients = cohort(model)
    assert_same(clients.together(kernel="vmap", block=2), clients.alone(), 1e-10)
    if model in FUSED:
        assert_same(clients.together(kernel="fused", block=2), clients.alone(), 1e-10)
    assert not caplog.records, caplog.text


@pytest.mark.parametrize("model", ["resnet8", "wrn16_2"])
def test_batch_statistics_are_each_clients_own(model: str, caplog: pytest.LogCaptureFixture) -> None:
    """Batches of several sizes: neither padded rows nor other clients may enter a mean."""
    clients = cohort(model, options={"norm": "bn"}, sizes=(10, 4, 7))
    found, alone = clients.together(kernel="vmap", block=3), clients.alone()
    assert_same(found, alone, 1e-9)
    moved = [name for name in clients.start if name.endswith("running_mean")]
    assert not torch.equal(found[0].streams["arrays"][moved[0]], found[1].streams["arrays"][moved[0]])
    assert not caplog.records, caplog.text


@pytest.mark.parametrize("model", FUSED)
def test_fused_kernels_agree_in_float32(model: str, caplog: pytest.LogCaptureFixture) -> None:
    clients = cohort(model, dtype=torch.float32, sizes=(9, 4, 12, 7))
    assert_same(clients.together(kernel="fused", block=3), clients.alone(), 1e-5)
    assert_same(clients.together(kernel="vmap", block=3), clients.alone(), 1e-5)
    assert not caplog.records, caplog.text


@pytest.mark.parametrize("kernel", ["fused", "vmap"])
@pytest.mark.parametrize(
    "local",
    [
        {"drop_last": True},
        {"batch_size": 0},
        {"batch_size": 100},
        {"epochs": 3},
        {"steps": 5},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"clip_norm": 0.05},
        {"clip_norm": 0.5, "momentum": 0.5, "schedule": "cosine"},
        {"schedule": "cosine"},
        {"schedule": "exponential", "lr_decay": 0.5},
        {"optimizer": "adam", "lr": 0.01},
        {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.1, "schedule": "cosine"},
        {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "momentum": 0.8},
        {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "schedule": "cosine"},
    ],
    ids=str,
)
def test_every_local_setting_with_unequal_clients(
    kernel: str, local: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    clients = Cohort(local=LocalParams(**{"batch_size": 4, **local}), sizes=(9, 4, 12, 1, 7))
    assert_same(clients.together(kernel=kernel, block=3), clients.alone(), 1e-9)
    assert not caplog.records, caplog.text


@pytest.mark.parametrize("kernel", ["fused", "vmap"])
def test_the_block_size_changes_nothing(kernel: str) -> None:
    clients = cohort("small_cnn", sizes=(9, 4, 12, 7))
    alone = clients.alone()
    for block in (1, 2, 10):
        assert_same(clients.together(kernel=kernel, block=block), alone, 1e-10)


@pytest.mark.parametrize("kernel", ["fused", "vmap"])
def test_augmented_batches_are_drawn_from_each_clients_stream(kernel: str) -> None:
    clients = cohort("small_cnn", local=LocalParams(batch_size=4, augment="flip_shift"), sizes=(9, 4, 12))
    plain = cohort("small_cnn", local=LocalParams(batch_size=4), sizes=(9, 4, 12))
    assert_same(clients.together(kernel=kernel, block=3), clients.alone(), 1e-10)
    with pytest.raises(AssertionError):
        assert_same(plain.alone(), clients.alone(), 1e-10)


def test_long_rounds_are_gathered_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowerbed.clients.cohort.schedule.GATHER_BYTES", 2000)
    monkeypatch.setattr("flowerbed.clients.cohort.schedule.SMALL_ROW", 16)
    clients = Cohort(local=LocalParams(batch_size=4, epochs=4))
    assert_same(clients.together(kernel="fused", block=4), clients.alone(), 1e-10)


@pytest.mark.parametrize("kernel", ["fused", "vmap"])
def test_dropout_draws_what_each_client_would_draw(kernel: str) -> None:
    """Two calls a step, one of them in the channels-last layout, for batches of two sizes."""
    clients = cohort("pfl_cnn", sizes=(9, 4, 12), dtype=torch.float32)
    assert_same(clients.together(kernel=kernel, block=3), clients.alone(), 1e-5)


class Looks(ClientHalf):
    """Evaluates the received model before it trains, and the trained one before it sends it."""

    def begin(self, local: LocalRound) -> Extras:
        return {"before": self.score(local)}

    def end(self, local: LocalRound, trained: Trained, extras: Extras) -> Mapping[str, Mapping[str, Tensor]]:
        scores = {"before": extras["before"], "after": self.score(local)}
        return {**super().end(local, trained, extras), "scores": scores}

    @staticmethod
    @torch.no_grad()
    def score(local: LocalRound) -> Tensor:
        local.model.eval()
        return local.task.loss(local.parts(local.train_data.x), local.train_data.y).mean()


@pytest.mark.parametrize("kernel", ["fused", "vmap"])
def test_a_look_at_the_model_does_not_switch_dropout_off(kernel: str) -> None:
    clients = cohort("pfl_cnn", sizes=(9, 4, 12), half=Looks())
    found = clients.together(kernel=kernel, block=2)
    assert_same(found, clients.alone(), 1e-10)
    assert float(found[0].streams["scores"]["before"]) != float(found[0].streams["scores"]["after"])


def test_fast_dropout_is_other_masks_of_the_same_kind() -> None:
    clients = cohort("pfl_cnn", sizes=(9, 4, 12), dtype=torch.float32)
    fast = clients.together(kernel="fused", block=3, dropout="fast")
    assert_same(clients.together(kernel="fused", block=1, dropout="fast"), fast, 1e-5)
    with pytest.raises(AssertionError):
        assert_same(fast, clients.alone(), 1e-3)


def test_a_teacher_in_the_loss_draws_no_masks() -> None:
    """FedNTD evaluates the received model beside the own one; only the own one drops."""
    from flowerbed.strategies.fedntd import FedNtdHalf, FedNtdParams

    clients = cohort("pfl_cnn", sizes=(8, 4), dtype=torch.float32, half=FedNtdHalf(FedNtdParams(beta=1.0)))
    assert_same(clients.together(kernel="vmap", block=2), clients.alone(), 1e-5)


def test_oneDNN_layers_agree() -> None:
    clients = Cohort(shape=(1024,), options={"hidden": (256, 8)}, sizes=(9, 4, 7), dtype=torch.float32)
    assert_same(clients.together(kernel="fused-onednn", block=2), clients.alone(), 1e-5)


@pytest.mark.parametrize("model", ["leaf_cnn", "small_cnn", "pfl_cnn"])
def test_bfloat16_convolutions_are_close_and_keep_the_type_of_the_weights(model: str) -> None:
    clients = cohort(model, sizes=(9, 4, 12), dtype=torch.float32)
    low = clients.together(kernel="fused", block=2, precision="bfloat16")
    for found, wanted in zip(low, clients.alone(), strict=True):
        moved, error = (
            torch.cat([(one[n] - other[n]).flatten() for n in one])
            for one, other in (
                (wanted.streams["arrays"], clients.start),
                (found.streams["arrays"], wanted.streams["arrays"]),
            )
        )
        assert found.streams["arrays"].keys() == clients.start.keys()
        assert all(v.dtype == torch.float32 for v in found.streams["arrays"].values())
        assert 1e-4 < float(error.norm() / moved.norm()) < 0.2
    fast = clients.together(kernel="fused", block=2, precision="bfloat16", dropout="fast")
    assert all(bool(v.isfinite().all()) for v in fast[0].streams["arrays"].values())


class AllLayers(nn.Module):
    """Every layer that the zoo's stacks lack, in one body."""

    @staticmethod
    def net() -> Net:
        from flowerbed.models.layers import GlobalMean

        body = nn.Sequential(
            nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=1, bias=False),
            nn.AvgPool2d(2, 1, 1),
            nn.Identity(),
            nn.Dropout(0.0),
            nn.ReLU(),
            nn.ZeroPad2d((1, 0, 2, 1)),
            nn.MaxPool2d(3, 2, 1),
            nn.GroupNorm(2, 4),
            nn.Conv2d(4, 6, 1, dilation=2),
            nn.Dropout(0.3),
            GlobalMean(),
            nn.Linear(6, 5, bias=False),
            nn.ReLU(),
        )
        return Net(body, nn.Linear(5, 4), 5)


def test_the_other_layers_and_their_geometry(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    for kernel in ("fused", "vmap"):
        clients = Cohort(shape=(3, 8, 8), module=AllLayers.net(), sizes=(9, 4, 7))
        assert_same(clients.together(kernel=kernel, block=3), clients.alone(), 1e-10)
    assert not caplog.records, caplog.text


class FrozenHead(ClientHalf):
    """Leaves the head, or the body, where it is."""

    def frozen(self, info: object) -> frozenset[str]:
        return getattr(info, str(self.params))


@pytest.mark.parametrize("kernel", ["fused", "vmap"])
@pytest.mark.parametrize("part", ["head", "backbone"])
def test_frozen_parameters_stand_still(kernel: str, part: str) -> None:
    local = LocalParams(batch_size=4, weight_decay=0.1, momentum=0.5)
    for settings in (local, LocalParams(batch_size=4)):
        clients = cohort("small_cnn", half=FrozenHead(part), local=settings, sizes=(9, 4))
        found = clients.together(kernel=kernel, block=2)
        assert_same(found, clients.alone(), 1e-10)
        frozen = FrozenHead(part).frozen(clients.rounds()[0].info)
        for name in frozen:
            assert torch.equal(found[0].streams["arrays"][name], clients.start[name])


class PrivateHead(ClientHalf):
    """Keeps its head."""

    def private(self, info: object) -> frozenset[str]:
        return info.head  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("kernel", ["fused", "vmap"])
def test_private_parameters_start_and_stay_at_the_client(kernel: str) -> None:
    clients = Cohort(half=PrivateHead())
    other = {name: value + 0.5 for name, value in clients.start.items() if name.startswith("head.")}
    clients.states[1] = {"private": other}
    rounds = clients.rounds()
    together = clients.engine(kernel=kernel, block=4).replies(rounds)
    for k, (local, reply) in enumerate(zip(clients.rounds(), together, strict=True)):
        local.load({**clients.start, **clients.states[k].get("private", {})})
        wanted = clients.half.run(local)
        assert_close(reply.streams["arrays"], wanted.streams["arrays"], 1e-10)
        assert not any(name.startswith("head.") for name in reply.streams["arrays"])
        assert_close(rounds[k].state["private"], {n: clients.net.state_dict()[n] for n in other}, 1e-10)


class Unused(nn.Module):
    """Has a parameter that its output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def test_a_parameter_without_gradient_does_not_decay() -> None:
    torch.manual_seed(0)
    clients = Cohort(module=Unused(), local=LocalParams(batch_size=4, weight_decay=0.1))
    found = clients.together(kernel="vmap", block=4)
    assert_same(found, clients.alone(), 1e-10)
    assert torch.equal(found[0].streams["arrays"]["idle"], torch.ones(3, dtype=torch.float64))
