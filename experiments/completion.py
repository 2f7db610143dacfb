"""Completion in bash, zsh and fish: commands, options, names of everything that can be chosen, and Hydra's keys.

The shell's side and the protocol are argcomplete's. What there is to complete is asked of the commands and registries
themselves, which takes seconds, since it imports all of them; so it is asked once in the background and kept as JSON
until a file of the package changes or something is installed. A completion reads that file and imports nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowerbed import __version__
from flowerbed.errors import ConfigError

SHELLS = ("bash", "zsh", "fish")
DESCRIPTION = "Print the script that teaches a shell to complete flowerbed."
EPILOG = """\
bash: eval "$(flowerbed completion bash)" in ~/.bashrc
zsh:  eval "$(flowerbed completion zsh)" in ~/.zshrc, after compinit
fish: flowerbed completion fish > ~/.config/fish/completions/flowerbed.fish
Names and keys are there some seconds after the first use.
"""
ASKED = "_ARGCOMPLETE"
"""The variable in which a shell asks for completions."""
PATIENCE = 120.0
"""Seconds after which a collection that has not ended is taken for dead."""
SETTINGS, PAPERS, FOLDERS, STRATEGIES = "settings", "papers", "folders", "strategies"
ROOMS = ("server", "clients", "strategies", "models", "datasets", "experiments")
Found = dict[str, Any]
"""What ``collect`` returns: ``commands``, ``groups``, ``options`` and ``papers``."""


def main(arguments: Sequence[str], as_json: bool = False) -> int:
    """Print the script of the shell that ``arguments`` names; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="flowerbed completion",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS)
    asked = parser.parse_args(list(arguments))
    try:
        from argcomplete.shell_integration import shellcode
    except ImportError as error:
        raise ConfigError("completion needs argcomplete: pip install 'flowerbed[simulation]'.") from error
    if kept() is None:
        collect_in_background()
    script = shellcode(["flowerbed"], shell=asked.shell)
    print(json.dumps({"shell": asked.shell, "script": script}) if as_json else script)
    return 0


def answer(commands: argparse.ArgumentParser) -> None:
    """Answer the shell that asks, and end the process; ``commands`` is the parser of the command line."""
    try:
        import argcomplete
    except ImportError:
        sys.exit(1)
    found = kept()
    if found is None:
        collect_in_background()
        found = {"commands": {name: {"help": text} for name, text in helps(commands).items()}}
    line = os.environ.get("COMP_LINE", "")
    argcomplete.autocomplete(parser_for(found, line), always_complete_options=False, validator=_fits)


def _fits(candidate: str, prefix: str) -> bool:
    return candidate.startswith(prefix)


def parser_for(found: Found, line: str) -> argparse.ArgumentParser:
    """Return a parser that only completes, as far as it matters for ``line``: the command in it, whole."""
    parser = argparse.ArgumentParser(prog="flowerbed", add_help=False)
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers()
    words = line.split()
    chosen = words[1] if len(words) > 1 else ""
    for name, about in found["commands"].items():
        command = commands.add_parser(name, help=about.get("help"), add_help=False)
        if name == chosen:
            _fill(command, about, found, line)
    return parser


def _fill(parser: argparse.ArgumentParser, about: Found, found: Found, line: str) -> None:
    if "benchmarks" in about:
        benchmarks = parser.add_subparsers()
        for name, further in about["benchmarks"].items():
            _fill(benchmarks.add_parser(name, add_help=False), further, found, line)
        return
    for one in about.get("arguments", ()):
        names = one["options"] or [one["dest"]]
        if one["flag"]:
            parser.add_argument(*names, action="store_true", help=one["help"])
            continue
        nargs = one["nargs"] if one["options"] or one["nargs"] in ("*", "+", "?") else None
        action: Any = parser.add_argument(*names, nargs=nargs, help=one["help"], choices=one["choices"])
        if one["choices"] is None:
            action.completer = _completer(one["of"], found, line)
    if not any("--help" in one["options"] for one in about.get("arguments", ())):
        parser.add_argument("--help", action="store_true")
    if not any("--json" in one["options"] for one in about.get("arguments", ())):
        parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _completer(kinds: Sequence[str], found: Found, line: str) -> Callable[..., Iterable[str]]:
    def candidates(prefix: str, **more: Any) -> list[str]:
        made: list[str] = []
        if SETTINGS in kinds:
            made += settings(prefix, found, line)
        if PAPERS in kinds and "=" not in prefix:
            made += found.get("papers", [])
        if STRATEGIES in kinds:
            made += found.get("groups", {}).get("strategy", [])
        if FOLDERS in kinds and "=" not in prefix:
            from argcomplete.completers import DirectoriesCompleter

            made += DirectoriesCompleter()(prefix)
        return [text for text in made if text.startswith(prefix)]

    return candidates


