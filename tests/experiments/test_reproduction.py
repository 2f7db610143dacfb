"""The reproduction engine on a toy paper: runs, reuse, resume, divergence, records and the two commands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_paper
from safetensors.torch import load_file

from flowerbed.errors import ConfigError
from flowerbed.experiments import cli
from flowerbed.experiments.config import merged
from flowerbed.experiments.reproduction import digests, ledger, report
from flowerbed.experiments.reproduction.catalogue import catalogue
from flowerbed.experiments.reproduction.claims import NOT_REPRODUCED, REPRODUCED, Claim, metric
from flowerbed.experiments.reproduction.command import claim_names
from flowerbed.experiments.reproduction.engine import reproduce
from flowerbed.experiments.reproduction.paper import built, load_paper, load_scale
from flowerbed.experiments.reproduction.running import Job, Outcome
from flowerbed.experiments.reproduction.schedule import Watcher, plan

TOY = "toy_paper:PAPER"
NO_MODULE = next((slug for slug in catalogue() if slug not in built()), "")


class Seen(Watcher):
    """Keeps what it sees."""

    def __init__(self) -> None:
        self.ends: list[tuple[str, int]] = []
        self.rounds: list[int] = []

    def advanced(self, job: Job, round_: int) -> None:
        self.rounds.append(round_)

    def ended(self, job: Job, outcome: Outcome) -> None:
        self.ends.append((job.arm, job.seed))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Return the toy at quick scale, and where it lies."""
    out = tmp_path_factory.mktemp("papers")
    return reproduce(TOY, "quick", out, workers=1), out


def test_arms_seeds_claims_and_measures(made: tuple[Any, Path]) -> None:
    result, _ = made
    assert result.arms == ("slow", "fast", "longer")
    assert result.whole
    assert [v.verdict for v in result.verdicts] == [REPRODUCED, "direction only"]
    values = result.outcomes["fast", 1].values
    assert values["evaluations"] == 3
    assert values["diverged"] == 0
    assert values["largest-weight"] > 0
    assert {"accuracy", "loss", "train:loss", "cost:bytes_up", "cost:client_steps"} <= values.keys()
    gaps = [result.outcomes["fast", s].values["accuracy"] - result.outcomes["slow", s].values["accuracy"] - 0.02
            for s in (0, 1)]  # fmt: skip
    assert result.verdicts[0].conditions[0].gaps == pytest.approx(gaps)


def test_an_arm_starts_from_the_model_of_another_with_the_same_seed(made: tuple[Any, Path]) -> None:
    result, _ = made
    for seed in (0, 1):
        run = result.finished("longer", seed)
        start = load_file(str(run.simulation.initial.weights))
        delivered = result.finished("fast", seed).tensors
        assert all(torch.equal(start[name], delivered[name]) for name in delivered)
        # The evaluation before its first round is that of the other's last.
        first = next(r for r in run.records if r.phase == "evaluate-server")
        assert first.metrics["accuracy"] == result.outcomes["fast", seed].values["accuracy"]


def test_again_it_runs_nothing(made: tuple[Any, Path]) -> None:
    result, out = made
    seen = Seen()
    again = reproduce(TOY, "quick", out, workers=1, watcher=seen)
    assert seen.rounds == []
    assert len(seen.ends) == 6
    assert again.outcomes == result.outcomes
    assert again.verdicts == result.verdicts


def test_a_run_that_was_interrupted_goes_on(made: tuple[Any, Path], tmp_path: Path) -> None:
    result, _ = made

    class Killer(Seen):
        def advanced(self, job: Job, round_: int) -> None:
            super().advanced(job, round_)
            # Its second training round: the checkpoint of the first is there.
            if (job.arm, job.seed, round_) == ("fast", 0, 2):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce(TOY, "quick", tmp_path, workers=1, watcher=Killer())
    seen = Seen()
    again = reproduce(TOY, "quick", tmp_path, workers=1, watcher=seen, seeds=[0])
    # "slow" is reused, "fast" makes its second round only (training and evaluation), "longer" its one.
    assert seen.rounds == [2, 2, 0, 1, 1]
    for arm in ("slow", "fast", "longer"):
        assert again.outcomes[arm, 0].values["loss"] == result.outcomes[arm, 0].values["loss"]
    assert not again.whole


def test_side_by_side_gives_the_same(made: tuple[Any, Path], tmp_path: Path) -> None:
    result, _ = made
    parallel = reproduce(TOY, "quick", tmp_path, workers=2, claims=["faster"], seeds=[0])
    assert parallel.arms == ("slow", "fast")
    for arm in parallel.arms:
        for name, value in result.outcomes[arm, 0].values.items():
            assert name == "cost:seconds" or parallel.outcomes[arm, 0].values[name] == value


