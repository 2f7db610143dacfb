"""Defended runs under attack: the truth behind encodings, who knows what, and any settings as a defence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowerbed.datasets.augment import Scale
from flowerbed.errors import DataError
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.leakage import matrix
from flowerbed.experiments.leakage.attacking import attack_run
from flowerbed.experiments.leakage.truth import truth_of, truth_of_all
from flowerbed.experiments.parts import Parts, build_parts
from flowerbed.experiments.simulation import run_simulation

SETTINGS: dict[str, Any] = {
    "dataset": "digits",
    "model": {"name": "dlg_lenet"},
    "federation": {"clients": 4, "rounds": 2},
    "local": {"steps": 1, "batch_size": 2, "lr": 0.1},
    "evaluation": {"every": 0},
    "grid": {"device": "cpu"},
}


def parts_with(defence: dict[str, Any] | str, **sections: Any) -> Parts:
    return build_parts(Simulation.of({**SETTINGS, "defence": defence, **sections}))


def test_ats_is_judged_by_what_the_model_saw() -> None:
    """Inverted images: the truth is 1 - x, and the originals stand beside it."""
    plain = truth_of(parts_with("none"), 1, 2)
    found = truth_of(parts_with({"name": "ats", "policies": [[29]]}), 1, 2)
    assert torch.equal(found.index, plain.index)
    torch.testing.assert_close(found.other["original"], plain.x)
    dataset = parts_with("none").dataset
    scale = Scale(dataset.mean, dataset.std)
    torch.testing.assert_close(scale.pixels(found.x), 1 - scale.pixels(plain.x))


def test_mixtures_are_judged_by_originals() -> None:
    plain = truth_of(parts_with("none"), 1, 2)
    found = truth_of(parts_with({"name": "mixup", "k": 2, "high": 0.9}), 1, 2)
    torch.testing.assert_close(found.x, plain.x)
    assert torch.equal(found.y, plain.y)
    assert not torch.allclose(found.other["encoded"], plain.x)
    both = truth_of_all(parts_with({"name": "mixup"}), [0, 1], 2)
    assert both.other["encoded"].shape == both.x.shape == (4, 1, 8, 8)


def test_labels_that_were_softened_leave_samples_alone() -> None:
    plain = truth_of(parts_with("none"), 1, 2)
    found = truth_of(parts_with("labels"), 1, 2)
    assert torch.equal(found.x, plain.x)
    assert found.other == {}


@pytest.mark.parametrize(
    ("defence", "figure"),
    [
        ({"name": "ats"}, "psnr: original"),
        ({"name": "dpsgd", "noise": 0.01}, "psnr"),
        ({"name": "instahide", "k": 2, "high": 0.9}, "psnr: encoded"),
        ({"name": "precode", "size": 4}, "psnr"),
        ({"name": "labels", "bias": False}, "psnr"),
        ({"name": "dgc"}, "psnr"),
    ],
)
def test_defended_runs_are_attacked_by_those_who_know(
    defence: dict[str, Any], figure: str, tmp_path: Path
) -> None:
    if defence["name"] == "dpsgd":
        pytest.importorskip("opacus")
        pytest.importorskip("dp_accounting")
    observed = {
        "observe": {"rounds": [1], "clients": [0, 2]},
        "run": {"dir": str(tmp_path), "figures": False},
    }
    run_simulation(Simulation.of({**SETTINGS, "defence": defence, **observed}))
    oblivious = attack_run(tmp_path, "ig", {"steps": 2, "tv": 0})
    adaptive = attack_run(tmp_path, "ig", {"steps": 2, "tv": 0}, adaptive=True)
    for made in (oblivious, adaptive):
        assert figure in made.summary()
        assert all(torch.isfinite(v.found.x).all() for v in made.victims)
    differs = defence["name"] != "ats"
    assert differs == (oblivious.attack != adaptive.attack), "who knows of a policy does not know its coins"


TEXT = """
settings: >-
  dataset=digits model=mlp model.hidden=[8] federation.clients=4 federation.rounds=1 local.steps=1 local.batch_size=1
  evaluation.every=0
