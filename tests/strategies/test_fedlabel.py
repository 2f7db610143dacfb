"""FedLabel: its identities, its losses and its server by hand, and plain twins of what one client does."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.clients.data import CLEAN, LABELLED, ClientData
from flowerbed.clients.experts import (
    AGREED,
    ALONE_CORRECT,
    ALONE_KEPT,
    CHOSEN_GLOBAL,
    CHOSEN_GLOBAL_CORRECT,
    CONFIDENCES,
    judge,
    no_counts,
    verdict_counts,
    verdict_rates,
)
from flowerbed.clients.local_round import MODEL, Clock, LocalRound
from flowerbed.clients.params import LocalParams
from flowerbed.clients.store import MemoryStore
from flowerbed.clients.training import train
from flowerbed.clients.unlabelled import CORRECT, KEPT, STRONG, TOTAL, unlabelled_batches
from flowerbed.datasets.augment import Scale
from flowerbed.datasets.partitions import Partition
from flowerbed.errors import ConfigError
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.parts import build_parts
from flowerbed.experiments.simulation import make_federation, open_grid, resume, simulate
from flowerbed.models.base import ModelSpec
from flowerbed.models.info import ModelInfo
from flowerbed.models.parts import ModelParts
from flowerbed.models.tasks import Classification
from flowerbed.seeds import seed_sequence
from flowerbed.server.loop import RunResult
from flowerbed.storage import load_groups
from flowerbed.strategies.base import ClientReply
from flowerbed.strategies.fedlabel import (
    AGREEING,
    RECEIVED,
    STEPS,
    STUDENT,
    TARGET,
    VARIANTS,
    WEIGHT,
    FedLabel,
    FedLabelHalf,
    FedLabelParams,
    divergence,
    summed,
)

TASK = Classification(3)
BASE: dict[str, Any] = {
    "model": {"name": "mlp", "hidden": [8]},
    "federation": {"clients": 3, "cohort": 2, "rounds": 3},
    "local": {"steps": 6, "batch_size": 16, "augment": "shift", "momentum": 0.5},
    "evaluation": {"every": 0},
    "grid": {"device": "cpu"},
    "data": {"labelled": 0.2},
}


def run(strategy: Mapping[str, Any], **sections: Any) -> RunResult:
    return simulate(strategy={"name": "fedlabel", **strategy}, **{**BASE, **sections})


def trained(result: RunResult) -> list[Mapping[str, Any]]:
    return [record.metrics for record in result.history if record.phase == "train"]


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def assert_close(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            value, other[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


# The verdict of two experts.

outputs_of_four = st.lists(st.lists(st.floats(-20, 20), min_size=4, max_size=4), min_size=1, max_size=6)


def logits(*rows: tuple[float, ...]) -> Tensor:
    """Return outputs whose softmax are these rows; a probability of zero is minus infinity."""
    return torch.tensor(rows, dtype=torch.float64).log()


@settings(deadline=None)
@given(outputs_of_four)
def test_variance_is_collision_probability_shifted_and_scaled(rows: list[list[float]]) -> None:
    outputs = torch.tensor(rows, dtype=torch.float64)
    p = outputs.softmax(-1)
    expected = (p.square().sum(-1) - 1 / 4) / 3
    found = CONFIDENCES["variance"](outputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert bool(((found >= 0) & (found <= 1 / 4 + 1e-15)).all())


def test_confidences_by_hand() -> None:
    even, sure, two = logits((0.25,) * 4), logits((1.0, 0.0, 0.0, 0.0)), logits((0.5, 0.5, 0.0, 0.0))
    found = {
        name: [float(h(z)) for z in (even, two, sure)]
        for name, h in CONFIDENCES.items()
        if "logit" not in name
    }
    assert found["variance"] == pytest.approx([0, 1 / 12, 1 / 4], abs=1e-15)
    assert found["entropy"] == pytest.approx([1 / (math.log(4) + 1e-5), 1 / (math.log(2) + 1e-5), 1e5])
    assert found["max-probability"] == [0.25, 0.5, 1.0]
    assert float(CONFIDENCES["logit-variance"](torch.tensor([[1.0, 2.0, 3.0]]))) == 1.0


def test_variance_and_largest_probability_may_choose_differently() -> None:
    s_g, s_l = logits((0.6, 0.3, 0.1)), logits((0.5, 0.5, 0.0))
    by_variance = CONFIDENCES["variance"]
    assert float(by_variance(s_g)) == pytest.approx(0.063333, abs=1e-6)
    assert float(by_variance(s_l)) == pytest.approx(0.083333, abs=1e-6)
    local = judge(s_g, s_l, by_variance, 0.55)
    assert (local.from_global.item(), local.kept.item()) == (False, False)
    assert float(local.ratio) == pytest.approx(0.063333 / 0.083333, abs=1e-5)
    shared = judge(s_g, s_l, CONFIDENCES["max-probability"], 0.55)
    assert (shared.from_global.item(), shared.kept.item(), shared.labels.item()) == (True, True, 0)
    assert float(shared.ratio) == pytest.approx(0.5 / 0.6)


@pytest.mark.parametrize("name", sorted(CONFIDENCES))
def test_equal_experts_are_the_global_one_with_full_weight_also_when_both_know_nothing(name: str) -> None:
    for outputs in (torch.tensor([[2.0, 1.0, 0.0]]), torch.zeros(1, 3)):
        verdict = judge(outputs, outputs.clone(), CONFIDENCES[name], 0.1)
        assert (verdict.from_global.item(), verdict.agreeing.item(), verdict.ratio.item()) == (
            True,
            True,
            1.0,
        )


def test_one_expert_alone_is_chosen_whatever_the_other_thinks() -> None:
    unsure, sure = logits((0.4, 0.3, 0.3)), logits((0.05, 0.9, 0.05))
    h = CONFIDENCES["variance"]
    assert judge(unsure, sure, h, 0.3, "global").labels.item() == 0
    assert judge(unsure, sure, h, 0.3, "local").labels.item() == 1
    assert judge(sure, unsure, h, 0.3, "local").labels.item() == 0
    assert judge(unsure, sure, h, 0.3, "global").ratio.item() == 1.0


def test_the_threshold_is_strict() -> None:
    even = torch.zeros(3, 2, dtype=torch.float64)  # softmax gives exactly 1/2
    assert not judge(even, even, CONFIDENCES["variance"], 0.5).kept.any()
    assert judge(even, even, CONFIDENCES["variance"], math.nextafter(0.5, 0)).kept.all()


@settings(deadline=None)
@given(outputs_of_four, st.sampled_from(sorted(CONFIDENCES)), st.sampled_from(["both", "global", "local"]))
def test_the_ratio_is_a_share(rows: list[list[float]], name: str, experts: str) -> None:
    of_global = torch.tensor(rows)
    of_local = of_global.flip(0) / 3
    ratio = judge(of_global, of_local, CONFIDENCES[name], 0.5, experts).ratio
    assert bool(((ratio >= 0) & (ratio <= 1)).all())


@settings(deadline=None)
@given(outputs_of_four, st.permutations(range(4)), st.sampled_from(sorted(CONFIDENCES)))
def test_the_names_of_the_classes_do_not_matter(rows: list[list[float]], order: list[int], name: str) -> None:
    of_global = torch.tensor(rows, dtype=torch.float64)
    of_local = of_global.flip(-1) / 2 + 1
    permutation = torch.tensor(order)
    before = judge(of_global, of_local, CONFIDENCES[name], 0.4)
    after = judge(of_global[:, permutation], of_local[:, permutation], CONFIDENCES[name], 0.4)
    # Where two classes or two experts are equal to rounding, the order decides by definition.
    h = CONFIDENCES[name]
    near = (h(of_global) - h(of_local)).abs() < 1e-9 * h(of_global).abs().clamp(min=1)
    for z in (of_global, of_local):
        top = z.topk(2).values
        near |= (top[:, 0] - top[:, 1] < 1e-9) | ((z.softmax(-1).amax(-1) - 0.4).abs() < 1e-9)
    clear = ~near
    assert torch.equal(permutation[after.labels][clear], before.labels[clear])
    for field in ("kept", "from_global", "agreeing"):
        assert torch.equal(getattr(after, field)[clear], getattr(before, field)[clear])
    torch.testing.assert_close(after.ratio[clear], before.ratio[clear])


def test_counts_and_rates_by_hand() -> None:
    """Six samples over three classes; the threshold is 0.55 and h the variance."""
    of_global = logits(
        (0.9, 0.05, 0.05),  # chosen, right; the local one agrees
        (0.6, 0.2, 0.2),  # not chosen; alone it would be kept and wrong
        (0.9, 0.05, 0.05),  # chosen, wrong; the local one agrees
        (0.4, 0.3, 0.3),  # nobody is sure
        (0.2, 0.2, 0.6),  # not chosen; the local one agrees
        (0.1, 0.8, 0.1),  # chosen, right
    )
    of_local = logits(
        (0.4, 0.3, 0.3),
        (0.1, 0.8, 0.1),
        (0.7, 0.2, 0.1),
        (0.3, 0.4, 0.3),
        (0.05, 0.05, 0.9),
        (0.3, 0.3, 0.4),
    )
    truth = torch.tensor([0, 1, 2, 0, 2, 1])
    verdict = judge(of_global, of_local, CONFIDENCES["variance"], 0.55)
    assert verdict.from_global.tolist()[:3] == [True, False, True]
    counts = verdict_counts(verdict, of_global, of_local, truth, 0.55)
    assert {name: count.tolist() for name, count in counts.items()} == {
        KEPT: [2, 2, 1],
        CORRECT: [1, 2, 1],
        TOTAL: [2, 2, 2],
        CHOSEN_GLOBAL: [2, 1, 0],
        CHOSEN_GLOBAL_CORRECT: [1, 1, 0],
        AGREED: [2, 0, 1],
        f"global-{ALONE_KEPT}": [3, 1, 1],
        f"global-{ALONE_CORRECT}": [1, 1, 1],
        f"local-{ALONE_KEPT}": [1, 1, 1],
        f"local-{ALONE_CORRECT}": [0, 1, 1],
    }
    assert counts.keys() == no_counts(3).keys()
    rates = verdict_rates({name: count.tolist() for name, count in counts.items()})
    assert rates == {
        "chosen-global-share": 3 / 5,
        "chosen-global-precision": 2 / 3,
        "chosen-local-precision": 2 / 2,
        "agreement": 3 / 5,
        "global-alone-correct-share": 3 / 6,
        "local-alone-correct-share": 2 / 6,
    }
    assert set(verdict_rates(no_counts(3)).values()) == {0.0}


# The student's loss.


class Affine(nn.Module):
    """Outputs the inputs plus a bias."""

    def __init__(self, b: Tensor) -> None:
        super().__init__()
        self.b = nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b


WEAKLY = torch.tensor([[2.0, 0.5, 0.0], [0.0, 1.0, 0.2], [0.3, 0.0, 1.5]], dtype=torch.float64)
STRONGLY = torch.tensor([[1.0, 2.0, 0.5], [0.0, 3.0, 0.1], [2.0, 0.0, 1.0]], dtype=torch.float64)
TARGETS = torch.tensor([[1.0, 0.0, 0.3], [0.2, 0.8, 0.0], [0.5, 0.1, 2.0]], dtype=torch.float64).log_softmax(
    -1
)
WEIGHTS = torch.tensor([0.7, 0.0, 0.25], dtype=torch.float64)
START = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)


def student_loss(
    params: FedLabelParams, b: Tensor, strong: Tensor = STRONGLY, weak: Tensor = WEAKLY
) -> Tensor:
    batch = {
        "x": weak, STRONG: strong, "y": torch.tensor([0, 1, 2]), TARGET: TARGETS, WEIGHT: WEIGHTS,
        AGREEING: torch.tensor([True, False, True]),
    }  # fmt: skip
    model = ModelParts.functional(Affine(START), {"b": b}, {})
    return FedLabelHalf(params).loss(model, batch, {RECEIVED: {"b": START}}, TASK)[0]


def kl(log_p: Tensor, z: Tensor) -> float:
    p, q = log_p.exp().tolist(), [math.exp(v) for v in z.tolist()]
    return sum(a * math.log(a / (b / sum(q))) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_the_loss_by_hand(variant: str) -> None:
    b = torch.tensor([0.4, 0.0, -0.1], dtype=torch.float64)
    strong, weak = STRONGLY + b, WEAKLY + b
    ce = (
        sum(math.log(sum(math.exp(v) for v in strong[i].tolist())) - float(strong[i, i]) for i in range(3))
        / 3
    )
    if variant == "paper":  # the strong view, over all three that are kept
        expected = ce + (0.7 * kl(TARGETS[0], strong[0]) + 0.25 * kl(TARGETS[2], strong[2])) / 3
    else:  # the weak view, over the two on which the experts agree, and the anchor
        expected = ce + (0.7 * kl(TARGETS[0], weak[0]) + 0.25 * kl(TARGETS[2], weak[2])) / 2
        expected += 10 * (0.3**2 + 0.2**2 + 0.4**2) / 3
    assert float(student_loss(FedLabelParams(variant=variant), b)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_gradients_by_finite_differences(variant: str) -> None:
    params = FedLabelParams(variant=variant)
    b = torch.tensor([0.4, 0.0, -0.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: student_loss(params, v), (b,))
    strong, weak = STRONGLY.clone().requires_grad_(), WEAKLY.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s, w: student_loss(params, START, s, w) + 0 * w.sum(), (strong, weak)
    )


def test_the_divergence_is_from_the_expert_to_the_student() -> None:
    outputs = STRONGLY.clone().requires_grad_()
    assert divergence(outputs.detach().log_softmax(-1), outputs).tolist() == [0.0] * 3
    value = divergence(TARGETS, outputs)
    assert value[0].item() == pytest.approx(kl(TARGETS[0], STRONGLY[0]), rel=1e-12)
    assert value[0].item() != pytest.approx(kl(STRONGLY[0].log_softmax(-1), TARGETS[0]), rel=1e-3)
    (gradient,) = torch.autograd.grad((WEIGHTS * value).sum(), outputs)
    expected = WEIGHTS[:, None] * (STRONGLY.softmax(-1) - TARGETS.exp())
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


def test_label_and_divergence_on_one_view_pull_together() -> None:
    """The gradient of CE + lambda KL is (1 + lambda) q - (onehot + lambda p), here over the three kept images."""
    strong = STRONGLY.clone().requires_grad_()
    loss = student_loss(FedLabelParams(), torch.zeros(3, dtype=torch.float64), strong)
    (gradient,) = torch.autograd.grad(loss, strong)
    weight = WEIGHTS[:, None]
    expected = (1 + weight) * STRONGLY.softmax(-1) - (
        torch.eye(3, dtype=torch.float64) + weight * TARGETS.exp()
    )
    torch.testing.assert_close(gradient, expected / 3, rtol=1e-12, atol=1e-15)


# The server.


def reply(node: int, expert: float, student: float, known: int, kept: int, merge: str) -> ClientReply:
    start = {"w": torch.zeros(1, dtype=torch.float64)}
    models = [{"w": torch.tensor([v], dtype=torch.float64)} for v in (expert, student)]
    metrics: dict[str, Any] = {"num-examples": known + kept, KEPT: [kept, 0]}
    if merge == "half":
        return ClientReply(node, {MODEL: models[0], STUDENT: models[1]}, metrics)
    return ClientReply(node, {MODEL: summed(start, *models, known, kept, frozenset({"w"}))}, metrics)


def moved(params: FedLabelParams, *clients: tuple[float, float, int, int], round_: int = 99) -> float:
    strategy, merge = FedLabel(params), params.rules.merge
    replies = [reply(node, *client, merge) for node, client in enumerate(clients)]
    return float(strategy.aggregate(round_, {"w": torch.zeros(1, dtype=torch.float64)}, replies)["w"])


TWO = ((1.0, 2.0, 1, 3), (3.0, 1.0, 1, 1))
"""Expert, student, labelled samples, pseudo-labels used of two clients that received 0."""


def test_paper_and_flute_on_the_toy() -> None:
    # r = (4, 2): (4 * 3 + 2 * 4) / 6; and half of mean (1, 3) plus half of (3 * 2 + 1 * 1) / 4.
    assert moved(FedLabelParams(), *TWO) == pytest.approx(10 / 3, rel=1e-15)
    assert moved(FedLabelParams(variant="flute"), *TWO) == 1.875
    assert moved(FedLabelParams(variant="flute"), *TWO, round_=50) == 1.0  # burn-in: the student counts as 0
    assert moved(FedLabelParams(variant="flute"), *TWO, round_=51) == 1.875


def test_other_weights_on_the_toy() -> None:
    assert moved(FedLabelParams(weighting="uniform"), *TWO) == 3.5
    assert moved(FedLabelParams(weighting="kept"), *TWO) == pytest.approx((3 * 3 + 1 * 4) / 4)
    half = FedLabelParams(merge="half")
    assert moved(half, *TWO) == pytest.approx(((4 * 1 + 2 * 3) / 6 + (4 * 2 + 2 * 1) / 6) / 2)
    assert moved(replace(half, weighting="uniform"), *TWO) == (2.0 + 1.5) / 2
    assert moved(FedLabelParams(server_lr=0.5), *TWO) == pytest.approx(5 / 3)


def test_nothing_kept_is_a_weight_of_one_in_flute_and_none_in_paper() -> None:
    idle = (1.0, 0.0, 1, 0)
    assert moved(FedLabelParams(variant="flute"), idle, TWO[0]) == 0.5 * 1.0 + 0.5 * (1 * 0.0 + 3 * 2.0) / 4
    assert moved(FedLabelParams(variant="flute"), idle, idle) == 0.5
    assert moved(FedLabelParams(), idle, TWO[0]) == (1 * 1.0 + 4 * 3.0) / 5
    # No label and nothing kept weighs nothing; a round of such clients changes nothing.
    assert moved(FedLabelParams(), (0.0, 0.0, 0, 0), TWO[0]) == 3.0
    assert moved(FedLabelParams(), (0.0, 0.0, 0, 0)) == 0.0


def test_statistics_are_averaged_and_counters_take_the_largest() -> None:
    def model(w: float, var: float, seen: int) -> dict[str, Tensor]:
        return {"w": torch.tensor([w]), "var": torch.tensor([var]), "seen": torch.tensor(seen)}

    found = summed(model(1, 1.0, 0), model(2, 0.25, 5), model(4, 0.0, 7), 3, 1, frozenset({"w"}))
    # A sum of displacements would make the variance negative: 1 - 0.75 - 1.
    assert (found["w"].item(), found["var"].item(), found["seen"].item()) == (5.0, 3 * 0.25 / 4, 7)
    unlabelled_only = summed(model(1, 1.0, 0), model(1, 1.0, 0), model(4, 0.5, 7), 0, 9, frozenset({"w"}))
    assert (unlabelled_only["w"].item(), unlabelled_only["var"].item()) == (4.0, 0.5)


# What it becomes without its unlabelled part.


def on_labels_alone(strategy: Mapping[str, Any], **sections: Any) -> RunResult:
    """Run a supervised strategy on the labelled samples, as if the others did not exist."""
    parts = build_parts(Simulation.of({**BASE, **sections, "strategy": strategy}))
    mask = parts.dataset.train.extras[LABELLED].numpy()
    held = [parts.train.indices(k) for k in range(parts.train.num_clients)]
    kept = [indices[mask[indices]] for indices in held]
    offsets = np.concatenate([[0], np.cumsum([len(k) for k in kept])])
    dataset = replace(parts.dataset, train=replace(parts.dataset.train, extras={}))
    spec = replace(parts.spec, train=Partition(np.concatenate(kept), offsets), dataset=dataset)
    parts = replace(parts, spec=spec)
    with open_grid(parts, MemoryStore()) as grid:
        return make_federation(parts, grid).run()


SKEWED: dict[str, Any] = {
    "partition": {"name": "dirichlet", "alpha": 0.5},
    "data": {"labelled": 0.3},
    "local": {"steps": 4, "batch_size": 16, "augment": "shift", "momentum": 0.5, "lr": 0.05},
}
WITH_BN: dict[str, Any] = {**SKEWED, "model": {"name": "worlds:bn_net"}}


@pytest.mark.parametrize("sections", [SKEWED, WITH_BN], ids=["mlp", "batch norm"])
@pytest.mark.parametrize("options", [{"beta": 1.0}, {"burn_in": 3, "beta": 0.0}], ids=["beta", "burn-in"])
def test_without_pseudo_labels_it_is_fedavg_on_the_labels_bit_for_bit(
    sections: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    found = run({"tau": 4, "tau_prime": 3, **options}, **sections)
    assert_same(found.model, on_labels_alone({"name": "fedavg"}, **sections).model)
    assert {m[STEPS] for m in trained(found)} == {0}


def test_flute_before_its_students_is_fedavg_with_half_a_step_buffers_too() -> None:
    one = {**WITH_BN, "federation": {"clients": 3, "rounds": 1}}
    found = run({"variant": "flute", "tau": 4}, **one).model
    whole = on_labels_alone({"name": "fedavg", "weighting": "uniform"}, **one).model
    start = build_parts(Simulation.of({**BASE, **one, "strategy": "fedavg"})).model
    floating = [name for name, value in start.items() if value.is_floating_point()]
    assert any("running_var" in name for name in floating)
    assert_close({n: found[n] for n in floating}, {n: (start[n] + whole[n]) / 2 for n in floating})
    # Without buffers, which a server learning rate leaves alone, also over several rounds.
    slow = on_labels_alone({"name": "fedavg", "weighting": "uniform", "server_lr": 0.5}, **SKEWED).model
    assert_close(run({"variant": "flute", "tau": 4}, **SKEWED).model, slow)


def test_terms_with_coefficient_zero_are_not_there() -> None:
    plain = run({"beta": 0.12, "lambda_0": 0.0}).model
    for other in ({"kl_target": "local"}, {"kl_view": "weak"}, {"kl_mean": "agreeing"}, {"anchor": 0.0}):
        assert_same(run({"beta": 0.12, "lambda_0": 0.0, **other}).model, plain)
    for other in ({"lambda_0": 1.0}, {"anchor": 1.0}):
        assert not torch.equal(
            run({"beta": 0.12, "lambda_0": 0.0, **other}).model["head.weight"], plain["head.weight"]
        )


def test_every_difference_of_the_variants_is_an_option() -> None:
    """Paper with every rule of flute spelled out is flute, and the other way round."""
    rules = {name: vars(rule) for name, rule in VARIANTS.items()}
    rules["flute"] = {**rules["flute"], "burn_in": 1}
    assert_same(
        run({"variant": "paper", **rules["flute"]}).model, run({"variant": "flute", "burn_in": 1}).model
    )
    assert_same(
        run({"variant": "flute", **rules["paper"], "beta": 0.12}).model,
        run({"variant": "paper", "beta": 0.12}).model,
    )


# One client against a plain twin.


def order(purpose: str, examples: int, epoch: int) -> Tensor:
    stream = np.random.Generator(np.random.PCG64(seed_sequence(0, purpose, 0, epoch)))
    return torch.from_numpy(stream.permutation(examples))


def twin(variant: str, beta: float, tau: int, tau_prime: int, rounds: int) -> Mapping[str, Tensor]:
    """Central FedLabel in plain PyTorch: one client, plain views, full batches of its own order."""
    parts = build_parts(Simulation.of({**BASE, **ALONE, "strategy": "labels_only"}))
    split, indices = parts.dataset.train, parts.train.indices(0)
    x, y = parts.dataset.prepare(split.inputs[indices]), split.labels[indices]
    mask = split.extras[LABELLED][indices]
    known, names, unknown = x[mask], y[mask], x[~mask]
    net = parts.spec.model.build(0)
    net.load_state_dict(parts.model)
    size, lr = 40, ALONE["local"]["lr"]

    def batches(purpose: str, examples: int, first: int, steps: int) -> list[Tensor]:
        per_epoch = math.ceil(examples / size)
        places = [divmod(step, per_epoch) for step in range(first, first + steps)]
        return [order(purpose, examples, e)[i * size : (i + 1) * size] for e, i in places]

    for t in range(rounds):
        expert, student = copy.deepcopy(net), copy.deepcopy(net)
        optimizer = torch.optim.SGD(expert.parameters(), lr=lr)
        for rows in batches("data order", len(known), t * tau, tau):
            optimizer.zero_grad()
            F.cross_entropy(expert(known[rows]), names[rows]).backward()
            optimizer.step()
        optimizer = torch.optim.SGD(student.parameters(), lr=lr)
        for rows in batches("data order unlabelled", len(unknown), t * tau_prime, tau_prime):
            inputs = unknown[rows]
            with torch.no_grad():
                p_g, p_l = (model(inputs).softmax(1) for model in (net, expert))
            losses, kls, agreeing = [], [], 0
            outputs = student(inputs)
            for i in range(len(rows)):
                v_g, v_l = ((p[i].square().sum() - 0.1) / 9 for p in (p_g, p_l))
                best, other = (p_g[i], p_l[i]) if v_g >= v_l else (p_l[i], p_g[i])
                if float(best.max()) <= beta:
                    continue
                losses.append(-outputs[i].log_softmax(0)[best.argmax()])
                if best.argmax() == other.argmax():
                    agreeing += 1
                    target = other if variant == "paper" else p_l[i]
                    scale = (1.0 if variant == "paper" else 0.05) * min(v_g, v_l) / max(v_g, v_l)
                    kls.append(scale * (target * (target.log() - outputs[i].log_softmax(0))).sum())
            if not losses:
                continue
            loss = torch.stack(losses).mean()
            if kls:
                loss = loss + torch.stack(kls).sum() / (len(losses) if variant == "paper" else agreeing)
            if variant == "flute":
                loss = loss + 10 * sum(
                    F.mse_loss(a, b.detach()) for a, b in zip(student.parameters(), net.parameters())
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            for w, w_l, w_u in zip(net.parameters(), expert.parameters(), student.parameters(), strict=True):
                w.copy_(w_l + w_u - w if variant == "paper" else (w_l + w_u) / 2)
    return net.state_dict()


ALONE: dict[str, Any] = {
    "federation": {"clients": 1, "rounds": 3},
    "local": {"steps": 7, "batch_size": 40, "augment": "none", "lr": 0.5},
    "data": {"labelled": 0.1},
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_one_client_is_the_central_form(variant: str) -> None:
    options = {"variant": variant, "beta": 0.2, "tau_prime": 3, "burn_in": 0, "strong": "none"}
    found = run(options, **ALONE)
    seen, kept, chosen, agreed = (
        sum(trained(found)[-1][name]) for name in (TOTAL, KEPT, CHOSEN_GLOBAL, AGREED)
    )
    assert 0 < chosen < kept < seen, "where every image is treated alike, this tests less"
    assert 0 < agreed < kept
    assert_close(found.model, twin(variant, 0.2, 4, 3, 3))


# One local round.


def images(examples: int = 24, known: int = 8) -> ClientData:
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(examples, 1, 8, 8, generator=generator)
    clean = torch.randint(0, 3, (examples,), generator=generator)
    mask = torch.arange(examples) < known
    extras = {LABELLED: mask, CLEAN: clean}
    return ClientData(x, torch.where(mask, clean, -1), torch.arange(examples), extras, Scale())


def open_round(data: ClientData, local: LocalParams, model: str = "mlp", round_: int = 1) -> LocalRound:
    module = ModelSpec(model, tuple(data.x.shape[1:]), 3).build(0)
    received = {MODEL: {n: v.clone() for n, v in module.state_dict().items()}}
    return LocalRound(
        client=1, seed=0, clock=Clock(round_, 5, local.steps_per_round(len(data))), phase="train", config={},
        received=received, model=module, parts=ModelParts.resident(module), info=ModelInfo.of(module), task=TASK,
        local=local, open_train=lambda: data, open_test=lambda: data, state={}, device=torch.device("cpu"),
    )  # fmt: skip


LOCAL = LocalParams(steps=6, batch_size=8, lr=0.1, momentum=0.9, weight_decay=0.01, augment="shift")


def test_experts_stay_as_they_were_while_the_student_trains() -> None:
    """Also with batch norm, whose student's statistics move: the labels of a step never depend on the student."""
    opened, half = open_round(images(), LOCAL, "worlds:bn_net"), FedLabelHalf(FedLabelParams(beta=0.0))
    received = opened.received_model()
    expert = {n: v + 0.1 if v.is_floating_point() else v for n, v in received.items()}
    source = half.pseudo_labelled(opened, unlabelled_batches(opened, LOCAL, "randaugment"), received, expert)
    before = source(3)
    train(opened, half.loss, extras={RECEIVED: received}, batches=source)
    state = opened.model.state_dict()
    assert not any(torch.equal(v, state[n]) for n, v in received.items()), (
        "the student moved, statistics and all"
    )
    after = source(3)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert opened.model.training


