"""Runs the code blocks of a Markdown page, in order and in one folder, as a reader would.

What a block is, its language says: ``python`` is executed, with the names of the blocks before it; where its first
line is a comment with nothing but a file name, it is saved as that file. ``bash`` is a command a line; ``flowerbed``
runs in this process. ``yaml`` must parse, and is saved like Python. Commands in a block without a language are not
run; like those that are marked so, their simulations are composed. Everything else is text.

Comments directly above a block say what cannot be seen in it::

    <!-- not run: REASON -->      skipped; its simulate commands are still composed, so their keys exist
    <!-- slow: REASON -->         left to the slow tests
    <!-- needs module NAME -->    skipped where it is not installed
    <!-- needs data NAME -->      skipped where FLOWERBED_DATA has no such folder
    <!-- fails -->                the command must exit with a code other than 0
    <!-- output -->               this text is what the last block printed: numbers and spacing aside, "..." is anything
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flowerbed.experiments import cli
from flowerbed.experiments.composition import compose_simulations

BLOCK = re.compile(r"((?:^<!-- .*? -->\n)*)^( *)```([\w{}-]*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# ([\w.-]+\.(?:py|yaml|toml))\n")
LANGUAGES = ("python", "bash", "yaml", "json", "toml", "text")


class PageError(AssertionError):
    """A block does not do what the page says."""


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    where: str
    """Page and line."""
    language: str
    text: str
    marks: tuple[str, ...] = ()
    """The comments above it."""

    def mark(self, name: str) -> str | None:
        """Return what a mark says; None without it."""
        found = [mark.removeprefix(name).lstrip(": ") for mark in self.marks if mark.startswith(name)]
        return found[0] if found else None

    def skipped(self) -> str | None:
        """Return why the block cannot be run here; None if it can."""
        if (reason := self.mark("not run")) is not None:
            return reason
        if self.language == "" and self.text.startswith("flowerbed "):
            return "commands in a block without a language"
        for mark in self.marks:
            module = mark.removeprefix("needs module ")
            if module != mark and not _installed(module):
                return f"{module} is not installed"
            data = mark.removeprefix("needs data ")
            if data != mark and not (Path(os.environ.get("FLOWERBED_DATA", "/nowhere")) / data).is_dir():
                return f"the data set {data} is not in FLOWERBED_DATA"
        return None


def blocks(path: Path, root: Path) -> list[Block]:
    """Return the blocks of a page in order; MyST's directives are none."""
    text = path.read_text()
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(3)) + 1
        marks = tuple(re.findall(r"<!-- (.*?) -->", match[1]))
        found.append(Block(f"{path.relative_to(root)}:{line}", match[3], match[4], marks))
    return [block for block in found if not block.language.startswith("{")]


class Reader:
    """Runs blocks one after another in the current folder."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "page"}
        self.printed = ""

    def read(self, block: Block) -> None:
        """Do what the block says; raises ``PageError`` naming its place if that does not work."""
        if block.mark("output") is not None:
            if not re.fullmatch(_pattern(block.text), _plain(self.printed)):
                raise PageError(f"{block.where} shows\n{block.text}\nbut printed was\n{self.printed}")
            return
        name = FILE_NAME.match(block.text)
        if block.language in ("python", "yaml", "toml") and name:
            Path(name[1]).write_text(block.text)
            if block.language == "python":
                compile(block.text, block.where, "exec")
        elif block.language == "python":
            with self._listening(block):
                exec(compile(block.text, block.where, "exec"), self.names)  # noqa: S102
        elif block.language == "yaml":
            yaml.safe_load(block.text)
        elif block.language == "bash":
            with self._listening(block):
                for command in commands(block.text):
                    _run(command, fails=block.mark("fails") is not None)

    def check(self, block: Block) -> None:
        """Do what can be done with a block that is not run: its simulations must be possible."""
        for command in commands(block.text) if block.language in ("bash", "") else ():
            words = shlex.split(command, comments=True)
            if words[:2] == ["flowerbed", "simulate"]:
                settings = [
                    w for w in words[2:] if not w.startswith(("-", "attack=", "attack.", "hydra", "+hydra"))
                ]
                compose_simulations(settings, sweep="-m" in words)

    @contextlib.contextmanager
    def _listening(self, block: Block) -> Iterator[None]:
        heard = io.StringIO()
        try:
            with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
                yield
        except PageError as error:
            raise PageError(f"{block.where}: {error}\n{heard.getvalue()}") from error
        except Exception as error:
            raise PageError(f"{block.where}: {type(error).__name__}: {error}\n{heard.getvalue()}") from error
        self.printed = heard.getvalue()


def commands(text: str) -> list[str]:
    """Return the commands of a block, continued lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


@contextlib.contextmanager
def own_modules(folder: Path) -> Iterator[None]:
    """Forget the modules of a page's folder afterwards: another page's may have their names."""
    before = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = before
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]


def _run(command: str, fails: bool) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "flowerbed":
        try:
            code = cli.main(words[1:])
        except SystemExit as asked:
            code = int(asked.code or 0)
    else:
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        print(done.stdout, done.stderr)
        code = done.returncode
    if bool(code) != fails:
        raise PageError(f"'{command}' exited with {code}")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _plain(text: str) -> str:
    return " ".join(re.sub(r"\d+(?:\.\d+)?(?:e-?\d+)?", "N", text).split())


def _pattern(text: str) -> str:
    return ".*".join(re.escape(part.strip()) for part in re.split(r"\.\.\.", _plain(text)))
