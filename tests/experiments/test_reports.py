"""Reports as values: what is read, what is said to be missing, what is binned, and that the numbers are the files'."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flowerbed.errors import ConfigError
from flowerbed.experiments import cli
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.leakage import matrix_report
from flowerbed.experiments.leakage.matrix import ADAPTIVE, OBLIVIOUS, Cell
from flowerbed.experiments.leakage.scoring import Summary
from flowerbed.experiments.reports import charts, collect, command, render
from flowerbed.experiments.reports.attack import matrix_part
from flowerbed.experiments.reports.page import Chart, Fold, Note, Page, Part, Table, Tiles
from flowerbed.experiments.reports.papers import ledger_part
from flowerbed.experiments.reports.run import run_part
from flowerbed.experiments.reports.sweep import sweep_part
from flowerbed.experiments.reproduction import ledger
from flowerbed.server.by_client import LEVELS
from flowerbed.server.callbacks import CLIENTS, SERVER, Record
from flowerbed.server.replies import Failure

pytest.importorskip("plotly", reason="the report's charts need plotly: pip install 'flowerbed[report]'")


def written(
    folder: Path,
    accuracies: Mapping[int, float],
    *,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    status: str | None = "completed",
    failures: Sequence[Failure] = (),
    clients: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run that has these accuracies by round; with a status also its summary."""
    folder.mkdir(parents=True)
    simulation = Simulation.of({"seed": seed, **(settings or {})})
    (folder / "config.yaml").write_text(yaml.safe_dump(simulation.plain()))
    lines = []
    for at, accuracy in accuracies.items():
        if at:
            mine = tuple(f for f in failures if f.round == at)
            lines.append(
                Record(at, "train", {"loss": 2.0 / at}, 4, 4 - len(mine), len(mine), 0.5, 1000, 500, mine)
            )
        counts = {"correct-per-class": [at, 2], "total-per-class": [10, 4]}
        lines.append(Record(at, SERVER, {"accuracy": accuracy, "loss": 1 - accuracy, **counts}, seconds=0.1))
        if clients is not None:
            lines.append(Record(at, CLIENTS, dict(clients), 4, 4))
    (folder / "metrics.jsonl").write_text("".join(f"{line.line()}\n" for line in lines))
    if status is not None:
        summary = {"status": status, "reason": "", "wall_seconds": 9.0, "versions": {"flowerbed": "0.1.0"}}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def blocks(part: Part, kind: type[Any]) -> list[Any]:
    return [b for b in render.blocks_of(Page("", [part], "")) if isinstance(b, kind)]


def chart(part: Part, title: str) -> Chart:
    return next(c for c in blocks(part, Chart) if c.title == title)


def trace(found: Chart, name: str) -> dict[str, Any]:
    return next(t for t in found.figure["data"] if t.get("name") == name)


def table(part: Part, caption: str) -> list[dict[str, str]]:
    found = next(t for t in blocks(part, Table) if t.caption == caption)
    return [
        dict(zip((c.name for c in found.columns), (c.text for c in row), strict=True)) for row in found.rows
    ]


def test_a_half_written_run_is_shown_and_said_to_be_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written(tmp_path / "run", {0: 0.1, 1: 0.2, 2: 0.3}, status=None)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"round": 3, "phase": "tra')
    assert cli.main(["report", str(run)]) == 0
    out = capsys.readouterr().out
    assert "summary.json is missing" in out
    assert "line 6 that cannot be read" in out
    text = (run / "report.html").read_text()
    assert "What is missing" in text
    assert f"flowerbed resume {run}" in text
    curve = trace(chart(run_part(collect.read_run(run)), "Accuracy"), "server's test set")
    assert (curve["x"], curve["y"]) == ([0, 1, 2], [0.1, 0.2, 0.3])