def test_many_clients_are_one_override(tmp_path: Path) -> None:
    settings = {"federation": {"clients": 4}}
    result = reproduce(TOY, "smoke", tmp_path, workers=1, claims=["faster"], settings=settings)
    assert not result.whole
    assert result.finished("fast", 0).simulation.federation.clients == 4


def test_an_analysis_adds_metrics_across_arms(tmp_path: Path) -> None:
    result = reproduce("toy_paper:ANALYSED", "smoke", tmp_path, workers=1)
    accuracy = {arm: result.outcomes[arm, 0].values["accuracy"] for arm in result.arms}
    assert result.outcomes["fast", 0].values["gain"] == accuracy["fast"] - accuracy["slow"]
    assert result.verdicts == (), "a smoke run judges nothing"


def test_a_diverged_arm_is_shown_as_diverged_and_takes_what_starts_from_it_along(tmp_path: Path) -> None:
    result = reproduce("toy_paper:BROKEN", "quick", tmp_path, workers=1)
    wild, heir = result.outcomes["wild", 0], result.outcomes["heir", 0]
    assert (wild.status, wild.values["diverged"]) == ("diverged", 1.0)
    assert "accuracy" not in wild.values
    assert heir.status == "failed"
    assert "starts from wild, seed 0, which diverged" in heir.reason
    (verdict,) = result.verdicts
    assert (verdict.verdict, verdict.reason) == (
        NOT_REPRODUCED,
        "wild diverged with seed 0, so 'accuracy' has no number",
    )


@pytest.mark.parametrize(
    ("paper", "sentence"),
    [
        (
            "toy_paper:WRONG_METRIC",
            r"arm 'fast', seed 0: Unknown metric 'accurracy'. Did you mean 'accuracy'",
        ),
        ("toy_paper:WRONG_ARM", r"claim 'none': Unknown arm 'fasst'. Did you mean 'fast'"),
        ("ps-dk", r"Unknown paper 'ps-dk'. Did you mean ps-kd"),
        (NO_MODULE, r"has no module yet. There are: .*ps-kd"),
        ("toy_paper:accuracy", r"is no Paper"),
    ],
)
def test_what_cannot_work_is_refused(paper: str, sentence: str, tmp_path: Path) -> None:
    if not paper:
        pytest.skip("every paper of the catalogue has a module")
    with pytest.raises(ConfigError, match=sentence):
        reproduce(paper, "smoke", tmp_path, workers=1)


def test_a_claim_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Unknown claim of 'toy' 'fastr'. Did you mean 'faster'"):
        reproduce(TOY, "smoke", tmp_path, claims=["fastr"])