def test_both_views_are_of_the_kept_images_and_drawn_anew() -> None:
    opened, half = open_round(images(), LOCAL), FedLabelHalf(FedLabelParams(beta=0.0, strong="none"))
    received = opened.received_model()
    plain = replace(LOCAL, augment="none", batch_size=0)
    source = half.pseudo_labelled(opened, unlabelled_batches(opened, plain, "none"), received, received)
    assert torch.equal(source(0)["x"], source(0)[STRONG])
    drawn = half.pseudo_labelled(opened, unlabelled_batches(opened, LOCAL, "randaugment"), received, received)
    epoch = 2  # steps of one pass over 16 unlabelled images
    for view in ("x", STRONG):
        passes = [torch.cat([drawn(e * epoch + i)[view] for i in range(epoch)]) for e in range(2)]
        assert not torch.equal(
            passes[0].flatten(1).sum(1).sort().values, passes[1].flatten(1).sum(1).sort().values
        )


def test_a_student_without_pseudo_labels_does_not_move_in_any_way() -> None:
    """No step at all: neither weight decay nor momentum acts."""
    reply_ = FedLabelHalf(FedLabelParams(beta=1.0, merge="half")).run(open_round(images(), LOCAL))
    received = open_round(images(), LOCAL).received[MODEL]
    assert_same(dict(reply_.streams[STUDENT]), dict(received))
    assert reply_.metrics["num-examples"] == 8
    assert (reply_.metrics["steps"], reply_.metrics[STEPS]) == (3, 0)


