"""Gradient inversion: gradients of real exchanges, label rules against exact cases, batches against loops."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from torch import Tensor, nn
from torch.nn import functional as F

from flowerbed.clients.params import LocalParams
from flowerbed.datasets.augment import Scale
from flowerbed.errors import CheckpointError, ConfigError
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.leakage.truth import truth_of
from flowerbed.experiments.parts import build_parts
from flowerbed.experiments.simulation import run_simulation
from flowerbed.models.base import ModelSpec
from flowerbed.strategies import attacks
from flowerbed.strategies.attacks import labels, objectives
from flowerbed.strategies.attacks.candidates import update
from flowerbed.strategies.attacks.descents import Descent
from flowerbed.strategies.attacks.inversion import Inversion, moved_back, steps_of
from flowerbed.strategies.attacks.observation import Gradient, Observation, SideInfo, gradient_of, why_inexact
from flowerbed.strategies.attacks.observer import name_of
from flowerbed.strategies.attacks.presets import ATTACKS, TEXT, WITHOUT_SEARCH
from flowerbed.strategies.attacks.priors import BatchStatistics, Norm, TotalVariation, group_gap
from flowerbed.strategies.attacks.spaces import Pixels

SCALE = Scale((0.5,), (0.25,))
GENERATIVE = {"latent", "ggl", "gias", "gifd"}
ONE_STEP = LocalParams(lr=0.1, batch_size=0, steps=1)
SIDE = SideInfo(local=ONE_STEP, scale=SCALE)
SIGMOID = ModelSpec("dlg_lenet", (1, 8, 8), 4)


def gradient_at(module: nn.Module, x: Tensor, y: Tensor) -> Gradient:
    named = dict(module.named_parameters())
    found = torch.autograd.grad(F.cross_entropy(module(x), y), list(named.values()))
    return dict(zip(named, found, strict=True))


def observed(
    x: Tensor, y: Tensor, spec: ModelSpec = SIGMOID, seed: int = 0, lr: float = 0.1, client: int = 0
) -> Observation:
    """Return what a server sees of one plain step; in float64, so that the difference is exact enough."""
    module = spec.build(seed).eval()
    sent = {n: v.detach().clone() for n, v in module.state_dict().items()}
    moved = {n: sent[n] - lr * g for n, g in gradient_at(module, x, y).items()}
    return Observation(client, 1, spec, sent, {**sent, **moved}, len(y))


def images(count: int, shape: tuple[int, ...] = (1, 8, 8), seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return SCALE.values(torch.rand(count, *shape, generator=rng))


def watched(directory: Path, **sections: Any) -> Simulation:
    """Run a small federation whose server is observed."""
    base: dict[str, Any] = {
        "dataset": "digits",
        "model": {"name": "mlp", "hidden": [8]},
        "federation": {"clients": 4, "rounds": 2},
        "local": {"steps": 1, "batch_size": 8, "lr": 0.1},
        "evaluation": {"every": 0},
        "observe": {"rounds": [2], "clients": [1, 2]},
        "run": {"dir": str(directory), "progress": False, "figures": False},
        "grid": {"device": "cpu"},
        "seed": 3,
    }
    for name, value in sections.items():
        base[name] = {**base.get(name, {}), **value} if isinstance(value, dict) else value
    simulation = Simulation.of(base)
    run_simulation(simulation)
    return simulation


# From an exchange to a gradient.


@pytest.mark.parametrize(
    "local",
    [
        {},
        {"weight_decay": 0.01},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ],
)
def test_a_real_exchange_gives_the_central_gradient(local: dict[str, Any], tmp_path: Path) -> None:
    simulation = watched(tmp_path, local=local)
    parts = build_parts(simulation)
    seen = sorted(p.stem for p in (tmp_path / "observations").glob("*.json"))
    assert seen == [name_of(2, 1), name_of(2, 2)]
    for client in (1, 2):
        observation = Observation.load(tmp_path / "observations" / name_of(2, client))
        truth = truth_of(parts, client, 2)
        expected = gradient_at(observation.module(), truth.x, truth.y)
        side = SideInfo(local=simulation.local, rounds=2)
        found = gradient_of(observation, side)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_an_observer_changes_nothing_and_forgets_nothing(tmp_path: Path) -> None:
    watched(tmp_path / "a", local={"batch_size": 16})
    watched(tmp_path / "b", local={"batch_size": 16}, observe={"rounds": [], "clients": []})
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()
    assert not (tmp_path / "b" / "observations").exists()
    observation = Observation.load(tmp_path / "a" / "observations" / name_of(2, 1))
    again = tmp_path / "again"
    observation.save(again)
    stored = Observation.load(again)
    assert (stored.client, stored.round, stored.examples, stored.model) == (1, 2, 359, observation.model)
    assert worlds.equal(stored.sent, observation.sent)
    assert worlds.equal(stored.returned, observation.returned)


def test_under_secure_aggregation_no_single_update_is_seen(tmp_path: Path) -> None:
    watched(tmp_path, secure={"enabled": True}, observe={"clients": []})
    assert [p.stem for p in (tmp_path / "observations").glob("*.json")] == ["round-00002-cohort"]


@pytest.mark.parametrize(
    ("local", "sentence"),
    [
        ({"optimizer": "adam"}, "a step of adam"),
        ({"clip_norm": 1.0}, "clipped"),
        ({"steps": 3}, "3 steps"),
        ({"lr": 0.0}, "learning rate was 0"),
        ({"schedule": "cosine"}, "number of rounds"),
        ({"momentum": 0.9, "persist": True}, "carried over"),
    ],
)
def test_updates_that_are_no_gradient_say_why(local: dict[str, Any], sentence: str) -> None:
    x, y = images(2), torch.tensor([1, 2])
    observation = replace(observed(x, y), round=2)
    side = SideInfo(local=LocalParams(**{"steps": 1, "batch_size": 0, **local}))
    assert sentence in str(why_inexact(observation, side))
    with pytest.raises(ConfigError, match="no single gradient"):
        gradient_of(observation, side)


def test_bad_observations_are_named() -> None:
    x, y = images(2), torch.tensor([1, 2])
    good = observed(x, y)
    name = next(iter(good.sent))
    wrong = replace(good, sent={**good.sent, name: torch.zeros(3)})
    with pytest.raises(ConfigError, match=rf"'{name}' was sent as \(3,\)"):
        wrong.module()
    broken = replace(good, returned={**good.returned, name: torch.full_like(good.sent[name], torch.nan)})
    with pytest.raises(ConfigError, match="not finite"):
        broken.module()
    with pytest.raises(ConfigError, match="lacks"):
        replace(good, sent={**good.sent, "further": torch.zeros(1)}).module()
    with pytest.raises(ConfigError, match="0 everywhere"):
        gradient_of(replace(good, returned=good.sent), SIDE)
    with pytest.raises(ConfigError, match="how many samples"):
        ATTACKS.get("ig")(None).run([(replace(good, examples=None), SIDE)])
    with pytest.raises(ConfigError, match="needs to know local"):
        ATTACKS.get("ig")(None).run([(good, SideInfo())])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Observation.load(Path("nowhere"))


def test_no_attack_can_name_the_truth() -> None:
    """The rooms forbid the import; neither does any attack open files or know of a data set."""
    for path in Path(attacks.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert "experiments" not in str(node.module), path
                assert not str(node.module).startswith("flowerbed.datasets.sources"), path


# Several local steps.


def local_steps(x: Tensor, y: Tensor, local: LocalParams, spec: ModelSpec = SIGMOID) -> Observation:
    """Return what comes back from plain epochs of torch's SGD over the samples in their order."""
    module = spec.build(0).train()
    sent = {n: v.detach().clone() for n, v in module.state_dict().items()}
    optimizer = torch.optim.SGD(
        module.parameters(),
        local.lr,
        local.momentum,
        weight_decay=local.weight_decay,
        nesterov=local.nesterov,
    )
    for _ in range(local.epochs):
        for rows in torch.split(torch.arange(len(y)), local.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(module(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    returned = {n: v.detach().clone() for n, v in module.state_dict().items()}
    return Observation(0, 1, spec, sent, returned, len(y))


@pytest.mark.parametrize(
    "local",
    [
        LocalParams(lr=0.1, batch_size=2),
        LocalParams(lr=0.1, batch_size=2, epochs=2, momentum=0.9, weight_decay=0.01),
        LocalParams(lr=0.1, batch_size=2, epochs=2, momentum=0.9, nesterov=True),
    ],
)
def test_imitated_steps_are_those_of_torch(local: LocalParams) -> None:
    x, y = images(5), torch.tensor([0, 1, 2, 3, 1])
    observation = local_steps(x, y, local)
    side = SideInfo(local=local, scale=SCALE)
    steps = steps_of(observation, side, 5)
    assert (steps.sizes, steps.count) == ((2, 2, 1), 3 * local.epochs)
    module = observation.module()
    found, _ = update(module, dict(module.named_parameters()), {}, x, y, steps)
    for name, value in moved_back(observation).items():
        torch.testing.assert_close(found[name].detach(), value, rtol=1e-4, atol=1e-6)


def test_several_steps_are_attacked_and_counted() -> None:
    x, y = images(4), torch.tensor([0, 1, 2, 3])
    local = LocalParams(lr=0.05, batch_size=2)
    case = (local_steps(x, y, local), SideInfo(local=local, scale=SCALE))
    attack = Inversion("mine", descents=(Descent(steps=60, sign="hard", schedule="steps"),))
    (found,) = attack.run([case])
    assert found.curve[-1] < 0.5 * found.curve[0]
    assert found.evaluations == 2 * 61, "two local steps for each candidate"
    assert found.labels.sort().values.tolist() == [0, 1, 2, 3]
    part = LocalParams(lr=0.05, batch_size=1, steps=2)
    with pytest.raises(ConfigError, match="a part of the client's samples"):
        attack.run([(case[0], SideInfo(local=part))])
    with pytest.raises(ConfigError, match="only plain steps of SGD"):
        attack.run([(case[0], SideInfo(local=LocalParams(optimizer="adam", batch_size=2)))])


# Objectives and priors.


def test_objectives_by_hand() -> None:
    u, v = (
        {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])},
        {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([4.0])},
    )
    expected = {
        "l2": 10.0,
        "l1": 4.0,
        "cosine": 1 - 16 / (5 * 17**0.5),
        "layers": (1 + 0) / 2,
        "norms": 10**0.5,
        "means": 5.0,
        "tag": 10 + 0.1 * 4,
        "l1-relative": 4 / 5,
    }
    assert expected.keys() == set(objectives.OBJECTIVES)
    for name, value in expected.items():
        found = objectives.OBJECTIVES.get(name)(u, v)
        assert float(found) == pytest.approx(value, abs=1e-5), name
        assert float(objectives.OBJECTIVES.get(name)(v, v)) == pytest.approx(0, abs=1e-5)


def test_priors_by_hand() -> None:
    flat = torch.full((2, 3, 5, 5), 0.7)
    assert float(TotalVariation(1.0)(flat)) == 0
    x = torch.tensor([[0.0, 1.0], [0.0, 3.0]]).view(1, 1, 2, 2)
    # Differences 0 and 2 along columns, 1 and 3 along rows.
    assert float(TotalVariation(0.5)(x)) == pytest.approx(0.5 * (1 + 2))
    assert float(TotalVariation(1.0, p=2, q=0.5)(x)) == pytest.approx((2 + 5) ** 0.5)
    assert float(Norm(2.0)(x)) == pytest.approx(2 * 10**0.5)
    restarts = torch.stack([torch.zeros(1, 4), torch.full((1, 4), 2.0)])[None]
    # Each of the two is a distance of 2 from the mean of 1.
    assert float(group_gap(restarts, 3.0)) == pytest.approx(12)


def test_batch_statistics_vanish_where_the_batch_has_the_running_ones() -> None:
    layer = nn.BatchNorm2d(2)
    z = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    far = float(BatchStatistics(1.0, first=2.0).of([(layer, z)]))
    layer.running_mean, layer.running_var = z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False)
    near = float(BatchStatistics(1.0).of([(layer, z)]))
    assert near < 1e-5 < far


