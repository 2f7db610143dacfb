"""Completion: what is collected is what there is, what is answered fits the line, and no answer imports torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flowerbed.experiments import cli, completion
from flowerbed.experiments.config import Simulation
from flowerbed.experiments.options import registry

pytest.importorskip("argcomplete")

FOUND: dict[str, Any] = {
    "commands": {
        "simulate": {
            "help": "run a federation",
            "arguments": [
                {"options": ["--multirun", "-m"], "dest": "multirun", "nargs": 0, "choices": None, "flag": True,
                 "help": "a sweep", "of": []},
                {"options": [], "dest": "overrides", "nargs": "*", "choices": None, "flag": False, "help": "",
                 "of": ["settings"]},
            ],
        },
        "reproduce": {
            "help": "run a paper",
            "arguments": [
                {"options": ["--scale"], "dest": "scale", "nargs": None, "choices": ["full", "quick"], "flag": False,
                 "help": "how large", "of": []},
                {"options": [], "dest": "words", "nargs": "*", "choices": None, "flag": False, "help": "",
                 "of": ["settings", "papers"]},
            ],
        },
        "show": {
            "help": "show",
            "arguments": [
                {"options": [], "dest": "directory", "nargs": None, "choices": None, "flag": False, "help": "",
                 "of": ["folders"]}
            ],
        },
        "bench": {"help": "bench", "benchmarks": {"speed": {"arguments": []}, "scale": {"arguments": []}}},
    },
    "groups": {"strategy": ["fedavg", "fedprox", "flower:FedAdam"], "model": ["auto", "mlp"],
               "grid": ["inprocess", "ray"]},
    "options": {
        "": {"seed": ["0"], "federation.rounds": ["10"], "federation.clients": ["10"],
             "run.overwrite": ["true", "false"]},
        "strategy=fedavg": {"server_lr": ["1.0"]},
        "strategy=fedprox": {"server_lr": ["1.0"], "mu": ["0.01"]},
        "model=mlp": {"hidden": ["[200]"]},
    },
    "defaults": {"strategy": "fedavg", "model": "auto"},
    "papers": ["ps-kd", "stn"],
}  # fmt: skip


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a shell in which everything has been collected."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    completion.keep(FOUND)
    folder = tmp_path / "bin"
    folder.mkdir()
    command = folder / "flowerbed"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m flowerbed.experiments.cli "$@"\n')
    command.chmod(0o755)
    source = str(Path(cli.__file__).parents[2])
    return {**os.environ, "PYTHONPATH": source, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def answers(line: str, shell: dict[str, str], folder: Path) -> list[str]:
    """Return what the command answers to a shell that asks by argcomplete's protocol."""
    out = folder / "answer"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SUPPRESS_SPACE": "1", "COMP_LINE": line,
             "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(out)}  # fmt: skip
    command = [sys.executable, "-X", "importtime", "-m", "flowerbed.experiments.cli"]
    done = subprocess.run(
        command, env={**shell, **asked}, cwd=folder, capture_output=True, text=True, check=False
    )
    imported = {text.rpartition("|")[2].strip() for text in done.stderr.splitlines() if "import time" in text}
    assert "argcomplete" in imported
    assert not imported & {"torch", "numpy", "flwr", "hydra", "yaml", "rich"}
    return out.read_text().split("\n") if out.exists() and out.read_text() else []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flowerbed ", ["simulate", "reproduce", "show", "bench"]),
        ("flowerbed sh", ["show"]),
        ("flowerbed simulate --m", ["--multirun"]),
        ("flowerbed simulate f", ["federation."]),
        ("flowerbed simulate federation.r", ["federation.rounds="]),
        ("flowerbed simulate strategy=fedp", ["strategy=fedprox"]),
        ("flowerbed simulate -m strategy=fedavg,fedp", ["strategy=fedavg,fedprox"]),
        ("flowerbed simulate strategy=flower:", ["strategy=flower:FedAdam"]),
        # The options of what was chosen; else those of the default.
        ("flowerbed simulate strategy=fedprox strategy.m", ["strategy.mu="]),
        ("flowerbed simulate strategy.m", []),
        ("flowerbed simulate strategy.s", ["strategy.server_lr="]),
        ("flowerbed simulate model=mlp model.hidden=", [r"model.hidden=\[200\]"]),
        ("flowerbed simulate run.overwrite=t", ["run.overwrite=true"]),
        ("flowerbed reproduce ps", ["ps-kd"]),
        ("flowerbed reproduce --scale q", ["quick"]),
        ("flowerbed reproduce --scale quick ps-kd grid=r", ["grid=ray"]),
        ("flowerbed bench s", ["speed", "scale"]),
        ("flowerbed show ru", ["runs/"]),
        ("flowerbed nonsense x", []),
    ],
)
def test_answers(line: str, expected: list[str], shell: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "rubbish.txt").touch()
    # "\\013" and a blank are how argcomplete marks an answer that is whole.
    assert sorted(text.strip() for text in answers(line, shell, tmp_path)) == sorted(expected)


