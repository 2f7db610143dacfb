"""Malicious servers: exact rows under trap weights, the caught samples' gradient alone, and a run without a trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_attacks import SCALE, gradient_at, images, watched
from torch import Tensor

from flowerbed.clients.params import LocalParams
from flowerbed.errors import ConfigError
from flowerbed.experiments import cli
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.leakage.attacking import attack_run
from flowerbed.experiments.leakage.truth import truth_of
from flowerbed.experiments.parts import build_parts
from flowerbed.models.base import ModelSpec
from flowerbed.strategies.attacks.analytic import TRAP, agreed
from flowerbed.strategies.attacks.descents import Descent
from flowerbed.strategies.attacks.fishing import Fishing
from flowerbed.strategies.attacks.inversion import Inversion
from flowerbed.strategies.attacks.observation import Observation, SideInfo, gradient_of
from flowerbed.strategies.attacks.observer import name_of
from flowerbed.strategies.attacks.tampering import (
    ClassFishing,
    Exchange,
    FeatureFishing,
    Tampering,
    TrapWeights,
    caught,
    cut_of,
    next_cut,
)

SIDE = SideInfo(local=LocalParams(lr=1.0, batch_size=0, steps=1), scale=SCALE)
MLP = ModelSpec("mlp", (1, 8, 8), 4, {"hidden": [300]})
LENET = ModelSpec("dlg_lenet", (1, 8, 8), 4)


def answered(spec: ModelSpec, tampering: Tampering, x: Tensor, y: Tensor) -> Observation:
    """Return what a server sees that tampers, of one plain step on these samples."""
    module = spec.build(0)
    honest = {n: v.detach().clone() for n, v in module.state_dict().items()}
    sent = {**honest, **tampering.broadcast(Exchange(spec, honest, 0, 1, 7, SIDE))}
    module.load_state_dict(sent)
    moved = {n: sent[n] - g for n, g in gradient_at(module, x, y).items()}
    return Observation(0, 1, spec, sent, {**sent, **moved}, len(y))


# Trap weights.


def test_trap_rows_are_half_negative_and_slightly_below_zero() -> None:
    sent = answered(MLP, TrapWeights(sigma=0.5, s=0.9), images(1), torch.tensor([0])).sent
    pixels = sent["body.1.weight"].double() / SCALE.std[0]
    for row in pixels:
        low, high = row[row < 0], row[row > 0]
        assert len(low) == len(high) == 32
        torch.testing.assert_close((-0.9 * low).sort().values, high.sort().values)
    assert float(pixels[pixels < 0].std()) == pytest.approx(0.5 * (1 - 2 / torch.pi) ** 0.5, rel=0.03)
    # On a black image of pixels 0 every row gives 0: what the scale adds is taken back.
    black = SCALE.values(torch.zeros(1, 1, 1)).expand(1, 8, 8).flatten()
    drive = sent["body.1.weight"] @ black + sent["body.1.bias"]
    torch.testing.assert_close(drive, torch.zeros_like(drive), atol=1e-4, rtol=0)


@pytest.mark.parametrize("batch", [4, 16])
def test_every_sample_that_is_alone_in_two_rows_is_copied(batch: int) -> None:
    x, y = images(batch, seed=batch).square(), torch.arange(batch) % 4
    seen = answered(MLP, TrapWeights(s=0.9), x, y)
    fires = (x.flatten(1) @ seen.sent["body.1.weight"].T + seen.sent["body.1.bias"]) > 0
    alone = fires[:, fires.sum(0) == 1].sum(1)
    (found,) = TRAP.run([(seen, SIDE)])
    gaps = (x[:, None] - found.x[None]).flatten(2).abs().amax(2).amin(1)
    copied = gaps < 0.02
    assert bool(copied[alone >= 2].all())
    assert int((alone >= 2).sum()) >= batch / 4, "the case is worth the name"
    assert not bool(copied[alone == 0].any())


def test_rows_that_agree_come_once_and_first() -> None:
    a, b, c = torch.eye(3, dtype=torch.float64) * 5
    x = torch.stack([c, a, b, a + 1e-3, b, b])
    assert agreed(x, torch.arange(10, 16)).tolist() == [12, 11, 10]


def test_a_model_without_a_dense_layer_in_front_is_refused() -> None:
    with pytest.raises(ConfigError, match="'dlg_lenet' has none"):
        answered(LENET, TrapWeights(), images(1), torch.tensor([0]))


# Fishing.


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 3, 1], [3, 3, 0, 2, 1, 1], [3, 0, 0, 0, 0, 0]])
def test_the_body_gets_the_gradient_of_the_caught_samples_alone(labels: list[int]) -> None:
    x, y = images(6), torch.tensor(labels)
    seen = answered(LENET, ClassFishing(target=3), x, y)
    found = gradient_of(seen, SIDE)
    own = y == 3
    count = int(own.sum())
    assert caught(seen, SIDE) == count
    alone = gradient_at(seen.module(), x[own], y[own])
    for name, value in alone.items():
        if not name.startswith("head."):
            torch.testing.assert_close(found[name], value * count / 6, rtol=1e-3, atol=1e-5)


def test_one_of_many_is_reconstructed_and_all_labels_are_counted() -> None:
    x, y = images(8, seed=4), torch.tensor([2, 0, 0, 3, 0, 1, 3, 3])
    seen = answered(LENET, ClassFishing(target=1), x, y)
    attack = Fishing(
        search=Inversion("fishing", descents=(Descent(steps=300, sign="soft", schedule="cosine"),))
    )
    (found,) = attack.run([(seen, SIDE)])
    assert found.found["caught"] == 1
    assert found.labels.tolist() == [1, 0, 0, 0, 2, 3, 3, 3]
    assert found.x.shape == x.shape
    error = (SCALE.pixels(found.x[:1]) - SCALE.pixels(x[5:6])).square().mean()
    assert float(error) < 3e-3, "25 dB, from a batch of eight"


def test_an_empty_net_is_grey_and_all_empty_ones_are_an_error() -> None:
    x, y = images(2), torch.tensor([0, 1])
    attack = Fishing(search=Inversion("fishing", descents=(Descent(steps=1),)))
    empty = answered(LENET, ClassFishing(target=3), x, y)
    full = answered(LENET, ClassFishing(target=1), x, y)
    grey, found = attack.run([(empty, SIDE), (full, SIDE)])
    assert (grey.found["caught"], found.found["caught"]) == (0, 1)
    assert (grey.cost, grey.labels.tolist()) == (1.0, [0, 1])
    assert float(SCALE.pixels(grey.x).sub(0.5).abs().max()) < 1e-6
    with pytest.raises(ConfigError, match="caught nothing"):
        attack.run([(empty, SIDE)])
    with pytest.raises(ConfigError, match="not made to fish"):
        attack.run([(replace(full, sent={**full.sent, "head.weight": torch.ones(4, 48)}), SIDE)])


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.integers(-400, 400), min_size=1, max_size=20, unique=True),
    first=st.floats(-50, 50),
    step=st.floats(0.5, 50),
)
def test_bisection_leaves_a_single_sample(values: list[int], first: float, step: float) -> None:
    seen: list[tuple[float, int]] = []
    for _ in range(40):
        cut = next_cut(seen, first, step)
        seen.append((cut, sum(value < cut for value in values)))
        if seen[-1][1] == 1:
            break
    assert seen[-1][1] == 1
    assert next_cut(seen, first, step) == cut, "and stays there"


def test_feature_fishing_counts_what_is_below_its_cut() -> None:
    x, y = images(6), torch.full((6,), 2)
    seen = answered(LENET, FeatureFishing(target=2), x, y)
    module = seen.module()
    place = int(seen.sent["head.weight"][2].argmax())
    below = module.features(x)[:, place] < cut_of(seen)  # type: ignore[operator]
    assert caught(seen, SIDE) == int(below.sum()) > 0


# In a run.


def started(directory: Path) -> dict[str, Tensor]:
    """Return the model that a run began with."""
    from flowerbed.experiments.run_directory import load_simulation

    return build_parts(load_simulation(directory)).model


def test_a_tampered_round_is_kept_and_leaves_no_trace(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "tampering": {"name": "trap_weights", "s": 0.9},
        "observe": {"rounds": [1], "clients": []},
        "federation": {"clients": 4, "rounds": 1},
    }
    watched(tmp_path / "one", **sections)
    first, kept = started(tmp_path / "one"), load_file(tmp_path / "one" / "model.safetensors")
    assert all(torch.equal(kept[n], v) for n, v in first.items())
    seen = Observation.load(tmp_path / "one" / "observations" / name_of(1, 2))
    assert torch.equal(seen.sent["head.weight"], first["head.weight"])
    assert not torch.equal(seen.sent["body.1.weight"], first["body.1.weight"])
    # The next round trains, and from the honest model.
    sections["federation"] = {"clients": 4, "rounds": 2}
    watched(tmp_path / "two", **sections)
    kept = load_file(tmp_path / "two" / "model.safetensors")
    gap = (kept["body.1.weight"] - first["body.1.weight"]).abs().max()
    assert 0 < float(gap) < 0.1 < float((seen.sent["body.1.weight"] - first["body.1.weight"]).abs().max())


def test_who_is_not_observed_gets_the_honest_model(tmp_path: Path) -> None:
    """And trains it: the update of the others is a quarter of what it is without them."""
    rest: dict[str, Any] = {
        "federation": {"clients": 4, "rounds": 1},
        "observe": {"rounds": [1], "clients": [1]},
    }
    watched(tmp_path / "a", tampering="trap_weights", **rest)
    watched(tmp_path / "b", **rest)
    seen = Observation.load(tmp_path / "b" / "observations" / name_of(1, 1))
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    first, share = started(tmp_path / "a"), seen.examples / 1437  # type: ignore[operator]
    for name in first:
        torch.testing.assert_close(
            b[name] - a[name], share * (seen.returned[name] - first[name]), atol=1e-6, rtol=1e-3
        )


def test_a_feature_is_fished_for_round_by_round(tmp_path: Path) -> None:
    rounds = list(range(1, 9))
    watched(
        tmp_path,
        model="dlg_lenet",
        partition={"name": "shards", "per_client": 1},
        federation={"clients": 40, "rounds": 8},
        local={"steps": 1, "batch_size": 0, "lr": 0.1},
        tampering={"name": "feature_fishing", "target": 1},
        observe={"rounds": rounds, "clients": list(range(40))},
    )
    from flowerbed.experiments.run_directory import load_simulation

    parts = build_parts(load_simulation(tmp_path))
    (client, *_) = (c for c in range(40) if set(truth_of(parts, c, 1).y.tolist()) == {1})
    truth = truth_of(parts, client, 1)
    counts = []
    for round_ in rounds:
        seen = Observation.load(tmp_path / "observations" / name_of(round_, client))
        place = int(seen.sent["head.weight"][1].argmax())
        features = seen.module().features(truth.x)[:, place]  # type: ignore[operator]
        counts.append(int((features < cut_of(seen)).sum()))
    assert counts[-1] == 1
    assert counts[0] > 1
    found = attack_run(tmp_path, "fishing", {"steps": 3}, clients=[client], rounds=[8])
    assert found.victims[0].found.found["caught"] == 1


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["tampering=trap_weights"], "say which, for example observe.rounds"),
        (["tampering=trap_weights", "observe.rounds=[1]", "secure.enabled=true"], "hides them"),
        (["tampering=trap"], "Unknown tampering 'trap'"),
        (["tampering=class_fishing", "tampering.target=12", "observe.rounds=[1]"], "the classes 0 to 9"),
        (["tampering=trap_weights", "tampering.s=2", "observe.rounds=[1]"], "tampering.s is 2"),
        (["strategy=fedbuff", "tampering=class_fishing", "observe.rounds=[1]"], "cannot tamper"),
    ],
)
def test_what_cannot_be_tampered_with_is_said(
    more: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [
        "simulate",
        "model=mlp",
        "federation.clients=4",
        "federation.rounds=1",
        f"run.dir={tmp_path / 'run'}",
    ]
    assert cli.main([*base, "run.figures=false", *more]) != 0
    assert sentence in capsys.readouterr().err


def test_an_attack_that_needs_a_malicious_server_gets_one(tmp_path: Path) -> None:
    asked = ["simulate", "attack=fishing", "attack.steps=2", "tampering.target=5", "model=dlg_lenet"]
    asked += ["federation.clients=6", "federation.rounds=1", "local.steps=1", "local.batch_size=0"]
    assert cli.main([*asked, "evaluation.every=0", "run.figures=false", f"run.dir={tmp_path}", "--json"]) == 0
    from flowerbed.experiments.run_directory import load_simulation

    simulation: Simulation = load_simulation(tmp_path)
    assert (simulation.tampering.name, simulation.tampering.options["target"]) == ("class_fishing", 5)
    assert (tmp_path / "attacks" / "fishing" / "attack.json").exists()