def test_a_picture_of_arms_that_the_claims_do_not_need_is_left_out_quietly(
    made: tuple[Any, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, _ = made

    def figure(_: Any) -> None:
        raise KeyError("an arm")

    scale = dataclasses.replace(whole.scale, paper=dataclasses.replace(whole.scale.paper, figure=figure))
    part = dataclasses.replace(whole, scale=scale, whole=False)
    record = ledger.record_of(part)
    report.write(part, record, tmp_path)
    assert "not drawn" not in caplog.text
    # Of a whole run it is a mistake, and said.
    report.write(dataclasses.replace(part, whole=True), record, tmp_path)
    assert "was not drawn: KeyError" in caplog.text


def test_names_of_claims_may_have_commas() -> None:
    one = Claim("a, b", "Something.", metric("x")["y"] >= 0)
    paper = dataclasses.replace(load_paper(TOY), claims=(one, dataclasses.replace(one, name="a")))
    assert claim_names("a, b,a", paper) == ["a, b", "a"]
    assert claim_names("a,a, b", paper) == ["a", "a, b"]
    assert claim_names("a, c", paper) == ["a", "c"]


# The protocol.


def test_layers_of_settings() -> None:
    assert merged({"model": "mlp", "local": {"lr": 1, "epochs": 2}}, {"local": {"lr": 3}, "seed": 1}) == {
        "model": "mlp", "local": {"lr": 3, "epochs": 2}, "seed": 1}  # fmt: skip
    assert merged({"model": "mlp"}, {"model": {"hidden": [3]}})["model"] == {"name": "mlp", "hidden": [3]}
    assert merged({"strategy": {"name": "a", "x": 1}}, {"strategy": {"name": "b"}})["strategy"] == {
        "name": "b"
    }


def test_a_scale_overrides_its_arms_and_the_command_line_everything() -> None:
    paper = load_paper(TOY)
    quick = load_scale(paper, "quick", {"local": {"batch_size": 10}})
    assert [a.settings["federation"]["rounds"] for a in quick.arms.values()] == [2, 2, 1]
    assert [a.settings["local"]["lr"] for a in quick.arms.values()] == [0.001, 0.1, 0.1]
    assert all(a.settings["local"] == {**a.settings["local"], "batch_size": 10, "persist": True}
               for a in quick.arms.values())  # fmt: skip
    assert quick.arms["longer"].references() == {"fast"}
    assert quick.arms["slow"].settings["model"] == "toy_paper:one_layer"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("lr: 0.1}", "lrr: 0.1}"), "arm 'fast': Unknown key in local 'lrr'. Did you mean 'lr'"),
        (("lr: 0.1}", "lr: -1}"), "arm 'fast': local.lr is -1"),
        (("scales:", "scale:"), "Unknown key of toy.yaml 'scale'"),
        (('"long*"', '"lung*"'), r"no arm is called \['lung\*'\]"),
        (("about: baseline", "scales: [quick, tiny]"), "arm 'slow': Unknown scale 'tiny'"),
        (("full:", "huge:"), "Unknown scale of toy.yaml 'huge'"),
        (("model:fast", "model:fust"), "starts from the model of 'toy/fust', which does not exist"),
        (("model:fast", "model:longer"), "needs its own model"),
    ],
)
def test_a_wrong_protocol_is_explained(change: tuple[str, str], sentence: str, tmp_path: Path) -> None:
    text = (Path(toy_paper.__file__).parent / "toy_paper.yaml").read_text()
    (tmp_path / "toy.yaml").write_text(text.replace(*change, 1))
    paper = dataclasses.replace(load_paper(TOY), protocol=tmp_path / "toy.yaml")
    with pytest.raises(ConfigError, match=sentence):
        plan(scale := load_scale(paper, "quick"), scale.arms, (0,), tmp_path, {})


def test_an_arm_may_be_of_some_scales_only(tmp_path: Path) -> None:
    text = (Path(toy_paper.__file__).parent / "toy_paper.yaml").read_text()
    (tmp_path / "toy.yaml").write_text(text.replace("arms:", "arms:\n  extra: {scales: [smoke, full]}", 1))
    paper = dataclasses.replace(load_paper(TOY), protocol=tmp_path / "toy.yaml")
    object.__setattr__(paper, "address", TOY)
    assert ["extra" in load_scale(paper, scale).arms for scale in ("smoke", "quick", "full")] == [
        True,
        False,
        True,
    ]


def test_twins_pictures_and_claims_of_a_package_decide_no_result() -> None:
    paper = load_paper("dr-tune")
    here = "flowerbed.experiments.papers.dr_tune"
    assert paper.module == here
    assert paper.sources() == [here, f"{here}.probes", *paper.uses]
    protocol = load_scale(paper, "smoke").arms["fine-tune"].settings
    assert protocol["strategy"]["name"] == f"{here}:DrTune"
    assert protocol["evaluation"]["measures"] == [f"{here}.probes:validated"]


def test_a_paper_is_found_again_where_it_was_found() -> None:
    """Its measure is called in other processes, and a module may hold several papers."""
    address = f"{toy_paper.__name__}:ANALYSED"
    assert load_paper(load_paper(address).address) is toy_paper.ANALYSED


# Hashes and records.


def test_only_code_counts() -> None:
    source = 'def f(x):\n    """Say."""\n    return "# no comment"  # a comment\n\n\nPAPER = f(\n    1,\n)\nX = 1\n'
    assert digests.code_of(source) == 'def f(x):\n    return "# no comment"\nX = 1'


def test_where_a_run_is_computed_does_not_count() -> None:
    one = {
        "local": {"lr": 1},
        "grid": {"name": "ray"},
        "data": {"dir": "/a", "imbalance": 2},
        "run": {"keep": 3},
    }
    assert digests.deciding(one) == {"local": {"lr": 1}, "data": {"imbalance": 2}}
    assert digests.deciding({"data": {"dir": "/a"}}) == {}