def test_before_anything_is_collected_there_are_the_commands(
    shell: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = completion.place()
    found.unlink()
    # As if another process were at it: this test starts none.
    found.with_suffix(".lock").touch()
    assert "simulate" in [text.strip() for text in answers("flowerbed sim", shell, tmp_path)]
    started: list[Any] = []
    monkeypatch.setattr(completion.subprocess, "Popen", lambda *a, **k: started.append(a))
    completion.collect_in_background()
    assert started == []
    old = found.with_suffix(".lock").stat().st_mtime - 2 * completion.PATIENCE
    os.utime(found.with_suffix(".lock"), (old, old))
    completion.collect_in_background()
    completion.collect_in_background()
    assert len(started) == 1


def test_what_was_collected_of_another_state_is_not_used(
    shell: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert completion.kept() == FOUND
    monkeypatch.setattr(completion, "_stamps", lambda: iter((1, 2, 3)))
    assert completion.kept() is None
    completion.keep({"commands": {}})
    assert completion.kept() == {"commands": {}}
    assert len([*completion.place().parent.glob("completion-*.json")]) == 1


def test_what_is_collected_is_what_there_is() -> None:
    found = completion.collect()
    json.dumps(found)
    assert set(found["commands"]) == set(completion.helps(cli._parser()))
    assert set(found["commands"]["bench"]["benchmarks"]) == set(cli.BENCHMARKS)

    def options(name: str) -> set[str]:
        return {text for one in found["commands"][name]["arguments"] for text in one["options"]}

    # Of parsers in very different places: the command line's own, a command's, Hydra's.
    assert {"--claims", "--scale", "--seeds"} <= options("reproduce")
    assert {"--port", "--open"} <= options("watch")
    assert {"--multirun", "--cfg"} <= options("simulate")
    for name in ("simulate", "resume", "compare", "explain", "reproduce", "attack"):
        assert any("settings" in one["of"] for one in found["commands"][name]["arguments"]), name
    assert any("folders" in one["of"] for one in found["commands"]["show"]["arguments"])
    for kind in ("strategy", "dataset", "partition", "encoder", "model", "defence"):
        assert set(registry(kind).names()) <= set(found["groups"][kind])
    plain = Simulation().plain()
    keys = {
        f"{section}.{key}" for section, value in plain.items() if isinstance(value, dict) for key in value
    }
    keys -= {f"{section}.{key}" for section in found["defaults"] for key in plain[section]}
    assert keys - {"grid.name", "tracking.name"} <= set(found["options"][""])
    for text in found["options"][""]:
        section, _, key = text.partition(".")
        assert key in plain[section] if key else text == "seed"
    assert set(found["options"]["strategy=fedprox"]) >= {"mu", "server_lr"}
    assert "ps-kd" in found["papers"]


def test_only_known_shells(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["completion", "tcsh"])
    assert caught.value.code == 2
    assert "invalid choice: 'tcsh'" in capsys.readouterr().err


def script(name: str, folder: Path, shell: dict[str, str]) -> Path:
    made = subprocess.run(
        ["flowerbed", "completion", name], env=shell, capture_output=True, text=True, check=True
    )
    path = folder / f"flowerbed.{name}"
    path.write_text(made.stdout)
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes(shell: dict[str, str], tmp_path: Path) -> None:
    # For bash a word ends at "=" and ":", so that only what follows is put in.
    code = f"""
        source {script("bash", tmp_path, shell)}
        complete -p flowerbed
        for words in strategy=fedp strategy=flower:F fed; do
            line="flowerbed simulate $words"
            COMP_LINE=$line COMP_POINT=${{#line}} COMP_TYPE=9 COMPREPLY=()
            _python_argcomplete flowerbed "" "" 2>/dev/null
            printf '%s\\n' "${{COMPREPLY[*]}}"
        done
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", code], env=shell, capture_output=True, text=True, check=True
    )
    said = [text.strip() for text in done.stdout.splitlines()]
    assert said[0].endswith("-F _python_argcomplete flowerbed")
    assert said[1:] == ["fedprox", "FedAdam", "federation."]


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes(shell: dict[str, str], tmp_path: Path) -> None:
    code = f"source {script('fish', tmp_path, shell)}; complete -C 'flowerbed simulate strategy=fedp'"
    done = subprocess.run(
        ["fish", "--no-config", "-c", code], env=shell, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["strategy=fedprox"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_takes_the_script(shell: dict[str, str], tmp_path: Path) -> None:
    made = script("zsh", tmp_path, shell)
    code = f"autoload -U compinit && compinit -D -u && source {made} && print $_comps[flowerbed]"
    done = subprocess.run(["zsh", "-f", "-c", code], env=shell, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "_python_argcomplete"
