"""GIFD as a paper: equal budgets, victims that no prior saw, choices that no victim's truth reaches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowerbed.errors import ConfigError
from flowerbed.experiments.leakage import attacking
from flowerbed.experiments.leakage.truth import Truth, truth_of
from flowerbed.experiments.papers import gifd
from flowerbed.experiments.papers.gifd import PAPER, CuriousParams
from flowerbed.experiments.parts import Parts, build_parts
from flowerbed.experiments.reproduction.engine import Reproduction, reproduce
from flowerbed.experiments.reproduction.finished import Finished
from flowerbed.experiments.reproduction.paper import load_paper, load_scale

QUICK = load_scale(load_paper("gifd"), "quick")
RUNS = {name: arm.simulation(0, dict.fromkeys(arm.references(), "model")) for name, arm in QUICK.arms.items()}
ATTACKS = {name: CuriousParams(**run.strategy.options) for name, run in RUNS.items() if name != gifd.PRIOR}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Reproduction:
    claims = ["range", "feature domain", "stage choice"]
    return reproduce("gifd", "smoke", tmp_path_factory.mktemp("gifd"), claims=claims, workers=1)


SPENT: list[tuple[str, dict[str, int]]] = [
    ("ig", {}),
    ("latent", {}),
    ("gias", {}),
    ("ggl", {"population": 20}),
    *(("gifd", {"stages": k}) for k in (1, 2, 3)),
]


@pytest.mark.parametrize(("attack", "options"), SPENT)
def test_a_budget_is_spent_whatever_the_attack(attack: str, options: dict[str, int]) -> None:
    found = gifd.steps(attack, 400, options)
    spent = sum(found) if isinstance(found, list) else found * (options.get("stages", 0) + 1)
    spent *= options.get("population", 1)
    assert 400 - options.get("stages", 0) <= spent <= 400


def test_all_methods_have_the_same_budget_victims_and_start() -> None:
    assert {(p.budget, p.victims) for n, p in ATTACKS.items() if not n.startswith("batch")} == {(400, 20)}
    assert {(p.budget, p.victims) for n, p in ATTACKS.items() if n.startswith("batch")} == {(400, 5)}
    assert all(one["restarts"] == 1 for p in ATTACKS.values() for one in p.candidates())
    assert all("rule" not in p.options for p in ATTACKS.values())
    assert all(p.adaptive for n, p in ATTACKS.items() if n != "prune-gifd-oblivious")
    for name, params in ATTACKS.items():
        assert params.victims + params.tuned_on <= RUNS[name].federation.clients
    tried = {(p.attack, len(list(p.candidates()))) for n, p in ATTACKS.items() if n.count("-") == 1}
    assert tried == {("ig", 4), ("latent", 1), ("gias", 4), ("gifd", 4), ("ggl", 1)}


@pytest.mark.parametrize("setting", gifd.SETTINGS.values())
def test_arms_of_one_setting_differ_in_the_attack_alone(setting: str) -> None:
    members = [name for name in RUNS if name.startswith(f"{setting}-")]
    assert {f"{setting}-{m}" for m in gifd.METHODS.values()} <= set(members)
    plain = [{k: v for k, v in RUNS[n].plain().items() if k != "strategy"} for n in members]
    assert all(p == plain[0] for p in plain)


def test_settings_of_the_defences() -> None:
    assert {d: RUNS[f"{d}-gifd"].defence.name for d in gifd.DEFENCES} == {d: d for d in gifd.DEFENCES}
    assert (RUNS["batch-gifd"].defence.name, RUNS["batch-gifd"].local.batch_size) == ("none", 4)
    assert RUNS["ood-gifd"].dataset.options["of"] != RUNS["prior"].dataset.name == "fashion_mnist"
    assert RUNS["prune-gifd"].dataset.options["of"] == "fashion_mnist"


def test_every_arm_made_as_many_gradients(made: Reproduction) -> None:
    """Eight and the judgement of each stage, one more where steps do not divide."""
    found = {arm: made.outcomes[arm, 0].values["evaluations"] for arm in made.arms if arm != gifd.PRIOR}
    assert set(found) == {"prune-ig", "prune-latent", "prune-gifd", "prune-gifd-all", "prune-gifd-last"}
    assert all(8 <= value <= 12 for value in found.values())


def parts_of(made: Reproduction, arm: str) -> Parts:
    return build_parts(Finished(arm, 0, made.directories[arm, 0]).simulation)


def test_no_victim_is_among_the_images_of_the_prior(made: Reproduction) -> None:
    prior, victims = parts_of(made, gifd.PRIOR).dataset, parts_of(made, "prune-gifd").dataset
    assert torch.equal(victims.train.inputs, prior.test.inputs)
    assert torch.equal(victims.test.inputs, prior.train.inputs)


def test_a_victims_truth_reaches_no_choice(
    made: Reproduction, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Poisoned for those who are attacked, true for those that options are chosen on: nothing changes but scores."""
    directory = made.directories["prune-gifd", 0]
    finished = Finished("prune-gifd", 0, directory)
    params = CuriousParams(**finished.simulation.strategy.options)
    honest = load_file(directory / gifd.FOLDER / "reconstructions.safetensors")

    def poisoned(parts: Parts, client: int, round_: int) -> Truth:
        true = truth_of(parts, client, round_)
        return Truth(true.x * 0, (true.y + 1) % 10, true.index) if client < params.victims else true

    monkeypatch.setattr(attacking, "truth_of", poisoned)
    found = gifd.measure(finished)
    before = made.outcomes["prune-gifd", 0].values
    again = load_file(directory / gifd.FOLDER / "reconstructions.safetensors")
    assert all(torch.equal(honest[name], again[name]) for name in honest)
    assert found["chosen-stages"] == before["chosen-stages"]
    assert found["psnr"] != before["psnr"]


