"""Scores against slow twins and hand-worked cases, and the command from run to gallery."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from flowerbed.datasets.augment import Scale
from flowerbed.errors import ConfigError
from flowerbed.experiments import cli
from flowerbed.experiments.leakage import attacking, command, scoring
from flowerbed.experiments.leakage.scoring import Pool
from flowerbed.experiments.leakage.truth import Truth, truth_of
from flowerbed.experiments.parts import build_parts
from flowerbed.experiments.run_directory import load_simulation
from flowerbed.strategies.attacks.observation import Observation, Reconstruction
from flowerbed.strategies.attacks.observer import name_of, stems

PIXELS = Scale()


def pixels(count: int, side: int = 13, channels: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


def test_psnr_by_hand() -> None:
    a = torch.zeros(2, 1, 4, 4)
    b = torch.stack([torch.full((1, 4, 4), 0.1), torch.zeros(1, 4, 4)])
    assert scoring.psnr(a, b).tolist() == pytest.approx([20.0, scoring.MOST_PSNR])


def slow_ssim(a: Tensor, b: Tensor) -> float:
    """Wang et al. 2004, window by window."""
    size, total, count = 11, 0.0, 0
    raw = [
        [math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(size)] for i in range(size)
    ]
    scale = sum(map(sum, raw))
    for channel in range(a.shape[0]):
        for top in range(a.shape[1] - size + 1):
            for left in range(a.shape[2] - size + 1):
                sums = [0.0] * 5
                for i in range(size):
                    for j in range(size):
                        w = raw[i][j] / scale
                        x, y = float(a[channel, top + i, left + j]), float(b[channel, top + i, left + j])
                        for k, value in enumerate((x, y, x * x, y * y, x * y)):
                            sums[k] += w * value
                mx, my, xx, yy, xy = sums
                c1, c2 = 0.0001, 0.0009
                value = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
                value /= (mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2)
                total, count = total + value, count + 1
    return total / count


def test_ssim_against_a_slow_twin() -> None:
    a = pixels(2)
    b = (a + 0.2 * pixels(2, seed=1)).clamp(0, 1)
    expected = [slow_ssim(a[i], b[i]) for i in range(2)]
    assert scoring.ssim(a, b).tolist() == pytest.approx(expected, abs=1e-9)
    assert scoring.ssim(a, a).tolist() == pytest.approx([1.0, 1.0])
    assert scoring.ssim(pixels(1, side=8), pixels(1, side=8)).tolist() == pytest.approx([1.0])


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(5)))
def test_reconstructions_are_matched_one_to_one(order: list[int]) -> None:
    true = pixels(5)
    found = true[order] + 0.01
    assert [order[j] for j in scoring.matched(found, true)] == list(range(5))


def test_repeated_reconstructions_flatter_nobody() -> None:
    """The first image twice, for two true ones: only one of them may have it."""
    true = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    assert sorted(scoring.matched(torch.zeros(2, 1, 4, 4), true)) == [0, 1]


def test_label_accuracy_by_hand() -> None:
    assert scoring.label_accuracy(torch.tensor([1, 1, 2, 5]), torch.tensor([1, 2, 2, 3])) == 0.5
    assert scoring.label_accuracy(torch.tensor([2, 1]), torch.tensor([1, 2])) == 1


def test_a_score_knows_whose_image_it_is() -> None:
    pool = Pool(pixels(6, channels=1), torch.tensor([0, 0, 0, 1, 1, 1]), torch.arange(6))
    truth = Truth(pool.x[[1, 4]], torch.tensor([0, 1]), torch.tensor([1, 4]))
    # The first comes back nearly whole, in place of the second another of its class.
    found = Reconstruction(torch.stack([pool.x[5], pool.x[1] + 0.01]), torch.tensor([1, 0]), 0.0)
    marks = scoring.score(found, truth, PIXELS, pool)
    assert marks.order == (1, 0)
    assert [image["top-1"] for image in marks.images] == [1.0, 0.0]
    assert [image["top-10"] for image in marks.images] == [1.0, 1.0]
    assert marks.labels == 1
    assert marks.mean("psnr") == pytest.approx(sum(image["psnr"] for image in marks.images) / 2)


def test_null_models_by_hand() -> None:
    x = torch.stack([torch.full((1, 2, 2), v) for v in (0.0, 0.2, 0.6)])
    pool = Pool(x, torch.zeros(3, dtype=torch.int64), torch.arange(3))
    found = scoring.nulls(Truth(x[:1], torch.tensor([0]), torch.tensor([0])), PIXELS, pool, 0)
    # The others are 0.2 and 0.6: mean 0.4, nearest 0.2; a flat image is its own mean colour.
    assert found["class mean"] == pytest.approx([-20 * math.log10(0.4)])
    assert found["nearest image"] == pytest.approx([-20 * math.log10(0.2)])
    assert found["mean colour"] == [scoring.MOST_PSNR]
    assert found["random image"][0] in (pytest.approx(13.9794, abs=1e-3), pytest.approx(4.437, abs=1e-3))


def test_a_summary_has_its_mean_inside_and_its_worst_case() -> None:
    found = scoring.summarised([1.0, 2.0, 6.0], 0)
    assert found.low <= found.mean == 3 <= found.high
    assert found.worst == 6
    assert scoring.summarised([1.0, 2.0], 0, larger_leaks=False).worst == 1
    assert math.isnan(scoring.summarised([1.0, math.nan], 0).mean)


# From a run to a gallery.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("watched") / "run"
    asked = [
        "simulate",
        "model=dlg_lenet",
        "federation.clients=8",
        "federation.rounds=2",
        "local.steps=1",
        "local.batch_size=2",
        "evaluation.every=0",
        "observe.rounds=[1,2]",
        "observe.clients=[0,3]",
        f"run.dir={directory}",
        "run.figures=false",
    ]
    assert cli.main(asked) == 0
    return directory


def test_truth_is_what_the_client_trained_on(run: Path) -> None:
    simulation = load_simulation(run)
    parts = build_parts(simulation)
    first, second = (truth_of(parts, 3, round_) for round_ in (1, 2))
    assert len(first.y) == len(second.y) == 2
    assert not set(first.index.tolist()) & set(second.index.tolist())
    assert set(first.index.tolist()) <= set(parts.train.indices(3).tolist())
    with pytest.raises(ConfigError, match="8 clients, and none is number 8"):
        truth_of(parts, 8, 1)


def test_the_command_writes_what_it_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    asked = ["attack", str(run), "attack.steps=30", "attack.tv=0", "--rounds", "1", "--json"]
    assert cli.main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(v["client"], v["round"]) for v in found["victims"]] == [(0, 1), (3, 1)]
    assert found["options"] == {"steps": 30, "tv": 0}
    assert {"psnr", "ssim", "labels", "null: class mean"} <= found["summary"].keys()
    assert found["victims"][0]["evaluations"] == 31
    folder = run / "attacks" / "ig"
    assert {p.name for p in folder.iterdir()} == {
        "attack.json",
        "attack.md",
        "pairs.safetensors",
        "gallery.png",
        "reconstructions.safetensors",
    }
    assert "| null: class mean |" in (folder / "attack.md").read_text()
    # The images that are kept for the gallery stand beside what belongs to them: they give the figures again.
    pairs = load_file(folder / "pairs.safetensors")
    for victim in found["victims"]:
        end = f"round-1-client-{victim['client']}"
        gap = (pairs[f"original-{end}"].double() - pairs[f"found-{end}"].double()) / 255
        again = -10 * gap.square().flatten(1).mean(1).log10()
        assert again.tolist() == pytest.approx([image["psnr"] for image in victim["images"]], abs=0.1)


def test_poisoned_truth_changes_no_reconstruction(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = attacking.attack_run(run, "ig", {"steps": 5}, rounds=[1])

    def poisoned(parts: object, client: int, round_: int) -> Truth:
        return Truth(torch.zeros(2, 1, 8, 8), torch.tensor([9, 9]), torch.tensor([0, 1]))

    monkeypatch.setattr(attacking, "truth_of", poisoned)
    again = attacking.attack_run(run, "ig", {"steps": 5}, rounds=[1])
    for a, b in zip(honest.victims, again.victims, strict=True):
        assert torch.equal(a.found.x, b.found.x)
        assert torch.equal(a.found.labels, b.found.labels)
        assert a.score.images != b.score.images


def test_granted_labels_reach_the_attack(run: Path) -> None:
    found = attacking.attack_run(run, "ig", {"steps": 1}, grant=["labels", "surrogate"])
    assert len(found.victims) == 4
    assert all(torch.equal(v.found.labels, v.truth.y) for v in found.victims)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["attack=gifd"], "give attack.prior=FILE"),
        (["attack=gifd", "attack.prior=nowhere"], "attack.prior=nowhere cannot be read"),
        (["attack=ig2"], "Unknown attack 'ig2'"),
        (["attack.stepz=3"], "Unknown option of attack 'ig' 'stepz'"),
        (["model=mlp"], "is no setting of an attack"),
        (["--clients", "7"], "holds no observation of these clients"),
        (["--grant", "everything"], "Unknown grant 'everything'"),
        (["--normalisation", "both"], "normalisation is 'both'"),
    ],
)
def test_the_command_refuses_clearly(
    run: Path, more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["attack", str(run), *more]) == 2
    assert sentence in capsys.readouterr().err


def test_observing_needs_a_directory(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="observe.clients needs observe.rounds"):
        attacking.run_directory.Simulation.of({"observe": {"clients": [1]}})
    with pytest.raises(ConfigError, match=r"give run\.dir"):
        build_parts(attacking.run_directory.Simulation.of({"observe": {"rounds": [1]}}))


def test_a_run_is_attacked_once_it_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["simulate", "model=dlg_lenet", "federation.clients=2", "federation.rounds=1", "local.steps=1"]
    asked += ["local.batch_size=1", "evaluation.every=0", "run.figures=false", f"run.dir={tmp_path / 'run'}"]
    assert cli.main([*asked, "attack=ig", "attack.steps=2"]) == 0
    assert "null: class mean" in capsys.readouterr().out
    assert (tmp_path / "run" / "attacks" / "ig" / "gallery.png").exists()
    assert cli.main([*asked, "attack=ig", "attack.stepz=2"]) == 2
    assert "Unknown option of attack" in capsys.readouterr().err
    assert cli.main(["simulate", "-m", *asked[1:], "attack=ig"]) == 2
    assert "matrix=FILE.yaml" in capsys.readouterr().err


def test_options_reach_every_stage_and_prior() -> None:
    attack = attacking.composed("modern", {"tv": 0.5, "steps": 7, "restarts": 3, "objective": "l2"})
    assert (attack.priors[0].weight, attack.priors[0].p) == (0.5, 2.0)  # type: ignore[attr-defined]
    assert (attack.descents[0].steps, attack.restarts, attack.objective) == (7, 3, "l2")
    assert command.read(["attack=dlg"]) == ("dlg", {})
    assert command.read([])[1] == {"steps": command.STEPS}


def test_observations_are_found_in_order(run: Path) -> None:
    found = [Observation.load(stem) for stem in stems(run / "observations")]
    assert [(o.round, o.client) for o in found] == [(1, 0), (1, 3), (2, 0), (2, 3)]
    assert name_of(2, 3) == "round-00002-client-000003"