rounds: [1]
clients: [0]
defences:
  larger batch: local.batch_size=4
  secure: secure.enabled=true
  user level: privacy.mode=local privacy.noise=0.01
  released: privacy.mode=central privacy.noise=0.01 observe.view=released
attacks:
  wang: attack=wang attack.steps=1
"""


def test_any_settings_may_be_a_defence(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    path = tmp_path / "m.yaml"
    path.write_text(TEXT)
    plan = matrix.read_plan(path)
    assert plan.runs["secure"].observe.clients == ()
    assert plan.runs["larger batch"].observe.clients == (0,)
    cells = matrix.run_matrix(plan, tmp_path / "out", lambda text: None)
    assert [(c.defence, c.knows) for c in cells] == [
        ("larger batch", "oblivious"),
        ("secure", "oblivious"),
        ("user level", "oblivious"),
        ("user level", "adaptive"),
        ("released", "oblivious"),
    ]


def test_who_knows_attacks_only_where_it_makes_a_difference() -> None:
    known = {"imitation": "mask"}
    both = (matrix.OBLIVIOUS, matrix.ADAPTIVE)
    assert matrix.attackers(known, "ig", {"steps": 5}) == both
    assert matrix.attackers(known, "ig", {"imitation": "none"}) == (matrix.OBLIVIOUS,)
    assert matrix.attackers(known, "readout", {}) == (matrix.OBLIVIOUS,)
    assert matrix.attackers({"floor": 0.1}, "ig", {}) == (matrix.OBLIVIOUS,)


BREAKS = Path(matrix.__file__).parent / "breaks"


@pytest.mark.parametrize("name", ["soteria", "precode", "ats"])
def test_the_matrices_of_known_breaks_are_well_formed(name: str) -> None:
    plan = matrix.read_plan(BREAKS / f"{name}.yaml")
    assert "none" in plan.runs
    assert len(plan.runs) > 1


Cells = dict[tuple[str, str, int, str], float]


def soteria(psnr: Cells, hits: Cells) -> None:
    for defence in ("Soteria 10 %", "Soteria 50 %"):
        oblivious, adaptive = (psnr[defence, "IG", 1, knows] for knows in ("oblivious", "adaptive"))
        assert oblivious < psnr["none", "IG", 1, "oblivious"] - 5, "it seems to protect"
        assert adaptive > psnr["none", "IG", 1, "oblivious"] - 3, "until the layer is left out"


def precode(psnr: Cells, hits: Cells) -> None:
    assert psnr["PRECODE", "IG", 1, "oblivious"] < psnr["none", "IG", 1, "oblivious"] - 10, (
        "it seems to protect"
    )
    assert hits["PRECODE", "read-out", 1, "oblivious"] == 1, "but every image is read out of the first layer"
    assert psnr["PRECODE", "IG", 1, "adaptive"] > psnr["none", "IG", 1, "oblivious"] - 3


def ats(psnr: Cells, hits: Cells) -> None:
    for round_ in (1, 10):
        early, plain = (psnr[defence, "IG", round_, "oblivious"] for defence in ("ATS", "none"))
        assert early > plain - 3, "at the start it protects nothing"


@pytest.mark.slow
@pytest.mark.parametrize("holds", [soteria, precode, ats])
def test_known_breaks_are_there(holds: Callable[[Cells, Cells], None], tmp_path: Path) -> None:
    """Makes the matrix anew (a few minutes of one core); what it once gave is stored beside it."""
    try:
        cells = matrix.run_matrix(matrix.read_plan(BREAKS / f"{holds.__name__}.yaml"), tmp_path, print)
    except DataError as error:
        pytest.skip(str(error))
    keys = [(c.defence, c.attack, c.round, c.knows) for c in cells]
    psnr, hits = (
        {key: c.summary[name].mean for key, c in zip(keys, cells, strict=True)} for name in ("psnr", "hit")
    )
    holds(psnr, hits)