def test_a_run_of_another_version_is_shown_as_far_as_it_is_understood(tmp_path: Path) -> None:
    run = written(tmp_path / "run", {1: 0.2})
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "versions": {"flowerbed": "9.9"}}))
    (run / "config.yaml").write_text(
        "strategy: {name: of-the-future, power: 3}\nseed: 1\nnew_section: {a: [1, 2]}\n"
    )
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"round": 2, "phase": "train", "metrics": {"loss": 1.0}, "joules": 5}\n')
        file.write('{"round": 2, "phase": "evaluate-server", "metrics": {"accuracy": 0.7, "score": 3.0}}\n')
        file.write('{"epoch": 2}\n')
    part = run_part(collect.read_run(run))
    assert any("made with flowerbed 9.9" in text for text in part.missing)
    assert any("a line 5 that cannot be read" in text or "line 5 that" in text for text in part.missing)
    assert trace(chart(part, "Accuracy"), "server's test set")["y"] == [0.2, 0.7]
    rows = {row["key"]: row for row in table(part, "Settings")}
    assert rows["strategy.power"]["value"] == "3"
    assert rows["new_section.a"]["value"] == "[1, 2]"


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "metrics.jsonl", "partition.npz"])
@pytest.mark.parametrize("content", [b"", b"\x00\xff{[", b"[]", b"3"])
def test_a_damaged_file_costs_no_report(tmp_path: Path, name: str, content: bytes) -> None:
    run = written(tmp_path / "run", {1: 0.2})
    (run / name).write_bytes(content)
    page = command.make_page([run])
    assert any(name in text or "flowerbed of an unknown version" in text for text in page.parts[0].missing)
    assert "<main" in render.html(page)


def test_curves_are_broken_where_there_is_no_number(tmp_path: Path) -> None:
    run = written(tmp_path / "run", {1: 0.1, 2: math.nan, 3: 0.3, 6: 0.6, 7: math.inf})
    part = run_part(collect.read_run(run))
    assert "No training record of rounds 4–5; curves are broken there." in part.missing
    assert any("accuracy (evaluate-server) is not finite in rounds 2, 7" in text for text in part.missing)
    curve = trace(chart(part, "Accuracy"), "server's test set")
    assert curve["x"] == [1, 2, 3, 4, 5, 6, 7]
    assert curve["y"] == [0.1, None, 0.3, None, None, 0.6, None]
    assert curve["connectgaps"] is False
    text = render.html(Page("", [part], ""))
    assert not re.search(r"[:\[,](NaN|-?Infinity)[,\]}]", text), "no JSON that a browser refuses"


def test_the_selected_figure_is_the_mean_of_the_last_evaluations_and_not_the_best(tmp_path: Path) -> None:
    run = written(tmp_path / "run", {0: 0.0, 1: 0.99, 2: 0.5, 3: 0.6, 4: 0.5, 5: 0.6, 6: 0.3})
    assert collect.read_run(run).selected()["accuracy"] == pytest.approx((0.5 + 0.6 + 0.5 + 0.6 + 0.3) / 5)


def test_failures_are_counted_by_kind_and_client(tmp_path: Path) -> None:
    failures = [Failure(1, 3, "raised", "ZeroDivisionError: <b>x</b>\n  at"), Failure(2, 3, "died", "gone"),
                Failure(2, 1, "raised", "y")]  # fmt: skip
    run = written(tmp_path / "run", {1: 0.1, 2: 0.2, 3: 0.3}, failures=failures)
    part = run_part(collect.read_run(run))
    found = chart(part, "Failures by round")
    assert (
        "3 of 12 requests failed: 2 raised, 1 died. Most often: client 3 (2), client 1 (1)." in found.summary
    )
    assert trace(found, "raised")["y"] == [1, 1, 0]
    assert trace(found, "died")["y"] == [0, 1, 0]
    assert table(part, "Failed requests")[0]["reason"] == "ZeroDivisionError: <b>x</b>"
    text = render.html(Page("", [part], ""))
    assert "<b>x</b>" not in text
    assert "&lt;b&gt;x&lt;/b&gt;" in text