def test_a_client_without_unlabelled_samples_sends_its_local_expert() -> None:
    data = images(8, 8)
    found = FedLabelHalf(FedLabelParams(beta=0.0)).run(open_round(data, LOCAL))
    idle = FedLabelHalf(FedLabelParams(beta=1.0)).run(open_round(data, LOCAL))
    assert_same(dict(found.streams[MODEL]), dict(idle.streams[MODEL]))
    assert found.metrics["num-examples"] == 8
    assert not torch.equal(
        found.streams[MODEL]["head.weight"], open_round(data, LOCAL).received[MODEL]["head.weight"]
    )


def test_a_client_without_labels_asks_the_global_model_alone() -> None:
    data = images(16, 0)
    found = FedLabelHalf(FedLabelParams(beta=0.0)).run(open_round(data, LOCAL))
    kept = found.metrics[KEPT]
    assert isinstance(kept, list)
    assert found.metrics["num-examples"] == sum(kept) == 3 * 8
    assert found.metrics[CHOSEN_GLOBAL] == kept == found.metrics[AGREED]
    assert found.metrics["loss-labelled"] == 0.0
    nothing = FedLabelHalf(FedLabelParams(beta=1.0)).run(open_round(data, LOCAL))
    assert nothing.metrics["num-examples"] == 0
    assert_same(dict(nothing.streams[MODEL]), dict(open_round(data, LOCAL).received[MODEL]))


