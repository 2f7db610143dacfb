"""Figures of text against slow twins, and the command from a run of a language model to a page of pairs."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowerbed.experiments import cli
from flowerbed.experiments.leakage import text_scoring
from flowerbed.experiments.leakage.truth import Truth
from flowerbed.strategies.attacks.observation import Reconstruction


def slow_common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    @functools.cache
    def best(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        if a[i] == b[j]:
            return 1 + best(i + 1, j + 1)
        return max(best(i + 1, j), best(i, j + 1))

    return best(0, 0)


@settings(max_examples=50, deadline=None)
@given(
    a=st.lists(st.integers(0, 3), min_size=1, max_size=8),
    b=st.lists(st.integers(0, 3), min_size=1, max_size=8),
)
def test_common_subsequences(a: list[int], b: list[int]) -> None:
    assert text_scoring.common_subsequence(a, b) == slow_common(tuple(a), tuple(b))


def test_figures_by_hand() -> None:
    found = text_scoring.figures(torch.tensor([1, 2, 3, 1, 4]), torch.tensor([1, 3, 2, 1, 1]))
    assert found["tokens"] == pytest.approx(2 / 5)
    # 1 twice, 2, 3 are in both; the true 1 a third time is not.
    assert found["bag"] == found["rouge-1"] == pytest.approx(4 / 5)
    # Pairs 12 23 31 14 and 13 32 21 11: none in common.
    assert found["rouge-2"] == 0
    # 1 2 1, or 1 3 1.
    assert found["rouge-l"] == pytest.approx(3 / 5)
    assert found["hit"] == 0
    assert set(text_scoring.figures(torch.arange(4), torch.arange(4)).values()) == {1.0}


def test_sequences_are_matched_one_to_one_and_nulls_are_chance() -> None:
    x = torch.tensor([[0, 1, 2], [2, 1, 0]])
    y = torch.tensor([[1, 2, 0], [1, 0, 0]])
    truth = Truth(x, y, torch.tensor([0, 1]))
    marks = text_scoring.score(Reconstruction(x.flip(0), y.flip(0), 0.0), truth)
    assert marks.order == (1, 0)
    assert marks.mean("tokens") == marks.labels == 1
    train = torch.cat([x, torch.zeros(98, 3, dtype=torch.int64)])
    nulls = text_scoring.nulls(truth, train, 0)
    # Nearly all of the set is 0, which one place in three of these two holds.
    assert nulls["most frequent token"] == pytest.approx([1 / 3, 1 / 3])
    # Without itself, the nearest to either has at least the place of 0 or the middle.
    assert nulls["nearest sequence"] == pytest.approx([1 / 3, 1 / 3])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("text") / "run"
    asked = ["simulate", "dataset=attack_nets:tiny_text", "model=gpt_tiny", "model.width=16", "model.depth=1"]
    asked += [
        "federation.clients=8",
        "federation.rounds=1",
        "local.steps=1",
        "local.batch_size=1",
        "local.lr=1",
    ]
    asked += ["evaluation.every=0", "observe.rounds=[1]", "observe.clients=[0,3]", "run.figures=false"]
    assert cli.main([*asked, f"run.dir={directory}"]) == 0
    return directory


def test_text_of_a_run_is_read_and_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(["attack", str(run), "attack=positions", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["summary"]["tokens"]["mean"] == found["summary"]["hit"]["mean"] == 1
    assert found["summary"]["null: random sequence"]["mean"] < 0.9
    shown = (run / "attacks" / "positions" / "gallery.txt").read_text().splitlines()
    assert len(shown) >= 5
    assert shown[0].removeprefix("true ") == shown[1].removeprefix("found")


def test_a_search_of_text_takes_public_text_and_its_own_options(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    asked = ["attack=lamp", "attack.steps=3", "attack.stages=2", "attack.tries=25", "--grant", "surrogate"]
    assert cli.main(["attack", str(run), *asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["victims"][0]["evaluations"] == 2 * (3 + 25 + 1)
    assert {"tokens", "bag", "rouge-2", "rouge-l"} <= found["summary"].keys()


def test_an_attack_on_images_is_refused_on_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(["attack", str(run), "attack=ig"]) == 2
    assert "for images, and" in capsys.readouterr().err
