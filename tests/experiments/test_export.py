"""What ``flowerbed export`` writes is the model: read back by programs that do not know flowerbed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from flowerbed.datasets.sources import load_dataset
from flowerbed.errors import ConfigError, RunError
from flowerbed.experiments import cli, export
from flowerbed.models.zoo import build_model

# The two lines that README and card show.
TWO_LINES = 'from safetensors.torch import load_file\nstate = load_file("model.safetensors")\n'


def simulated(directory: Path, *settings: str) -> Path:
    """Return the directory of a finished run."""
    assert cli.main(["simulate", *settings, f"run.dir={directory}", "--json"]) == 0
    return directory


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run that leaves 6 of 20 units."""
    return simulated(
        tmp_path_factory.mktemp("export") / "sparse",
        "strategy=flowerbed.experiments.papers.wgsef:Wgsef",
        "strategy.k=0.3",
        "federation.clients=2",
        "federation.rounds=2",
        "model=mlp",
        "model.hidden=[20]",
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run whose model is not the initial one."""
    return simulated(
        tmp_path_factory.mktemp("export") / "run",
        "federation.clients=4",
        "federation.rounds=2",
        "model=resnet8",
        "model.norm=bn",
        "local.steps=3",
    )


def reference(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the raw test images and the logits that the trained model has for them, without ``export``."""
    data = load_dataset("digits")
    model = build_model("resnet8", (1, 8, 8), 10, norm="bn")
    model.load_state_dict(load_file(run / "model.safetensors"))
    with torch.no_grad():
        return data.test.inputs, model.eval()(data.prepare(data.test.inputs))


def plain_python(code: str, folder: Path) -> str:
    """Run ``code`` in ``folder`` where flowerbed cannot be imported."""
    forbid = "import sys; sys.modules['flowerbed'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", forbid + code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_lines_of_plain_pytorch_load_a_run(run: Path, tmp_path: Path) -> None:
    values = load_file(run / "model.safetensors")
    code = TWO_LINES + (
        "import torch\n"
        "assert all(type(value) is torch.Tensor for value in state.values())\n"
        "print(sum(float(value.double().sum()) for value in state.values()), len(state))"
    )
    total, count = plain_python(code, run).split()
    assert float(total) == pytest.approx(sum(float(value.double().sum()) for value in values.values()))
    assert int(count) == len(values)


@pytest.mark.parametrize("name", ["pt2", "torchscript"])
def test_torch_formats_compute_what_the_model_does(run: Path, tmp_path: Path, name: str) -> None:
    made = export.export_run(run, ["safetensors", name], tmp_path / "out")
    assert [path.name for path in made.files] == [
        "model.safetensors", f"model.{export.FORMATS[name].suffix}", "config.json", "README.md",
    ]  # fmt: skip
    assert made.differences["safetensors"] < 1e-6
    samples, logits = reference(run)
    save_file({"samples": samples.clone(), "logits": logits}, tmp_path / "out" / "expected.safetensors")
    load = {
        "pt2": 'torch.export.load("model.pt2").module()',
        "torchscript": 'torch.jit.load("model.ts")',
    }[name]
    code = (
        f"import torch\nmodel = {load}\n"
        "from safetensors.torch import load_file\n"
        'expected = load_file("expected.safetensors")\n'
        "with torch.no_grad():\n"
        '    found = model(expected["samples"])\n'
        'print(float((found - expected["logits"]).abs().max()))'
    )
    assert float(plain_python(code, tmp_path / "out").splitlines()[-1]) < 1e-4


def test_onnx_computes_what_the_model_does(run: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed (extra export)")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra export)")
    export.export_run(run, ["onnx"], tmp_path)
    samples, logits = reference(run)
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(str(tmp_path / "model.onnx"))
    onnx.checker.check_model(model)
    # All in one file, for a batch of any size.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.onnx"]
    found = ReferenceEvaluator(model).run(None, {"samples": samples[:7].numpy()})[0]
    assert np.abs(found - logits[:7].numpy()).max() < 1e-4
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra export)")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: samples.numpy()})
    assert np.abs(found - logits.numpy()).max() < 1e-4


def test_a_file_that_is_not_the_model_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = export.FORMATS["pt2"].write

    def other(model: export.Prepared, samples: torch.Tensor, path: Path) -> export.Predict:
        read = honest(model, samples, path)
        return lambda x: read(x) + 0.01

    monkeypatch.setitem(export.FORMATS, "pt2", export.Format("pt2", other))
    with pytest.raises(RunError, match=r"differ by up to 0\.01"):
        export.export_run(run, ["pt2"], tmp_path)