def test_time_and_bytes_are_the_sums_of_the_records(tmp_path: Path) -> None:
    part = run_part(collect.read_run(written(tmp_path / "run", {1: 0.1, 2: 0.2, 3: 0.3})))
    assert trace(chart(part, "Seconds by round"), "training")["y"] == [0.5, 0.5, 0.5]
    assert trace(chart(part, "Payload so far"), "to clients")["y"] == pytest.approx([0.001, 0.002, 0.003])
    by_class = chart(part, "Accuracy by class (server's test set)").figure["data"][0]["z"]
    assert np.array(by_class) == pytest.approx(np.array([[0.1, 0.2, 0.3], [0.5, 0.5, 0.5]]))


def test_ten_thousand_clients_are_binned_and_it_is_said(tmp_path: Path) -> None:
    """Clients of one class each, so that the bins can be known beforehand."""
    quantiles = [0.2 + 0.6 * level for level in LEVELS]
    kept = {"accuracy": 0.5, "accuracy-mean": 0.5, "accuracy-worst": 0.2, "accuracy-quantiles": quantiles}
    run = written(
        tmp_path / "run",
        {1: 0.1, 2: 0.2},
        clients=kept,
        settings={"federation": {"clients": 10_000, "rounds": 2}},
    )
    counts = np.zeros((10_000, 10), dtype=np.int64)
    counts[np.arange(10_000), np.arange(10_000) % 10] = 1 + np.arange(10_000) // 10
    np.savez_compressed(run / "partition.npz", counts=counts, classes=np.array([str(c) for c in range(10)]))
    part = run_part(collect.read_run(run))
    who = chart(part, "Classes by client")
    z = np.array(who.figure["data"][0]["z"])
    assert z.shape == (charts.MOST_CELLS, 10) or z.shape[0] <= charts.MOST_CELLS
    assert "10\u202f000 rows are shown as means of 84 each" in who.summary
    # Ordered by their class, a bin of 84 clients holds one class, or two where classes meet.
    assert z.sum(axis=1) == pytest.approx(np.ones(len(z)))
    assert ((z > 0).sum(axis=1) <= 2).all()
    sizes = chart(part, "Clients by size").figure["data"][0]
    assert sum(sizes["y"]) == 10_000
    spread = chart(part, "Spread of accuracy over clients")
    bands = [t for t in spread.figure["data"] if t.get("fill") == "tonexty"]
    assert [t["y"][0] for t in bands] == pytest.approx([0.8, 0.74, 0.65])
    assert "too many to keep one by one" in " ".join(n.text for n in blocks(part, Note))
    text = render.html(Page("", [part], ""))
    assert len(text) - len(render.packed_library()) < 400_000
    validated(part)


def test_a_client_that_was_not_evaluated_leaves_its_cell_empty(tmp_path: Path) -> None:
    run = written(tmp_path / "run", {1: 0.1, 2: 0.2})
    for at, numbers, values in ((1, [0, 1], [0.5, 0.75]), (2, [1, 2], [0.25, 1.0])):
        metrics = {"accuracy": 0.5, "accuracy-quantiles": [0.5] * 21, "client-numbers": numbers,
                   "accuracy-by-client": values}  # fmt: skip
        with open(run / "metrics.jsonl", "a") as file:
            file.write(Record(at, CLIENTS, metrics, 2, 2).line() + "\n")
    part = run_part(collect.read_run(run))
    found = chart(part, "Accuracy by client").figure["data"][0]
    rows = dict(zip((row[0][0] for row in found["customdata"]), found["z"], strict=True))
    assert rows == {"2": [None, 1.0], "1": [0.75, 0.25], "0": [0.5, None]}


VALUES = st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=4000)


