"""Semi-supervised methods: the identities that decide them, and their losses by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed import seeds
from flowerbed.clients.data import CLEAN, LABELLED, ClientData
from flowerbed.clients.half import ClientHalf
from flowerbed.clients.local_round import MODEL, Clock, LocalRound
from flowerbed.clients.params import LocalParams
from flowerbed.clients.training import train
from flowerbed.clients.unlabelled import CORRECT, KEPT, STRONG, TOTAL, TRUTH, WEAK
from flowerbed.datasets.augment import Scale
from flowerbed.datasets.dataset import Dataset, Split
from flowerbed.errors import ConfigError
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.parts import build_parts
from flowerbed.experiments.simulation import resume, simulate
from flowerbed.models.base import ModelSpec
from flowerbed.models.info import ModelInfo
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Classification
from flowerbed.server.loop import RunResult
from flowerbed.server.sampling import UniformSampler
from flowerbed.strategies.aggregation import mean_metrics
from flowerbed.strategies.base import ClientReply, Setting
from flowerbed.strategies.fedfixmatch import FedFixMatchHalf
from flowerbed.strategies.fedmatch import ANSWER, HELPER, PSI, FedMatch, FedMatchHalf, FedMatchParams, agreed
from flowerbed.strategies.feduda import FedUDAHalf, FedUDAParams
from flowerbed.strategies.labels_only import LabelsOnlyHalf
from flowerbed.strategies.semi_supervised import (
    ConsistencyHalf,
    ConsistencyParams,
    check_data,
    pseudo_label_rates,
)
from flowerbed.strategies.semifl import SemiFL, SemiFLHalf, SemiFLParams, pseudo_labels
from flowerbed.strategies.server_side import ServerSide

HIDDEN: dict[str, Any] = {"labelled": 0.2}
TASK = Classification(3)


def run(strategy: Any, **settings: Any) -> RunResult:
    base: dict[str, Any] = {
        "model": {"name": "mlp", "hidden": [8]},
        "federation": {"clients": 3, "cohort": 2, "rounds": 2},
        "local": {"steps": 4, "batch_size": 16, "augment": "shift", "momentum": 0.5},
        "evaluation": {"every": 0},
        "grid": {"device": "cpu"},
        "data": HIDDEN,
    }
    return simulate(strategy=strategy, **{**base, **settings})


def trained(result: RunResult) -> list[Mapping[str, Any]]:
    return [record.metrics for record in result.history if record.phase == "train"]


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def images(examples: int = 12, known: int = 6, dtype: torch.dtype = torch.float32) -> ClientData:
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(examples, 1, 4, 4, generator=generator).to(dtype)
    clean = torch.randint(0, 3, (examples,), generator=generator)
    mask = torch.arange(examples) < known
    extras = {LABELLED: mask, CLEAN: clean}
    return ClientData(x, torch.where(mask, clean, -1), torch.arange(examples), extras, Scale())


def open_round(
    data: ClientData,
    local: LocalParams,
    received: Mapping[str, Mapping[str, Tensor]] | None = None,
    *,
    spec: ModelSpec | None = None,
) -> LocalRound:
    model = (spec or ModelSpec("linear", tuple(data.x.shape[1:]), 3)).build(0).to(data.x.dtype)
    streams = {MODEL: {n: v.clone() for n, v in model.state_dict().items()}, **(received or {})}
    return LocalRound(
        client=1, seed=0, clock=Clock(1, 5, local.steps_per_round(len(data))), phase="train", config={},
        received=streams, model=model, parts=ModelParts.resident(model), info=ModelInfo.of(model), task=TASK,
        local=local, open_train=lambda: data, open_test=lambda: data, state={}, device=torch.device("cpu"),
    )  # fmt: skip


# Labels only, and what the others become without their unlabelled part.


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "fedfixmatch", "tau": 1.01, "mu": 2},
        {"name": "fedfixmatch", "tau": 0.0, "lambda_u": 0.0, "mu": 1, "strong": "none"},
        {"name": "feduda", "tau": 1.01, "mu": 2},
        {"name": "feduda", "tau": 0.0, "lambda_u": 0.0, "mu": 3},
    ],
)
def test_without_pseudo_labels_it_is_labels_only_bit_for_bit(strategy: dict[str, Any]) -> None:
    assert_same(run(strategy).model, run("labels_only").model)


def test_with_them_it_is_not() -> None:
    supervised = run("labels_only").model
    for name in ("fedfixmatch", "feduda"):
        found = run({"name": name, "tau": 0.0, "mu": 2})
        assert not torch.equal(found.model["head.weight"], supervised["head.weight"])


@pytest.mark.parametrize("strategy", ["labels_only", "fedfixmatch", "feduda"])
def test_with_every_label_it_is_fedavg_bit_for_bit(strategy: str) -> None:
    full: dict[str, Any] = {"data": {"labelled": 1.0}}
    assert_same(run(strategy, **full).model, run("fedavg", **full).model)


def test_one_client_with_every_label_is_central() -> None:
    one: dict[str, Any] = {"data": {"labelled": 1.0}, "federation": {"clients": 1, "rounds": 2}}
    local = {"local": {"epochs": 1, "batch_size": 512, "persist": True, "momentum": 0.9}}
    assert_same(run("fedfixmatch", **one, **local).model, run("fedavg", **one, **local).model)


def test_all_make_the_same_number_of_steps() -> None:
    """Also with epochs, whatever part of the samples has labels; the upper bound is FedAvg with all labels."""
    local = {"local": {"epochs": 2, "batch_size": 100, "lr": 0.02}}
    upper = trained(run("fedavg", data={}, **local))
    for strategy in (
        "labels_only",
        {"name": "fedfixmatch", "mu": 1},
        {"name": "feduda", "mu": 1},
        {"name": "fedmatch", "mu": 1},
    ):
        assert [m["steps"] for m in trained(run(strategy, **local))] == [m["steps"] for m in upper]


def test_a_client_without_labels_stays_out() -> None:
    data, local = images(8, 0), LocalParams(batch_size=2)
    reply = LabelsOnlyHalf().run(open_round(data, local))
    assert reply.metrics == {"num-examples": 0, "steps": 0, "loss": 0.0}
    assert_same(dict(reply.streams[MODEL]), dict(open_round(data, local).received[MODEL]))
    # The semi-supervised half learns there from pseudo-labels alone.
    half = FedFixMatchHalf(ConsistencyParams(tau=0.0, mu=1, strong="none"))
    found = half.run(open_round(data, local))
    assert not torch.equal(found.streams[MODEL]["head.weight"], reply.streams[MODEL]["head.weight"])
    assert found.metrics["loss-labelled"] == 0
    assert found.metrics["loss"] == pytest.approx(found.metrics["loss-unlabelled"])


# The losses by hand. The model is the identity, so that views are outputs.


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.0


def value_of(half: ConsistencyHalf, weak: Tensor, strong: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
    batch = {
        "x": torch.zeros(0, 3, dtype=weak.dtype), "y": torch.zeros(0, dtype=torch.int64),
        WEAK: weak, STRONG: strong, TRUTH: torch.arange(len(weak)) % 3,
    }  # fmt: skip
    return half.loss(ModelParts.resident(Identity()), batch, {}, TASK)


LOGITS = torch.tensor([[4.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 5.0]], dtype=torch.float64)
OTHERS = torch.tensor([[1.0, 2.0, 0.5], [0.0, 3.0, 0.0], [2.0, 0.0, 1.0]], dtype=torch.float64)


def test_fixmatch_by_hand() -> None:
    """Samples 0 and 2 pass 0.95 (0.9647, 0.9867), 1 does not (0.5761); the mean is over all three."""
    value, metrics = value_of(FedFixMatchHalf(ConsistencyParams(lambda_u=2.0)), LOGITS, OTHERS)
    terms = [
        math.log(sum(math.exp(z) for z in row)) - row[label]
        for row, label in ((OTHERS[0].tolist(), 0), (OTHERS[2].tolist(), 2))
    ]
    assert float(value) == pytest.approx(2.0 * sum(terms) / 3, rel=1e-12)
    assert metrics[KEPT].tolist() == [1, 0, 1]
    assert metrics[CORRECT].tolist() == [1, 0, 1]
    assert metrics[TOTAL].tolist() == [1, 1, 1]


def test_the_threshold_is_reached_by_equality() -> None:
    even = torch.zeros(3, 2, dtype=torch.float64)  # softmax gives exactly 1/2
    batch = {"x": torch.zeros(0, 2), "y": torch.zeros(0, dtype=torch.int64), WEAK: even, STRONG: even,
             TRUTH: torch.zeros(3, dtype=torch.int64)}  # fmt: skip
    for tau, kept in ((0.5, 3), (math.nextafter(0.5, 1), 0)):
        half = FedFixMatchHalf(ConsistencyParams(tau=tau))
        _, metrics = half.loss(ModelParts.resident(Identity()), batch, {}, Classification(2))
        assert int(metrics[KEPT].sum()) == kept


def test_uda_by_hand() -> None:
    half = FedUDAHalf(FedUDAParams(T=0.5, tau=0.8))
    value, _ = value_of(half, LOGITS, OTHERS)
    total = 0.0
    for weak, strong in ((LOGITS[0], OTHERS[0]), (LOGITS[2], OTHERS[2])):
        p = [math.exp(2 * z) for z in weak.tolist()]
        q = [math.exp(z) for z in strong.tolist()]
        for a, b in zip(p, q, strict=True):
            total += a / sum(p) * math.log(a / sum(p) / (b / sum(q)))
    assert float(value) == pytest.approx(total / 3, rel=1e-12)


def test_uda_is_exactly_zero_for_identical_views_at_temperature_one() -> None:
    half = FedUDAHalf(FedUDAParams(T=1.0, tau=0.0))
    strong = LOGITS.clone().requires_grad_()
    value, _ = value_of(half, LOGITS, strong)
    assert value.item() == 0.0
    (gradient,) = torch.autograd.grad(value, strong)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-15, rtol=0)
    # On a model, in training: what moves is the supervised loss alone.
    params = FedUDAParams(T=1.0, tau=0.0, strong="none", mu=1)
    reply = FedUDAHalf(params).run(open_round(images(), LocalParams(batch_size=3)))
    assert reply.metrics["loss-unlabelled"] == 0.0


@pytest.mark.parametrize(
    "half",
    [FedFixMatchHalf(ConsistencyParams(tau=0.5)), FedUDAHalf(FedUDAParams(tau=0.5, T=0.4))],
    ids=["fixmatch", "uda"],
)
def test_gradients_by_finite_differences_and_none_through_the_weak_view(half: ConsistencyHalf) -> None:
    strong, weak = OTHERS.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: value_of(half, LOGITS, s)[0], (strong,))
    value, _ = value_of(half, weak, strong)
    assert torch.autograd.grad(value, weak, allow_unused=True) == (None,)


def test_rates_are_those_of_all_samples_together() -> None:
    """Means of the clients' rates would give precision 0.75 and coverage 0.55; pooled they are 5/6 and 6/21."""
    replies: list[Mapping[str, Any]] = [
        {"num-examples": 30, KEPT: [1, 1], CORRECT: [1, 0], TOTAL: [10, 10]},
        {"num-examples": 2, KEPT: [4, 0], CORRECT: [4, 0], TOTAL: [1, 0]},
    ]
    rates = pseudo_label_rates(mean_metrics(replies))
    assert rates["pseudo-coverage"] == 6 / 21
    assert rates["pseudo-precision"] == 5 / 6
    assert rates["pseudo-correct-share"] == 5 / 21
    empty = pseudo_label_rates({KEPT: [0, 0], CORRECT: [0, 0], TOTAL: [0, 0]})
    assert set(empty.values()) == {0.0}