def test_record_standing_and_seal(
    made: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = made
    record = ledger.record_of(result)
    path = ledger.write(record, tmp_path)
    monkeypatch.setattr(ledger, "load_paper", lambda slug: load_paper(TOY))

    def standing() -> ledger.Standing:
        return ledger.standing("toy", True, tmp_path)

    assert standing().status == ledger.RECORDED
    assert (standing().passed, standing().failed) == (1, 1)
    values = record["arms"]["fast"]["figures"]["accuracy"]["values"]
    assert values == [result.outcomes["fast", s].values["accuracy"] for s in (0, 1)]
    assert {"cores", "processor"} <= record["hardware"].keys()
    assert record["versions"]["torch"] == torch.__version__

    edited = json.loads(path.read_text())
    edited["quick"]["claims"][1]["verdict"] = REPRODUCED
    path.write_text(json.dumps(edited))
    assert standing().status == ledger.EDITED

    for kind, other in (
        ("config", {"local": {"lr": 0.01}}),
        ("module", None),
        ("claims", None),
    ):
        ledger.write(record, tmp_path)
        with monkeypatch.context() as patched:
            if other:
                patched.setattr(ledger, "load_scale", lambda p, s, o=other: load_scale(p, s, o))
            else:
                patched.setattr(digests, kind, lambda paper: "another")
            assert (standing().status, standing().reason) == (ledger.STALE, f"{kind} changed")
    assert standing().status == ledger.RECORDED
    assert ledger.standing("other", True, tmp_path).status == ledger.NOT_RUN


def test_a_part_of_a_reproduction_is_no_record(made: tuple[Any, Path], tmp_path: Path) -> None:
    result, _ = made
    part = ledger.record_of(dataclasses.replace(result, whole=False))
    with pytest.raises(ConfigError, match="Only a whole reproduction"):
        ledger.write(part, tmp_path)


# The commands.


def test_the_command_writes_record_report_and_pictures(
    made: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = made
    asked = ["reproduce", TOY, "--out", str(out), "--ledger", str(tmp_path), "--jobs", "1"]
    assert cli.main(asked) == 0
    shown = capsys.readouterr().out
    assert "1 reproduced, 1 direction only" in shown
    folder = out / "toy" / "quick"
    assert {p.name for p in folder.iterdir()} == {
        "runs",
        "record.json",
        "report.md",
        "arms.png",
        "curves.png",
    }
    assert "| Going on helps, a lot. | direction only |" in (folder / "report.md").read_text()
    assert json.loads((tmp_path / "toy.json").read_text())["quick"] == json.loads(
        (folder / "record.json").read_text()
    )


def test_changed_settings_go_into_no_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "reproduce",
        TOY,
        "local.lr=0.05",
        "--out",
        str(tmp_path / "out"),
        "--ledger",
        str(tmp_path / "ledger"),
    ]
    assert cli.main([*asked, "--jobs", "1", "--seeds", "0", "--claims", "faster", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert not record["whole"]
    assert record["arms"]["slow"]["settings"]["local"]["lr"] == 0.05
    assert record["claims"][0]["verdict"] == "not evaluated"
    assert not (tmp_path / "ledger").exists()


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (["reproduce"], "Name one paper, or use --all"),
        (["reproduce", "--all", "ps-kd"], "--all runs every paper as it stands"),
        (["reproduce", "ps-kd", "seed=3"], "give --seeds or --out"),
        (["reproduce", "ps-kd", "--seeds", "0,1,0"], "each is evidence once"),
        (["reproduce", "ps-kd", "--seeds", "zero"], "--seeds: 'zero' is no list of whole numbers"),
        (["reproduce", "ps-kd", "locall.lr=3"], "Unknown setting 'locall'"),
        (["papers", "nothing-like-it"], "Unknown paper"),
    ],
)
def test_commands_refuse_clearly(asked: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(asked) == 2
    assert sentence in capsys.readouterr().err


def test_papers_shows_every_method(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert len(catalogue()) == 79
    assert cli.main(["papers", "--json", "--ledger", str(tmp_path)]) == 0
    rows = {row["slug"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == catalogue().keys()
    assert rows["ps-kd"]["status"] == "not run"
    assert {slug for slug, row in rows.items() if row["status"] == "no module"} == rows.keys() - set(built())
    assert cli.main(["papers", "*-mp", "--ledger", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "global-mp" in shown
    assert "not run" in shown
    assert "ps-kd" not in shown


@pytest.mark.parametrize("path", sorted(ledger.LEDGER.glob("*.json")), ids=lambda path: path.stem)
def test_verdicts_are_read_back_from_a_record_as_they_were(path: Path) -> None:
    for record in ledger.read(path).values():
        for claim in record["claims"]:
            verdict = ledger.verdict_of(claim)
            assert json.loads(json.dumps(dataclasses.asdict(verdict) | {"clear": verdict.clear})) == claim