@given(VALUES, st.integers(8, 200))
def test_a_thinned_curve_keeps_its_ends_its_extremes_and_its_gaps(
    values: list[float | None], most: int
) -> None:
    kept = charts.thinned_places(values, most)
    assert kept == sorted(set(kept))
    assert {0, len(values) - 1} <= set(kept)
    known = [v for v in values if v is not None]
    shown = [values[i] for i in kept if values[i] is not None]
    assert len(kept) <= max(most, 2) * 1.25 + 2
    if known:
        assert (min(known), max(known)) == (min(shown), max(shown))  # type: ignore[type-var]
    assert (None in values) == (None in [values[i] for i in kept])


def test_bins_are_means_of_what_is_there() -> None:
    z = np.array([[1.0, math.nan], [3.0, math.nan], [5.0, 7.0]])
    means, names, step = charts.binned(z, ["a", "b", "c"], most=2)
    assert (names, step) == (["a–b", "c–c"], 2)
    assert means[0, 0] == 2
    assert math.isnan(means[0, 1])
    assert means[1].tolist() == [5, 7]


def sweep(folder: Path) -> Path:
    """Two learning rates, of which the better one has the lower peak; a third one has a failed seed."""
    curves = {
        0.1: [0.9, 0.5, 0.5, 0.5, 0.5, 0.5],
        0.2: [0.1, 0.6, 0.6, 0.6, 0.6, 0.6],
        0.4: [0.1] + [0.95] * 5,
    }
    for place, (lr, values) in enumerate(curves.items()):
        for seed in (0, 1):
            failed = lr == 0.4 and seed == 1
            written(
                folder / str(2 * place + seed),
                {at: v + 0.01 * seed for at, v in enumerate(values)},
                seed=seed,
                settings={"local": {"lr": lr}},
                status="failed" if failed else "completed",
            )
    (folder / "jobs.jsonl").write_text(
        json.dumps({"number": 6, "overrides": ["local.lr=-1"], "directory": "elsewhere/6", "status": "failed",
                    "reason": "local.lr is -1"}) + "\n{broken\n"
    )  # fmt: skip
    return folder


def test_a_sweep_is_judged_by_the_rule(tmp_path: Path) -> None:
    part = sweep_part(sweep(tmp_path / "sweep"))
    rows = {row["local.lr"]: row for row in table(part, "Settings")}
    assert [rows[lr]["rank"] for lr in ("0.2", "0.1", "0.4", "-1")] == ["1", "2", "–", "–"]
    # Two seeds, 0.60 and 0.61: 0.605 -+ 12.7062 * 0.00707107 / sqrt(2).
    assert rows["0.2"]["accuracy"] == "60.50 % (54.15 to 66.85)"
    assert rows["0.4"]["accuracy"] == "–"
    assert rows["0.4"]["ended"] == "1 of 2"
    best = blocks(part, Tiles)[0].tiles[0]
    assert (best.label, best.value, best.detail) == ("best by rule: accuracy", "60.50 %", "lr=0.2")
    assert any("Job 6 left no run: local.lr is -1" in text for text in part.missing)
    assert any("jobs.jsonl has a line 2" in text for text in part.missing)
    dots = chart(part, "Accuracy by setting")
    assert [a["text"] for a in dots.figure["layout"]["annotations"]] == ["1 of 2 failed", "1 of 1 failed"]
    validated(part)


def test_settings_that_differ_twice_are_drawn_as_parallel_coordinates(tmp_path: Path) -> None:
    for place, (lr, name) in enumerate(
        [(0.1, "fedavg"), (0.1, "fedprox"), (0.4, "fedavg"), (0.4, "fedprox")]
    ):
        values = {at: 0.1 * (place + 1) for at in range(3)}
        written(tmp_path / "sweep" / str(place), values, settings={"local": {"lr": lr}, "strategy": name})
    part = sweep_part(tmp_path / "sweep")
    found = chart(part, "Settings and what came of them")
    ticks = found.figure["layout"]["xaxis"]["ticktext"]
    assert ticks[-1] == "accuracy"
    assert {"local.lr", "strategy.name"} <= set(ticks)
    best = found.figure["data"][-1]
    assert best["line"]["width"] == 4
    assert best["y"][ticks.index("local.lr")] == 1
    assert best["y"][-1] == 1
    keys = {t["meta"]["row"] for t in found.figure["data"]}
    rows = next(t for t in blocks(part, Table) if t.key == "settings")
    assert keys == set(rows.row_keys)
    assert found.follows == "settings"