def test_every_round_reports_them() -> None:
    for metrics in trained(run({"name": "fedfixmatch", "tau": 0.14, "mu": 2})):
        kept, correct, total = (sum(metrics[name]) for name in (KEPT, CORRECT, TOTAL))
        # Two clients, four steps, two unlabelled samples for each of 16 labelled ones.
        assert total == 2 * 4 * 2 * 16
        assert 0 < correct < kept <= total
        assert metrics["pseudo-coverage"] == kept / total
        assert metrics["pseudo-precision"] == correct / kept


# FedMatch.


def psi_round(factor: float, local: LocalParams, **streams: Mapping[str, Tensor]) -> LocalRound:
    data = images()
    theta = open_round(data, local).received[MODEL]
    psi = {n: factor / (1 + factor) * v for n, v in theta.items()}
    return open_round(data, local, {PSI: psi, **streams})


OFF: dict[str, Any] = {"lambda_i": 0.0, "lambda_a": 0.0, "lambda_l2": 0.0, "lambda_l1": 0.0}


def test_a_supervised_step_leaves_psi_and_an_unsupervised_one_leaves_sigma() -> None:
    local = LocalParams(batch_size=3, momentum=0.5, lr=0.05)
    both = {}
    for name, params in (
        ("supervised", FedMatchParams(mu=1, strong="none", **OFF)),
        ("unsupervised", FedMatchParams(mu=1, strong="none", tau=0.0, lambda_s=0.0, lambda_a=1.0)),
    ):
        opened, half = psi_round(0.5, local), FedMatchHalf(params)
        extras = half.begin(opened)
        sigma = opened.parameters()
        psi = {n: v.clone() for n, v in extras[PSI].items()}
        trained_ = train(
            opened, half.loss, extras=extras, batches=half.batches(opened), further=half.further(extras)
        )
        streams = half.end(opened, trained_, extras)
        after = {n: streams[MODEL][n] - streams[PSI][n] for n in sigma}
        both[name] = (sigma, after, psi, streams)
    sigma, after, psi, streams = both["supervised"]
    assert_same(psi, dict(streams[PSI]))
    assert all(not torch.allclose(after[n], sigma[n], atol=1e-4) for n in sigma)
    sigma, after, psi, streams = both["unsupervised"]
    for n in sigma:
        # Sigma itself is not sent; theta = sigma + psi is, so it is known up to one rounding.
        torch.testing.assert_close(after[n], sigma[n], atol=1e-6, rtol=0)
        assert torch.equal(streams[MODEL][n], sigma[n] + streams[PSI][n])
        assert not torch.allclose(streams[PSI][n], psi[n], atol=1e-4)