# Labels.


def mlp_case(batch: int, seed: int) -> tuple[nn.Module, Gradient, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    spec = ModelSpec("mlp", (12,), 10, {"hidden": [64]})
    module = spec.build(seed)
    x, y = torch.randn(batch, 12, generator=rng), torch.randint(10, (batch,), generator=rng)
    return module, gradient_at(module, x, y), x, y.sort().values


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_with_the_true_probabilities_counts_are_exact(batch: int) -> None:
    module, gradient, x, y = mlp_case(batch, batch)
    last = labels.last_layer(module, gradient, batch, x)
    n = batch * (last.probabilities - last.bias)
    torch.testing.assert_close(n, torch.bincount(y, minlength=10).double(), rtol=0, atol=1e-5)
    assert torch.equal(labels.restore("count", last), y)


@pytest.mark.parametrize("batch", [8, 32])
@pytest.mark.parametrize(
    ("spec", "public", "least"),
    [
        (ModelSpec("dlg_lenet", (3, 16, 16), 10, {"uniform": 0.0}), False, 1.0),
        (ModelSpec("small_cnn", (1, 8, 8), 10), True, 1.0),
        # Normalised features of noise are not those of images: from noise alone it is 0.93 on average.
        (ModelSpec("small_cnn", (1, 8, 8), 10), False, 0.85),
    ],
    ids=["sigmoid", "group norm, public images", "group norm"],
)
def test_counting_is_the_default_and_right_on_random_convolutions(
    spec: ModelSpec, public: bool, least: float, batch: int
) -> None:
    """Of images that are nothing like the noise that stands in for them: bright shapes on black."""
    assert Inversion("mine").rule == "count"
    for seed in range(5):
        module, rng = spec.build(seed).eval(), torch.Generator().manual_seed(seed)
        drawn = torch.rand(batch + 256, *spec.input_shape, generator=rng).sub(0.7).clamp(min=0) * 3
        x, other = SCALE.values(drawn).split([batch, 256])
        y = torch.randint(10, (batch,), generator=rng)
        side = SideInfo(scale=SCALE, surrogate=other if public else None)
        last = labels.last_layer(
            module, gradient_at(module, x, y), batch, labels.dummies(spec.input_shape, side, seed)
        )
        found = labels.restore("count", last)
        gap = torch.bincount(found, minlength=10) - torch.bincount(y, minlength=10)
        assert 1 - float(gap.abs().sum()) / (2 * batch) >= least


@pytest.mark.parametrize("batch", [8, 32])
def test_counting_restores_every_batch_of_a_random_net(batch: int) -> None:
    """From noise alone, repeated labels and all: 20 of 20 batches."""
    side = SideInfo()
    for seed in range(20):
        module, gradient, _, y = mlp_case(batch, seed)
        x = labels.dummies((12,), side, seed)
        assert torch.equal(labels.restore("count", labels.last_layer(module, gradient, batch, x)), y)


def test_all_rules_agree_on_a_single_sample() -> None:
    for seed in range(5):
        module, gradient, x, y = mlp_case(1, seed)
        last = labels.last_layer(module, gradient, 1, x)
        for rule in labels.RULES:
            assert labels.restore(rule, last).tolist() == y.tolist(), rule


def test_rules_for_distinct_labels() -> None:
    module = ModelSpec("mlp", (12,), 10, {"hidden": [64]}).build(0)
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([1, 4, 6, 9])
    last = labels.last_layer(module, gradient_at(module, x, y), 4, x)
    for rule in set(labels.RULES) - {"idlg"}:
        assert labels.restore(rule, last).tolist() == y.tolist(), rule
    assert labels.restore("idlg", last).tolist()[0] in y.tolist()


def test_ilrg_solves_for_counts_where_classes_are_alike_inside() -> None:
    """All samples of a class the same: its assumption holds, and repeated labels are counted exactly."""
    module = ModelSpec("mlp", (12,), 10, {"hidden": [64]}).build(0)
    prototypes = torch.randn(10, 12, generator=torch.Generator().manual_seed(3))
    y = torch.tensor([0, 0, 0, 2, 2, 5, 7, 7, 7, 7, 7, 9])
    last = labels.last_layer(module, gradient_at(module, prototypes[y], y), 12, prototypes)
    assert torch.equal(labels.restore("ilrg", last), y)


def test_a_rule_that_reads_a_bias_asks_for_one() -> None:
    module, gradient, x, _ = mlp_case(4, 0)
    last = replace(labels.last_layer(module, gradient, 4, x), bias=None)
    with pytest.raises(ConfigError, match="use count"):
        labels.restore("greedy-bias", last)
    assert len(labels.restore("count", last)) == 4


# The engine.


def test_a_batch_of_victims_finds_what_a_loop_finds() -> None:
    cases = [(observed(images(2, seed=k), torch.tensor([k, 3]), seed=k, client=k), SIDE) for k in range(3)]
    attack = Inversion(
        "mine", priors=(TotalVariation(0.01),), descents=(Descent(steps=12, sign="soft"),), restarts=2
    )
    together = attack.run(cases, seed=5)
    chunked = replace(attack, chunk=2).run(cases, seed=5)
    assert [r.evaluations for r in together] == [2 * 13] * 3
    for k, case in enumerate(cases):
        # Alone, a victim is the first: the same draws need its place, so the first is compared bit for bit in draws.
        torch.testing.assert_close(chunked[k].x, together[k].x, rtol=1e-4, atol=1e-4)
        if k == 0:
            (alone,) = attack.run([case], seed=5)
            torch.testing.assert_close(alone.x, together[k].x, rtol=1e-4, atol=1e-4)
            assert alone.cost == pytest.approx(together[k].cost, rel=1e-3)


def test_one_model_for_all_victims_is_the_same_as_a_copy_for_each() -> None:
    shared = [(observed(images(1, seed=k), torch.tensor([k]), client=k), SIDE) for k in range(2)]
    attack = Inversion("mine", descents=(Descent(steps=8),))
    together = attack.run(shared, seed=1)
    # A third victim of another model: now every row has a copy of its own.
    mixed = attack.run([*shared, (observed(images(1, seed=9), torch.tensor([1]), seed=4), SIDE)], seed=1)
    for k in range(2):
        torch.testing.assert_close(mixed[k].x, together[k].x, rtol=1e-4, atol=1e-4)


def test_dlg_finds_image_and_label_of_a_sigmoid_net() -> None:
    x, y = images(1, seed=3), torch.tensor([2])
    attack = replace(
        ATTACKS.get("dlg")(None), descents=(Descent(steps=40, lr=1.0, method="lbfgs"),), restarts=4
    )
    (found,) = attack.run([(observed(x, y), SIDE)], seed=0)
    error = (SCALE.pixels(found.x) - SCALE.pixels(x)).square().mean()
    assert float(error) < 1e-4, "40 dB"
    assert found.labels.tolist() == [2]
    assert found.found["costs"][found.found["restart"]] == found.cost == min(found.found["costs"])


def test_ig_stays_in_the_box_and_gets_nearer() -> None:
    x, y = images(1, seed=3), torch.tensor([2])
    attack = replace(
        ATTACKS.get("ig")(None), descents=(Descent(steps=150, sign="hard", schedule="steps"),), priors=()
    )
    (found,) = attack.run([(observed(x, y), SIDE)], seed=0)
    black, white = SCALE.values(torch.zeros(1, 1, 1)), SCALE.values(torch.ones(1, 1, 1))
    assert bool((found.x >= black - 1e-6).all() and (found.x <= white + 1e-6).all())
    assert found.curve[-1] < 0.1 * found.curve[0]


def test_a_restart_that_is_not_finite_is_never_chosen() -> None:
    x, y = images(1, seed=3), torch.tensor([2])
    attack = Inversion("wild", Pixels(boxed=False), "l2", descents=(Descent(steps=3, lr=1e30),), restarts=2)
    (found,) = attack.run([(observed(x, y), SIDE)], seed=0)
    costs = torch.tensor(found.found["costs"])
    assert found.cost == float(costs.min())


def test_given_labels_are_used_and_counted() -> None:
    x, y = images(2), torch.tensor([3, 0])
    attack = Inversion("mine", descents=(Descent(steps=1),))
    (found,) = attack.run([(observed(x, y), replace(SIDE, labels=y))])
    assert found.labels.tolist() == [3, 0]
    with pytest.raises(ConfigError, match="3 labels were given for a batch of 2"):
        attack.run([(observed(x, y), replace(SIDE, labels=torch.tensor([1, 2, 3])))])


@pytest.mark.parametrize("normalisation", ["eval", "train"])
def test_batch_norm_as_the_client_ran_it_explains_the_gradient(normalisation: str) -> None:
    """At the truth the cost is 0 under the right mode, and is not under the other."""
    spec = ModelSpec("resnet8", (1, 8, 8), 4)
    x, y = images(4), torch.tensor([0, 1, 2, 3])
    module = spec.build(0)
    sent = {n: v.detach().clone() for n, v in module.state_dict().items()}
    module.train(normalisation == "train")
    moved = {n: sent[n] - 0.1 * g for n, g in gradient_at(module, x, y).items()}
    observation = Observation(0, 1, spec, sent, {**sent, **moved}, 4)

    class AtTruth(Pixels):
        def open(self, rows: Any) -> dict[str, Tensor]:
            return {"x": x[None].clone()}

    attack = Inversion("at truth", AtTruth(), descents=(Descent(steps=1, lr=1e-12),))
    costs = {
        mode: attack.run([(observation, replace(SIDE, labels=y, normalisation=mode))])[0].cost
        for mode in ("eval", "train")
    }
    other = "train" if normalisation == "eval" else "eval"
    assert costs[normalisation] < 1e-4 < costs[other]


def test_every_preset_runs() -> None:
    x, y = images(2), torch.tensor([1, 2])
    bn = ModelSpec("resnet8", (1, 8, 8), 4)
    for name in set(ATTACKS) - GENERATIVE - WITHOUT_SEARCH - TEXT - {"fishing"}:
        attack = ATTACKS.get(name)(None)
        short = tuple(replace(d, steps=2) for d in attack.descents)
        for spec in (SIGMOID, bn):
            (found,) = replace(attack, descents=short).run([(observed(x, y, spec), SIDE)])
            assert found.x.shape == x.shape
            assert found.labels.shape == y.shape


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Descent(steps=0), "attack.steps is 0"),
        (lambda: Descent(method="newton"), "attack.method is 'newton'"),
        (lambda: Inversion("x", objective="l3"), "Unknown objective"),
        (lambda: Inversion("x", rule="oracle"), "Unknown label rule"),
        (lambda: Inversion("x", restarts=0), "attack.restarts is 0"),
        (lambda: SideInfo(normalisation="batch"), "normalisation is 'batch'"),
        (lambda: Pixels(start="zeros"), "begins at 'zeros'"),
    ],
)
def test_wrong_compositions_are_refused(make: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make()