def test_an_interrupted_comparison_is_shown_as_a_sweep(tmp_path: Path) -> None:
    written(tmp_path / "both" / "runs" / "fedavg-seed0", {1: 0.5})
    written(
        tmp_path / "both" / "runs" / "fedprox-seed0", {1: 0.6}, settings={"strategy": "fedprox"}, status=None
    )
    part = command.make_page([tmp_path / "both"]).parts[0]
    assert part.kind == "sweep"
    assert "Neither comparison.json nor matrix.json is there" in part.missing[0]
    rows = {row["strategy.name"]: row for row in table(part, "Settings")}
    assert (rows["fedavg"]["ended"], rows["fedprox"]["ended"]) == ("1 of 1", "0 of 1")


def test_several_runs_are_compared_and_then_shown_one_by_one(tmp_path: Path) -> None:
    runs = [written(tmp_path / name, {1: 0.5}, seed=seed) for seed, name in enumerate("ab")]
    page = command.make_page(runs)
    assert [part.kind for part in page.parts] == ["sweep", "run", "run"]


def cells() -> list[Cell]:
    def one(defence: str, attack: str, knows: str, psnr: float, utility: float) -> Cell:
        found = Summary(psnr, psnr - 1, psnr + 2, psnr + 3)
        null = Summary(12.0, 11.0, 13.0, 14.0)
        return Cell(
            defence, attack, 1, knows, {"psnr": found, "null: class mean": null}, 10, 1.5, utility, 100.0
        )

    return [
        one("none", "DLG", OBLIVIOUS, 40.0, 0.9),
        one("none", "IG", OBLIVIOUS, 30.0, 0.9),
        one("prune", "IG", OBLIVIOUS, 10.0, 0.8),
        one("prune", "IG", ADAPTIVE, 18.0, 0.8),
    ]


def test_a_defence_is_judged_by_the_attack_that_leaks_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "matrix"
    folder.mkdir()
    monkeypatch.setattr(matrix_report, "SHOWN", ("psnr",))
    (folder / "matrix.json").write_text(json.dumps(matrix_report.plain(cells())))
    part = matrix_part(folder)
    rows = {row["defence"]: row for row in table(part, "What leaks most from each defence")}
    assert rows["prune"]["worst attack"] == "IG (adaptive)"
    assert rows["prune"]["against it"] == "+6.0 dB"
    assert rows["none"]["PSNR, dB"] == "40 (39 to 42)"
    heat = chart(part, "Mean PSNR, model of round 1").figure["data"][0]
    # Columns: DLG, IG, IG adaptive, null; what was not made is empty.
    assert heat["z"] == [[40.0, 30.0, None, 12.0], [None, 10.0, 18.0, 12.0]]
    curve = chart(part, "Leakage and utility, model of round 1").figure
    assert [(t["x"], t["y"]) for t in curve["data"]] == [([0.9], [40.0]), ([0.8], [18.0])]
    assert curve["data"][1]["error_y"]["array"] == [2.0]
    assert [s["y0"] for s in curve["layout"]["shapes"]] == [12.0]
    validated(part)


def test_the_ledger_says_what_its_files_say() -> None:
    files = [json.loads(path.read_text()) for path in sorted(ledger.LEDGER.glob("*.json"))]
    part = ledger_part([])
    rows = table(part, "Every paper of the catalogue")
    for records in files:
        record = records.get("full") or records["quick"]
        row = next(r for r in rows if r["paper"] == record["slug"])
        verdicts = [claim["verdict"] for claim in record["claims"]]
        assert row["reproduced"] == str(verdicts.count("reproduced"))
        assert row["not"] == str(verdicts.count("not reproduced"))
    folds = {fold.key for fold in blocks(part, Fold)}
    links = {c.link for t in blocks(part, Table) for line in t.rows for c in line if c.link}
    assert links == folds, "a link goes somewhere, and every paper has one"
    validated(part)