def test_without_psi_fedmatch_is_labels_only() -> None:
    params = {"name": "fedmatch", "lambda_s": 1.0, "psi_factor": 0.0, "mu": 1, "tau": 0.0, **OFF}
    plain = {"name": "labels_only", "weighting": "uniform"}
    assert_same(run(params).model, run(plain).model)
    assert not torch.equal(run({**params, "lambda_a": 1.0}).model["head.bias"], run(plain).model["head.bias"])


def test_the_first_psi_is_its_share_of_the_model() -> None:
    strategy = FedMatch(FedMatchParams(psi_factor=0.25))
    strategy.current = {"w": torch.tensor([5.0, -10.0])}
    psi = strategy.broadcast(1)[PSI]["w"]
    assert psi.tolist() == [1.0, -2.0]
    sigma = strategy.current["w"] - psi
    torch.testing.assert_close(psi, 0.25 * sigma)


def test_votes_by_hand() -> None:
    own = torch.tensor([0, 0, 0, 2])
    others = [torch.tensor([1, 1, 0, 0]), torch.tensor([1, 2, 1, 1])]
    # Two against one win; three different ones leave the own; one supporter suffices.
    assert agreed(own, others, 3).tolist() == [1, 0, 0, 2]
    assert agreed(own, [], 3).tolist() == own.tolist()