def test_the_card_says_what_the_run_stored(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(run), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    card = (run / "export" / "README.md").read_text()
    assert str(run / "export" / "README.md") in printed["files"]
    summary = json.loads((run / "summary.json").read_text())
    assert (
        f"| accuracy | {summary['final']['accuracy']:.4g} | {summary['mean_of_last_5']['accuracy']:.4g} |"
        in card
    )
    for text in (
        summary["config_hash"],
        "Client failures: 0.",
        "## Licence",
        "| classes | 0, 1,",
        "fedavg: ",
        TWO_LINES,
    ):
        assert text in card
    # No licence is claimed, and no place of this machine.
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "pytorch", "tags": ["federated-learning", "flowerbed"]}
    assert str(run.parent) not in card
    settings = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["local"] == stored["local"]
    facts: dict[str, Any] = json.loads((run / "export" / "config.json").read_text())
    assert (facts["model"], facts["options"]["norm"], facts["input_shape"]) == ("resnet8", "bn", [1, 8, 8])
    assert facts["classes"] == list("0123456789")
    # With these facts the weights alone are enough.
    data = load_dataset("digits")
    samples = (data.test.inputs / facts["scale"] - facts["mean"][0]) / facts["std"][0]
    assert torch.allclose(samples, data.prepare(data.test.inputs), atol=1e-6)


def test_the_card_says_what_stays_at_the_clients(tmp_path: Path) -> None:
    settings = [
        "strategy=fedper",
        "model=mlp",
        "model.hidden=[8]",
        "federation.clients=2",
        "federation.rounds=1",
    ]
    assert (
        cli.main(["simulate", *settings, f"run.dir={tmp_path / 'run'}", "run.figures=false", "--json"]) == 0
    )
    export.export_run(tmp_path / "run")
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "untrained in these files: `head.bias`, `head.weight`." in card


def test_what_cannot_be_exported_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["export", str(run), "--format", "onxx"]) == 2
    assert "Did you mean 'onnx'?" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text((run / "config.yaml").read_text())
    assert cli.main(["export", str(unfinished)]) == 2
    assert "finish the run first" in capsys.readouterr().err
    save_file({"other": torch.zeros(2)}, unfinished / "model.safetensors")
    with pytest.raises(ConfigError, match="does not hold the model that the run describes"):
        export.export_run(unfinished)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"pip install 'flowerbed\[export\]'"):
        export.export_run(run, ["onnx"], tmp_path / "none")


def test_tokens_go_in_as_they_are(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 7, (12, 6))
    arrays = {"x_train": rows, "y_train": rows, "x_test": rows, "y_test": rows}
    np.savez(tmp_path / "text.npz", **arrays)
    settings = [
        "model=char_gru",
        "federation.clients=2",
        "federation.rounds=1",
        f"run.dir={tmp_path / 'run'}",
    ]
    assert cli.main(["simulate", f"dataset=npz:{tmp_path}/text.npz", *settings, "--json"]) == 0
    made = export.export_run(tmp_path / "run", ["pt2"])
    assert made.differences["pt2"] < 1e-4


@pytest.mark.parametrize("name", ["pt2", "torchscript"])
def test_compact_files_hold_what_is_not_zero(sparse: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("torch_pruning", reason="needs flowerbed[sparsity]")
    words = ["export", str(sparse), "--format", f"safetensors,{name}", "--out", str(tmp_path), "--compact"]
    assert cli.main(words) == 0
    shapes = {key: tuple(value.shape) for key, value in load_file(tmp_path / "model.safetensors").items()}
    assert sorted(shapes.values()) == [(6,), (6, 64), (10,), (10, 6)]
    whole = load_file(sparse / "model.safetensors")
    units = next(value for value in whole.values() if value.shape == (20, 64))
    alive = units.ne(0).any(1)
    assert torch.equal(
        load_file(tmp_path / "model.safetensors")["head.weight"], whole["head.weight"][:, alive]
    )
    facts = json.loads((tmp_path / "config.json").read_text())
    assert facts["parameters"] == 6 * 65 + 10 * 7
    card = (tmp_path / "README.md").read_text()
    assert f"{20 * 65 + 10 * 21:,} parameters" in card
    assert f"{facts['parameters']:,} parameters are left" in card


def test_where_nothing_is_zero_nothing_is_taken_out(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning", reason="needs flowerbed[sparsity]")
    settings = ("federation.clients=2", "federation.rounds=1", "model=small_cnn", "local.steps=1")
    directory = simulated(tmp_path / "run", *settings)
    # Nothing is zero, so nothing is taken out, and the files are those of the whole model.
    export.export_run(directory, out=tmp_path / "out", compact=True)
    whole, made = (
        load_file(directory / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert {name: value.shape for name, value in whole.items()} == {
        name: value.shape for name, value in made.items()
    }
    assert "taken out" not in (tmp_path / "out" / "README.md").read_text()
