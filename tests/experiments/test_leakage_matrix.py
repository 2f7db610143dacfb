"""A matrix: what is attacked by whom, what is made again and what is not, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flowerbed.errors import ConfigError
from flowerbed.experiments import cli
from flowerbed.experiments.leakage import matrix, matrix_report

TEXT = """
settings: >-
  dataset=digits model=dlg_lenet federation.clients=6 federation.rounds=2 local.steps=1 local.batch_size=1
  evaluation.every=2
rounds: [2]
clients: [0, 1]
defences:
  none: ""
  "prune 90 %": defence=prune defence.keep=0.1
attacks:
  IG: attack=ig attack.steps=3 attack.tv=0.001
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[matrix.Cell]]:
    folder = tmp_path_factory.mktemp("matrix")
    plan = folder / "leakage.yaml"
    plan.write_text(TEXT)
    cells = matrix.run_matrix(matrix.read_plan(plan), folder / "out", lambda text: None)
    return plan, folder / "out", cells


def test_every_defence_meets_those_who_know_of_it(made: tuple[Path, Path, list[matrix.Cell]]) -> None:
    _, _, cells = made
    assert [(c.defence, c.attack, c.round, c.knows) for c in cells] == [
        ("none", "IG", 2, "oblivious"),
        ("prune 90 %", "IG", 2, "oblivious"),
        ("prune 90 %", "IG", 2, "adaptive"),
    ]
    assert all(c.utility is not None and c.evaluations == 2 * 4 for c in cells)
    assert cells[1].utility == cells[2].utility
    assert cells[1].summary["psnr"] != cells[2].summary["psnr"]


def test_what_is_there_is_not_made_again(
    made: tuple[Path, Path, list[matrix.Cell]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out, cells = made

    def never(*args: Any, **more: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(matrix, "run_simulation", never)
    monkeypatch.setattr(matrix, "attack_run", never)
    assert matrix.run_matrix(matrix.read_plan(plan), out, lambda text: None) == cells
    with pytest.raises(AssertionError, match="made again"):
        matrix.run_matrix(matrix.read_plan(plan, ["local.lr=0.2"]), out, lambda text: None)


def test_the_report_judges_a_defence_by_its_worst_attack(
    made: tuple[Path, Path, list[matrix.Cell]], tmp_path: Path
) -> None:
    _, _, cells = made
    top = matrix.worst_attack(cells, "prune 90 %", 2)
    assert top.summary["psnr"].mean == max(c.summary["psnr"].mean for c in cells[1:])
    text = matrix_report.markdown(cells)
    assert f"- prune 90 %, round 2: IG ({top.knows})" in text
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 1 + len(cells)
    files = matrix_report.write(cells, tmp_path)
    assert {f.name for f in files} == {"matrix.json", "matrix.md", "heatmap.png", "leakage_utility.png"}
    assert len(json.loads(files[0].read_text())["cells"]) == len(cells)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("rounds: [2]", ""), "'rounds' is missing"),
        (("rounds: [2]", "rounds: [9]"), "round 9 is to be attacked and federation.rounds is 2"),
        (("attacks:", "assaults:"), "Unknown key of leakage.yaml 'assaults'"),
        (("attack=ig", "strategy=ig"), "is no setting of an attack"),
    ],
)
def test_a_wrong_matrix_is_explained(change: tuple[str, str], sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "leakage.yaml"
    path.write_text(TEXT.replace(*change))
    with pytest.raises(ConfigError, match=sentence):
        matrix.read_plan(path)


def test_the_command_finds_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["attack", f"matrix={tmp_path / 'nowhere.yaml'}"]) == 2
    assert "There is no file" in capsys.readouterr().err
    assert cli.main(["attack", "attack=ig"]) == 2
    assert "Name the directory of one run" in capsys.readouterr().err