class Affine(nn.Module):
    """Outputs the inputs plus a bias: theta is that bias."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b


def fedmatch_value(params: FedMatchParams, sigma: Tensor, psi: Tensor, helpers: Sequence[Tensor]) -> Tensor:
    module = Affine()
    batch = {"x": LOGITS[:2], "y": torch.tensor([1, 2]), WEAK: LOGITS, STRONG: OTHERS,
             TRUTH: torch.zeros(3, dtype=torch.int64)}  # fmt: skip
    model = ModelParts.functional(module, {"b": sigma}, {})
    extras = {PSI: {"b": psi}, HELPER: [{"b": h} for h in helpers]}
    return FedMatchHalf(params).loss(model, batch, extras, TASK)[0]


def test_fedmatch_loss_by_hand_and_its_gradients() -> None:
    sigma = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
    psi = torch.tensor([0.5, 0.1, -0.4], dtype=torch.float64)
    helpers = [
        torch.tensor([0.0, 6.0, 0.0], dtype=torch.float64),
        torch.tensor([1.0, 7.0, 2.0], dtype=torch.float64),
    ]
    params = FedMatchParams(lambda_s=3.0, lambda_i=0.5, lambda_a=0.25, lambda_l2=2.0, lambda_l1=0.75, tau=0.8)
    theta = sigma + psi
    outputs = (LOGITS + theta).softmax(1)
    kept = [i for i in range(3) if float(outputs[i].max()) >= 0.8]
    assert kept == [0, 2]
    expected = 3.0 * F.cross_entropy(LOGITS[:2] + theta, torch.tensor([1, 2]))
    votes = [int((LOGITS[i] + h).argmax()) for h in helpers for i in kept]
    assert votes == [1, 1, 1, 1]  # both helpers say 1, against 0 and 2
    for i in kept:
        expected = expected - 0.25 * (OTHERS[i] + theta).log_softmax(0)[1] / 2
        for helper in helpers:
            p = (LOGITS[i] + helper).softmax(0)
            expected = expected + 0.5 / 2 * (p * (p.log() - outputs[i].log())).sum() / 2
    expected = expected + 2.0 * ((sigma - psi) ** 2).sum() + 0.75 * psi.abs().sum()
    torch.testing.assert_close(fedmatch_value(params, sigma, psi, helpers), expected, rtol=1e-12, atol=0)
    # Each half gets its own terms alone: compare with differences of these terms.
    s, p = sigma.clone().requires_grad_(), psi.clone().requires_grad_()
    by_sigma, by_psi = torch.autograd.grad(fedmatch_value(params, s, p, helpers), (s, p))
    alone = replace(params, lambda_i=0.0, lambda_a=0.0, lambda_l2=0.0, lambda_l1=0.0)
    rest = replace(params, lambda_s=0.0)
    for i in range(3):
        e = torch.zeros(3, dtype=torch.float64)
        e[i] = 1e-6
        up, down = (fedmatch_value(alone, sigma + d, psi, helpers) for d in (e, -e))
        assert float(by_sigma[i]) == pytest.approx(float(up - down) / 2e-6, abs=1e-6)
        up, down = (fedmatch_value(rest, sigma, psi + d, helpers) for d in (e, -e))
        assert float(by_psi[i]) == pytest.approx(float(up - down) / 2e-6, abs=1e-6)


def test_identical_helpers_add_no_consistency_loss() -> None:
    sigma, psi = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    params = FedMatchParams(lambda_s=0.0, lambda_a=0.0, lambda_i=1.0, lambda_l1=0.0, lambda_l2=0.0, tau=0.0)
    assert float(fedmatch_value(params, sigma, psi, [sigma + psi])) == 0.0
    assert float(fedmatch_value(params, sigma, psi, [sigma + 1, sigma + LOGITS[0]])) > 0.0


def test_helpers_are_the_nearest_others() -> None:
    strategy = FedMatch(FedMatchParams(H=2))
    assert strategy.helpers("0") == []
    answers = {"0": [1.0, 0.0], "1": [0.0, 1.0], "2": [0.9, 0.1], "10": [0.6, 0.4], "3": [0.6, 0.4]}
    strategy.state[ANSWER] = {c: torch.tensor(a) for c, a in answers.items()}
    assert strategy.helpers("0") == ["2", "3"]
    assert strategy.helpers("1") == ["3", "10"]
    assert strategy.helpers("7") == []


def test_only_rounds_with_helpers_send_them() -> None:
    result = run(
        {"name": "fedmatch", "mu": 1, "h_interval": 2, "H": 1, "tau": 0.0},
        federation={"clients": 3, "rounds": 4},
        local={"steps": 1, "batch_size": 8, "lr": 0.01},
    )
    down = [record.bytes_down for record in result.history if record.phase == "train"]
    assert down[0] == down[2] < down[1] == down[3]
    # One helper is one psi (a whole set of parameters) for each of the three clients.
    model = run("labels_only", federation={"clients": 3, "rounds": 1}, local={"steps": 1})
    per_client = model.history[0].bytes_down / 3
    assert (down[1] - down[0]) / 3 == pytest.approx(per_client, rel=0.02)


# SemiFL.

SEMIFL: dict[str, Any] = {"data": {"server_per_class": 5, "labelled": 0.0}}


def test_the_servers_samples_are_nobody_elses() -> None:
    parts = build_parts(Simulation.of({"strategy": "semifl", "federation": {"clients": 4}, **SEMIFL}))
    assert parts.strategy.setting is not None
    server = parts.strategy.setting.server
    assert server is not None
    held = [parts.train.indices(client) for client in range(4)]
    assert np.bincount(parts.dataset.train.labels[server.samples]).tolist() == [5] * 10
    everyone = np.concatenate([*held, server.samples])
    assert sorted(everyone.tolist()) == list(range(len(parts.dataset.train)))
    assert torch.equal(server.data.y, server.data.extras[CLEAN])
    view = ClientData.view(parts.dataset, parts.dataset.train, held[0], torch.device("cpu"))
    assert bool((view.y == -1).all())


def test_pseudo_labels_stay_the_same_within_a_round() -> None:
    """They are the received model's, whatever the training model thinks later, in every view and as partner."""
    data, local = images(30, 0), LocalParams(batch_size=4, lr=2.0, steps=12)
    opened = open_round(data, local)
    received = opened.model(data.x).detach()
    confidence, expected = received.softmax(1).max(1)
    tau = float(confidence.median())
    confident, half = confidence >= tau, SemiFLHalf(SemiFLParams(tau=tau, strong="none"))
    assert 0 < int(confident.sum()) < 30
    seen: dict[int, set[int]] = {}
    partners: set[int] = set()
    original = half.loss

    def watched(model: ModelParts, batch: dict[str, Tensor], extras: Any, task: Any) -> Any:
        for index, label in zip(batch["index"].tolist(), batch["y"].tolist(), strict=True):
            seen.setdefault(index, set()).add(label)
        partners.update(batch["mixed-y"].tolist())
        return original(model, batch, extras, task)

    half.loss = watched  # type: ignore[method-assign]
    reply = half.run(opened)
    assert set(seen) == set(torch.nonzero(confident)[:, 0].tolist())
    assert all(labels == {int(expected[index])} for index, labels in seen.items())
    assert partners <= set(expected.tolist())
    # The model did change its mind meanwhile, so that the test says something.
    assert not torch.equal(opened.model(data.x).argmax(1), expected)
    assert reply.metrics[KEPT] == torch.bincount(expected[confident], minlength=3).tolist()
    right = expected[confident & (expected == data.extras[CLEAN])]
    assert reply.metrics[CORRECT] == torch.bincount(right, minlength=3).tolist()
    assert reply.metrics[TOTAL] == torch.bincount(data.extras[CLEAN], minlength=3).tolist()
    labels, kept = pseudo_labels(open_round(data, local), tau)
    assert torch.equal(labels, expected)
    assert torch.equal(kept, confident)


