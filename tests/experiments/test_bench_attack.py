"""The benchmark of inversions: one and the same work for both sides, a rival through its interface, bars by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from flowerbed.datasets.sources import load_dataset
from flowerbed.errors import ConfigError
from flowerbed.experiments.benchmarks import attack, report
from flowerbed.experiments.benchmarks.competitors import inversion_side
from flowerbed.models.base import ModelSpec

STUB = """
import json, torch
from types import SimpleNamespace
asked = []
def get_attack_config(name, overrides):
    asked.extend([name, *overrides])
    return "settings"
class Attacker:
    def reconstruct(self, payload, shared, secrets, dryrun):
        (told,) = shared
        assert len(told["gradients"]) == len(payload[0]["parameters"])
        assert all(g.shape == p.shape for g, p in zip(told["gradients"], payload[0]["parameters"]))
        return {"data": torch.full((1, *payload[0]["metadata"].shape), float(told["metadata"]["labels"]))}, {}
attacks = SimpleNamespace(prepare_attack=lambda model, loss, settings, setup: Attacker())
"""
ASKED = ["--dataset", "digits", "--victims", "3", "--restarts", "2", "--iterations", "4", "--tv", "0.02"]


def test_both_sides_get_the_same_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rival = tmp_path / "checkout"
    (rival / "breaching").mkdir(parents=True)
    (rival / "breaching" / "__init__.py").write_text(STUB)
    (rival / "torchvision.py").write_text("")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("breaching", "torchvision"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    asked = attack.parse([*ASKED, "--breaching", str(rival)])
    true, scale = attack.prepare(asked, load_dataset("digits"), tmp_path)
    assert true.shape == (3, 1, 8, 8)
    work, tensors = json.loads((tmp_path / "work.json").read_text()), load_file(tmp_path / "work.safetensors")
    model = ModelSpec("dlg_lenet", (1, 8, 8), 10).build(0).eval()
    loss = F.cross_entropy(model(scale.values(true[1:2])), tensors["labels"][1:2])
    (expected,) = torch.autograd.grad(loss, [model.head.weight])  # type: ignore[union-attr]
    torch.testing.assert_close(tensors["gradient/head.weight"][1], expected, rtol=1e-4, atol=1e-6)

    run, count = inversion_side.flowerbed(work, tensors)
    found = run()
    assert [x.shape for x in found] == [(1, 1, 8, 8)] * 3
    assert count() == 3 * 2 * (4 + 1)

    run, count = inversion_side.breaching(work, tensors)
    assert [float(x.mean()) for x in run()] == tensors["labels"].tolist()
    assert count() == 3 * 2 * (4 + 1)
    import breaching  # type: ignore[import-not-found]

    assert breaching.asked == [
        "invertinggradients",
        "optim.max_iterations=4",
        "optim.callback=4",
        "restarts.num_trials=2",
        "regularization.total_variation.scale=0.02",
    ]
    monkeypatch.delitem(sys.modules, "breaching")
    monkeypatch.delitem(sys.modules, "torchvision")


def test_bars_are_a_third_of_the_time_at_no_worse_images() -> None:
    ours = {"cpu_per_image": 1.0, "psnr": 20.0}
    for rival, expected in (
        ({"cpu_per_image": 4.0, "psnr": 19.0}, [report.MET, report.MET]),
        ({"cpu_per_image": 2.0, "psnr": 21.0}, [report.MISSED, report.MISSED]),
        (None, [report.UNKNOWN, report.UNKNOWN]),
    ):
        found = {attack.OURS: ours} | ({} if rival is None else {attack.RIVAL: rival})
        items = attack.items(found, 14.0)
        document = {i.key: report.item_section(i, {"date": "", "commit": "", "load": 0.0}) for i in items}
        assert [v.verdict for v in report.verdicts(document, ())] == expected


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--breaching", "nowhere"], "there is no folder 'breaching' in it"),
        (["--victims", "0"], "--victims is 0"),
    ],
)
def test_what_cannot_be_measured_is_said_first(more: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        attack.parse([*ASKED, *more])


def test_a_set_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no images"):
        attack.prepare(attack.parse(ASKED), load_dataset("attack_nets:tiny_text"), tmp_path)