def test_what_holds_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert cli.main(["report", str(tmp_path / "empty")]) == 2
    assert "holds nothing to report: no run (config.yaml" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "absent")]) == 2
    assert cli.main(["report"]) == 2
    assert not list(tmp_path.rglob("*.html"))


def test_without_plotly_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(ConfigError, match=r"pip install 'flowerbed\[report\]'"):
        command.make_page([written(tmp_path / "run", {1: 0.2})])


class Fetches(HTMLParser):
    """Collects everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [
            value or "" for name, value in attributes if name in ("src", "href", "srcset", "data", "action")
        ]


def test_a_page_fetches_nothing_and_no_text_leaves_its_place(tmp_path: Path) -> None:
    evil = '</script><script>alert("x")</script>'
    run = written(tmp_path / "run", {1: 0.5})
    with open(run / "metrics.jsonl", "a") as file:
        file.write(Record(2, SERVER, {"accuracy": 0.5, evil: 1.0}).line() + "\n")
    page = command.make_page([run], title=evil)
    text = render.html(page)
    assert "<script>alert" not in text
    parser = Fetches()
    parser.feed(text)
    assert all(value.startswith(("#", "data:")) for value in parser.found)


def colours(value: Any) -> Any:
    """Return a figure with colours in the place of their names."""
    if isinstance(value, dict):
        return {key: colours(item) for key, item in value.items()}
    if isinstance(value, list):
        return [colours(item) for item in value]
    if value in ("@sequence", "@diverging"):
        return "Viridis"
    return "#000000" if isinstance(value, str) and value.startswith("@") else value


def validated(part: Part) -> None:
    """Let Plotly check every property of every figure."""
    from plotly.graph_objects import Figure

    for found in blocks(part, Chart):
        plain = colours(json.loads(render.figure_json(found)))
        Figure(data=plain["data"], layout=plain["layout"])


# Machado, Oliveira and Fernandes 2009, full severity, on linear RGB.
DEFICIENCIES = {
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
    "none": np.eye(3).tolist(),
}


def linear(code: str) -> Any:
    values = np.array([int(code[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: Any) -> Any:
    """Return CIELAB under D65."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_are_told_apart_by_every_eye_and_stand_out(theme: str) -> None:
    script = (render.ASSETS / "report.js").read_text()
    block = re.search(rf"  {theme}: {{(.*?)\n  }},", script, re.DOTALL)
    assert block is not None
    found = dict(re.findall(r"(\w+): \"(#\w{6})\"", block[1]))
    categories = [linear(found[str(i)]) for i in range(charts.COLOURS)]
    for matrix in DEFICIENCIES.values():
        seen = [lab(np.array(matrix) @ colour) for colour in categories]
        assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 14

    def contrast(name: str) -> float:
        one, two = (float(linear(found[n]) @ [0.2126, 0.7152, 0.0722]) for n in (name, "surface"))
        return (max(one, two) + 0.05) / (min(one, two) + 0.05)

    # WCAG 2.2: 4.5 for text, 3 for what a chart is made of.
    assert min(contrast("ink"), contrast("muted"), contrast("bad")) >= 4.5
    assert min(contrast(str(i)) for i in range(4)) >= 3
    # The scales carry their order in lightness alone.
    scale = re.search(r"sequence: \[(.*?)\]\]", block[1])
    assert scale is not None
    steps = [lab(linear(code))[0] for code in re.findall("#\\w{6}", scale[1])]
    assert len(steps) == 5
    assert steps in (sorted(steps), sorted(steps, reverse=True))
