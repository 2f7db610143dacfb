"""The benchmark harness: what it counts, how it compares, what it says. No figure that it measures is asserted."""

from __future__ import annotations

import cProfile
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from flowerbed.errors import ConfigError
from flowerbed.experiments import cli
from flowerbed.experiments.benchmarks import accounting, items, report, speed, workload
from flowerbed.experiments.benchmarks.competitors import plain
from flowerbed.experiments.benchmarks.gate import Finished, Gate, digest
from flowerbed.experiments.benchmarks.race import Entry, Result, Turn, median_interval, race, ratio
from flowerbed.experiments.benchmarks.report import Bar, Item
from flowerbed.experiments.benchmarks.variants import VARIANTS, Variant
from flowerbed.experiments.config import Simulation
from flowerbed.models.base import ModelSpec

STAMP = {
    "date": "today",
    "commit": "abc",
    "cpu": "a chip",
    "cores": 2,
    "memory_gib": 4,
    "system": "Linux",
    "python": "3.11",
    "versions": {"torch": "2"},
    "load": 0.5,
}


# How costs are compared.


def test_interval_of_a_median_by_hand() -> None:
    # n = 9: P(X <= 1) = 10 / 512 <= 2.5 % < P(X <= 2), so the second smallest and the second largest.
    found = median_interval([9, 1, 8, 2, 7, 3, 6, 4, 5])
    assert (found.median, found.low, found.high) == (5, 2, 8)
    # n = 5: even the extremes cover only 1 - 2 / 32.
    assert median_interval([1, 2, 3, 4, 5]).low is None
    assert (median_interval([3.0, 1.0]).median, median_interval([3.0]).median) == (2.0, 3.0)


@given(st.integers(6, 60))
def test_interval_has_the_level_and_no_narrower_one_has(n: int) -> None:
    found = median_interval(range(1, n + 1))
    assert found.low is not None
    k = int(found.low)
    assert found.high == n + 1 - k
    assert stats.binom.cdf(k - 1, n, 0.5) <= 0.025 < stats.binom.cdf(k, n, 0.5)


def turns_of(name: str, *costs: float) -> Result:
    return Result(name, [Turn(1, cost, 2 * cost) for cost in costs])


def test_ratio_pairs_the_turns() -> None:
    # A machine that is ten times slower in one turn is so for both.
    slow, fast = turns_of("slow", 2.0, 20.0, 4.0, 8.0), turns_of("fast", 1.0, 10.0, 2.0, 4.0)
    found = ratio(slow, fast)
    assert found is not None
    assert found.median == 2.0
    assert ratio(slow, Result("dead")) is None


# What is written down.


def model_section(results: list[Result], absent: dict[str, str] | None = None) -> report.Document:
    return report.model_section(
        "a model", STAMP, results, ("bare", "pfl"), steps=10, flops=4.0, peak=100.0, absent=absent or {}
    )


def test_verdicts_of_a_document() -> None:
    dead = Result("pfl", failure="it fell")
    document = {
        "model m": model_section([turns_of("bare", 3.0), turns_of("ours", 1.0), dead], {"other": "not here"}),
        "item a": report.item_section(Item("a", "low enough", 1.0, bar=1.02), STAMP),
        "item b": report.item_section(Item("b", "high enough", 1.6, bar=1.7, at_most=False), STAMP),
        "item c": report.item_section(Item("c", "unknown", None, bar=1.0, note="why"), STAMP),
        "item d": report.item_section(Item("d", "no bar", 5.0), STAMP),
    }
    bars = [
        Bar("m", "ours", "ours", {"bare": 3, "pfl": 1}),
        Bar("m", "other", "other", {"bare": 2}),
        Bar("n", "ours", "elsewhere", {"bare": 1}),
    ]
    lines = report.verdicts(document, bars)
    assert [(line.title, line.verdict) for line in lines] == [
        ("ours vs bare", "met"),
        ("ours vs pfl", "not measured"),
        ("other vs bare", "not measured"),
        ("elsewhere vs bare", "not measured"),
        ("low enough", "met"),
        ("high enough", "NOT MET"),
        ("unknown", "not measured"),
    ]
    assert [line.found for line in lines][1:3] == ["pfl: it fell", "other: not here"]
    stricter = report.verdicts(document, [Bar("m", "ours", "ours", {"bare": 3.01})])
    assert stricter[0].verdict == "NOT MET"
    text = report.markdown("Speed", "How.", document, lines)
    assert "| ours | 1 | 2 | 10 | 5 | 40.0% | 3x | - | 3x | - |" in text
    assert "- pfl: not measured, it fell" in text
    assert "- other: not measured, not here" in text