def test_mixup_mixes_labels_as_it_mixes_images() -> None:
    data, local = images(20, 0, torch.float64), LocalParams(batch_size=5)
    opened, half = open_round(data, local), SemiFLHalf(SemiFLParams(strong="none", lambda_=0.5))
    named = replace(data, y=data.extras[CLEAN])
    kept = torch.arange(20) % 2 == 0
    batches = half.named_batches(opened, named, kept)
    for step in range(3):
        batch = batches(step)
        assert bool((batch["index"] % 2 == 0).all())
        rng = seeds.numpy_rng(0, "mixup", 1, step)
        rows = rng.integers(20, size=5)
        share = rng.beta(0.75, 0.75)
        torch.testing.assert_close(batch["mixed"], share * batch["x"] + (1 - share) * data.x[rows])
        assert torch.equal(batch["mixed-y"], named.y[rows])
        value, _ = half.loss(opened.parts, batch, {}, TASK)
        plain = F.cross_entropy(opened.model(batch["x"]), batch["y"])
        hot = share * F.one_hot(batch["y"], 3) + (1 - share) * F.one_hot(batch["mixed-y"], 3)
        mixed = F.cross_entropy(opened.model(batch["mixed"]), hot.double())
        torch.testing.assert_close(value, plain + 0.5 * mixed)


