"""The README's rehearsal of a deployment, as it stands there, with a device that is killed and one that is unknown."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import Meanwhile, assert_same, wait_until
from safetensors.torch import load_file

from flowerbed.experiments.deploy import certificates
from flowerbed.experiments.deploy.node import free_port
from flowerbed.experiments.simulation import simulate

README = Path(__file__).resolve().parents[2] / "README.md"
PORT = "127.0.0.1:9092"


class Script:
    """Runs the lines of a shell script one by one, those that end with & in the background."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "bin").mkdir()
        command = folder / "bin" / "flowerbed"
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m flowerbed.experiments.cli "$@"\n')
        command.chmod(0o755)
        self._environment = {**os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        self.background: dict[str, subprocess.Popen[bytes]] = {}

    def line(self, text: str) -> str:
        """Run one line; return what it printed."""
        if text.endswith("&"):
            words = text.removesuffix("&").split()
            with open(self._folder / f"{len(self.background)}.log", "wb") as log:
                started = subprocess.Popen(
                    words, cwd=self._folder, env=self._environment, stdout=log, stderr=subprocess.STDOUT
                )
            self.background[words[-1]] = started
            return ""
        done = self.run(text)
        assert done.returncode == 0, f"{text}: {done.stdout}{done.stderr}"
        return done.stdout

    def run(self, text: str) -> subprocess.CompletedProcess[str]:
        """Run one line in the foreground."""
        return subprocess.run(
            text.split(), cwd=self._folder, env=self._environment, capture_output=True, text=True, check=False
        )

    def stop(self) -> None:
        for process in self.background.values():
            process.terminate()
        for process in self.background.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    made = Script(tmp_path)
    yield made
    made.stop()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_rehearsal_of_the_readme(script: Script, tmp_path: Path) -> None:
    (block,) = re.findall(r"```\n(flowerbed deploy init.*?)```", README.read_text(), re.DOTALL)
    assert PORT in block
    lines = block.replace(PORT, f"127.0.0.1:{free_port()}").strip().splitlines()
    metrics = tmp_path / "fed" / "runs" / "first" / "metrics.jsonl"

    def power_cut() -> None:
        """Kill a device after the first round of training, and start it again."""
        wait_until(
            lambda: metrics.exists() and '"phase": "train"' in metrics.read_text(), "the first round", 900
        )
        node = script.background["fed/nodes/ward-b"]
        os.kill(node.pid, signal.SIGKILL)
        node.wait()
        script.line("flowerbed deploy node fed/nodes/ward-b &")

    for text in lines:
        cut = Meanwhile(power_cut) if text.startswith("flowerbed deploy run") else None
        said = script.line(text)
        if cut is not None:
            cut.done()
            assert "completed: 2 rounds, 0 failures" in said, said
    assert re.search(r"run first: finished:completed, round 2 of 2", said), said
    assert len(re.findall(r"ward-\w +\d +online", said)) == 3, said

    settings = {"strategy": "fedloge", "federation": {"rounds": 2, "clients": 3}}
    assert_same(load_file(metrics.with_name("model.safetensors")), simulate(**settings).model)

    stranger = tmp_path / "fed" / "nodes" / "stranger"
    kept = shutil.ignore_patterns("store", "flower")
    shutil.copytree(tmp_path / "fed" / "nodes" / "ward-a", stranger, ignore=kept)
    certificates.make_node_key(stranger / "node.key")
    refused = script.run("flowerbed deploy node fed/nodes/stranger")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "does not know this device's key" in refused.stderr
    (stranger / "node.key").chmod(0o644)
    refused = script.run("flowerbed deploy node fed/nodes/stranger")
    assert (refused.returncode, "chmod 600" in refused.stderr) == (2, True)