def test_document_survives_writing(tmp_path: Path) -> None:
    document = {"model m": model_section([turns_of("bare", 3.0)])}
    report.write(tmp_path / "deep" / "speed", document, "text")
    assert report.read(tmp_path / "deep" / "speed") == json.loads(json.dumps(document))
    assert report.read(tmp_path / "nothing") == {}


# The work.


def test_grey_by_hand() -> None:
    images = np.zeros((1, 3, 32, 32), np.uint8)
    images[0, :, 2, 2] = (10, 20, 31)
    images[0, :, 1, 2] = 255
    seen = workload.grey(images)
    assert seen.shape == (1, 1, 28, 28)
    # 61 / 3 = 20.33; the row above is cropped away.
    assert seen[0, 0, 0, 0] == 20
    assert seen.sum() == 20


def test_prepared_folder(tmp_path: Path) -> None:
    work = workload.Work(users=4, samples=10, cohort=2)
    workload.prepare(tmp_path, work, "synthetic")
    assert workload.read_work(tmp_path) == work
    assert work.steps == 2
    for view, shape in workload.SHAPES.items():
        inputs, labels = workload.users(tmp_path, view)
        assert inputs.shape == (4, 10, *shape)
        assert labels.shape == (4, 10)
        np.testing.assert_allclose(inputs.mean((0, 1, 3, 4)), 0, atol=1e-4)
        np.testing.assert_allclose(inputs.std((0, 1, 3, 4)), 1, atol=1e-4)
        with np.load(tmp_path / f"{view}.npz") as archive:
            assert archive["x_train"].shape == (40, *shape)
            assert sorted(archive["y_train"]) == sorted(labels.ravel())


@pytest.mark.parametrize("bad", [{"users": 10, "cohort": 11}, {"samples": 15}])
def test_impossible_work_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        workload.Work(**bad)


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="need 20000; digits has"):
        workload.prepare(tmp_path, workload.Work(users=400), "digits")


@pytest.mark.parametrize("name", workload.MODELS)
def test_the_plain_model_computes_what_ours_does(name: str) -> None:
    """The contestants' models have the same parameters, and with the same values the same outputs."""
    model = workload.MODELS[name]
    shape = workload.SHAPES[model.view]
    ours, theirs = ModelSpec(name, shape, 10, model.options).build(0), plain.build(name)
    assert sum(p.numel() for p in ours.parameters()) == model.parameters
    assert [p.shape for p in theirs.parameters()] == [p.shape for p in ours.parameters()]
    with torch.no_grad():
        for mine, their in zip(ours.parameters(), theirs.parameters(), strict=True):
            their.copy_(mine)
    ours.eval()
    theirs.eval()
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-5)


def test_flops_of_a_step_by_hand() -> None:
    # 784-10 at batch 10: forward, and the gradient of the weights; that of the inputs is not needed.
    assert speed.step_flops(workload.MODELS["linear"], 10) == 2 * 2 * 10 * 784 * 10


# The gate.


def replies_of(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_gate_counts_the_rounds_of_a_turn() -> None:
    out = io.StringIO()
    gate = Gate(out, io.StringIO("go 2\ngo 1\nstop\n"))
    gate.open()
    gate.passed()
    assert [reply["kind"] for reply in replies_of(out)] == ["ready"]
    gate.passed()
    with pytest.raises(Finished):
        gate.passed()
    gate.end(digest="x")
    kinds = [(reply["kind"], reply.get("rounds")) for reply in replies_of(out)]
    assert kinds == [("ready", None), ("turn", 2), ("turn", 1), ("end", None)]
    assert replies_of(out)[-1]["digest"] == "x"


def test_gate_profiles_its_turns_only() -> None:
    def sleepless() -> None:
        sum(range(1000))

    out = io.StringIO()
    gate = Gate(out, io.StringIO("go 1\ngo 1\ngo 1\n"), limit=3, profile=cProfile.Profile(), unseen=1)
    sleepless()
    gate.open()
    for _ in range(3):
        sleepless()
        gate.passed()
    sleepless()
    gate.end()
    (line,) = [text for text in replies_of(out)[-1]["profile"].splitlines() if "sleepless" in text]
    assert line.split()[0] == "2"


def test_gate_ends_with_its_limit_and_when_nobody_listens() -> None:
    gate = Gate(io.StringIO(), io.StringIO("go 1\n"), limit=1)
    gate.open()
    gate.passed()
    with pytest.raises(Finished):
        Gate(io.StringIO(), io.StringIO("")).open()


def test_digest_sees_bits_and_names() -> None:
    one = {"a": torch.tensor([0.0, 1.0])}
    assert digest(one) == digest({"a": torch.tensor([0.0, 1.0])})
    assert digest(one) != digest({"a": torch.tensor([-0.0, 1.0])})
    assert digest(one) != digest({"b": one["a"]})


# Accounting.

BURN = "import time\nwhile time.process_time() < 0.4: pass\n"


def test_cpu_time_of_children_counts_alive_and_buried() -> None:
    before = accounting.tree_cpu_seconds()
    subprocess.run([sys.executable, "-c", BURN], check=True)
    assert accounting.tree_cpu_seconds() - before > 0.35
    code = BURN + "print(flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert accounting.tree_cpu_seconds(child.pid) > 0.35
        accounting.kill_tree(child.pid)
        assert child.wait() != 0


def test_peak_of_another_process() -> None:
    code = "input()\nx = bytearray(b'1') * (64 << 20)\nprint(flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        before = accounting.own_bytes(child.pid)
        with accounting.PeakWatch(child.pid) as watch:
            child.stdin.write("\n")
            child.stdin.flush()
            child.stdout.readline()
        assert watch.peak - before > 60 << 20
        child.kill()
    assert accounting.own_bytes(child.pid) == 0


# Who takes part.


def test_variants_say_what_is_missing() -> None:
    assert VARIANTS[0].missing() == ""
    nonsense = Variant("x", {"local": {"warp": 9}}, "")
    assert nonsense.missing() == "not in this version (Unknown key in local 'warp')"
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)