def test_without_pseudo_labels_semifl_is_central_training_on_the_servers_samples() -> None:
    """Bit for bit a plain loop over the documented streams: one turn before round 1 and one after each round."""
    settings: dict[str, Any] = {
        "model": {"name": "mlp", "hidden": [8]},
        "federation": {"clients": 3, "rounds": 2},
        "local": {"batch_size": 20, "lr": 0.1, "momentum": 0.5},
        **SEMIFL,
    }
    result = run({"name": "semifl", "tau": 1.01, "server_epochs": 2}, **settings)
    assert [m["pseudo-coverage"] for m in trained(result)] == [0.0, 0.0]
    assert [m["steps"] for m in trained(result)] == [0, 0]
    parts = build_parts(Simulation.of({"strategy": "semifl", **settings}))
    assert parts.strategy.setting is not None
    server = parts.strategy.setting.server
    assert server is not None
    x, y = server.data.x, parts.dataset.train.labels[server.samples]
    net = parts.spec.model.build(0)
    for turn in range(3):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5)
        for epoch in (2 * turn, 2 * turn + 1):
            order = torch.from_numpy(seeds.numpy_rng(0, "data order", 3, epoch).permutation(50))
            for rows in (order[:20], order[20:40], order[40:]):
                optimizer.zero_grad()
                F.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
    assert_same(result.model, dict(net.state_dict()))