def test_batch_norm_never_sees_a_single_image() -> None:
    """Unlabelled batches of one: without batch norm these are steps, with it none."""
    data = images(13, 4)
    local = replace(LOCAL, batch_size=8, steps=4)
    steps = {}
    for model in ("mlp", "worlds:bn_net"):
        found = FedLabelHalf(FedLabelParams(beta=0.0, tau=1, tau_prime=4)).run(open_round(data, local, model))
        steps[model] = (found.metrics[STEPS], sum(found.metrics[KEPT]), sum(found.metrics[TOTAL]))  # type: ignore[arg-type]
    assert steps == {"mlp": (4, 18, 18), "worlds:bn_net": (2, 16, 18)}


def test_steps_are_those_that_labels_only_makes() -> None:
    assert FedLabelParams().steps(7) == (4, 3)
    assert FedLabelParams(tau_prime=10).steps(40) == (30, 10)
    assert FedLabelParams(tau=5, tau_prime=5).steps(1) == (5, 5)
    assert FedLabelParams().steps(1) == (1, 0)
    local = {"epochs": 2, "batch_size": 50, "lr": 0.01}
    supervised = simulate(strategy="labels_only", **{**BASE, "local": local})
    found = run({"beta": 0.0}, local=local)
    assert [m["steps"] for m in trained(found)] == [m["steps"] for m in trained(supervised)]


