"""``flowerbed diff`` and ``flowerbed show`` on folders that are written here by hand."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flowerbed.experiments import cli, config, diff, saved
from flowerbed.experiments.diff import Difference, differences, equal, leaves


def make_run(folder: Path, accuracies: tuple[float, ...] = (0.5, 0.6), **changed: Any) -> Path:
    folder.mkdir(parents=True)
    plain = {
        "strategy": {"name": "fedavg"},
        "seed": 0,
        "federation": {"clients": 4, "rounds": 2},
        "data": {"dir": None, "imbalance": 1.0},
        "grid": {"name": "inprocess"},
        "run": {"dir": str(folder)},
    }
    for key, value in changed.get("settings", {}).items():
        section, _, name = key.partition(".")
        if name:
            plain[section][name] = value  # type: ignore[index]
        else:
            plain[section] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    text = ""
    for i, accuracy in enumerate(accuracies, 1):
        record = {"round": i, "phase": "evaluate-server", "metrics": {"accuracy": accuracy}, "seconds": i / 7}
        text += json.dumps({**record, "failures": []}) + "\n"
    (folder / "metrics.jsonl").write_text(text)
    summary = {
        "status": "completed",
        "reason": "",
        "rounds": len(accuracies),
        "final": {"accuracy": accuracies[-1]},
        "failures": {"total": 0, "by_kind": {}},
        "seed": plain["seed"],
        "config_hash": str(plain),
        "wall_seconds": 1.5,
        **changed.get("summary", {}),
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def compared(a: Path, b: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, Any]:
    code = cli.main(["diff", str(a), str(b), "--json", *more])
    return code, json.loads(capsys.readouterr().out)


def keys(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {one["key"]: one["sides"] for one in found}


def test_what_decides_no_result_is_what_the_configuration_says() -> None:
    # The command must not import torch, so it has a list of its own.
    assert set(diff.HOW) == set(config.Simulation().plain()) - set(config.IDENTITY)
    neutral = {".".join(pair) for pair in config.NEUTRAL} - {"federation.rounds"}
    assert set(diff.NEUTRAL) == neutral


def test_the_same_run_in_another_folder_is_no_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = make_run(tmp_path / "a")
    b = make_run(
        tmp_path / "b",
        settings={"grid.name": "ray", "data.dir": "/data"},
        summary={"wall_seconds": 99.0, "git_commit": "abc"},
    )
    code, found = compared(a, b, capsys)
    assert (code, found["same"]) == (0, True)
    (one,) = found["compared"]
    assert not one["settings"]
    assert not one["results"]
    # They are shown all the same.
    assert set(keys(one["circumstances"])) == {"data.dir", "grid.name", "wall_seconds", "git_commit"}
    assert cli.main(["diff", str(a), str(b)]) == 0
    assert "no difference in settings or results" in capsys.readouterr().out


def test_settings_results_and_the_round_where_they_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = make_run(tmp_path / "a", (0.5, 0.6, 0.7))
    b = make_run(
        tmp_path / "b",
        (0.5, 0.6 + 1e-16, 0.75),
        settings={"seed": 1, "strategy": {"name": "fedprox", "mu": 0.1}},
    )
    code, found = compared(a, b, capsys)
    assert code == 1
    (one,) = found["compared"]
    assert keys(one["settings"]) == {
        "strategy.name": {"a": "fedavg", "b": "fedprox"},
        "strategy.mu": {"b": 0.1},
        "seed": {"a": 0, "b": 1},
    }
    assert keys(one["results"]) == {"final.accuracy": {"a": 0.7, "b": 0.75}}
    # The last bit of a double counts.
    assert 0.6 + 1e-16 != 0.6
    assert one["first"] == "from round 2 on: evaluate-server/accuracy is 0.6 in A and 0.6000000000000001 in B"
    _, near = compared(a, b, capsys, "--tolerance", "1e-9")
    assert near["compared"][0]["first"].startswith("from round 3 on")
    assert cli.main(["diff", str(a), str(b)]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"^strategy\.mu +\(not there\) +0\.1$", shown, re.MULTILINE)
    assert "+0.05" in shown


def test_a_run_that_went_on_longer_parts_where_the_other_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = make_run(tmp_path / "a", (0.5,)), make_run(tmp_path / "b", (0.5, 0.5))
    code, found = compared(a, b, capsys)
    assert code == 1
    assert found["compared"][0]["first"] == "from round 2 on: only B has a record of evaluate-server"


def test_half_written_runs_are_compared_as_far_as_they_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    (b / "summary.json").write_text('{"status": "com')
    (b / "config.yaml").unlink()
    with open(b / "metrics.jsonl", "a") as file:
        file.write('{"round": 3, "pha')
    code, found = compared(a, b, capsys)
    assert code == 1
    (one,) = found["compared"]
    assert [text.split("/")[-1].split(" ")[0] for text in one["missing"]] == ["config.yaml", "summary.json"]
    assert keys(one["results"])["status"] == {"a": "completed", "b": "unfinished"}
    assert "final.accuracy" not in keys(one["results"])
    assert one["first"] == ""


def test_sweeps_are_matched_by_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweeps = []
    for name, jobs in (("x", ["seed=0", "seed=1", "seed=2"]), ("y", ["seed=2", "seed=1", "seed=3"])):
        folder = tmp_path / name
        for i, override in enumerate(jobs):
            accuracy = 0.9 if (name, override) == ("y", "seed=2") else 0.6
            make_run(folder / str(i), (0.5, accuracy), settings={"seed": int(override[-1])})
            job = {
                "number": i,
                "overrides": ["federation.rounds=2", override],
                "directory": "moved",
                "status": "completed",
            }
            with open(folder / "jobs.jsonl", "a") as file:
                file.write(json.dumps(job) + "\n")
        sweeps.append(folder)
    code, found = compared(*sweeps, capsys)
    assert code == 1
    assert found["only_in_a"] == ["federation.rounds=2 seed=0"]
    assert found["only_in_b"] == ["federation.rounds=2 seed=3"]
    assert {one["name"]: one["same"] for one in found["compared"]} == {
        "federation.rounds=2 seed=1": True,
        "federation.rounds=2 seed=2": False,
    }
    assert cli.main(["diff", *map(str, sweeps)]) == 1
    shown = capsys.readouterr().out
    assert "2 pairs, 1 of them without a difference" in shown
    assert "only in A:\n  federation.rounds=2 seed=0" in shown
    shutil.copytree(sweeps[0], tmp_path / "copy")
    assert compared(sweeps[0], tmp_path / "copy", capsys)[0] == 0


def test_other_folders_are_matched_by_place_and_results_by_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, accuracy in (("x", 0.6), ("y", 0.7)):
        make_run(tmp_path / name / "deep" / "run", (accuracy,))
        (tmp_path / name / "deep" / "attack").mkdir()
        (tmp_path / name / "deep" / "attack" / "attack.json").write_text(
            json.dumps(
                {
                    "victims": [{"client": 0, "seconds": accuracy}, {"client": accuracy}],
                    "versions": {"torch": name},
                }
            )
        )
    code, found = compared(tmp_path / "x", tmp_path / "y", capsys)
    assert (code, [one["name"] for one in found["compared"]]) == (1, ["deep/run"])
    code, found = compared(tmp_path / "x/deep/attack", tmp_path / "y/deep/attack", capsys)
    assert code == 1
    assert keys(found["compared"][0]["results"]) == {"victims.1.client": {"a": 0.6, "b": 0.7}}
    assert set(keys(found["compared"][0]["circumstances"])) == {"victims.0.seconds", "versions.torch"}


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ("run", "nowhere", "nowhere is no folder"),
        ("run", "sweep", "run is a run and "),
        ("empty", "empty", "empty holds no runs"),
    ],
)
def test_what_cannot_be_compared_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], a: str, b: str, said: str
) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "jobs.jsonl").touch()
    assert cli.main(["diff", str(tmp_path / a), str(tmp_path / b)]) == 2
    assert said in capsys.readouterr().err


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.sampled_from(["", "x", "1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text("ab", max_size=2), JSON, max_size=3))
def test_nothing_differs_from_itself_however_it_is_written(value: dict[str, Any]) -> None:
    assert differences(value, json.loads(json.dumps(value)), 0.0) == []
    if any(True for _ in leaves(value)):
        assert differences(value, {}, 0.0)


@pytest.mark.parametrize(
    ("a", "b", "tolerance", "same"),
    [
        (1, 1.0, 0.0, True),
        (True, 1, 0.0, False),
        (math.nan, math.nan, 0.0, True),
        (math.nan, 1.0, 0.5, False),
        (math.inf, math.inf, 0.0, True),
        (100.0, 101.0, 0.01, True),
        (100.0, 102.0, 0.01, False),
        (0.0, 1e-300, 0.5, False),
        ([1, 2], [1, 2.0], 0.0, True),
        ([1, 2], [1], 0.0, False),
        ("1", 1, 0.0, False),
        (None, 0, 0.0, False),
    ],
)
def test_equality_by_hand(a: Any, b: Any, tolerance: float, same: bool) -> None:
    assert equal(a, b, tolerance) is same
    assert equal(b, a, tolerance) is same
    assert differences({"k": a}, {"k": b}, tolerance) == (
        [] if same else [Difference("k", {"a": diff.plain(a), "b": diff.plain(b)})]
    )


# What is shown of folders that are no runs.

SUMMARY = {"mean": 15.31, "low": 12.0, "high": 19.7, "worst": 21.8}
RESULTS: dict[str, dict[str, Any]] = {
    "attack": {
        "attack": "ig",
        "options": {"steps": 100},
        "run": "runs/watched",
        "granted": [],
        "defence": {"name": "prune", "keep": 0.05},
        "adaptive": True,
        "summary": {"psnr": SUMMARY, "null: class mean": {**SUMMARY, "mean": 16.5}},
        "victims": [{"client": 3, "round": 1, "evaluations": 1001, "seconds": 61.0, "labels": {"true": [7, 7]}}],
    },
    "matrix": {
        "cells": [
            {"defence": d, "attack": "IG", "round": 1, "knows": "oblivious", "utility": None,
             "summary": {"psnr": {**SUMMARY, "mean": m}, "null: class mean": SUMMARY, "labels": SUMMARY}}
            for d, m in (("none", 24.1), ("noise", 9.0))
        ]
    },
    "comparison": {
        "methods": {"fedavg": {}, "scaffold": {}},
        "seeds": [0, 1],
        "reference": "fedavg",
        "selection": "The mean of the last.",
        "notes": ["Two seeds are few."],
        "metrics": {"accuracy": {"lower_is_better": False, "rows": [
            {"method": "fedavg", "mean": None, "rank": 2.0, "difference": None, "p_t_holm": None},
            {"method": "scaffold", "mean": {"mean": 0.8667, "low": 0.77, "high": 0.95}, "rank": 1.0,
             "difference": {"mean": 0.0183}, "p_t_holm": 0.438},
        ]}},
        "runs": [{"ok": True}, {"ok": False}],
    },
    "reproduction": {
        "title": "A paper", "slug": "a-paper", "scale": "quick", "seeds": [0], "seconds": 594.5,
        "made": "2026", "whole": False, "hardware": {"cores": 2, "processor": "X"},
        "claims": [
            {"claim": "better", "verdict": "reproduced", "reason": "",
             "conditions": [{"mean": 0.2}, {"mean": 0.1}], "mechanism": []},
            {"claim": "faster", "verdict": "not evaluated", "reason": "a run failed",
             "conditions": [], "mechanism": []},
        ],
        "arms": {"plain": {"runs": [{"seed": 0, "status": "failed", "reason": "no memory"}]}},
    },
}  # fmt: skip
LINES = {
    "attack": "ig on 1 updates: PSNR 15.3 dB, best null 16.5, worst 21.8",
    "matrix": "2 defences x 1 attacks; most leaks from none by IG: 24.1 dB",
    "comparison": "2 methods x 2 seeds; first in accuracy: scaffold 0.8667; 1 runs failed",
    "reproduction": "a-paper, quick scale: 1 reproduced, 1 not evaluated",
}
SCREENS = {
    "attack": ["prune; the attacker knows of it", "1 updates of 2 samples; clients 3, rounds 1",
               "1,001", "1:01", "null: class mean"],
    "matrix": ["noise", "9.0", "24.1"],
    "comparison": ["0.0183", "0.77 to 0.95", "reference", "- Two seeds are few."],
    "reproduction": ["0.1 of 2", "a run failed", "- plain, seed 0 failed: no memory",
                     "9:54", "no record of the ledger"],
}  # fmt: skip


@pytest.mark.parametrize("kind", RESULTS)
def test_one_screen_about_a_result(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / kind
    folder.mkdir()
    (folder / saved.RESULT_FILES[kind]).write_text(json.dumps(RESULTS[kind]))
    assert saved.headline(kind, RESULTS[kind]) == LINES[kind]
    assert cli.main(["show", str(folder)]) == 0
    shown = capsys.readouterr().out
    for text in SCREENS[kind]:
        assert text in shown
    assert max(map(len, shown.splitlines())) < 140
    assert cli.main(["show", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == RESULTS[kind]
    # The folder above says a line about it.
    assert cli.main(["show", str(tmp_path)]) == 0
    assert LINES[kind] in capsys.readouterr().out
    (folder / saved.RESULT_FILES[kind]).write_text('{"summary": {}}')
    assert cli.main(["show", str(folder)]) == 2
    assert "has another form than this version of flowerbed writes" in capsys.readouterr().err
    (folder / saved.RESULT_FILES[kind]).write_text('{"summa')
    assert cli.main(["show", str(folder)]) == 2
    assert "is cut off or damaged" in capsys.readouterr().err


def test_a_run_with_a_torn_summary_is_shown_with_what_its_metrics_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    (run / "summary.json").write_text('{"status"')
    with open(run / "metrics.jsonl", "a") as file:
        file.write(
            "nonsense\n" + '{"round": 3, "phase": "train", "metrics": {"loss": NaN}, "failures": []}\n'
        )
    assert cli.main(["show", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "unfinished" in shown
    assert "final accuracy" in shown
    assert "0.6" in shown
    assert "is cut off or damaged" in shown
    assert "1 line cannot be read and left out" in shown
    assert "train/loss is not finite" in shown


def test_a_summary_of_another_version_is_shown_as_far_as_it_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    (run / "summary.json").write_text(
        json.dumps({"status": "completed", "versions": {"flowerbed": "0.0.1"}, "new": 1})
    )
    assert cli.main(["show", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "flowerbed 0.0.1" in shown
    assert "not recorded" in shown