def test_every_variant_keeps_the_workload(tmp_path: Path) -> None:
    options = speed.parse([])
    work = workload.Work()
    for model in workload.MODELS.values():
        entries, _ = speed.entries_of(model, tmp_path, work, options)
        for entry in entries:
            if entry.specification["kind"] == "flowerbed":
                asked = Simulation.of(entry.specification["settings"])
                assert (asked.federation.clients, asked.federation.cohort) == (1000, 50)
                assert (asked.local.batch_size, asked.local.lr, asked.local.epochs) == (10, 0.1, 1)


def test_pfl_that_is_not_there_is_a_row_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    options = speed.parse([])
    entries, absent = speed.entries_of(workload.MODELS["linear"], tmp_path, workload.Work(), options)
    assert "pfl" not in [entry.name for entry in entries]
    assert "pip install --target DIR pfl" in absent["pfl"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--smoke", "--store"], "worth a --store"),
        (["--pfl", "/nowhere"], "no package pfl"),
        (["--turns", "0"], "--turns is 0"),
    ],
)
def test_bad_options_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        speed.main(argv)


def test_command_line_knows_the_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "sped"]) == 2
    assert "Did you mean 'speed'?" in capsys.readouterr().err


# All of it.


def test_profile_of_who_misses_a_bar(tmp_path: Path) -> None:
    work = workload.Work(users=4, samples=10, cohort=2)
    workload.prepare(tmp_path, work, "synthetic")
    model = workload.MODELS["linear"]
    specification = {"kind": "bare", "folder": str(tmp_path), "model": "linear", "device": "cpu"}
    document = {"model linear": model_section([turns_of("bare", 1.0), turns_of("ours", 1.0)])}
    bars = [Bar("linear", "ours", "", {"bare": 2}), Bar("linear", "bare", "", {"bare": 1})]
    entries = [Entry("ours", specification), Entry("bare", specification)]
    found = speed.profiles(document, model, bars, entries, "cpu")
    assert list(found) == ["ours"]
    assert "cross_entropy" in found["ours"]


def test_race_leaves_out_who_fails() -> None:
    found, used = race([Entry("wrong", {"kind": "central", "settings": {"seed": 0}})], turns=1), []
    assert "KeyError" in found[0].failure
    assert found[0].turns == used


def test_smoke_run_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--smoke", "--models", "linear", "--contestants", "bare", "flowerbed", "cohort", "--items"]
    speed.main([*argv, "--out", str(tmp_path / "speed"), "--json"])
    document = json.loads(capsys.readouterr().out)
    section = document["model linear"]
    for name in ("bare", "flowerbed"):
        assert not section["contestants"][name].get("failure"), section["contestants"][name]
        assert len(section["contestants"][name]["turns"]) == 2
    assert set(section["faster"]["flowerbed"]["bare"]) == {"cpu", "wall"}
    assert json.loads((tmp_path / "speed.json").read_text()) == document
    assert "## Bars" in (tmp_path / "speed.md").read_text()


def test_single_client_item_compares_bits(tmp_path: Path) -> None:
    place = items.Place(tmp_path, speed.SMOKE, 1, 0.0, True, lambda text: None)
    timed, bits = items.single_client(place)
    assert timed.value is not None
    assert bits.value == 0.0, bits.note