# Whole runs.


def test_every_round_says_how_good_the_labels_are_and_who_wrote_them() -> None:
    result = run({"beta": 0.13})
    for metrics in trained(result):
        kept, correct, seen, chosen = (sum(metrics[n]) for n in (KEPT, CORRECT, TOTAL, CHOSEN_GLOBAL))
        assert seen == 2 * 3 * 16
        assert 0 < kept <= seen
        assert metrics["pseudo-coverage"] == kept / seen
        assert metrics["pseudo-precision"] == correct / kept
        assert metrics["chosen-global-share"] == chosen / kept
        assert metrics["global-alone-correct-share"] == sum(metrics[f"global-{ALONE_CORRECT}"]) / seen
        assert 0 <= metrics["lambda"] <= 1
        assert (metrics["supervised-factor"], metrics["student-factor"]) == (1.0, 1.0)


def test_flute_says_that_it_halves_the_step_and_sends_twice_as_much() -> None:
    flute, paper = run({"variant": "flute", "burn_in": 1}), run({"beta": 0.12})
    assert [(m["supervised-factor"], m["student-factor"]) for m in trained(flute)] == [
        (0.5, 0.0),
        *[(0.5, 0.5)] * 2,
    ]
    up = [r.bytes_up for r in flute.history if r.phase == "train"]
    single = [r.bytes_up for r in paper.history if r.phase == "train"]
    down = [r.bytes_down for r in flute.history if r.phase == "train"]
    assert down == [r.bytes_down for r in paper.history if r.phase == "train"]
    # Metrics are a few kilobytes beside the model.
    assert up[0] == pytest.approx(single[0], rel=0.01)
    assert up[1] - up[0] == pytest.approx(down[0], rel=0.05)