class WithoutServerTurn(SemiFL):
    def _supervised(self, turn: int, model: dict[str, Tensor]) -> dict[str, Tensor]:
        return model


def test_server_momentum_by_hand() -> None:
    """Weights move both ways; a client that trained nothing does not count; the velocity remembers."""
    strategy = WithoutServerTurn(SemiFLParams(beta=0.5, server_lr=0.5))

    def reply(w: list[float], steps: int, n: int) -> ClientReply:
        return ClientReply(0, {MODEL: {"w": torch.tensor(w)}}, {"num-examples": n, "steps": steps})

    first = strategy.aggregate(
        1, {"w": torch.tensor([1.0, -1.0])},
        [reply([0.0, 0.0], 3, 1), reply([2.0, 4.0], 3, 9), reply([9.0, 9.0], 0, 9)],
    )  # fmt: skip
    # Mean (1, 2), alike for both; v = (0, -3); w - v / 2.
    assert first["w"].tolist() == [1.0, 0.5]
    idle = strategy.aggregate(2, first, [reply([9.0, 9.0], 0, 9)])
    assert idle["w"].tolist() == [1.0, 0.5]
    second = strategy.aggregate(3, idle, [reply([0.0, 0.5], 1, 1)])
    # v = 0.5 (0, -3) + (1, 0) = (1, -1.5).
    assert second["w"].tolist() == [0.5, 1.25]


def test_batchnorm_statistics_come_from_the_servers_samples() -> None:
    settings: dict[str, Any] = {
        "model": {"name": "resnet8", "norm": "bn"},
        "federation": {"clients": 3, "cohort": 1, "rounds": 1},
        "local": {"steps": 1, "batch_size": 25, "lr": 0.01},
        **SEMIFL,
    }
    result = run({"name": "semifl", "tau": 0.0, "server_epochs": 1}, **settings)
    counters = {n: int(v) for n, v in result.model.items() if n.endswith("num_batches_tracked")}
    assert counters
    assert set(counters.values()) == {2}  # 50 samples in batches of 25


def test_a_semifl_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    strategy = {"name": "semifl", "tau": 0.2}
    whole = run(strategy, **SEMIFL, federation={"clients": 3, "cohort": 2, "rounds": 3})
    short = {"clients": 3, "cohort": 2, "rounds": 2}
    run(strategy, **SEMIFL, federation=short, run={"dir": str(tmp_path / "run")})
    assert any(m["pseudo-coverage"] for m in trained(whole))
    assert_same(resume(tmp_path / "run", federation={"rounds": 3}).model, whole.model)