def settings(prefix: str, found: Found, line: str) -> list[str]:
    """Return the settings that go on from ``prefix``: groups and sections, then keys, then values.

    What the line has chosen already decides which options there are: ``strategy=fedprox`` offers ``strategy.mu``.
    """
    groups, options = found.get("groups", {}), found.get("options", {})
    key, equals, value = prefix.partition("=")
    if equals:
        if key in groups:
            # Of several values, as in a sweep, the last is the one that is written.
            before, comma, _ = value.rpartition(",")
            return [f"{key}={before}{comma}{name}" for name in groups[key]]
        return [f"{key}={text}" for text in _keys(found, line).get(key, ())]
    if "." in prefix:
        return [f"{name}=" for name in _keys(found, line)]
    sections = {f"{name.split('.')[0]}." for name in options.get("", {}) if "." in name}
    alone = [f"{name}=" for name in options.get("", {}) if "." not in name]
    chosen = {f"{group}." for group in groups if any(k.startswith(f"{group}.") for k in _keys(found, line))}
    return [*(f"{name}=" for name in groups), *sorted(sections | chosen), *alone]


def _keys(found: Found, line: str) -> dict[str, list[str]]:
    """Return every key with the values to offer, those of what the line has chosen included."""
    options = found.get("options", {})
    keys = dict(options.get("", {}))
    chosen = dict(re.findall(r"(?:^|\s)([a-z]+)=([^\s,=]+)(?=\s)", line))
    for kind, default in found.get("defaults", {}).items():
        for option, values in options.get(f"{kind}={chosen.get(kind, default)}", {}).items():
            keys[f"{kind}.{option}"] = values
    return keys


# Collecting.


def collect() -> Found:
    """Ask every command for its options, and every registry for its names; imports all of them."""
    from flowerbed.experiments import cli

    found: Found = {"commands": {}}
    for name, text in helps(cli._parser()).items():
        about: Found = {"help": text}
        if name == "bench":
            about["benchmarks"] = {one: {"arguments": _arguments([name, one], "")} for one in cli.BENCHMARKS}
        else:
            about["arguments"] = _arguments([name], text)
        found["commands"][name] = about
    return found | _settings()