@pytest.mark.parametrize("options", [{"beta": 0.13}, {"variant": "flute", "burn_in": 1, "beta": 0.12}])
def test_a_run_resumes_to_the_same_bits(options: Mapping[str, Any], tmp_path: Path) -> None:
    kept = {"local": {**BASE["local"], "persist": True}}
    whole = run(options, run={"dir": str(tmp_path / "whole")}, **kept)
    run(options, run={"dir": str(tmp_path / "short")}, federation={**BASE["federation"], "rounds": 2}, **kept)
    longer = resume(tmp_path / "short", federation={"rounds": 3})
    assert_same(whole.model, longer.model)
    assert (tmp_path / "whole" / "figures" / "pseudo_labels.png").exists()
    assert any("momentum_buffer" in name for name in _state_groups(tmp_path / "whole"))


def _state_groups(directory: Path) -> list[str]:
    """Return the names of what clients keep for their students."""
    kept = (directory / "checkpoints" / "clients").rglob("*.safetensors")
    return [group for path in kept for group in load_groups(path) if STUDENT in group]


def test_it_learns_digits_from_few_labels() -> None:
    result = run(
        {"beta": 0.7, "burn_in": 6},
        federation={"clients": 5, "rounds": 12},
        local={"steps": 30, "batch_size": 32, "lr": 0.1},
        model={"name": "mlp", "hidden": [32]},
        data={"labelled": 0.1},
        evaluation={"every": 12},
    )
    assert result.final()["accuracy"] > 0.8
    assert trained(result)[-1]["pseudo-precision"] > 0.8