def test_options_are_those_that_did_best_on_the_further_clients(
    made: Reproduction, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = Finished("prune-ig", 0, made.directories["prune-ig", 0])
    asked: list[tuple[float, tuple[int, ...]]] = []
    true = gifd.attacked

    def seen(one: Finished, params: CuriousParams, options: dict[str, float], clients: range) -> object:
        asked.append((options["tv"], tuple(clients)))
        return true(one, params, options, clients)

    monkeypatch.setattr(gifd, "attacked", seen)
    monkeypatch.setattr(
        gifd,
        "psnr_of",
        lambda made: {0.003: 0.0, 0.01: 1.0, 0.03: 3.0, 0.1: 2.0}[made.attack.priors[0].weight],
    )
    assert gifd.measure(finished)["chosen-tv"] == 0.03
    assert asked == [(0.003, (2,)), (0.01, (2,)), (0.03, (2,)), (0.1, (2,)), (0.03, (0, 1))]


def test_wins_are_counted_image_by_image(tmp_path: Path) -> None:
    runs = {}
    for arm, ratios in {"x-gifd": [3.0, 1.0, 2.0, 5.0], "x-ig": [1.0, 2.0, 2.0, 4.0], "prior": []}.items():
        folder = tmp_path / arm / gifd.FOLDER
        folder.mkdir(parents=True)
        images = [{"psnr": r} for r in ratios]
        (folder / "attack.json").write_text(
            json.dumps({"victims": [{"images": images[:1]}, {"images": images[1:]}]})
        )
        runs[arm] = Finished(arm, 0, tmp_path / arm)
    assert gifd.analyse(runs) == {"x-gifd": {"wins-over-ig": 0.5}}


def test_nulls_and_fitness_are_measured(made: Reproduction) -> None:
    latent, prior = (made.outcomes[arm, 0].values for arm in ("prune-latent", gifd.PRIOR))
    assert {"null-class-mean", "null-nearest-image", "null-best-sample"} <= latent.keys()
    assert {"range-z", "range-h1", "range-h2", "range-h3", "variety", "variety-data"} <= prior.keys()
    assert "null-class-mean" not in made.outcomes["prune-gifd", 0].values


def test_the_figure_and_the_claims_speak_of_arms_that_exist(made: Reproduction) -> None:
    shown = {f"{s}-{m}" for s in gifd.SETTINGS.values() for m in gifd.METHODS.values()}
    assert shown <= set(QUICK.arms)
    assert {arm for c in PAPER.claims for _, arm in c.needs()} <= set(QUICK.arms)
    assert len(gifd.figure(made).axes) == len(gifd.SETTINGS)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"budget": 0}, "budget is 0"),
        ({"tune": {"tv": []}}, "tv has no values"),
        ({"attack": "gif"}, "Unknown attack"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        CuriousParams(**options)  # type: ignore[arg-type]