def helps(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return the commands with their one line of help."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return {one.dest: one.help or "" for one in action._choices_actions}
    return {}


class _Caught(BaseException):
    """Carries a parser out of the command that was about to use it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def parser_of(words: Sequence[str]) -> argparse.ArgumentParser | None:
    """Return the parser that a command reads its arguments with; None if it has none.

    A command is asked for its help, and stopped when it begins to parse; what does not parse only prints.
    """
    from flowerbed.experiments import cli

    def caught(self: argparse.ArgumentParser, *arguments: Any, **more: Any) -> Any:
        raise _Caught(self)

    before = argparse.ArgumentParser.parse_known_args
    argparse.ArgumentParser.parse_known_args = caught  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            cli.main([*words, "--help"])
    except _Caught as one:
        for action in one.parser._actions:
            if isinstance(action, argparse._SubParsersAction) and words[0] in action.choices:
                return action.choices[words[0]]  # type: ignore[no-any-return]
        return one.parser
    except SystemExit:
        pass
    finally:
        argparse.ArgumentParser.parse_known_args = before  # type: ignore[method-assign]
    return None


def _arguments(words: Sequence[str], text: str) -> list[Found]:
    parser = parser_of(words)
    described = (
        [] if parser is None else [_argument(a) for a in parser._actions if a.help != argparse.SUPPRESS]
    )
    if not any(not one["options"] for one in described) and "KEY=VALUE" in text:
        described.append({"options": [], "dest": SETTINGS, "nargs": "*", "choices": None, "flag": False,
                          "help": "", "of": [SETTINGS]})  # fmt: skip
    return described


def _argument(action: argparse.Action) -> Found:
    metavar = str(action.metavar or "")
    of = [SETTINGS] if "KEY=VALUE" in metavar or action.dest == "overrides" else []
    of += [PAPERS] if "SLUG" in metavar else []
    of += [STRATEGIES] if metavar == "STRATEGY" else []
    of += [FOLDERS] if action.type is Path or "RUN" in metavar or "DIR" in metavar else []
    text = action.help if isinstance(action.help, str) else ""
    with contextlib.suppress(TypeError, ValueError, KeyError):
        text = text % {**vars(action), "prog": "flowerbed"}
    return {
        "options": list(action.option_strings),
        "dest": action.dest,
        "nargs": action.nargs if isinstance(action.nargs, str | int) else None,
        "choices": None if action.choices is None else [str(choice) for choice in action.choices],
        "flag": bool(action.option_strings) and action.nargs == 0,
        "help": text,
        "of": of,
    }


def _settings() -> Found:
    from flowerbed.experiments.config import CHOICES, SECTIONS, Simulation
    from flowerbed.experiments.hydra_schema import CONF, NAMED
    from flowerbed.experiments.listing import shown, things
    from flowerbed.experiments.options import REQUIRED, Option, options_of
    from flowerbed.experiments.reproduction.paper import built
    from flowerbed.experiments.usage import EXPERIMENT
    from flowerbed.strategies.attacks.presets import ATTACKS

    def offered(option: Option) -> list[str]:
        if option.type is bool or isinstance(option.default, bool):
            return ["true", "false"]
        return [] if option.default is REQUIRED else [shown(option.default)]

    described = {kind: things(kind) for kind in CHOICES}
    groups = {kind: [thing.name for thing in found] for kind, found in described.items()}
    groups |= {
        name: sorted(path.stem for path in (CONF / name).glob("*.yaml")) for name in (*NAMED, EXPERIMENT)
    }
    groups["attack"] = sorted(ATTACKS)
    options = {
        f"{kind}={thing.name}": {o.name: offered(o) for o in thing.options if o.name not in thing.preset}
        for kind, found in described.items()
        for thing in found
    }
    options[""] = {"seed": ["0"]} | {
        f"{section}.{o.name}": offered(o)
        for section, cls in SECTIONS.items()
        for o in options_of(cls)[0]
        if not (section in NAMED and o.name == "name")
    }
    defaults = {kind: getattr(Simulation(), kind).name for kind in CHOICES}
    return {"groups": groups, "options": options, "defaults": defaults, "papers": built()}


# Keeping.


def kept() -> Found | None:
    """Return what was collected of this very state of the package; None if nothing was."""
    try:
        found: Found = json.loads(place().read_bytes())
    except (OSError, ValueError):
        return None
    return found


def place() -> Path:
    """Return the file for this state of the package and of what is installed beside it."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowerbed"
    about = [__version__, sys.executable, *map(str, _stamps())]
    return folder / f"completion-{hashlib.sha256(' '.join(about).encode()).hexdigest()[:16]}.json"


def _stamps() -> Iterator[int]:
    """Yield the times of the package's newest file, of each room's number of files, and of the installed packages."""
    package = Path(__file__).resolve().parents[1]
    package = package if (package / "experiments").is_dir() else Path(__file__).parents[1]
    newest = files = 0
    waiting = [str(package / room) for room in ROOMS]
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as items:
            for item in items:
                if item.is_dir(follow_symlinks=False):
                    waiting += [item.path] if not item.name.startswith(("_", ".")) else []
                elif item.name.endswith((".py", ".yaml")):
                    files += 1
                    newest = max(newest, item.stat(follow_symlinks=False).st_mtime_ns)
    yield from (newest, files)
    with contextlib.suppress(OSError):
        yield os.stat(sysconfig.get_paths()["purelib"]).st_mtime_ns


def collect_in_background() -> None:
    """Start collecting in a process of its own, unless one is at it; a shell must not wait for it."""
    path = place()
    lock = path.with_suffix(".lock")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if time.time() - lock.stat().st_mtime > PATIENCE:
                lock.unlink()
        os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith((ASKED, "COMP_"))
        }
        subprocess.Popen(
            [sys.executable, "-m", "flowerbed.experiments.completion"],
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


def keep(found: Mapping[str, Any]) -> Path:
    """Keep what was collected in the place of what was collected before; returns the file."""
    path = place()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not storage.atomic_write: that imports torch.
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(found))
    for old in path.parent.glob("completion-*.json"):
        old.unlink(missing_ok=True)
    part.replace(path)
    path.with_suffix(".lock").unlink(missing_ok=True)
    return path


if __name__ == "__main__":
    with contextlib.suppress(OSError):
        os.nice(10)
    keep(collect())