@pytest.mark.parametrize("labels", [{"labelled": 0.2}, {"labels_per_class": 2}])
@pytest.mark.parametrize("federation", [{"clients": 20, "cohort": 4}, {"clients": 3}], ids=["device", "silo"])
def test_class_mismatched_labels_cross_device_and_cross_silo(
    labels: Mapping[str, Any], federation: Mapping[str, Any]
) -> None:
    result = run(
        {"beta": 0.12},
        data={**labels, "labelled_classes": 0.5},
        federation={**federation, "rounds": 2},
        partition={"name": "dirichlet", "alpha": 1.0},
    )
    assert not result.failures
    assert all(sum(m[KEPT]) for m in trained(result))


# Refusals.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "released"}, r"Unknown strategy\.variant 'released'.*flute, paper"),
        ({"h": "variance of logits"}, r"Unknown strategy\.h"),
        ({"merge": "mean"}, r"Unknown strategy\.merge 'mean'.*half, sum"),
        ({"weighting": "examples"}, r"Unknown strategy\.weighting.*kept, r_k, uniform"),
        ({"kl_target": "global"}, r"strategy\.kl_target"),
        ({"experts": "none"}, r"strategy\.experts"),
        ({"strong": "strongest"}, r"augmentation 'strongest'"),
        ({"beta": -0.1}, r"strategy\.beta is -0\.1"),
        ({"lambda_0": -1.0}, r"strategy\.lambda_0"),
        ({"tau_prime": -1}, r"strategy\.tau_prime"),
        ({"server_lr": 0.0}, r"strategy\.server_lr"),
    ],
)
def test_bad_parameters_name_themselves(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FedLabelParams(**options)


def test_labels_that_cannot_work_are_refused_before_training() -> None:
    with pytest.raises(ConfigError, match=r"every client sees all of its labels; set data\.labelled"):
        run({}, data={})
    # Four samples in all have a label, so at least six of the ten classes have none.
    with pytest.raises(
        ConfigError, match=r"see 3 labels for 10 classes, and none of . of them.*raise data\.labelled"
    ):
        run({}, data={"labelled": 0.002})
    with pytest.raises(ConfigError, match="none of 10 of them"):
        run({}, data={"labelled": 0.0})
    # The server's own labels help no client.
    with pytest.raises(ConfigError, match="none of 10 of them"):
        run({}, data={"labelled": 0.0, "server_per_class": 3})


def test_two_models_cannot_be_masked_or_noised_together() -> None:
    for sections in ({"secure": {"enabled": True}}, {"privacy": {"mode": "central"}}):
        with pytest.raises(ConfigError, match="fedlabel"):
            run({"variant": "flute"}, federation={"clients": 4, "rounds": 1}, **sections)
    assert not FedLabel(FedLabelParams()).individual_replies
