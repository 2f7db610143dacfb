"""The statistics against scipy and hand-worked numbers; runs that are reused, resumed, and shown as failed."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from flowerbed.errors import ConfigError
from flowerbed.experiments import check, compare_command, compare_report, paired
from flowerbed.experiments.compare import Watcher, compare
from flowerbed.experiments.comparison import Comparison, Metric
from flowerbed.server.callbacks import Record
from flowerbed.storage import Tensors
from flowerbed.strategies.base import ClientReply
from flowerbed.strategies.fedavg import FedAvg

SMALL: dict[str, Any] = {
    "model": {"name": "mlp", "hidden": [8]},
    "federation": {"clients": 4, "cohort": 2, "rounds": 2},
    "local": {"batch_size": 128},
    "grid": {"device": "cpu"},
}
NUMBERS = st.lists(st.floats(-10, 10).map(lambda v: round(v, 3)), min_size=2, max_size=10)


class Breaks(FedAvg):
    """FedAvg whose model is not finite after round 2 of seed 1."""

    def aggregate(self, server_round: int, current: Tensors, replies: list[ClientReply]) -> Tensors:
        model = super().aggregate(server_round, current, replies)
        assert self.setting is not None
        broken = self.setting.seed == 1 and server_round == 2
        return {name: value * math.nan if broken else value for name, value in model.items()}


class Forgetful(FedAvg):
    """Keeps what it needs in an attribute, which no checkpoint has."""

    seen = 0

    def aggregate(self, server_round: int, current: Tensors, replies: list[ClientReply]) -> Tensors:
        self.seen += 1
        model = super().aggregate(server_round, current, replies)
        return {name: value * (1 + 0.01 * self.seen) for name, value in model.items()}


@pytest.fixture(autouse=True)
def own_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("own_methods")
    module.Breaks, module.Forgetful = Breaks, Forgetful  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_methods", module)


# The statistics.


def test_t_interval_by_hand() -> None:
    found = paired.t_interval([1.0, 2.0, 3.0])
    # t_{0.975, 2} = 4.302653, s = 1.
    assert found is not None
    assert (found.mean, found.high) == (2.0, pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5))
    assert paired.t_interval([5.0]) == paired.Interval(5.0, None, None)
    assert paired.t_interval([1.0, None, 3.0]) is None
    assert paired.t_interval([]) is None


@given(NUMBERS.filter(lambda values: len(set(values)) > 1))
def test_interval_and_test_are_scipy_s(values: list[float]) -> None:
    found, expected = paired.t_interval(values), stats.ttest_1samp(values, 0.0)
    assert found is not None
    assert found.low == pytest.approx(expected.confidence_interval(0.95).low, rel=1e-6, abs=1e-9)
    assert paired.paired_t(values) == pytest.approx(expected.pvalue)


def test_paired_t_of_a_known_example() -> None:
    after, before = [4.1, 5.0, 6.2, 5.5], [3.9, 4.4, 6.0, 5.1]
    gaps = paired.differences(after, before)
    assert gaps is not None
    assert paired.paired_t(gaps) == pytest.approx(stats.ttest_rel(after, before).pvalue)
    assert paired.paired_t([0.0, 0.0]) == 1.0
    assert paired.paired_t([0.25, 0.25]) == 0.0
    assert paired.paired_t([0.25]) is None


def test_sign_flip_is_exact() -> None:
    assert paired.sign_flip([1.0] * 6) == 2 / 64
    assert paired.sign_flip([1.0] * 5) is None
    assert paired.sign_flip([0.0] * 6) == 1.0
    gaps = [0.3, -0.1, 0.2, 0.5, 0.1, -0.05, 0.4]
    expected = stats.permutation_test(
        (gaps,),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=math.inf,
    )
    assert paired.sign_flip(gaps) == pytest.approx(expected.pvalue)


def test_holm_by_hand() -> None:
    assert paired.holm([0.01, 0.04, None, 0.03]) == [
        pytest.approx(0.03),
        pytest.approx(0.06),
        None,
        pytest.approx(0.06),
    ]
    assert paired.holm([0.9, 0.8]) == [1.0, 1.0]
    assert paired.holm([None]) == [None]


def test_ranks_by_hand() -> None:
    values = {"a": (0.9, 0.5, None), "b": (0.8, 0.5, 0.1), "c": (0.7, 0.4, None)}
    # Seed 0: 1, 2, 3; seed 1: 1.5, 1.5, 3; seed 2: b is the only one that finished.
    assert paired.mean_ranks(values) == pytest.approx({"a": 5 / 3, "b": 4.5 / 3, "c": 8.5 / 3})
    assert paired.mean_ranks({"a": (1.0,), "b": (2.0,)}, lower_is_better=True) == {"a": 1.0, "b": 2.0}


def test_no_difference_is_made_from_what_is_left() -> None:
    assert paired.differences([1.0, None], [0.5, 0.5]) is None
    assert paired.differences([1.0, 2.0], [None, 0.5]) is None


# Metrics.


def test_metrics_know_where_they_come_from_and_which_way_is_up() -> None:
    assert Metric("accuracy").phase == "evaluate-server"
    assert Metric("clients:personal-ece").phase == "evaluate-clients"
    lower = ("loss", "clients:ece", "clients:personal-accuracy-std", "clients:personal-loss")
    assert all(Metric(name).lower_is_better for name in lower)
    higher = ("accuracy", "clients:accuracy-jain", "balanced-accuracy", "clients:accuracy-worst-10pct")
    assert not any(Metric(name).lower_is_better for name in higher)
    assert Metric("clients:personal-accuracy").found_in({"accuracy": 1.0}) == "accuracy"
    assert Metric("personal-accuracy").found_in({"accuracy": 1.0}) is None


# Runs.


class Counting(Watcher):
    """Writes down what is run from the start, resumed or reused; may interrupt."""

    def __init__(self, interrupt: tuple[str, int, int] | None = None) -> None:
        self.runs: list[tuple[str, int, int]] = []
        self.reused: list[bool] = []
        self._interrupt = interrupt
        self._now = ("", 0)

    def begins(self, method: str, seed: int) -> None:
        self._now = (method, seed)

    def started(self, rounds: int, first_round: int) -> None:
        self.runs.append((*self._now, first_round))

    def recorded(self, record: Record) -> None:
        if record.phase == "train" and (*self._now, record.round) == self._interrupt:
            raise KeyboardInterrupt

    def ended(self, run: Any) -> None:
        self.reused.append(run.reused)


def figures(comparison: Comparison) -> list[tuple[str, int, Any]]:
    return [(run.method, run.seed, dict(run.values)) for run in comparison.runs]


def test_equal_methods_are_equal_bit_for_bit_and_another_is_not() -> None:
    comparison = compare(
        ["fedavg", {"name": "fedprox", "mu": 0.0}, {"name": "fedavgm", "server_lr": 0.3}], (0, 1), SMALL
    )
    same, other = comparison.rows(Metric("accuracy"))[1:]
    assert same.difference == paired.Interval(0.0, 0.0, 0.0)
    assert same.p_t == same.p_t_holm == 1.0
    assert other.difference is not None
    assert other.difference.mean != 0
    first = comparison.of("fedavg")[0]
    assert first.values["accuracy"] == pytest.approx(sum(v for r, v in first.curves["accuracy"] if r > 0) / 2)


def test_an_interrupted_comparison_goes_on_and_reuses_what_is_finished(tmp_path: Path) -> None:
    methods = ["fedavg", {"name": "fedprox", "mu": 1.0}]
    settings = {**SMALL, "federation": {**SMALL["federation"], "rounds": 3}}
    whole = compare(methods, (0,), settings)
    first, second, third = Counting(interrupt=("fedprox", 0, 2)), Counting(), Counting()
    with pytest.raises(KeyboardInterrupt):
        compare(methods, (0,), settings, tmp_path, watcher=first)
    assert first.runs == [("fedavg", 0, 1), ("fedprox", 0, 1)]
    resumed = compare(methods, (0,), settings, tmp_path, watcher=second)
    # The checkpoint of round 1 is whole: only rounds 2 and 3 of the second run are left.
    assert second.runs == [("fedprox", 0, 2)]
    assert second.reused == [True, False]
    assert figures(resumed) == figures(whole)
    longer = {**settings, "federation": {**settings["federation"], "rounds": 4}}
    compare(["fedavg"], (0,), longer, tmp_path, watcher=third)
    assert third.runs == [("fedavg", 0, 1)]


def test_a_failed_run_is_shown_and_never_averaged_away(tmp_path: Path) -> None:
    comparison = compare(["fedavg", "own_methods:Breaks"], (0, 1, 2), SMALL, tmp_path)
    (failed,) = comparison.failed
    assert (failed.method, failed.seed, failed.status) == ("own_methods:Breaks", 1, "failed")
    assert "not finite" in failed.reason
    good, broken = comparison.rows(Metric("accuracy"))
    assert (broken.mean, broken.difference, broken.p_t) == (None, None, None)
    # Bit for bit FedAvg where it did not break: ranks 1.5, 2, 1.5.
    assert (good.rank, broken.rank) == pytest.approx((4 / 3, 5 / 3))
    assert good.mean is not None
    text = (tmp_path / "comparison.md").read_text()
    assert "1 of 3 failed" in text
    assert "seed 1 failed after round 1" in text
    lines = list(csv.DictReader((tmp_path / "comparison.csv").open()))
    assert [line["mean"] != "" for line in lines] == [True, False]
    assert lines[1]["finished"] == "2"
    assert lines[1]["seed_1"] == "failed"
    assert float(lines[0]["mean"]) == good.mean.mean
    assert float(lines[0]["bytes_up"]) == comparison.runs[0].cost["train"]["bytes_up"]
    assert float(lines[0]["flops"]) > 0
    stored = json.loads((tmp_path / "comparison.json").read_text())
    assert stored["metrics"]["accuracy"]["rows"][0]["mean"]["mean"] == good.mean.mean
    assert stored["runs"][3]["method"] == "own_methods:Breaks"
    assert not stored["runs"][3]["ok"]
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_curves_are_drawn_and_evaluations_counted_of_the_figures_compared() -> None:
    last = {**SMALL, "federation": {"clients": 4, "rounds": 2}}
    evaluation = {"every": 0, "clients_every": 2, "last": 1}
    once = compare(["fedavg"], (0,), {**last, "evaluation": evaluation}, metrics=["clients:accuracy-mean"])
    assert len(compare_report.figure(once).axes) == 1, "one evaluation is no curve"
    assert [run.evaluations for run in once.runs] == [1]
    assert "Evaluations averaged" not in compare_report.markdown(once)
    often = compare(["fedavg"], (0,), {**last, "evaluation": {**evaluation, "every": 1}})
    assert len(compare_report.figure(often).axes) == 2


def test_a_method_without_a_personal_model_offers_its_generic_one() -> None:
    settings = {**SMALL, "evaluation": {"clients_every": 1}}
    comparison = compare(
        ["fedavg"],
        (0,),
        settings,
        metrics=("clients:accuracy", "clients:personal-accuracy", "clients:accuracy-jain"),
    )
    (run,) = comparison.runs
    assert run.values["clients:accuracy"] == run.values["clients:personal-accuracy"]
    assert run.generic
    assert any("generic one's: fedavg" in note for note in compare_report.notes(comparison))


@pytest.mark.parametrize(
    ("methods", "changes", "message"),
    [
        (
            {"a": {"partition": {"name": "dirichlet", "alpha": 1.0}}, "b": {}},
            {},
            "'a' and 'b' differ in partition",
        ),
        ({"a": {"federation": {"rounds": 3}}, "b": {}}, {}, "differ in federation.rounds \\(3 and 2\\)"),
        ({"a": {"evaluation": {"last": 1}}, "b": {}}, {}, "differ in evaluation"),
        ({"a": {}, "b": {"strategy": "fedavg"}}, {}, "'a' and 'b' are the same method"),
        (["fedavg", "fedavg"], {}, "is there twice"),
        (["fedavg"], {"seeds": (0, 0)}, "repeat"),
        (["fedavg"], {"seeds": ()}, "at least one seed"),
        (["fedavg"], {"metrics": ("acuracy",)}, "Did you mean 'accuracy'"),
        (["fedavg"], {"metrics": ("clients:accuracy",)}, "evaluation.clients_every"),
        (["fedavg"], {"reference": "fedprox"}, "Unknown method \\(reference\\) 'fedprox'"),
        ([], {}, "at least one method"),
        # A method that cannot work is refused before any other has run.
        (["fedavg", {"name": "fedprox", "mu": -1.0}], {}, "strategy.mu"),
    ],
)
def test_refusals(methods: Any, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    arguments = {"seeds": (0,), "settings": SMALL, "out": None, **changes}
    with pytest.raises(ConfigError, match=message):
        compare(methods, **arguments)


# The command line.


def test_options_of_one_method_and_of_all() -> None:
    methods, seeds = compare_command.read(
        [
            "strategy=fedavg,fedprox",
            "strategy.fedprox.mu=0.3",
            "strategy.server_lr=0.5",
            "federation.rounds=7",
            "seeds=3,5",
        ]
    )
    assert seeds == [3, 5]
    assert methods["fedprox"].strategy.options["mu"] == 0.3
    assert "mu" not in methods["fedavg"].strategy.options
    assert {m.strategy.options["server_lr"] for m in methods.values()} == {0.5}
    assert {m.federation.rounds for m in methods.values()} == {7}


def test_methods_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "methods.yaml"
    file.write_text("Plain: strategy=fedavg\nFedProx, 5 epochs: [strategy=fedprox, local.epochs=5]\n")
    methods, _ = compare_command.read([f"methods={file}", "local.lr=0.2"])
    assert list(methods) == ["Plain", "FedProx, 5 epochs"]
    assert [(m.local.epochs, m.local.lr) for m in methods.values()] == [(1, 0.2), (5, 0.2)]
    file.write_text("just text\n")
    with pytest.raises(ConfigError, match="must map labels to settings"):
        compare_command.read([f"methods={file}"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["seeds=0"], "strategy=fedavg,fedprox or as methods=FILE"),
        (["strategy=fedavg", "seed=1"], "give seeds=0,1,2"),
        (["strategy=fedavg", "run.dir=x"], "give --out DIR"),
        (["strategy=fedavg", "seeds=x"], "whole numbers"),
        (["strategy=fedavg,fedavg"], "repeats a name"),
        (["methods=nowhere.yaml"], "no file nowhere.yaml"),
        (["strategy=fedavg,fedprox", "strategy.fedprox.nu=1"], "fedprox: Unknown key in strategy 'nu'"),
    ],
)
def test_command_line_refusals(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compare_command.read(settings)


def test_the_command_prints_json_and_writes_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [
        "model=mlp",
        "model.hidden=[8]",
        "federation.clients=4",
        "federation.rounds=1",
        "grid.device=cpu",
    ]
    code = compare_command.compare(
        ["strategy=fedavg", "seeds=0", *settings, "--out", str(tmp_path), "--metric", "accuracy,loss"],
        as_json=True,
    )
    assert code == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed["metrics"]) == ["accuracy", "loss"]
    assert "One seed: there is no interval" in (tmp_path / "comparison.md").read_text()


# flowerbed check.


def test_check_passes_fedavg_and_names_what_another_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    assert check.check(["fedavg", "server_lr=1.0", "--json"], as_json=True) == 0
    said = json.loads(capsys.readouterr().out)["checks"]
    assert {c["status"] for c in said} == {"passed"}
    assert all(c["promise"] for c in said)
    assert check.check(["own_methods:Forgetful", "--skip", "one_client_is_central"], as_json=False) == 1
    case = check.case_of("own_methods:Forgetful", ["model.hidden=[4]", "server_lr=0.5"])
    assert case.settings == {"model": {"hidden": [4]}}
    outcomes = {o.check: o for o in check.run_checks(case, skip=["trains"])}
    assert outcomes["trains"].status == "skipped"
    assert outcomes["resumes"].status == "failed"
    assert "resumed run differs" in outcomes["resumes"].reason
    assert outcomes["same_seed_same_bits"].status == "passed"
    assert "--skip" in outcomes["one_client_is_central"].reason


def test_check_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'resumes'"):
        check.check(["fedavg", "--skip", "resume"])
    with pytest.raises(ConfigError, match="Unknown key in strategy 'mu'"):
        check.check(["fedavg", "mu=1"])
    with pytest.raises(ConfigError, match="write option=value"):
        check.check(["fedavg", "mu"])