# What cannot work is refused before anything runs.


@pytest.mark.parametrize(
    ("params", "bad"),
    [
        (ConsistencyParams, {"tau": -0.1}),
        (ConsistencyParams, {"lambda_u": -1.0}),
        (ConsistencyParams, {"mu": 0}),
        (ConsistencyParams, {"weighting": "size"}),
        (FedUDAParams, {"T": 0.0}),
        (FedMatchParams, {"lambda_i": -1.0}),
        (FedMatchParams, {"lambda_l2": -1.0}),
        (FedMatchParams, {"psi_factor": -0.1}),
        (FedMatchParams, {"H": -1}),
        (FedMatchParams, {"h_interval": 0}),
        (FedMatchParams, {"mu": 0}),
        (SemiFLParams, {"a": 0.0}),
        (SemiFLParams, {"beta": 1.0}),
        (SemiFLParams, {"server_lr": 0.0}),
        (SemiFLParams, {"server_epochs": 0}),
        (SemiFLParams, {"lambda_": -1.0}),
    ],
)
def test_bad_parameters_are_named(params: type, bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"strategy.{next(iter(bad))} is"):
        params(**bad)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.server_per_class"):
        run("semifl")
    with pytest.raises(ConfigError, match=r"local\.lr=0\.1 times strategy\.lambda_l2=10"):
        run("fedmatch", local={"lr": 0.1})
    with pytest.raises(ConfigError, match="leaves the clients without samples"):
        run("semifl", data={"server_per_class": 10_000})
    with pytest.raises(ConfigError, match="Unknown augmentation 'randaugmnet'.*Did you mean 'randaugment'"):
        ConsistencyParams(strong="randaugmnet")


def server_of(dataset: Dataset) -> ServerSide:
    spec = ModelSpec("linear", dataset.input_shape, dataset.num_classes)
    return ServerSide(0, 2, spec, dataset, np.arange(1), "cpu")


def test_data_without_images_or_classes_is_refused() -> None:
    rows = Split(torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64))
    features = server_of(Dataset("rows", rows, rows, ("a", "b"), (0.0,), (1.0,)))
    with pytest.raises(ConfigError, match="made for images"):
        check_data(features, "randaugment_cutout")
    check_data(features, "none")
    check_data(features, "my_package.views:noise")
    text = Split(torch.zeros(4, 6, dtype=torch.int64), torch.zeros(4, 6, dtype=torch.int64))
    tokens = server_of(Dataset("text", text, text, ("a", "b"), (0.0,), (1.0,), task="next-token"))
    with pytest.raises(ConfigError, match="one class for each sample"):
        check_data(tokens, "none")


def test_a_strategy_meets_the_refusal_in_setup() -> None:
    rows = Split(torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64))
    server = server_of(Dataset("rows", rows, rows, ("a", "b"), (0.0,), (1.0,)))
    info = ModelInfo.of(server.model.build(0))
    setting = Setting(0, 2, 1, info, UniformSampler(0, 0), local=LocalParams(lr=0.01), server=server)
    for strategy in (FedMatch(), SemiFL()):
        with pytest.raises(ConfigError, match="made for images"):
            strategy.setup(setting)


def test_the_server_trains_like_a_client_of_its_number() -> None:
    """The same loop: a client that holds the server's samples makes the same bits."""
    data = images(6, 6)
    split = Split(data.x, data.extras[CLEAN])
    dataset = Dataset("toy", split, split, ("a", "b", "c"), (0.0,), (1.0,))
    server = ServerSide(0, 1, ModelSpec("linear", (1, 4, 4), 3), dataset, np.arange(6), "cpu")
    local = LocalParams(batch_size=4, momentum=0.5)
    client = open_round(replace(data, y=data.extras[CLEAN]), local)
    opened = server.open(client.received[MODEL], local, 1, 5)
    for round_ in (client, opened):
        train(round_, ClientHalf().loss, extras={})
    assert_same(dict(client.model.state_dict()), dict(opened.model.state_dict()))
